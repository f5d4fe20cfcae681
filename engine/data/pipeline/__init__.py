"""The steps between raw input and a corpus: a job, its work folder, shards made by a team, and their merge."""

from __future__ import annotations

from engine.data.pipeline.settings import DEFAULT_SEED, Counts, Settings

__all__ = ["DEFAULT_SEED", "Counts", "Settings"]

"""From raw text to batches: readers, tokens on disk (.bin/.idx), and samples as a function of (seed, corpus, k)."""

from __future__ import annotations

from engine.data.samples import Samples, open_samples

__all__ = ["Samples", "open_samples"]

"""Ranks that were started for different runs are told so: together they would train a run that nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from engine.config import RunConfig, to_dict
from engine.data.fingerprint import Fingerprint
from engine.errors import UserError, shown

KEY = "run"
"""The store's key for what rank 0 was asked for."""
PLACES = ("out", "load", "data", "valid_data", "tokenizer")
"""Paths: a machine may have the same files elsewhere. What the data hold is compared, and so is a shared --out when it
is written."""


def refuse_another_run(config: RunConfig, data: Fingerprint, rank: int, world: int, store: dist.Store,
                       start: Mapping[str, Any] | None = None) -> None:
    """Returns when all ranks were asked for the same run. Raises UserError, with the first flag that differs, on a rank
    that was asked for another run than rank 0. `start` is `Start.content`: what the weights are taken from.

    By the store, before the process group: ranks of different layouts do not even build the same groups."""
    mine = json.dumps({"flags": _flags(config), "data": [_content(one) for one in data], "start": start or {}})
    if rank == 0:
        store.set(KEY, mine)
        others = [f"{KEY}/{other}" for other in range(1, world)]
        if others:
            store.wait(others)  # nothing is written before all are known to mean the same
        return
    theirs, own = json.loads(store.get(KEY)), json.loads(mine)
    for name, value in own["flags"].items():
        other = theirs["flags"].get(name)
        if value != other:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"rank {rank} was started with {flag} {shown(value, 80)}, and rank 0 with {flag} "
                            f"{shown(other, 80)}; start every rank of a run with the same flags, and another run at "
                            "another MASTER_PORT")
    if own["data"] != theirs["data"]:
        raise UserError(f"rank {rank} reads other data than rank 0: {shown(own['data'], 300)}, not "
                        f"{shown(theirs['data'], 300)}; bring the same files to every machine")
    if own["start"] != theirs["start"]:
        raise UserError(f"rank {rank} would start from {_named(own['start'])}, and rank 0 from "
                        f"{_named(theirs['start'])}, and these are not the same; give --load a folder that no run "
                        "writes, such as one step's, with the same files on every machine")
    store.set(f"{KEY}/{rank}", "")


def _named(start: Mapping[str, Any]) -> str:
    """What a rank starts from, in a few words."""
    if not start:
        return "new weights"
    return f"a checkpoint of step {start['step']}" if "step" in start else "a Hugging Face folder"


def _flags(config: RunConfig) -> dict[str, Any]:
    """Every leaf of a config but for the places."""
    groups = to_dict(config).values()
    return {name: value for group in groups for name, value in group.items() if name not in PLACES}


def _content(one: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus or a file is, wherever it lies."""
    return {name: value for name, value in one.items() if name != "path"}

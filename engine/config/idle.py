"""Flags that would do nothing: what a user writes and a run does not read is an error, never silence.

What a --config file or a recipe says is not judged here: a run folder's config.yaml has every field, and tuning or
verification may start from it. It is left out where an entry point does not read it, and the run says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.config.schema import RunConfig
from engine.errors import UserError, shown


@dataclass(frozen=True)
class Idle:
    """Fields that a run does not read where `when` holds."""

    names: tuple[str, ...]
    when: Callable[[RunConfig], bool]
    why: str


IDLE = (
    Idle(("split",), lambda c: bool(c.data.valid_data),
         "--valid-data is given, so nothing of --data is held back; leave one of them out"),
    Idle(("eval_every", "eval_samples"), lambda c: not c.data.valid_data and not c.data.split,
         "nothing is held back to evaluate; give --valid-data or --split"),
    Idle(("save_every", "save_wait", "keep"), lambda c: not c.save.out, "nothing is saved without --out"),
    Idle(("save_wait",), lambda c: not c.save.save_every, "without --save-every only the last step is saved, and that "
                                                          "is waited for anyway"),
    Idle(("new_data",), lambda c: not c.save.resume, "it goes with --resume; a new run takes any data"),
    Idle(("min_lr",), lambda c: c.optimizer.decay == "constant", "--decay constant never goes down to it"),
    Idle(("init_std",), lambda c: bool(c.save.load), "the weights are those of --load, and none is drawn"),
)


def refuse_unread(flags: Mapping[str, Any], unread: Mapping[str, str]) -> None:
    """Raises UserError for a flag that an entry point does not read; `unread` says why."""
    for name in flags:
        if name in unread:
            raise UserError(f"--{name.replace('_', '-')}: {unread[name]}; leave the flag out")


def refuse_idle(flags: Mapping[str, Any], config: RunConfig) -> None:
    """Raises UserError for a flag that does nothing beside the others; `flags` are the command line's own."""
    usual = default_values()
    for idle in IDLE:
        for name in idle.names:
            if name in flags and flags[name] != usual[name] and idle.when(config):
                raise UserError(f"--{name.replace('_', '-')} {shown(flags[name], 80)}: {idle.why}")


def drop_unread(values: Mapping[str, Any], unread: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The values without those that an entry point does not read, and the names of those dropped that say more than
    the default."""
    usual = default_values()
    kept = {name: value for name, value in values.items() if name not in unread}
    return kept, [name for name, value in values.items() if name in unread and value != usual[name]]


def default_values() -> dict[str, Any]:
    """Every field by its name, with the schema's default."""
    config = RunConfig()
    return {item.name: getattr(getattr(config, group.name), item.name)
            for group in fields(RunConfig) for item in fields(getattr(config, group.name))}

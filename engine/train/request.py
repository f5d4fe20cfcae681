"""What a start asks for: an entry point, its command line and its recipe, read but not yet judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config import RunConfig
from engine.config.flags import Values, parse_given, parse_values
from engine.config.idle import drop_unread, refuse_unread
from engine.data.fingerprint import Fingerprint
from engine.errors import UserError, shown


@dataclass(frozen=True)
class EntryPoint:
    """What pretraining, tuning and verification differ in: the module's name, what it changes of the defaults, the
    fields it does not read (with the reason), how it looks at its data, and whether it starts from a trained model."""

    name: str
    unread: Mapping[str, str]
    check_data: Callable[[RunConfig], Fingerprint]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loads: bool = False


@dataclass(frozen=True)
class Switches:
    """What a command line asks for besides a config."""

    help: bool = False
    check: bool = False
    dry_run: bool = False
    world_size: int | None = None


@dataclass(frozen=True)
class Request:
    """`flags` are the command line's own, `given` are they over its --config, `under` is what lies beneath: the
    recipe's values over the entry point's defaults, with `demo` among them, the data of a recipe without any. `notes`
    are lines for the start-up report."""

    entry: EntryPoint
    switches: Switches
    flags: Values
    given: Values
    under: Values
    demo: Values = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_request(entry: EntryPoint, argv: Sequence[str], recipe: Sequence[str] = (),
                 demo: Sequence[str] = ()) -> Request:
    """Reads a command line over a recipe's flags. `demo` are the recipe's data, for whoever brings none. Raises
    UserError for what cannot be read, and for a flag of `argv` that the entry point does not read; a --config file may
    hold such values (it may be another entry point's config.yaml): they are left out, and a note names them."""
    switches, words = take_switches(argv)
    if switches.world_size and not (switches.check or switches.dry_run):
        raise UserError(f"--world-size {switches.world_size} is for --check and --dry-run; processes are started by "
                        "torchrun --nproc-per-node N")
    said = parse_given(words)
    refuse_unread(said.flags, entry.unread)
    file, dropped = drop_unread(said.file, entry.unread)
    notes = []
    if dropped:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in dropped)
        notes.append(f"of --config, {entry.name} does not read {names}")
    given = _one_length({**file, **said.flags}, said.flags)
    under = {**entry.defaults, **parse_values(recipe)}
    if given.get("epochs"):
        under.pop("steps", None)
    own = "data" in given or said.file  # a config says all that its run needs
    data = {} if own else parse_values(demo)
    if "split" in said.flags:
        data.pop("valid_data", None)
    return Request(entry, switches, said.flags, given, {**under, **data}, data, tuple(notes))


def _one_length(given: Values, flags: Values) -> Values:
    """A run is so many steps or so many epochs long. A flag wins over a file; two of one kind contradict each other."""
    if "steps" not in given or not given.get("epochs"):
        return given
    by_flag = [name for name in ("steps", "epochs") if name in flags]
    if len(by_flag) != 1:
        raise UserError(f"--epochs {given['epochs']:g} and --steps {given['steps']} both say how long the run is; "
                        "leave one of them out")
    dropped = "epochs" if by_flag == ["steps"] else "steps"
    return {name: value for name, value in given.items() if name != dropped}


def take_switches(argv: Sequence[str]) -> tuple[Switches, list[str]]:
    """Splits --help, --check, --dry-run and --world-size N off a command line."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            found["help"] = True
        elif word in ("--check", "--dry-run"):
            found[word[2:].replace("-", "_")] = True
        elif word.split("=")[0] == "--world-size":
            text = word.partition("=")[2] or (words.pop(0) if words else "")
            if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < 1:
                raise UserError(f"--world-size {shown(text, 40)!r} is not a number of processes (1 to 999999)")
            found["world_size"] = int(text)
        else:
            rest.append(word)
    return Switches(**found), rest

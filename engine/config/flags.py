"""From YAML and flags to a RunConfig, and back. `--config run.yaml` is read first, then flags; later flags win."""

from __future__ import annotations

import ast
import inspect
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import MappingProxyType
from typing import Any

import yaml

from engine.config.foreign import RUN, unknown_option
from engine.config.presets import resolve_model
from engine.config.read_yaml import read_yaml
from engine.config.schema import ModelConfig, RunConfig
from engine.errors import UserError, shown

Values = dict[str, Any]
JOINED = ("data", "valid_data")
"""Flags that may be repeated (in YAML: a list), for they name several files: their values are joined by commas."""

ONCE_BOOL = MappingProxyType({"recompute": {True: "full", False: "none"}})
"""Fields that once were true or false: what the two mean now, in old files, and as `--recompute`, `--no-recompute`."""
BOOLS = MappingProxyType({"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False,
                          "on": True, "off": False})


@dataclass(frozen=True)
class Leaf:
    """One field of one group: `parallel.tp`, its type, and whether it may be null."""

    group: str
    name: str
    type: type
    optional: bool

    @property
    def switch(self) -> bool:
        """Whether the flag may stand alone, or with `no-` before it."""
        return self.type is bool or self.name in ONCE_BOOL


@dataclass(frozen=True)
class Given:
    """What a command line says: `flags` by itself, `file` by its --config."""

    flags: Values
    file: Values

    @property
    def values(self) -> Values:
        """Both; flags win."""
        return {**self.file, **self.flags}


def _leaves() -> dict[str, Leaf]:
    """Every leaf by its name; a name in two groups is a mistake of ours, found by the first test that runs."""
    found: dict[str, Leaf] = {}
    for group in fields(RunConfig):
        kind = typing.get_type_hints(RunConfig)[group.name]
        for name, hint in typing.get_type_hints(kind).items():
            arguments = [a for a in typing.get_args(hint) if a is not types.NoneType]
            if name in found:
                raise AssertionError(f"two fields named {name}")
            found[name] = Leaf(group.name, name, arguments[0] if arguments else hint, bool(arguments))
    return found


def _leaf(key: str, leaves: Mapping[str, Leaf]) -> Leaf:
    """The leaf that `tp`, `virtual-stages` or `parallel.tp` names."""
    group, _, name = key.replace("-", "_").rpartition(".")
    leaf = leaves.get(name)
    if leaf is None or group not in ("", leaf.group):
        raise UserError(unknown_option(key, name, leaves, RUN))
    return leaf


def _convert(leaf: Leaf, value: Any) -> Any:
    """`value` (a flag's text or what YAML made of it) as the leaf's type; `1e-4` is a float whatever YAML thinks."""
    flag = "--" + leaf.name.replace("_", "-")
    if value is None or (leaf.optional and value in ("none", "null")):
        if leaf.optional:
            return None
        raise UserError(f"{flag} needs a value")
    said = BOOLS.get(str(value).lower())
    if leaf.type is bool:
        if said is None:
            raise UserError(f"{flag} {shown(value, 80)!r} is not true or false")
        return said
    if leaf.name in ONCE_BOOL and said is not None:
        return ONCE_BOOL[leaf.name][said]
    if leaf.name in JOINED and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, (bool, list, dict)):
        raise UserError(f"{flag} must be a {leaf.type.__name__}, not a {type(value).__name__}")
    if leaf.type is str:
        if "\0" in str(value):
            raise UserError(f"{flag} {shown(value, 80)!r} has a NUL character in it")
        return str(value)
    text = str(value).replace("_", "")
    if leaf.type is int and re.fullmatch(r"[+-]?[0-9]{1,40}", text):
        return int(text)  # not through a float, which keeps 53 bits of a seed
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"{flag} {shown(value, 80)!r} is not a number") from None
    if not math.isfinite(number):
        raise UserError(f"{flag} {shown(value, 80)!r} is not a finite number")
    if leaf.type is int:
        if number != int(number):
            raise UserError(f"{flag} {shown(value, 80)!r} is not a whole number")
        return int(number)
    return number


def _from_yaml(path: str, leaves: Mapping[str, Leaf]) -> Values:
    """The leaves of a YAML file: `tp: 2`, `parallel: {tp: 2}` and `model: 7b` are all understood."""
    groups = {leaf.group for leaf in leaves.values()}
    found: Values = {}

    def put(key: str, value: Any) -> None:
        leaf = _leaf(key, leaves)
        if leaf.name in found:
            raise UserError(f"--config {shown(path)} says {leaf.name} twice, again as {shown(key, 80)}; keep one")
        found[leaf.name] = _convert(leaf, value)

    for key, value in read_yaml(path).items():
        if key in groups and isinstance(value, dict):
            for name, inner in value.items():
                put(f"{key}.{name}", inner)
        else:
            put(key, value)
    return found


def _from_flags(argv: Sequence[str], leaves: Mapping[str, Leaf]) -> tuple[Values, list[str]]:
    """The leaves of `--tp 2`, `--tp=2`, `--resume`, `--no-resume`, and the files of `--config`."""
    found: Values = {}
    configs: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected argument {shown(word, 80)!r}; options look like --tp 2")
        key, equals, value = word[2:].partition("=")
        if key == "config":
            configs.append(value if equals else _next_value(key, words))
            continue
        negated = key.startswith("no-") and key[3:].replace("-", "_") in leaves
        leaf = _leaf(key[3:] if negated else key, leaves)
        if negated and (equals or not leaf.switch):  # --no-recompute=1 says both, and would be taken for one
            raise UserError(f"--{key} takes no value" if leaf.switch else unknown_option(key, key, leaves, RUN))
        if leaf.switch and not equals and (negated or _alone(leaf, words)):
            found[leaf.name] = _convert(leaf, not negated)
        else:
            converted = _convert(leaf, value if equals else _next_value(key, words))
            if converted == "":  # most often an unset variable of a shell: `--load "$MODEL"` would train from nothing
                raise UserError(f"--{key} is empty; give a value, or leave the flag out")
            earlier = found.get(leaf.name) if leaf.name in JOINED else None
            found[leaf.name] = f"{earlier},{converted}" if earlier else converted
    return found, configs


def _alone(leaf: Leaf, words: Sequence[str]) -> bool:
    """Whether a flag that may stand alone does so, by the words after it."""
    if leaf.type is bool:
        return not words or words[0].lower() not in ("true", "false")
    return not words or words[0].startswith("--")


def _next_value(key: str, words: list[str]) -> str:
    """Takes the value that follows `--key`; a following option is not a value, a negative number is."""
    if not words or (words[0].startswith("--") and len(words[0]) > 2):
        raise UserError(f"--{shown(key, 80)} needs a value")
    return words.pop(0)


def parse_given(argv: Sequence[str]) -> Given:
    """What flags say and what YAML says, apart; of several --config files the later win."""
    leaves = _leaves()
    flags, configs = _from_flags(argv, leaves)
    file: Values = {}
    for config in configs:
        file |= _from_yaml(config, leaves)
    return Given(flags, file)


def parse_values(argv: Sequence[str]) -> Values:
    """What YAML and flags say, and nothing else: leaf name -> value."""
    return parse_given(argv).values


def parse(argv: Sequence[str], base: ModelConfig | None = None, defaults: Mapping[str, Any] | None = None) -> RunConfig:
    """The RunConfig of a command line. `base` is a loaded checkpoint's model; `defaults` are an entry point's own."""
    return build({**(defaults or {}), **parse_values(argv)}, base)


def build(values: Mapping[str, Any], base: ModelConfig | None = None) -> RunConfig:
    """The RunConfig of leaf values; the model group goes through its preset."""
    leaves = _leaves()
    groups: dict[str, Any] = {}
    for group, kind in typing.get_type_hints(RunConfig).items():
        given = {n: v for n, v in values.items() if leaves[n].group == group}
        groups[group] = resolve_model(given, base) if kind is ModelConfig else kind(**given)
    return RunConfig(**groups)


def from_dict(content: Mapping[str, Any]) -> RunConfig:
    """The RunConfig that `to_dict` wrote; unknown and ill-typed keys raise UserError."""
    leaves = _leaves()
    values: Values = {}
    groups = {leaf.group for leaf in leaves.values()}
    for group, inner in content.items():
        if group not in groups:
            raise UserError(f"config: there is no group {shown(group, 80)!r}")
        if not isinstance(inner, dict):
            raise UserError(f"config: {group} must be a group of fields, not {shown(inner, 80)!r}")
        for name, value in inner.items():
            leaf = _leaf(f"{group}.{name}", leaves)
            values[leaf.name] = _convert(leaf, value)
    return build(values)


def unknown_fields(content: Mapping[str, Any]) -> list[str]:
    """The groups and fields (`group.field`) of a `to_dict` that this Triax does not have."""
    leaves = _leaves()
    known = {leaf.group: {name for name in leaves if leaves[name].group == leaf.group} for leaf in leaves.values()}
    found = [group for group in content if group not in known]
    return found + [f"{group}.{name}" for group, inner in content.items() if group in known and isinstance(inner, dict)
                    for name in inner if name not in known[group]]


def to_dict(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The resolved config as nested plain values."""
    return asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as a YAML file that `--config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe(without: Collection[str] = ()) -> str:
    """Every flag with its default and help text, grouped as in the schema; `without` are fields left out."""
    lines = ["options (--config FILE.yaml is read first, later flags win):"]
    defaults = build({})  # not the fields' own: the model's come from its preset
    for group in fields(RunConfig):
        kind = typing.get_type_hints(RunConfig)[group.name]
        lines.append(f"\n{group.name}: {inspect.cleandoc(kind.__doc__ or '').splitlines()[0]}")
        help_of = _field_docs(kind)
        for item in fields(kind):
            if item.name in without:
                continue
            value = getattr(getattr(defaults, group.name), item.name)
            default = "" if value in ("", None) else f" [{value}]"
            lines.append(f"  --{item.name.replace('_', '-'):<19} {help_of.get(item.name, '')}{default}")
    return "\n".join(lines)


def _field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, read from its source."""
    assert is_dataclass(kind)
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(kind)).body[0]).body
    docs = {}
    for item, after in zip(body, body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
            docs[item.target.id] = str(ast.literal_eval(after.value))
    return docs

"""A run's YAML file as keys and texts. Every scalar stays the text that stands in the file, so that `010`, `1:30` and
`1e-4` mean the same as on the command line; nothing is constructed, so no tag can run anything."""

from __future__ import annotations

import sys
from typing import Any

import yaml

from engine.errors import UserError, shown
from engine.signature import HEAD_BYTES, refuse_pointer_text

MOST_BYTES = 1 << 20
"""A run's config has some hundred lines; what is longer is another file, or a device that never ends."""
DEEPEST = 8
TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in
                 ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value"))


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a file (`-` is standard input): texts, None for a plain null, lists and nested mappings. Raises
    UserError for what is no YAML, repeats a key, has aliases or foreign tags, or is larger than `MOST_BYTES`."""
    name = f"--config {shown(path)}"
    text = _text(path, name)
    try:
        _refuse_bombs(name, text)
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not YAML: {shown(' '.join(str(error).split()))}") from None
    content = None if root is None else _plain(name, root)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold key: value lines, not a {type(content).__name__}")
    return content


def _text(path: str, name: str) -> str:
    if not path:
        raise UserError("--config is empty; give a YAML file, or - for standard input")
    try:
        if path == "-":
            content = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with open(path, "rb") as file:
                content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{name} is larger than {MOST_BYTES >> 20} MiB, which no run's config is; give a YAML file")
    if path == "-" and not content.strip():
        # Most often another process, or an earlier one, has read it: a run without its config would be another run.
        raise UserError(f"{name}: standard input is empty; it is read once, by one process. Give a file")
    refuse_pointer_text(name, content[:HEAD_BYTES])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not YAML: it is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _refuse_bombs(name: str, text: str) -> None:
    """Raises UserError for YAML that is small as text and has no bound as values: aliases of aliases, deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{name} has YAML aliases (*name), which a run's config does not use; write the values out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UserError(f"{name} is nested too deeply for a run's config")


def _plain(name: str, node: yaml.Node) -> Any:
    """A node as dict, list, text or None."""
    line = node.start_mark.line + 1
    if node.tag not in TAGS:
        raise UserError(f"{name} is not YAML of a run's config: line {line} has the tag {shown(node.tag, 80)}")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(name, item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{name} is not YAML of a run's config: the key in line {key.start_mark.line + 1} is "
                                "not a word")
            if key.value in found:
                raise UserError(f"{name} has {shown(key.value, 80)!r} twice, again in line {key.start_mark.line + 1}; "
                                "join the two")
            found[key.value] = _plain(name, value)
        return found
    plain = isinstance(node, yaml.ScalarNode) and node.style is None  # 'null' in quotes is a word
    return None if plain and node.tag.endswith(":null") else node.value

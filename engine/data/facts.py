"""PREFIX.json: how a corpus was made, and what its files are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from engine.data.checksum import FileSums, sum_of_json
from engine.errors import UserError
from engine.signature import refuse_pointer

Facts = dict[str, Any]


def facts_path(prefix: str | Path) -> Path:
    """Where they lie."""
    return Path(f"{prefix}.json")


def write_facts(file: IO[str], info: Mapping[str, Any], sums: Mapping[str, FileSums]) -> None:
    """Writes what `info` tells, the checksums of the corpus' files ("bin", "idx"), and a checksum of all that."""
    body = {**info, "files": {name: one.as_json() for name, one in sums.items()}}
    json.dump({**body, "crc32": sum_of_json(body)}, file, ensure_ascii=False, indent=2)
    file.write("\n")


def read_facts(prefix: str | Path) -> Facts | None:
    """PREFIX.json; None where there is none (Megatron-LM writes none). Raises UserError when it is of no use."""
    path = facts_path(prefix)
    try:
        refuse_pointer(path)
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != "triax-corpus":
            raise ValueError('it has no "format": "triax-corpus"')
        _check_whole(facts)
        _check_facts(facts)
        return facts
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not tell how the corpus was made: {error}") from None


def file_sums(facts: Facts | None) -> dict[str, FileSums] | None:
    """The checksums of .bin and .idx, by "bin" and "idx"; None where nothing tells them: Megatron-LM never does, nor
    did Triax at first."""
    if facts is None or "files" not in facts:
        return None
    return {name: FileSums.from_json(facts["files"][name]) for name in ("bin", "idx")}


def why_unproven(prefix: str | Path, facts: Facts | None) -> str:
    """Why nothing proves the bytes of a corpus that has no checksums."""
    path = facts_path(prefix)
    return f"{path} is not there" if facts is None else f"{path} is of a time when Triax kept no checksums"


def _check_whole(facts: Facts) -> None:
    """Raises ValueError where the facts are not those that were written."""
    body = {name: value for name, value in facts.items() if name != "crc32"}
    if "crc32" in facts and facts["crc32"] != sum_of_json(body):
        raise ValueError('it does not match its own "crc32": it is damaged, or was changed by hand')
    if "crc32" not in facts and "files" in facts:
        raise ValueError('it has "files" and no "crc32" of its own')


def _check_facts(facts: Facts) -> None:
    """Raises ValueError for what nobody can work with."""
    for name, needed in (("tokenizer", ("vocab_size",)), ("counts", ("documents", "tokens"))):
        part = facts.get(name)
        if not isinstance(part, dict):
            raise ValueError(f'it has no "{name}"')
        for key in needed:
            if not isinstance(part.get(key), int):
                raise ValueError(f'"{name}" has no number "{key}"')
    if not isinstance(facts["counts"].get("text_bytes", 0), int):
        raise ValueError('"text_bytes" is no number')
    inputs = facts.get("inputs") or []
    whole = isinstance(inputs, list) and all(isinstance(one, dict) for one in inputs)
    if not whole or not all(isinstance(one.get("size"), int) for one in inputs):
        raise ValueError('"inputs" is no list of files with their sizes')
    if "files" in facts:
        if not isinstance(facts["files"], dict) or not {"bin", "idx"} <= facts["files"].keys():
            raise ValueError('"files" does not tell of bin and idx')
        file_sums(facts)

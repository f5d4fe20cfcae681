"""Whether the bytes of a run's corpora are those that were written: read through, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.data.blend import parse_spec
from engine.data.checksum import FileSums
from engine.data.facts import file_sums, read_facts, why_unproven
from engine.data.indexed import with_suffix


class Proof:
    """The files of corpora with the checksums their .json files hold.

    total: bytes to read; unproven: for each corpus without checksums, why nothing proves its bytes."""

    def __init__(self, specs: Sequence[str]) -> None:
        """specs: "PREFIX", or a blend "P1:0.7,P2:0.3". A corpus of several specs is read once.

        Raises UserError where a .json is of no use."""
        self._files: dict[Path, FileSums] = {}
        self.unproven: list[str] = []
        for prefix in dict.fromkeys(prefix for spec in specs for prefix, _ in parse_spec(spec)):
            facts = read_facts(prefix)
            sums = file_sums(facts)
            if sums is None:
                self.unproven.append(f"nothing proves the bytes of {prefix}: {why_unproven(prefix, facts)}")
            else:
                self._files |= {with_suffix(prefix, f".{name}"): one for name, one in sums.items()}
        self.total = sum(sums.size for sums in self._files.values())

    def blocks(self) -> Iterator[int]:
        """Reads everything; gives the bytes of each block once they match. Raises UserError where they do not."""
        for path, sums in self._files.items():
            for block in sums.read(path):
                yield len(block)

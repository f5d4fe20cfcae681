"""Every flipped bit of a corpus is found: in .bin, .idx and .json, by the tool, by a merge, and before training."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import checksum
from engine.data.checksum import FileSums, Summing
from engine.data.combine import combine
from engine.data.facts import file_sums, read_facts
from engine.data.indexed import IndexedWriter
from engine.data.overview import overview, verify
from engine.data.preprocess import Settings, prepare
from engine.errors import UserError

SUFFIXES = (".bin", ".idx", ".json")
TEXTS = [f"document {n}: " + "the cat sat on the mat. " * (n % 7 + 1) for n in range(500)]
FACTS = {"format": "triax-corpus", "version": 1, "tokenizer": {"hash": "abc", "vocab_size": 101}, "eod_id": 2}


def write(prefix: Path, seed: int = 0, facts: dict[str, Any] | None = FACTS) -> str:
    """60 documents of 50 tokens of a vocabulary of 101: most flips of the lower bits stay inside it."""
    ids = np.random.default_rng(seed).integers(0, 101, 3000)
    with IndexedWriter(prefix, 101) as writer:
        writer.add_documents(ids, np.full(60, 50))
        counts = {"documents": 60, "tokens": 3000}
        writer.finish(None if facts is None else {**facts, "counts": counts})
    return str(prefix)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@given(st.binary(max_size=300), st.lists(st.integers(0, 40), max_size=20), st.sampled_from((8, 16, 64)))
def test_sums_do_not_depend_on_the_pieces_that_go_by(content: bytes, pieces: list[int], block: int) -> None:
    summing, at = Summing(block), 0
    for piece in (*pieces, len(content)):
        summing.update(np.frombuffer(content[at : at + piece], np.uint8).data)
        at += piece
    blocks = [content[start : start + block] for start in range(0, len(content), block)]
    found = summing.sums()
    assert found == FileSums(len(content), block, tuple(map(zlib.crc32, blocks)))
    assert FileSums.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_150_random_bit_flips_of_a_prepared_corpus_are_all_found(vocabulary: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare(Settings(inputs=[str(source)], tokenizer=vocabulary, output_prefix=str(tmp_path / "c")), lambda line: None)
    assert "every byte of both files matches" in verify(str(tmp_path / "c"), None)
    whole = {suffix: Path(f"{tmp_path}/c{suffix}").read_bytes() for suffix in SUFFIXES}
    chance = random.Random(0)
    for number in range(150):
        suffix = SUFFIXES[number % 3]
        flip(Path(f"{tmp_path}/c{suffix}"), chance.randrange(len(whole[suffix]) * 8))
        with pytest.raises(UserError, match=r"c\.(bin|idx|json)"):
            verify(str(tmp_path / "c"), None)
        Path(f"{tmp_path}/c{suffix}").write_bytes(whole[suffix])
    assert "every byte of both files matches" in verify(str(tmp_path / "c"), None)


def test_the_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum.Summing.__init__, "__defaults__", (1024,))
    prefix = write(tmp_path / "c")
    flip(tmp_path / "c.bin", 8 * 2500)
    with pytest.raises(UserError, match=r"c\.bin: bytes 2,048 to 3,071 do not match their checksum \(crc32 "):
        verify(prefix, None)
    flip(tmp_path / "c.bin", 8 * 2500)
    with open(tmp_path / "c.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"c\.idx describes bytes 0 to 6000 of .*c\.bin, which has 6002 bytes"):
        verify(prefix, None)


@pytest.mark.parametrize(("change", "message"), [
    ({"files": 5}, '"files" does not tell of bin and idx'),
    ({"files": {"bin": {}, "idx": {}}}, '"files" holds no checksums'),
    ({"files": {"bin": {"bytes": 6000, "block_bytes": 0, "crc32": []}, "idx": {}}}, "holds 0 checksums"),
    ({"files": {"bin": {"bytes": 6000, "block_bytes": 64, "crc32": ["00"]}, "idx": {}}}, "holds 1 checksums"),
])  # fmt: skip
def test_facts_that_vouch_for_nothing_are_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    prefix = write(tmp_path / "c")
    body = {name: value for name, value in json.loads((tmp_path / "c.json").read_text()).items() if name != "crc32"}
    body |= change
    (tmp_path / "c.json").write_text(json.dumps(body | {"crc32": checksum.sum_of_json(body)}))
    with pytest.raises(UserError, match=message):
        verify(prefix, None)


def test_a_changed_json_is_said_to_be_and_one_without_sums_still_works(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c")
    facts = json.loads((tmp_path / "c.json").read_text())
    for change in ({"eod_id": 3}, {"crc32": None}):
        (tmp_path / "c.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match='does not match its own "crc32"'):
            overview(prefix)
    old = {name: value for name, value in facts.items() if name not in ("crc32", "files")}
    (tmp_path / "c.json").write_text(json.dumps(old))
    assert verify(prefix, None).endswith("c.json is of a time when Triax kept no checksums")
    combine([prefix], str(tmp_path / "new"))
    assert verify(str(tmp_path / "new"), None).endswith("every byte of both files matches its checksum")


def test_megatrons_files_still_work_and_are_said_to_be_unproven(shared_data: Path) -> None:
    prefix = str(shared_data / "megatron" / "meg-gpt2-openwebtext_text_document")
    assert f"nothing proves the bytes: {prefix}.json is not there" in verify(prefix, None)


def test_a_merge_does_not_vouch_for_damaged_bytes(tmp_path: Path) -> None:
    """A copy with a checksum of its own would make damage look whole for ever."""
    one, two = write(tmp_path / "one"), write(tmp_path / "two", seed=1)
    combine([one, two], str(tmp_path / "whole"))
    sums = file_sums(read_facts(tmp_path / "whole"))
    assert sums is not None
    assert sums["bin"].crc32 == (zlib.crc32((tmp_path / "whole.bin").read_bytes()),)
    assert sums["idx"].crc32 == (zlib.crc32((tmp_path / "whole.idx").read_bytes()),)
    for suffix, bit in ((".bin", 8000), (".idx", 8 * (34 + 12 * 60 + 8))):
        flip(tmp_path / f"two{suffix}", bit)
        with pytest.raises(UserError, match=rf"two\{suffix}: bytes 0 to .* do not match their checksum"):
            combine([one, two], str(tmp_path / "all"))
        flip(tmp_path / f"two{suffix}", bit)
    assert not list(tmp_path.glob("all*"))


def test_a_damaged_shard_is_made_again_and_never_merged(vocabulary: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "no JSON\n")
    settings = Settings(inputs=[str(source)], tokenizer=vocabulary, output_prefix=str(tmp_path / "c"), workers=1,
                        unit_bytes=10_000)
    with pytest.raises(UserError, match="parts are kept"):
        prepare(settings, lambda line: None)  # the last line's fault; what was read before it stays
    work = tmp_path / "c.work"
    for name, bit in (("0000000.bin", 400), ("0000001.len", 0), ("0000002.json", 200)):
        flip(work / name, bit)
    skipping = Settings(**{**vars(settings), "on_error": "skip"})
    for number in (1, 0):  # lengths are read before tokens
        with pytest.raises(UserError, match=f"000000{number}.* does not match its checksum.*makes that part again"):
            prepare(skipping, lambda line: None)
    prepare(skipping, lambda line: None)
    assert not work.exists()
    prepare(Settings(**{**vars(skipping), "output_prefix": str(tmp_path / "again")}), lambda line: None)
    for suffix in SUFFIXES:
        assert Path(f"{tmp_path}/c{suffix}").read_bytes() == Path(f"{tmp_path}/again{suffix}").read_bytes()

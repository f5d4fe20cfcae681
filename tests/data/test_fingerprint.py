"""What a run was trained on is told by a few numbers, and a difference in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.fingerprint import copies, copy_notes, difference, of_corpora, of_files
from engine.data.indexed import IndexedWriter
from engine.errors import UserError


def write(prefix: Path, tokens: int, seed: int = 0, info: dict[str, Any] | None = None) -> str:
    """A corpus of random tokens, in documents of 50."""
    with IndexedWriter(prefix, 1000) as writer:
        ids = np.random.default_rng(seed).integers(0, 1000, tokens)
        writer.add_documents(ids, np.full(tokens // 50, 50))
        writer.finish(info)
    return str(prefix)


def saved(found: object) -> Any:
    """What comes back from a checkpoint."""
    return json.loads(json.dumps(found))


def test_the_same_corpus_elsewhere_is_no_difference(tmp_path: Path) -> None:
    then = saved(of_corpora(write(tmp_path / "c", 1000)))
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        os.replace(tmp_path / f"c{suffix}", tmp_path / "moved" / f"c{suffix}")
    assert difference(then, of_corpora(str(tmp_path / "moved" / "c"))) is None


def test_copies_are_told_apart_from_others_whatever_they_are_called(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", 1000), write(tmp_path / "b", 1000, seed=1), write(tmp_path / "c", 1000),
                write(tmp_path / "d", 0), write(tmp_path / "e", 0)]
    found = of_corpora(",".join(f"{prefix}:{n}" for n, prefix in enumerate(prefixes, 1)))
    assert copies(found) == [(0, 2)]
    (note,) = copy_notes(found)
    assert f"{prefixes[2]} holds the same as {prefixes[0]}" in note
    rows = [tmp_path / name for name in ("x.jsonl", "y.jsonl", "z.jsonl")]
    for path, text in zip(rows, ("row\n", "row\n", "raw\n"), strict=True):
        path.write_text(text)
    assert copies(of_files(rows)) == [(0, 1)]


@pytest.mark.parametrize(("tokens", "seed", "info", "words"), [
    (1050, 0, None, "with documents 20, and .*other has documents 21"),
    (1000, 1, None, "with bin_crc32 [0-9]+, and .*other has bin_crc32"),
    (1000, 0, {"inputs": "others"}, "with json_crc32"),
    (1000, 0, None, None),
])
def test_another_corpus_is_named_with_what_is_different(tmp_path: Path, tokens: int, seed: int,
                                                        info: dict[str, Any] | None, words: str | None) -> None:
    then = saved(of_corpora(write(tmp_path / "c", 1000, info={"inputs": "these"})))
    found = difference(then, of_corpora(write(tmp_path / "other", tokens, seed, info)))
    if words is None:
        assert found is None, "without a P.json the files speak for themselves"
    else:
        assert found is not None
        with pytest.raises(UserError, match=f"it was trained on {tmp_path / 'c'} {words}"):
            raise UserError(found)


def test_shares_and_order_of_a_blend_count_and_their_spelling_does_not(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", 500), write(tmp_path / "b", 500, seed=1)
    then = saved(of_corpora(f"{one}:0.7,{two}:0.3"))
    assert difference(then, of_corpora(f"{one}:7,{two}:3")) is None
    assert "with share 7/10, and" in str(difference(then, of_corpora(f"{one}:0.6,{two}:0.4")))
    assert "bin_crc32" in str(difference(then, of_corpora(f"{two}:0.7,{one}:0.3")))
    assert f"it was trained on {one} and {two}, not on {one}" == difference(then, of_corpora(one))


@pytest.mark.parametrize("then", ["text", 5, {"a": 1}, [1], [{}], [[]], [{"path": 7, "documents": [1]}]])
def test_anything_may_stand_in_a_checkpoint(tmp_path: Path, then: object) -> None:
    found = difference(then, of_corpora(write(tmp_path / "c", 100)))
    assert found and len(found) < 400


def test_rows_and_a_corpus_are_never_the_same_data(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", 100)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    found = f"it was trained on {corpus}, a corpus of token ids, and {rows} is a file of rows"
    assert difference(saved(of_corpora(corpus)), of_files([rows])) == found
    found = f"it was trained on {rows}, a file of rows, and {corpus} is a corpus of token ids"
    assert difference(saved(of_files([rows])), of_corpora(corpus)) == found


def test_a_file_of_rows_is_known_by_its_size_and_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"a" * 200_000)
    then = saved(of_files([path]))
    assert difference(then, of_files([path])) is None
    path.write_bytes(b"a" * 199_999 + b"b")
    assert "crc32" in str(difference(then, of_files([path])))
    path.write_bytes(b"a" * 200_001)
    assert "with bytes 200000, and" in str(difference(then, of_files([path])))


def test_it_is_read_at_once_from_data_of_any_size(tmp_path: Path) -> None:
    """A .bin of 200 GB, as far as its length goes."""
    write(tmp_path / "c", 1000)
    content = bytearray((tmp_path / "c.idx").read_bytes())
    content[34 + 19 * 4 : 34 + 20 * 4] = (10**9).to_bytes(4, "little")  # the last of 20 lengths
    at = 34 + 20 * 4 + 19 * 8
    content[at : at + 8] = (198 * 10**9).to_bytes(8, "little")
    (tmp_path / "c.idx").write_bytes(content)
    os.truncate(tmp_path / "c.bin", 200 * 10**9)
    assert of_corpora(str(tmp_path / "c"))[0]["tokens"] == 100 * 10**9

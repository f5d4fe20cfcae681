"""Every way in which a checkpoint or a safetensors file can be wrong is one clear UserError."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import Entry, alone, latest_step, manifest, open_checkpoint, resolve, save_checkpoint
from engine.checkpoint.slices import cover_fault
from engine.checkpoint.source import match_names
from engine.checkpoint.tensorfile import TensorFile
from engine.errors import UserError
from engine.parallel.sharding import Piece, split_rows

SHAPE = (6, 4)
EXPECTED = {"a.weight": SHAPE, "b.weight": SHAPE}
FILE = "rank-00000.safetensors"


def entries(fill: float = 1.0) -> list[Entry]:
    """Two tensors, the first in two slices."""
    found = []
    for name, parts in (("a.weight", 2), ("b.weight", 1)):
        for part in range(parts):
            member = split_rows(name, SHAPE, part, parts)
            values = torch.arange(member.extent[0] * 4.0).reshape(member.extent) + fill
            found.append(Entry("model", Piece(member, (0, member.extent[0]), member.start, member.extent), values))
    return found


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A sound step folder."""
    return save_checkpoint(tmp_path / "run" / "checkpoints", 3, entries(), rank=0, world=1, agree=alone,
                           meta={"samples": 1, "config": {}, "world": {}}, assets={"config.json": b"{}"})


def load(step: Path) -> None:
    """Reads all of it."""
    open_checkpoint(step).load(entries(), expected=EXPECTED, kinds=("model",))


def test_a_flipped_bit_anywhere_never_loads(step: Path) -> None:
    """Every byte of the tensor file and the manifest, one bit each: an error, or the very same tensors."""
    for name in (FILE, "manifest.json", "hf/config.json"):
        path = step / name
        sound = path.read_bytes()
        for at in range(len(sound)):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ (1 << at % 8)]) + sound[at + 1 :])
            with pytest.raises(UserError):
                load(step)
        path.write_bytes(sound)
    load(step)


@pytest.mark.parametrize("name", [FILE, "manifest.json", "hf/config.json"])
def test_a_truncated_or_missing_file_is_named(step: Path, name: str) -> None:
    path = step / name
    sound = path.read_bytes()
    for length in (0, 1, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(UserError, match=Path(name).name):
            load(step)
    path.unlink()
    with pytest.raises(UserError, match=Path(name).name):
        load(step)


def test_a_tensor_file_of_another_checkpoint_is_refused(step: Path) -> None:
    shutil.copy(step / FILE, step / "rank-00001.safetensors")
    with pytest.raises(UserError, match="rank-00001.safetensors is not in the manifest"):
        load(step)


def test_a_file_that_is_a_link_out_of_the_folder_is_refused(step: Path, tmp_path: Path) -> None:
    shutil.move(step / FILE, tmp_path / "elsewhere")
    (step / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a plain file"):
        load(step)


def edit(step: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and gives it a right checksum again, as an attacker would."""
    path = step / "manifest.json"
    content = json.loads(path.read_text())
    del content["crc32"]
    change(content)
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    path.write_text(json.dumps({**content, "crc32": zlib.crc32(text.encode())}))


A, B = "model/a.weight", "model/b.weight"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda m: m.update(version=2), "written by a newer Triax: format version 2, and this one reads 1"),
    "format": (lambda m: m.update(format="x"), "not a Triax checkpoint"),
    "overlap": (lambda m: m["tensors"][A]["slices"][1].update(offset=[2, 0]), "a.weight is not whole: .*overlap"),
    "gap": (lambda m: m["tensors"][A]["slices"].pop(), "a.weight is not whole: .*gap"),
    "outside": (lambda m: m["tensors"][A]["slices"][1].update(offset=[4, 0]), "outside"),
    "dtype": (lambda m: m["tensors"][A].update(dtype="bf16"), r"is F32 \[3, 4\], and the manifest says BF16"),
    "unknown dtype": (lambda m: m["tensors"][A].update(dtype="fp4"), "unknown dtype 'fp4'"),
    "shape": (lambda m: m["tensors"][B]["slices"][0].update(shape=[4, 6]), "manifest says F32"),
    "key": (lambda m: m["tensors"][B]["slices"][0].update(key="c"), "does not hold c"),
    "key twice": (lambda m: m["tensors"].update({"model/c": m["tensors"][B]}), "names it twice"),
    "extra in file": (lambda m: m["tensors"].pop(B), "b.weight, which the manifest does not name"),
    "parent": (lambda m: m["files"].update({"../x": 1}), "'../x' is not a plain file name"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": 1}), "not a plain file name"),
    "asset parent": (lambda m: m["assets"].update({"../manifest.json": {"bytes": 1, "crc32": 1}}), "not a plain"),
    "unlisted": (lambda m: m["tensors"][B]["slices"][0].update(file="/dev/zero"), "not one of the files"),
    "negative": (lambda m: m["tensors"][B]["slices"][0].update(offset=[-1, 0]), "not a whole number"),
    "huge": (lambda m: m["tensors"][B].update(shape=[10**30, 4]), "not a whole number below"),
    "vast": (lambda m: m["tensors"][B].update(shape=[2**62, 4]), "b.weight is not whole"),
    "dims": (lambda m: m["tensors"][B].update(shape=[1] * 10**5), "shape is not a list of at most 8 sizes"),
    "dtype list": (lambda m: m["tensors"][B].update(dtype=[]), "unknown dtype"),
    "dtype table": (lambda m: m["tensors"][B].update(dtype={}), "unknown dtype"),
    "file list": (lambda m: m["tensors"][B]["slices"][0].update(file=[]), "not one of the files"),
    "file table": (lambda m: m["tensors"][B]["slices"][0].update(file={}), "not one of the files"),
    "key list": (lambda m: m["tensors"][B]["slices"][0].update(key=[]), "not one of the files"),
    "long name": (lambda m: m["files"].update({"x" * 300: 1}), "not a plain file name"),
    "name with an escape": (lambda m: m["tensors"].update({"x\n\x1b[31m" * 900: {}}), r"x\\n\\x1b\[31mx"),
    "optimizer steps": (lambda m: m.update(optimizer_steps={}), "optimizer_steps in the manifest is {}"),
    "steps beyond": (lambda m: m.update(optimizer_steps=10**300), "optimizer_steps in the manifest is 1000"),
    "samples beyond": (lambda m: m.update(samples=-1), "samples in the manifest is -1"),
    "another step": (lambda m: m.update(step=4), "step-00000003 holds step 4: the folder was renamed"),
    "config list": (lambda m: m.update(config=[]), "has no config"),
    "a newer writer": (lambda m: (m.update(triax="99.0.0"), m["tensors"][B].update(dtype="fp8")),
                       r"written by a newer Triax \(99.0.0, and this is .*unknown dtype 'fp8'; update Triax"),
    "no version": (lambda m: m.update(triax=7), "triax is not a version"),
    "bool": (lambda m: m.update(step=True), "step is 'True'"),
    "samples": (lambda m: m.pop("samples"), "has no samples"),
    "kind": (lambda m: m["tensors"].update({"grad/x": m["tensors"].pop(B)}), "of no kind"),
    "no slices": (lambda m: m["tensors"][B].update(slices=[]), "gap"),
    "missing tensor": (lambda m: m["tensors"].update({"model/z": m["tensors"].pop(B)}), "lacks b.weight; it has z"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_lies_is_refused(step: Path, name: str) -> None:
    change, words = EDITS[name]
    edit(step, change)
    with pytest.raises(UserError, match=words):
        load(step)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a field": ({"model": {"window": 4096}}, "was written by a newer Triax .*config has model.window, which this one"),
    "a group": ({"experts": {"count": 8}}, "was written by a newer Triax .*config has experts, which this one"),
    "a family": ({"model": {"family": "rwkv"}}, "--family 'rwkv' is not known"),
    "no heads": ({"model": {"heads": 0}}, "--heads 0 must be at least 1"),
    "no number": ({"model": {"heads": []}}, "--heads must be a int"),
    "no group": ({"model": []}, "model must be a group"),
    "too many layers": ({"model": {"layers": 10**12}}, "beyond any model"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_in_a_manifest_is_refused_and_a_newer_one_says_so(step: Path, name: str) -> None:
    config, words = CONFIGS[name]
    edit(step, lambda m: m.update(config=config))
    with pytest.raises(UserError, match=words):
        open_checkpoint(step).run_config()
    edit(step, lambda m: m.update(triax="99.0.0"))
    with pytest.raises(UserError, match="was written by a newer Triax .99.0.0") as caught:
        open_checkpoint(step).run_config()
    assert "unknown option" not in str(caught.value)


def test_a_checkpoint_without_an_optimizer_says_so(step: Path) -> None:
    with pytest.raises(UserError, match="holds no optimizer; use --load"):
        open_checkpoint(step).optimizer_steps  # noqa: B018


def test_more_tensors_than_the_model_has_are_not_looked_at_one_by_one(
        step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 of them took half a minute."""
    edit(step, lambda m: m.update(tensors={f"model/x{i}.weight": {} for i in range(200_000)}))
    monkeypatch.setattr(manifest._Reader, "tensor", None)
    with pytest.raises(UserError, match="names 200,000 tensors, and its model has at most 1"):
        open_checkpoint(step)


def test_a_message_lists_the_first_names_of_many() -> None:
    names = [f"{chr(97 + i % 26)}{i}.weight" for i in range(3000)]
    with pytest.raises(UserError, match="and 2,976 more, which the model does not") as caught:
        match_names("x", {name: SHAPE for name in names} | EXPECTED, EXPECTED)
    assert len(str(caught.value)) < 1500


def test_whole_tensors_are_not_tested_cell_by_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "unique", None)
    assert cover_fault((3, 4), [((0, 0), (3, 4))]) is None


def test_a_pointer_out_of_the_run_is_refused(step: Path) -> None:
    run = step.parent.parent
    for word in ("../../etc", "/", "step-00000009", "", "step-00000003/../step-00000003"):
        (step.parent / "latest").write_text(word)
        with pytest.raises(UserError, match="latest names .*step-00000003"):
            latest_step(run)
    (step.parent / "latest").unlink()
    with pytest.raises(UserError, match="no file `latest`"):
        resolve(run)


def test_resolve_names_what_is_wrong_with_other_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        resolve(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a checkpoint"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickles"):
        resolve(tmp_path)


def header(tensors: Any, data: bytes = b"\0" * 16) -> bytes:
    """A safetensors file with this header."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 8), "b": entry(8, 16)}
HOSTILE = {
    "empty": b"", "short": b"\1\0\0", "longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "2^63": struct.pack("<Q", 1 << 63) + b"{}", "2^64-1": b"\xff" * 8 + b"{}",
    "not JSON": header(b"hello, not json!"), "a list": header([]), "not UTF-8": header(b'{"\xff":1}'),
    "nested": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "huge number": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "duplicate": header(b'{"a":%s,"a":%s}' % (json.dumps(entry(0, 8)).encode(), json.dumps(entry(8, 16)).encode())),
    "overlap": header({"a": entry(0, 8), "b": entry(4, 16, (3,))}), "same place": header({"a": entry(0, 16, (4,)),
                                                                                         "b": entry(0, 16, (4,))}),
    "hole": header({"a": entry(0, 8), "b": entry(12, 16, (1,))}), "negative": header({"a": entry(-8, 8, (4,))}),
    "beyond": header({"a": entry(0, 24, (6,))}), "trailing": header({"a": entry(0, 8)}),
    "reversed": header({"a": entry(8, 0), "b": entry(0, 16, (4,))}), "floats": header({"a": entry(0.0, 16.0, (4,))}),
    "bools": header({"a": entry(False, 16, (4,))}), "wrong shape": header({"a": entry(0, 16, (5,))}),
    "negative shape": header({"a": entry(0, 16, (-1, -4))}), "shape text": header({"a": entry(0, 16, "4")}),
    "dtype": header({"a": entry(0, 16, (4,), "F31")}), "dtype list": header({"a": entry(0, 16, (4,), [])}),
    "missing key": header({"a": {"dtype": "F32", "shape": [4]}}), "not a table": header({"a": 1}),
    "metadata": header({"__metadata__": {"x": 1}, **GOOD}), "dims": header({"a": entry(0, 16, (1,) * 10**6)}),
    "large dims": header({"a": entry(0, 16, (10**18,) * 10**5)}), "NaN": header(b'{"a":NaN}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_safetensors_header_is_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=str(tmp_path / "x")) as caught:
        TensorFile(tmp_path / "x")
    assert len(str(caught.value)) < 600 + len(str(tmp_path)), "foreign text is cut"


def test_a_sound_header_and_unaligned_data_are_read(tmp_path: Path) -> None:
    text = json.dumps(GOOD).encode()
    (tmp_path / "x").write_bytes(header(text + b" " * (1 - len(text) % 2), bytes(range(16))))
    want = torch.frombuffer(bytearray(range(8, 16)), dtype=torch.float32)
    assert torch.equal(TensorFile(tmp_path / "x").tensor("b"), want)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_cover_fault_agrees_with_counting_every_element(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2)))
    ranges = [st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(lambda r, n=n: (r[0], min(r[1], n - r[0])))
              for n in shape]
    rectangles = [tuple(zip(*cut, strict=True)) for cut in data.draw(st.lists(st.tuples(*ranges), max_size=6))]
    count = torch.zeros(shape, dtype=torch.int)
    for start, extent in rectangles:
        count[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))] += 1
    assert (cover_fault(shape, rectangles) is None) == bool((count == 1).all())

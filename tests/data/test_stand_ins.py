"""Files that are not what their names say are named for what they are, whatever reads them; what is lost is told."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from engine.checkpoint.tensorfile import TensorFile
from engine.data.facts import read_facts
from engine.data.indexed import IndexedDataset, IndexedWriter
from engine.data.inputs import Document, Fault, LeftOut, ReadOptions, find_sources, plan, read_span
from engine.data.inputs.read import open_meter
from engine.errors import UserError
from engine.hf import read_config
from engine.tokenizer import load_tokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 123456789\n"
ANNEX = b"/annex/objects/MD5E-s34--a0a12b.gz\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404: not found</body></html>"
NAMES = ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.xml",
         "a.xml.bz2", "a.xml.zst")
DUMP = ('<mediawiki xml:lang="fr"><siteinfo><dbname>frwiki</dbname></siteinfo>\n<page><title>Été</title><ns>0</ns>'
        "<id>1</id><revision><id>2</id><text>Il fait “chaud” à Orléans.</text></revision></page>\n"
        "<page><title>Çà</title><ns>0</ns><id>3</id><revision><id>4</id><text>Où ça ?</text></revision></page>\n"
        "</mediawiki>")
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda content: pytest.importorskip("zstandard").ZstdCompressor().compress(content),
}  # fmt: skip


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, encoding: str = "utf-8", unit_bytes: int = 1 << 20) -> list[Document | Fault | LeftOut]:
    sources = find_sources([str(path)], encoding)
    found: list[Document | Fault | LeftOut] = []
    for unit in plan(sources, "document", unit_bytes):
        for span in unit:
            with open_meter(sources[0], span.start, span.stop, ReadOptions(), 1 << 20) as meter:
                found += read_span(sources[0], meter, ReadOptions())
    return found


@pytest.mark.parametrize(("content", "message"), [
    (LFS, "is a pointer of Git LFS, not the file of 123,456,789 bytes that it stands for; run `git lfs pull`"),
    (ANNEX, "is a pointer of git-annex"), (PAGE, r"is a web page \(HTML\)"), (bytes(5000), "nothing but zeros"),
])  # fmt: skip
def test_inputs_of_every_kind_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    for name in (*NAMES, *(("a.txt",) if content != PAGE else ())):  # a page may be meant as text
        with pytest.raises(UserError, match=rf"{name}.* {message}"):
            find_sources([str(put(tmp_path / name, content))])


def test_several_inputs_that_cannot_be_read_are_told_at_once(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"{number}.jsonl", LFS)
    with pytest.raises(UserError, match=r"0.jsonl is a pointer.*\(and 2 more of the inputs cannot be read: .*1.jsonl"):
        find_sources([str(tmp_path)])


def test_what_is_packed_otherwise_than_its_name_says_is_named(tmp_path: Path) -> None:
    rows = b'{"text": "a"}\n' * 99
    for ending, pack in PACK.items():
        for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"):
            path = put(tmp_path / name, pack(rows))
            if name == f"a.jsonl{ending}":
                assert len(read(path)) == 99
            else:
                with pytest.raises(UserError, match=f"end its name in {ending}" if ending else "begins with b'{"):
                    find_sources([str(path)])


def test_a_window_of_two_gigabytes_is_named_and_not_taken(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters(window_log=31)
    for name, content in (("a.jsonl.zst", b'{"text": "a"}\n'), ("a.xml.zst", DUMP.encode())):
        packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        path = put(tmp_path / name, packer.compress(content) + packer.flush())
        with pytest.raises(UserError, match="packed with a window of 2,048 MiB.*unpack it first: zstd -d --long=31"):
            find_sources([str(path)])


def test_a_file_that_is_cut_short_is_said_to_be_with_its_size(tmp_path: Path) -> None:
    rows = b"".join(b'{"text": "%d"}\n' % n for n in range(5000))
    fault = read(put(tmp_path / "a.jsonl", rows[:1005]))[-1]
    assert isinstance(fault, Fault) and fault.message.endswith("the file ends within this line: it may be cut short")
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        content = PACK[ending](DUMP.encode())
        with pytest.raises(UserError, match=rf"cut short.*the file has {len(content) // 2} bytes"):
            found = read(put(tmp_path / f"a.xml{ending}", content[: len(content) // 2]))
            assert isinstance(found[-1], Fault)  # where a part can be read, as of gzip
            raise UserError(found[-1].message)
    with IndexedWriter(tmp_path / "c", 100) as writer:
        writer.add_documents(np.arange(90), np.full(9, 10))
        writer.finish()
    whole = (tmp_path / "c.bin").read_bytes()
    put(tmp_path / "c.bin", whole[:100])
    with pytest.raises(UserError, match="describes bytes 0 to 180 of .*c.bin, which has 100 bytes; it is cut short"):
        IndexedDataset(tmp_path / "c")


def test_corpora_weights_and_tokenizers_that_are_pointers_are_named(tmp_path: Path, vocabulary: str) -> None:
    with IndexedWriter(tmp_path / "c", 100) as writer:
        writer.add_documents(np.arange(90), np.full(9, 10))
        writer.finish()
    shutil.copytree(vocabulary, tmp_path / "tokenizer")
    for name, use in (("c.json", lambda: read_facts(tmp_path / "c")), ("c.idx", lambda: IndexedDataset(tmp_path / "c")),
                      ("c.bin", lambda: IndexedDataset(tmp_path / "c")),
                      ("model.safetensors", lambda: TensorFile(tmp_path / "model.safetensors")),
                      ("config.json", lambda: read_config(tmp_path)),
                      ("tokenizer/tokenizer.json", lambda: load_tokenizer(str(tmp_path / "tokenizer"))),
                      ("tokenizer/tokenizer.model", lambda: load_tokenizer(str(tmp_path / "tokenizer"))),
                      ("tokenizer/tokenizer.model", lambda: load_tokenizer(f"{tmp_path}/tokenizer/tokenizer.model")),
                      ("x.tiktoken", lambda: load_tokenizer(str(tmp_path / "x.tiktoken")))):
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        put(tmp_path / name, LFS)
        with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS"):
            use()
        if kept is not None:
            put(tmp_path / name, kept)
    with pytest.raises(UserError, match=r"is no safetensors file: it is a web page"):
        TensorFile(put(tmp_path / "model.safetensors", PAGE))


# --- dumps in any encoding


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize(("encoding", "given_as"), [
    ("utf-16", "utf-8"), ("utf-16-le", "utf-16-le"), ("utf-32", "utf-8"), ("utf-8-sig", "utf-8"), ("cp1252", "cp1252"),
    ("gb18030", "gb18030"), ("utf-16-be", "utf-16-be"),
])  # fmt: skip
def test_a_dump_is_read_in_every_encoding(tmp_path: Path, encoding: str, given_as: str, ending: str) -> None:
    expected = read(put(tmp_path / "plain.xml", DUMP.encode()))
    assert len(expected) == 2 and "“chaud” à Orléans" in str(expected[0])
    path = put(tmp_path / f"a.xml{ending}", PACK[ending](DUMP.encode(encoding)))
    for unit_bytes in (64, 1 << 20):
        assert read(path, given_as, unit_bytes) == expected


def test_a_dump_in_several_streams_or_of_a_declared_encoding_is_read(tmp_path: Path) -> None:
    expected = read(put(tmp_path / "plain.xml", DUMP.encode()))
    content = DUMP.encode("utf-16")
    for at in (100, 301, 302):  # also within a character
        path = put(tmp_path / "a.xml.bz2", bz2.compress(content[:at]) + bz2.compress(content[at:]))
        assert read(path, unit_bytes=64) == expected
    latin = '<?xml version="1.0" encoding="windows-1252"?>\n' + DUMP
    assert read(put(tmp_path / "b.xml", latin.encode("cp1252"))) == expected
    lie = '<?xml version="1.0" encoding="utf-16"?>\n' + DUMP  # as some programs write it, of text they had in memory
    assert read(put(tmp_path / "c.xml", lie.encode())) == expected
    with pytest.raises(UserError, match="looks like UTF-16 without a byte-order mark; say --encoding utf-16-le"):
        read(put(tmp_path / "d.xml", DUMP.encode("utf-16-le")))


def test_a_page_that_its_encoding_does_not_have_is_one_fault(tmp_path: Path) -> None:
    content = DUMP.encode("gb18030").replace("Orléans".encode("gb18030"), b"\xff\xffOrl")
    found = read(put(tmp_path / "a.xml", content), "gb18030")
    assert isinstance(found[0], Fault) and "bytes that its encoding does not have" in found[0].message
    assert isinstance(found[1], Document) and "Où ça ?" in found[1].text


# --- what is lost whole


def tool(name: str) -> ModuleType:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def test_an_input_that_is_lost_whole_is_no_success(
    tmp_path: Path, vocabulary: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(json.dumps({"text": f"text {n} of the cat on the mat"}) + "\n" for n in range(200)).encode()
    good, cut = put(tmp_path / "good.jsonl", rows + b"bad\n"), put(tmp_path / "cut.jsonl.gz", gzip.compress(rows)[:12])
    keys = put(tmp_path / "keys.jsonl", b'{"body": "a"}\n' * 3)
    prepare = ["--tokenizer", vocabulary, "--output-prefix", str(tmp_path / "c"), "--on-error", "skip", "--overwrite"]
    learn = ["--vocab-size", "300", "--output", str(tmp_path / "v"), "--on-error", "skip", "--overwrite"]
    for name, flags in (("preprocess_data", prepare), ("train_tokenizer", learn)):
        main = tool(name).main
        assert main(["--input", str(good), *flags]) == 0
        assert main(["--input", str(good), str(cut), str(keys), *flags]) == 1
        said = capfd.readouterr().err.splitlines()[-1]
        assert "2 inputs give nothing but bad records and are lost whole" in said
        assert "cut.jsonl.gz" in said and "keys.jsonl" in said
    assert IndexedDataset(tmp_path / "c").documents == 200

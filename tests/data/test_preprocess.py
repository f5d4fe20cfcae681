"""Raw text to tokens: the same bytes for any worker count, nothing half-written, every fault named."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from engine.data import preprocess as room
from engine.data.claim import claim
from engine.data.indexed import IndexedDataset
from engine.data.inputs import ReadOptions, find_sources, read_span
from engine.data.inputs.read import open_meter
from engine.data.pipeline import merge, team
from engine.data.preprocess import Counts, Settings, preprocess
from engine.data.progress import Progress
from engine.errors import UserError
from engine.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"document {n}: " + "the cat sat on the mat. " * (n % 7 + 1) for n in range(500)]


def jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def run(vocabulary: str, output: Path, *inputs: Path, **other: object) -> Counts:
    chosen = {"inputs": [str(path) for path in inputs], "tokenizer": vocabulary, "output_prefix": str(output)}
    return preprocess(Settings(**(chosen | other)), say=lambda line: None)  # type: ignore[arg-type]


def decoded(vocabulary: str, prefix: Path) -> list[str]:
    corpus, tokenizer = IndexedDataset(prefix), load_tokenizer(vocabulary)
    corpus.verify(tokenizer.vocab_size)
    return [tokenizer.decode(corpus.document(n)) for n in range(corpus.documents)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_without_shuffle_the_bytes_are_those_megatron_writes(vocabulary: str, tmp_path: Path) -> None:
    """Megatron-LM's tool: each document's ids, then the end-of-document id; one sequence a document."""
    run(vocabulary, tmp_path / "c", jsonl(tmp_path / "in.jsonl", TEXTS), shuffle_seed=None)
    tokenizer = load_tokenizer(vocabulary)
    documents = [[*tokenizer.encode(text), 2] for text in TEXTS]
    sizes = [len(document) for document in documents]
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(sizes) + 1)
    idx += struct.pack(f"<{len(sizes)}i", *sizes)
    idx += struct.pack(f"<{len(sizes)}q", *[2 * sum(sizes[:n]) for n in range(len(sizes))])
    idx += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    assert (tmp_path / "c.bin").read_bytes() == np.concatenate(documents).astype("<u2").tobytes()
    assert (tmp_path / "c.idx").read_bytes() == idx


def test_real_text_gives_the_bytes_of_a_document_after_the_other(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """English and Chinese through the real Llama-2 vocabulary, as Megatron-LM's tool does it; and all kinds at once."""
    monkeypatch.setattr(room, "_SMALL_INPUT", 0)
    model = str(shared_data / "tokenizer" / "llama2.model")
    inputs = [shared_data / "text" / name for name in ("c4_demo.jsonl", "zhwiki_articles_a.jsonl")]
    run(model, tmp_path / "c", *inputs, shuffle_seed=None, workers=2, unit_bytes=100_000)
    reference = sentencepiece.SentencePieceProcessor(model_file=model)
    texts = [json.loads(line)["text"] for path in inputs for line in path.read_text().splitlines()]
    expected = [np.array([*reference.Encode(text), 2], "<u2") for text in texts]
    assert (tmp_path / "c.bin").read_bytes() == np.concatenate(expected).tobytes()
    assert IndexedDataset(tmp_path / "c").sizes.tolist() == [len(ids) for ids in expected]
    run(model, tmp_path / "poems", shared_data / "text" / "poet.song.0.json", json_key="strains")
    counts = [
        run(model, tmp_path / f"all{workers}", *inputs, shared_data / "wiki", workers=workers, unit_bytes=300_000,
            dedup="near", quality="default", clean="all")
        for workers in (1, 2)
    ]  # fmt: skip
    assert counts[0] == counts[1] and counts[0].documents > 300 and counts[0].left_out["redirect"] > 90
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{tmp_path}/all1{suffix}").read_bytes() == Path(f"{tmp_path}/all2{suffix}").read_bytes()


def test_any_number_of_workers_gives_the_same_bytes(
    vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_SMALL_INPUT", 0)
    bad = jsonl(tmp_path / "a.jsonl", TEXTS)
    bad.write_text(bad.read_text().replace('{"text": "document 100:', '{"text" "document 100:'))
    (tmp_path / "b.txt").write_text("one\n\ntwo\nlines\n\n\nthree")
    for workers in (1, 2, 3):
        counts = run(
            vocabulary, tmp_path / f"w{workers}", bad, tmp_path / "b.txt",
            workers=workers, on_error="skip", split_text="blank", unit_bytes=1000,
        )  # fmt: skip
        assert (counts.documents, counts.skipped) == (502, 1)
        assert counts.faults == [f"{bad}:101: not JSON: Expecting ':' delimiter: line 1 column 9 (char 8)"]
        for suffix in (".bin", ".idx", ".json"):
            assert Path(f"{tmp_path}/w{workers}{suffix}").read_bytes() == Path(f"{tmp_path}/w1{suffix}").read_bytes()


def test_shuffle_permutes_whole_documents_by_the_seed(vocabulary: str, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    run(vocabulary, tmp_path / "one", source, shuffle_seed=1)
    run(vocabulary, tmp_path / "two", source, shuffle_seed=2)
    one, two = decoded(vocabulary, tmp_path / "one"), decoded(vocabulary, tmp_path / "two")
    assert sorted(one) == sorted(two) == sorted(TEXTS)
    assert one != two and one != TEXTS
    ends = IndexedDataset(tmp_path / "one")
    assert all(int(ends.document(n)[-1]) == 2 for n in range(ends.documents))


def test_order_in_little_memory_is_the_same(vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    run(vocabulary, tmp_path / "one", source)
    monkeypatch.setattr(merge, "_COPY_TOKENS", 50)
    run(vocabulary, tmp_path / "two", source, memory_bytes=10_000)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_manifest_says_what_went_in(vocabulary: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(jsonl(tmp_path / "in.jsonl", ["a", "", "  \n", "b"]).read_bytes()))
    run(vocabulary, tmp_path / "c", source, append_eod=False)
    info = json.loads((tmp_path / "c.json").read_text())
    assert info["counts"] == {"documents": 2, "tokens": 4, "text_bytes": 2, "empty": 2, "skipped": 0}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert info["inputs"] == [{"name": "in.jsonl.gz", "size": source.stat().st_size, "sha256": digest}]
    assert info["tokenizer"]["hash"] == load_tokenizer(vocabulary).hash
    assert info["eod_id"] is None and info["settings"]["shuffle_seed"] == 1234


GOOD = b'{"text": "good"}\n'
FAULTS = {
    "cut.jsonl": (GOOD + b'{"text": "ba\n' + GOOD, 2, "not JSON"),
    "surrogate.jsonl": (GOOD + b'{"text": "\\ud800"}\n' + GOOD, 2, "lone surrogate U+D800"),
    "utf8.jsonl": (GOOD + b'{"text": "\xff"}\n' + GOOD, 2, "not UTF-8"),
    "key.jsonl": (GOOD + b'{"body": "x"}\n' + GOOD, 2, 'no "text"; the row has body'),
    "keys.jsonl": (GOOD + b'{"\\ud800\\n\\u001b": "x"}\n' + GOOD, 2, r"the row has \ud800\n\x1b (choose"),
    "number.jsonl": (GOOD + b'{"text": 5}\n' + GOOD, 2, '"text" is a number, not text'),
    "array.jsonl": (GOOD + b'[{"text": "x"}]\n' + GOOD, 2, "an array; one object a line is needed"),
    "after.json": (b'[{"text": "good"}]\n' + GOOD + GOOD, 2, "more text after the array's end"),
    "within.json": (b'[{"text": "good"},\n{"text": "good"}', 2, "the file ends within the array"),
    "comma.json": (b'[{"text": "good"},\n{"text": "good"} 1]', 2, "'1' where a comma or ] should be"),
    "deep.jsonl": (GOOD + b"[" * 200000 + b"\n" + GOOD, 2, "not JSON"),
    "digits.jsonl": (GOOD + b'{"text": ' + b"9" * 10000 + b"}\n" + GOOD, 2, "not JSON"),
    "long.jsonl": (GOOD + b'{"text": "' + b"x" * (17 << 20) + b'"}\n' + GOOD, 2, "longer than 16,777,216 bytes"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 2 + os.urandom(5000).hex().encode())[:-2000], 3, "is cut short"),
}


def digest(content: bytes, block: int = 2 << 20) -> dict[str, str]:
    """What P.json must tell of a file's bytes."""
    blocks = [hashlib.sha256(content[at : at + block]) for at in range(0, len(content), block)]
    if len(blocks) == 1:
        return {"sha256": blocks[0].hexdigest()}
    return {f"sha256_of_blocks_of_{block}": hashlib.sha256(b"".join(part.digest() for part in blocks)).hexdigest()}


@pytest.mark.parametrize(("name", "workers"), [*((name, 1) for name in FAULTS), ("cut.jsonl", 2), ("cut.jsonl.gz", 2)])
def test_a_bad_record_is_named_and_stops_or_is_skipped(
    vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, workers: int
) -> None:
    monkeypatch.setattr(room, "_SMALL_INPUT", 0)
    content, line, message = FAULTS[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source = tmp_path / "in" / name
    source.write_bytes(content)
    good = jsonl(tmp_path / "in" / "good.jsonl", ["good"])
    with pytest.raises(UserError) as caught:
        run(vocabulary, tmp_path / "out" / "c", source, good, workers=workers)
    assert f"{source}:{line}: " in str(caught.value) and message in str(caught.value)
    assert names(tmp_path / "out") == set()
    counts = run(vocabulary, tmp_path / "out" / "c", source, good, workers=workers, on_error="skip")
    assert counts.skipped == 1 and message in counts.faults[0]
    assert set(decoded(vocabulary, tmp_path / "out" / "c")) == {"good"}
    info = json.loads((tmp_path / "out" / "c.json").read_text())
    assert {"name": name, "size": len(content), **digest(content)} == info["inputs"][0]


@pytest.mark.parametrize(
    ("split_text", "content", "documents"),
    [
        ("document", b"\xef\xbb\xbfa\r\nb\n\nc", ["a\nb\n\nc"]),
        ("line", b"a\r\n\r\nb \n\nc", ["a", "b ", "c"]),
        ("blank", b"a\nb\r\n\r\n \nc\n\n", ["a\nb", "c"]),
    ],
)
def test_plain_text_is_cut_as_asked(
    vocabulary: str, tmp_path: Path, split_text: str, content: bytes, documents: list[str]
) -> None:
    (tmp_path / "in.txt").write_bytes(content)
    run(vocabulary, tmp_path / "c", tmp_path / "in.txt", split_text=split_text, shuffle_seed=None)
    assert decoded(vocabulary, tmp_path / "c") == documents


def test_a_nul_and_special_strings_are_text(vocabulary: str, tmp_path: Path) -> None:
    texts = ["a\0b", "x</s>y<|im_end|>"]
    run(vocabulary, tmp_path / "c", jsonl(tmp_path / "in.jsonl", texts), shuffle_seed=None)
    assert decoded(vocabulary, tmp_path / "c") == texts
    assert int((IndexedDataset(tmp_path / "c").tokens == 2).sum()) == 2


def test_empty_first_document_and_blank_lines_are_left_out(vocabulary: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n\n{"text": "a"}\r\n\n{"text": "b"}')
    counts = run(vocabulary, tmp_path / "c", tmp_path / "in.jsonl", shuffle_seed=None)
    assert (counts.documents, counts.empty) == (2, 1)
    assert decoded(vocabulary, tmp_path / "c") == ["a", "b"]


def test_nothing_left_is_an_error(vocabulary: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no document is left .* 2 empty, 0 skipped"):
        run(vocabulary, tmp_path / "c", jsonl(tmp_path / "in.jsonl", ["", " "]))
    assert names(tmp_path) == {"in.jsonl"}


def test_outputs_are_checked_before_work(vocabulary: str, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "c.json", ["text"])
    with pytest.raises(UserError, match="is an input and would be overwritten"):
        run(vocabulary, tmp_path / "c", source, overwrite=True)
    source = jsonl(tmp_path / "in.jsonl", ["first"])
    run(vocabulary, tmp_path / "d", source)
    with pytest.raises(UserError, match="d.bin.* exists; choose another"):
        run(vocabulary, tmp_path / "d", source)
    jsonl(source, ["second"])
    run(vocabulary, tmp_path / "d", source, overwrite=True)
    assert decoded(vocabulary, tmp_path / "d") == ["second"]
    with pytest.raises(UserError, match="is a folder"):
        run(vocabulary, tmp_path, source)
    with pytest.raises(UserError, match="cannot make the folder"):
        run(vocabulary, source / "below" / "c", source)
    run(vocabulary, tmp_path / "new" / "folder" / "c", source)


def test_inputs_are_checked_before_work(vocabulary: str, tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "none.jsonl", "cannot read"),
        (tmp_path, "holds no file that can be read"),
        (jsonl(tmp_path / "in.jsonk", ["a"]), "did you mean .json"),
    ]:
        with pytest.raises(UserError, match=message):
            run(vocabulary, tmp_path / "c", path)


@pytest.mark.parametrize("moment", ["while starting", "in mid-run"])
def test_a_killed_worker_ends_the_run_at_once(
    vocabulary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Kills a real worker; the run ends by itself with one clear line, and another finishes the work."""
    monkeypatch.setattr(room, "_SMALL_INPUT", 0)
    source = jsonl(tmp_path / "in.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    add, lead = Progress.add, team._lead

    others = set(multiprocessing.active_children())  # ranks that other tests will use

    def kill() -> None:
        (set(multiprocessing.active_children()) - others).pop().kill()

    def kill_then_lead(*args: Any) -> None:
        kill()
        lead(*args)

    def add_then_kill(self: Progress, *numbers: int) -> None:
        add(self, *numbers)
        kill()

    if moment == "while starting":
        monkeypatch.setattr(team, "_lead", kill_then_lead)
    else:
        monkeypatch.setattr(Progress, "add", add_then_kill)
    with pytest.raises(UserError, match="worker processes died"):
        run(vocabulary, tmp_path / "out" / "c", source, workers=2, unit_bytes=1000)
    assert set(multiprocessing.active_children()) <= others
    assert names(tmp_path / "out") <= {"c.work"}
    monkeypatch.undo()
    run(vocabulary, tmp_path / "out" / "c", source, unit_bytes=1000)
    run(vocabulary, tmp_path / "whole", source)
    assert (tmp_path / "out" / "c.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


@pytest.mark.parametrize("started", ["forked", "spawned"])
def test_workers_end_when_the_main_process_is_killed(vocabulary: str, tmp_path: Path, started: str) -> None:
    """They would otherwise stay for ever; the next run need not wait for them, and clears what the killed one left."""
    source = jsonl(tmp_path / "in.jsonl", TEXTS * 200)
    script = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    if started == "spawned":
        script = f"import threading; threading.Thread(target=threading.Event().wait, daemon=True).start(); {script}"
    expected = 2 if started == "forked" and sys.platform == "linux" else 3  # spawned ones have a tracker of resources
    tool = str(ROOT / "tools" / "preprocess_data.py")
    arguments = ["--input", str(source), "--tokenizer", vocabulary, "--output-prefix", str(tmp_path / "c"),
                 "--unit-megabytes", "1"]
    main = subprocess.Popen([sys.executable, "-c", script, tool, *arguments, "--workers", "2"], stdout=subprocess.PIPE)
    children = Path(f"/proc/{main.pid}/task/{main.pid}/children")
    if not children.exists():
        pytest.skip("this system does not list a process' children")
    deadline = time.monotonic() + 30
    while len(workers := children.read_text().split()) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    main.kill()
    main.wait()
    claim(tmp_path / "c.work", clear=False).close()
    while any(_runs(int(pid)) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == expected and not any(_runs(int(pid)) for pid in workers)
    run(vocabulary, tmp_path / "c", source)
    assert names(tmp_path) == {"in.jsonl", "c.bin", "c.idx", "c.json"}


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_tool_exits_2_with_one_line_and_0_with_a_summary(vocabulary: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--tokenizer", vocabulary]
    failed = subprocess.run(
        [*command, "--input", str(bad), "--output-prefix", "c"], cwd=tmp_path, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {bad}:1: not JSON") and failed.stderr.count("\n") == 1
    good = jsonl(tmp_path / "good.jsonl", TEXTS)
    done = subprocess.run(
        [*command, "--input", str(good), "--output-prefix", "c"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "500 documents" in done.stdout
    assert "each document ends with the end-of-document token, id 2" in done.stdout
    assert names(tmp_path) == {"bad.jsonl", "good.jsonl", "c.bin", "c.idx", "c.json"}


def test_a_gzip_bomb_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """200 MB of one line in 200 kB: refused as a line too long, without being held."""
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b"a" * (1 << 20))
    source, options = find_sources([str(tmp_path / "bomb.jsonl.gz")])[0], ReadOptions()
    tracemalloc.start()
    with open_meter(source, 0, source.size, options, 1 << 20) as meter:
        items = list(read_span(source, meter, options))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20
    assert len(items) == 1 and "longer than" in str(items[0])


def test_without_a_tokenizer_it_says_how_to_get_one(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", ["a"])
    tool = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source)]
    for more, said in (([], "--tokenizer is needed: "), (["--tokenizer", "nowhere"], "no tokenizer at nowhere: ")):
        command = [*tool, "--output-prefix", str(tmp_path / "o" / "c"), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
        assert "python tools/train_tokenizer.py --input F --vocab-size 32000 --output DIR" in done.stderr
    assert names(tmp_path) == {"in.jsonl"}

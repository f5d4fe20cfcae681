"""A run that is ended at any moment goes on without loss or repetition, and leaves no half corpus."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.data import preprocess as room
from engine.data.claim import claim
from engine.data.indexed import IndexedDataset
from engine.data.pipeline import shard
from engine.data.preprocess import Counts, Settings, prepare
from engine.errors import UserError
from engine.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"text {n}: " + "the cat sat on the mat. " * (n % 7 + 1) for n in range(300)]
SUFFIXES = (".bin", ".idx", ".json")
Write = Callable[[str, list[str]], Path]


def run(vocabulary: str, output: Path, *inputs: Path, said: list[str] | None = None, **other: object) -> Counts:
    chosen = {"inputs": [str(path) for path in inputs], "tokenizer": vocabulary, "output_prefix": str(output),
              "unit_bytes": 20_000, "workers": 1}
    return prepare(Settings(**(chosen | other)), say=(said if said is not None else []).append)  # type: ignore[arg-type]


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


def left(folder: Path, prefix: str) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(prefix)}


class Dies:
    """Ends this process, as a power cut would, at the n-th call that changes something on the disk."""

    def __init__(self, at: int) -> None:
        self.at = at
        for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            setattr(module, name, self.wrapped(getattr(module, name)))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.at -= 1
            if self.at == 0:
                os._exit(9)
            return function(*args, **kwargs)

        return call


def in_child(work: Callable[[], object]) -> int:
    """The exit code of a forked copy of this process that does some work; 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_ended_at_any_change_on_the_disk_it_goes_on_to_the_same_bytes(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, loaded = jsonl("in.jsonl", TEXTS + TEXTS[:9]), load_tokenizer(vocabulary)
    monkeypatch.setattr(room, "load_tokenizer", lambda path: loaded)  # once, not two hundred times
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the system stays up; only the process ends
    run(vocabulary, tmp_path / "whole", source, dedup="exact")
    for moment in range(1, 200):
        prefix = tmp_path / f"c{moment}"

        def dying(prefix: Path = prefix, moment: int = moment) -> None:
            Dies(moment)
            run(vocabulary, prefix, source, dedup="exact")

        code = in_child(dying)
        if code == 0:
            break
        assert code == 9
        whole = all(Path(f"{prefix}{suffix}").exists() for suffix in SUFFIXES)
        if not whole or Path(f"{prefix}.work/job.json").exists():
            run(vocabulary, prefix, source, dedup="exact")
            assert left(tmp_path, f"c{moment}.") == {f"c{moment}{suffix}" for suffix in SUFFIXES}
        assert content(prefix) == content(tmp_path / "whole")
        for suffix in SUFFIXES:
            Path(f"{prefix}{suffix}").unlink()
    else:
        pytest.fail("200 changes on the disk are not enough")
    assert moment > 40


def test_killed_at_random_with_workers_it_goes_on_to_the_same_bytes(
    vocabulary: str, tmp_path: Path, jsonl: Write
) -> None:
    source = jsonl("in.jsonl", TEXTS * 60)
    run(vocabulary, tmp_path / "whole", source, unit_bytes=1 << 20)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--tokenizer",
               vocabulary, "--output-prefix", str(tmp_path / "c"), "--workers", "2", "--unit-megabytes", "1"]
    moments = random.Random(5)
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and "input files" in process.stdout.readline()
        time.sleep(moments.uniform(0.0, 1.2))
        process.kill()
        process.communicate()
        if (tmp_path / "c.json").exists():
            break
    if not (tmp_path / "c.json").exists():
        assert subprocess.run(command, capture_output=True).returncode == 0
    run(vocabulary, tmp_path / "c", source, unit_bytes=1 << 20, overwrite=True)
    assert content(tmp_path / "c") == content(tmp_path / "whole")
    assert left(tmp_path, "c.") == {f"c{suffix}" for suffix in SUFFIXES}


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    """The run fails when that many shards are made."""
    original, made = shard.ShardMaker.make, [0]

    def make(self: shard.ShardMaker, *args: Any) -> None:
        if made[0] == shards:
            raise error
        original(self, *args)
        made[0] += 1

    monkeypatch.setattr(shard.ShardMaker, "make", make)


def test_a_run_that_goes_on_says_so_and_makes_only_what_is_missing(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl("in.jsonl", TEXTS)
    with monkeypatch.context() as patch:
        stop_after(patch, 1, UserError("stopped"))
        with pytest.raises(UserError, match="stopped; 1 of 2 parts are kept in .*c.work for the same command"):
            run(vocabulary, tmp_path / "c", source)
    said: list[str] = []
    stop_after(monkeypatch, 1, AssertionError("a finished shard is made again"))
    run(vocabulary, tmp_path / "c", source, said=said)
    assert any("c.work is continued: 1 of 2 parts are finished" in line for line in said)


def test_a_damaged_shard_is_made_again(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl("in.jsonl", TEXTS)
    run(vocabulary, tmp_path / "whole", source)
    for damage in ("bin", "json"):
        with monkeypatch.context() as patch:
            stop_after(patch, 1, UserError("stopped"))
            with pytest.raises(UserError):
                run(vocabulary, tmp_path / f"c-{damage}", source)
        with open(tmp_path / f"c-{damage}.work" / f"0000000.{damage}", "r+b") as file:
            file.truncate(10)
        run(vocabulary, tmp_path / f"c-{damage}", source)
        assert content(tmp_path / f"c-{damage}") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ("input", "in.jsonl changed"),
        ("more", "the inputs are 2 files, not the same 1"),
        ("eod", "eod_id was 2 and is None"),
        ("clean", "clean was none and is all"),
        ("broken", "job.json cannot be read"),
    ],
)
def test_another_job_starts_afresh_and_says_why(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch, changed: str, reason: str
) -> None:
    inputs, said = [jsonl("in.jsonl", TEXTS)], list[str]()
    with monkeypatch.context() as patch:
        stop_after(patch, 1, UserError("stopped"))
        with pytest.raises(UserError):
            run(vocabulary, tmp_path / "c", *inputs)
    other: dict[str, Any] = {"eod": {"append_eod": False}, "clean": {"clean": "all"}}.get(changed, {})
    if changed == "input":
        jsonl("in.jsonl", TEXTS[:200])
    if changed == "more":
        inputs.append(jsonl("more.jsonl", ["more"]))
    if changed == "broken":
        (tmp_path / "c.work" / "job.json").write_text("{}")
    run(vocabulary, tmp_path / "c", *inputs, said=said, **other)
    assert any("another job's work, which is removed: " in line and reason in line for line in said)
    run(vocabulary, tmp_path / "d", *inputs, **other)
    assert content(tmp_path / "c") == content(tmp_path / "d")


def test_what_does_not_change_shards_may_change_between_runs(
    vocabulary: str, tmp_path: Path, jsonl: Write
) -> None:
    """A bad record stops the run; told to skip it, the next one keeps what was done."""
    source = jsonl("in.jsonl", TEXTS)
    source.write_text(source.read_text() + "{\n")
    with pytest.raises(UserError, match=r"in.jsonl:301: not JSON.*1 of 2 parts are kept"):
        run(vocabulary, tmp_path / "c", source)
    assert left(tmp_path, "c.") == {"c.work"}
    said: list[str] = []
    counts = run(vocabulary, tmp_path / "c", source, said=said, on_error="skip", shuffle_seed=None, workers=2)
    assert counts.skipped == 1 and counts.faults[0].startswith(f"{source}:301: ")
    assert any("1 of 2 parts are finished" in line for line in said)


def test_an_input_that_changes_while_it_is_read_is_noticed(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl("in.jsonl", TEXTS)
    original = shard.ShardMaker._encode

    def encode(self: shard.ShardMaker, *args: Any) -> Any:
        jsonl("in.jsonl", TEXTS[:3])
        return original(self, *args)

    monkeypatch.setattr(shard.ShardMaker, "_encode", encode)
    with pytest.raises(UserError, match="in.jsonl was changed while it was read"):
        run(vocabulary, tmp_path / "c", source)


def test_two_runs_of_one_output_are_kept_apart(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    with claim(tmp_path / "c.work"), pytest.raises(UserError, match="another run is writing .*c.work"):
        run(vocabulary, tmp_path / "c", jsonl("in.jsonl", TEXTS))


def test_a_process_that_outlives_its_run_leaves_no_shard(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shard.ShardMaker._encode

    def encode(self: shard.ShardMaker, *args: Any) -> Any:
        (self.shards.folder / "run").write_text("another")
        return original(self, *args)

    monkeypatch.setattr(shard.ShardMaker, "_encode", encode)
    with pytest.raises(UserError, match="another run has taken over"):
        run(vocabulary, tmp_path / "c", jsonl("in.jsonl", TEXTS))
    assert not left(tmp_path, "c.")


def test_control_c_leaves_the_work_and_says_how_to_go_on(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    source = jsonl("in.jsonl", TEXTS * 400)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--tokenizer",
               vocabulary, "--output-prefix", str(tmp_path / "c"), "--workers", "2", "--unit-megabytes", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path).glob("c.work/0*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted: " in errors and "the same command goes on" in errors and "Traceback" not in errors
    assert left(tmp_path, "c.") == {"c.work"}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("limit", "message"), [(3_000, "cannot write to .*c.work: File too large"),
                                                (15_000, "cannot write .*/c: File too large; the same command")])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    vocabulary: str, tmp_path: Path, jsonl: Write, limit: int, message: str
) -> None:
    """No file may be larger than the limit: it stops the first shard, or the corpus after all shards."""
    source = jsonl("in.jsonl", TEXTS * 2)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(UserError, match=message):
            run(vocabulary, tmp_path / "c", source, unit_bytes=10_000)

    assert in_child(limited) == 0
    assert left(tmp_path, "c.") == ({"c.work"} if limit == 15_000 else set())
    run(vocabulary, tmp_path / "c", source, unit_bytes=10_000)
    run(vocabulary, tmp_path / "whole", source, unit_bytes=10_000)
    assert content(tmp_path / "c") == content(tmp_path / "whole")


def test_output_beside_its_input_goes_on_too(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as input does not take its own unfinished work for more input."""
    jsonl("data/in.jsonl", TEXTS)
    with monkeypatch.context() as patch:
        stop_after(patch, 1, UserError("stopped"))
        with pytest.raises(UserError, match="1 of 2 parts"):
            run(vocabulary, tmp_path / "data" / "c", tmp_path / "data")
    assert run(vocabulary, tmp_path / "data" / "c", tmp_path / "data").documents == 300


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    """Peak memory of a process that prepares 2 MB and of one that prepares 40 MB differ by little."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from engine.data.preprocess import *; "
        "prepare(Settings(inputs=[sys.argv[2]], tokenizer=sys.argv[3], output_prefix=sys.argv[2] + '.c', workers=1, "
        "memory_bytes=8 << 20, unit_bytes=4 << 20, dedup='exact'), say=lambda line: None); "
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell a process' peak memory without its parent's")
    peaks = []
    for copies in (50, 1000):
        source = jsonl(f"{copies}.jsonl", [f"{n}: {text}" for n in range(copies) for text in TEXTS])
        done = subprocess.run([sys.executable, "-c", script, str(ROOT), str(source), vocabulary], capture_output=True,
                              text=True, check=True)
        peaks.append(int(done.stdout) >> 10)
    assert peaks[1] < peaks[0] + 40


def test_the_digest_of_a_large_file_is_that_of_its_blocks(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    source = jsonl("in.jsonl", TEXTS)
    for unit_bytes in (10_000, 1 << 20):
        run(vocabulary, tmp_path / f"c{unit_bytes}", source, unit_bytes=unit_bytes)
    one, many = (json.loads((tmp_path / f"c{size}.json").read_text())["inputs"][0] for size in (1 << 20, 10_000))
    assert set(one) == {"name", "size", "sha256"} and set(many) == {"name", "size", "sha256_of_blocks_of_10000"}


def test_duplicates_go_wherever_they_stand_and_the_first_stays(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_SMALL_INPUT", 0)
    inputs = jsonl("a.jsonl", ["one", *TEXTS]), jsonl("b.jsonl", ["two", *reversed(TEXTS), "one"])
    for workers in (1, 2):
        counts = run(vocabulary, tmp_path / f"c{workers}", *inputs, dedup="exact", workers=workers, shuffle_seed=None)
        assert (counts.documents, counts.duplicates) == (302, 301)
    assert content(tmp_path / "c1") == content(tmp_path / "c2")
    corpus, tokenizer = IndexedDataset(tmp_path / "c1"), load_tokenizer(vocabulary)
    texts = [tokenizer.decode(corpus.document(n)) for n in range(corpus.documents)]
    assert texts == ["one", *TEXTS, "two"]
    facts = json.loads((tmp_path / "c1.json").read_text())["counts"]
    assert facts["text_bytes"] == sum(map(len, texts)) and facts["tokens"] == len(corpus.tokens)
    near = run(vocabulary, tmp_path / "near", inputs[0], dedup="near:20x5", workers=1)
    assert near.documents + near.duplicates == 301 and near.duplicates > 0


def test_cleaning_rules_and_the_report_name_what_they_took(
    vocabulary: str, tmp_path: Path, jsonl: Write
) -> None:
    words = "the cat sat on the mat and looked at the dog which lay in the sun "
    good = [f"{words * 5}number {n}.".replace("cat", f"cat {n}") for n in range(100)]
    source = jsonl("in.jsonl", [*good[:50], "too short", *good[50:], "\u00adx\u00ad"])
    reports = []
    for unit_bytes in (4_000, 1 << 20):
        prefix = tmp_path / f"c{unit_bytes}"
        counts = run(vocabulary, prefix, source, unit_bytes=unit_bytes, clean="control", quality="few_words=10",
                     report=f"{prefix}-report.json", shuffle_seed=None)
        assert counts.dropped == {"few_words": 2} and counts.documents == 100
        reports.append(json.loads(Path(f"{prefix}-report.json").read_text()))
    assert reports[0] == reports[1]
    samples = {sample["where"]: sample["text"] for sample in reports[0]["dropped"]["few_words"]["samples"]}
    assert samples == {f"{source}:51": "too short", f"{source}:102": "x"}
    assert (tmp_path / "c4000-report.txt").exists()
    for wrong in ({"clean": "nfcc"}, {"quality": "few_word"}, {"dedup": "nearly"}):
        with pytest.raises(UserError, match="did you mean"):
            run(vocabulary, tmp_path / "d", source, **wrong)


def test_shards_that_left_bad_records_out_do_not_serve_a_run_that_stops_at_them(
    vocabulary: str, tmp_path: Path, jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl("in.jsonl", TEXTS)
    source.write_text("BAD\n" + source.read_text())
    with monkeypatch.context() as patch:
        stop_after(patch, 1, UserError("stopped"))
        with pytest.raises(UserError, match="stopped; 1 of"):
            run(vocabulary, tmp_path / "c", source, on_error="skip")
    with pytest.raises(UserError, match="in.jsonl:1: not JSON"):
        run(vocabulary, tmp_path / "c", source)
    assert run(vocabulary, tmp_path / "c", source, on_error="skip").skipped == 1


def test_a_report_overwrites_nothing(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    """Neither its JSON nor the table beside it."""
    source = jsonl("in.json", TEXTS)
    beside = jsonl("books.txt", TEXTS)
    other = tmp_path / "other.json"
    other.write_text("{}")
    (tmp_path / "folder.json").mkdir()
    model = Path(load_tokenizer(vocabulary).files["tokenizer.model"])
    for report, message in [
        (source, "another file of this run"), (beside.with_suffix(".json"), "another file of this run"),
        (tmp_path / "c.json", "another file of this run"), (model, "another file of this run"),
        (other, "exists; choose another --report"), (tmp_path / "folder.json", "it is a folder"),
        (tmp_path / "none" / "r.json", "no such folder"), (tmp_path / "r.txt", "a .txt is written beside it"),
    ]:  # fmt: skip
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=message):
            run(vocabulary, tmp_path / "c", source, beside, quality="few_words=2", report=str(report))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(vocabulary, tmp_path / "c", source, quality="few_words=2", report=str(other), overwrite=True)
    assert json.loads(other.read_text())["documents"] == 300


def test_units_are_whole_blocks_of_a_digest(vocabulary: str, tmp_path: Path, jsonl: Write) -> None:
    source = jsonl("in.jsonl", ["word " * 20_000] * 70)  # 7 MB
    for megabytes in (2, 3, 16):
        run(vocabulary, tmp_path / f"c{megabytes}", source, unit_bytes=megabytes << 20)
    assert content(tmp_path / "c2") == content(tmp_path / "c3") == content(tmp_path / "c16")

"""Bad input ends every entry point with one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import runs

from engine import finetune, pretrain, verify
from engine.checkpoint import latest_step
from engine.tokenizer.train import train as train_tokenizer
from engine.train import rendezvous
from engine.train.lock import RunLock
from engine.train.place import Place
from engine.train.rendezvous import NoMeeting, connect

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    return runs.write_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> list[str]:
    """Two vocabularies of the same text; the run was trained with the first."""
    for size in (300, 310):
        train_tokenizer(lambda: iter(TEXT), folder / f"tokenizer-{size}", vocab_size=size)
    return [str(folder / f"tokenizer-{size}") for size in (300, 310)]


@pytest.fixture(scope="module")
def trained(folder: Path, data: list[str], tokenizers: list[str]) -> Path:
    """A finished run of two steps."""
    flags = [*runs.MODEL, "--vocab-size", "320", "--steps", "2", *data, "--tokenizer", tokenizers[0]]
    done = runs.pretrain(*flags, "--out", folder / "trained")
    assert done.returncode == 0, done.stderr
    return folder / "trained"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """The finished run, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    yield tmp_path / "run"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


# The launcher library asks for a file descriptor that captured output does not have.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


def fault(capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    """The one line on stderr that pretraining ends with, and nothing on stdout."""
    assert pretrain.main([*map(str, flags)]) == runs.BAD_INPUT
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, said
    return said.err


@pytest.mark.parametrize(("flags", "words"), [
    (["--laers", "2"], "unknown option --laers; did you mean --layers?"),
    (["--lr", "-0.1"], "--lr -0.1 must be at least 0"),
    (["--tp", "2"], "1 process cannot hold tp 2"),
    (["--vocab-size", "1e12"], "beyond any model"),
    (["--data", "nowhere"], "no dataset at nowhere.idx"),
    (["--tokenizer", "nowhere"], "nowhere"),
    (["--load", "nowhere"], "nowhere is not a folder"),
    (["--config", "nowhere.yaml"], "No such file"),
    (["--device", "tpu"], "--device 'tpu' is not known"),
    (["--seq-len", "4000"], "fewer than the 4001 of one sample"),
    (["--world-size", "none"], "--world-size 'none' is not a number of processes"),
    (["--resume"], "--resume needs"),
])
def test_a_mistake_in_the_flags_writes_nothing(
        capsys: pytest.CaptureFixture[str], data: list[str], tmp_path: Path, flags: list[str], words: str) -> None:
    if flags == ["--resume"]:
        assert "--resume continues the run in --out" in fault(capsys, *runs.MODEL, *data, *flags)
    else:
        assert words in fault(capsys, *runs.MODEL, *([] if "--data" in flags else data), "--out", tmp_path / "out",
                              *flags)
    assert not list(tmp_path.iterdir())


def test_no_data_names_the_tool_that_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tools/preprocess_data.py" in fault(capsys, *runs.MODEL)


def test_heads_that_do_not_divide(capsys: pytest.CaptureFixture[str], data: list[str]) -> None:
    line = fault(capsys, *data, *"--heads 30 --kv-heads 30 --head-dim 8 --tp 4 --check --world-size 4".split())
    assert line == "error: heads 30 is not divisible by tp 4; use --tp 1, 2, 3, 5 or 6\n"


def test_a_folder_with_checkpoints_is_not_written_over(
        capsys: pytest.CaptureFixture[str], trained: Path, data: list[str]) -> None:
    before = snapshot(trained)
    assert "continue it with --resume, or give another --out" in fault(capsys, *runs.MODEL, *data, "--out", trained)
    assert snapshot(trained) == before


@pytest.mark.parametrize(("flags", "words"), [
    (["--layers", "6"], "--layers 6 contradicts"), (["--tied"], "--tied True contradicts"),
    (["--model", "7b"], "whose model tiny has layers 4; leave the flag out"),
    (["--family", "gpt2"], "--family gpt2 contradicts"), (["--dtype", "bf16"], "--dtype"),
    (["--vocab-size", "330"], "--vocab-size 330 contradicts"), (["--qk-norm"], "--qk-norm True contradicts"),
])
def test_a_resumed_run_keeps_its_model(capsys: pytest.CaptureFixture[str], copy: Path, flags: list[str],
                                       words: str) -> None:
    before = snapshot(copy / "checkpoints")
    assert pretrain.main(["--out", str(copy), "--resume", "--steps", "4", *flags]) == runs.BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert snapshot(copy / "checkpoints") == before


def test_a_resumed_run_keeps_its_tokenizer(capsys: pytest.CaptureFixture[str], copy: Path,
                                           tokenizers: list[str]) -> None:
    line = fault(capsys, "--out", copy, "--resume", "--steps", "4", "--tokenizer", tokenizers[1])
    assert "is not the one that" in line and "leave the flag out" in line


def test_a_newer_format_asks_for_a_newer_triax(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    step = latest_step(copy)
    assert step is not None
    path = step / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    before = snapshot(copy)
    assert "written by a newer Triax: format version 2, and this one reads 1" in fault(
        capsys, "--out", copy, "--resume", "--steps", "4")
    assert snapshot(copy) == before


def test_two_runs_in_one_folder(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    before = snapshot(copy)
    with RunLock(copy):
        for check in ([], ["--check"]):
            line = fault(capsys, "--out", copy, "--resume", "--steps", "4", *check)
            assert line == f"error: another run is writing {copy}; wait for it, or give another --out\n"
    assert snapshot(copy) == before


@pytest.mark.parametrize("out", ["file", "file/run", "file/deep/run", "link/run"])
def test_an_out_that_cannot_be_written(capsys: pytest.CaptureFixture[str], data: list[str], tmp_path: Path,
                                       out: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    line = fault(capsys, *runs.MODEL, *data, "--out", tmp_path / out, "--check")
    assert "cannot be written" in line and "is not a folder" in line
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("env", "words"), [
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 must be below WORLD_SIZE 2"),
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' in the environment is not a whole number"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' in the environment is not a whole number"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK 0 must be below WORLD_SIZE 0"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT='70000' in the environment is not a port"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment is not a port"),
])
def test_an_environment_that_makes_no_sense(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: list[str], tmp_path: Path,
        env: dict[str, str], words: str) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert words in fault(capsys, *runs.MODEL, *data, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: list[str],
                              tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        line = fault(capsys, *runs.MODEL, *data, "--out", tmp_path / "out")
    assert f"MASTER_PORT {port} on 127.0.0.1 cannot be opened; is another run using it?" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("host", "words"), [
    ("nowhere.invalid", "MASTER_ADDR 'nowhere.invalid' is not a host that this machine knows ("),
    ("[::1]", "nothing answers at ::1 port 1 within 1 s; was rank 0 started, and is MASTER_ADDR its machine?"),
])
def test_a_host_where_nobody_is(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: list[str],
                                tmp_path: Path, host: str, words: str) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert words in fault(capfd, *runs.MODEL, *data, "--out", tmp_path / "out", "--timeout", "1")
    assert not list(tmp_path.iterdir())


def test_a_seat_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that meet at one port by mistake: the second one's ranks must not join the first."""
    place = Place(0, 2, 0, 2, port=runs.free_port())
    store = connect(place, 5.0)
    connect(replace(place, rank=1), 5.0)
    with pytest.raises(NoMeeting, match="another rank 1 meets at 127.0.0.1 port .*: is another run using it"):
        connect(replace(place, rank=1), 5.0)
    assert store.add("seat/0", 0) == 1


@pytest.fixture(scope="module")
def mute() -> Iterator[int]:
    """The port of a listener that says nothing. It stays until the module's end: torch writes to the descriptor of
    stderr when such a connection is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("flags", [[], ["--heads", "7"]])
def test_a_listener_that_says_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                      data: list[str], tmp_path: Path, mute: int, flags: list[str]) -> None:
    """A port that another program holds, or a rank 0 that is stopped: torch's store would wait there for good."""
    monkeypatch.setattr(rendezvous.refuse, "__kwdefaults__", {"patience": 1.0, "open_store": True})
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(mute)}.items():
        monkeypatch.setenv(name, value)
    line = fault(capfd, *runs.MODEL, *data, "--out", tmp_path / "out", "--timeout", "1", *flags)
    says = f"what answers at 127.0.0.1 port {mute} says nothing for 1 s; is rank 0 stopped, or does another program "
    assert ("heads 7" if flags else says) in line
    assert not list(tmp_path.iterdir())


def recipe(name: str, *flags: str | Path, launcher: tuple[str, ...] = ("bash",)) -> subprocess.CompletedProcess[str]:
    """Starts a recipe by bash, or by another launcher, with this Python."""
    command = [*launcher, str(runs.ROOT / "examples" / name), *map(str, flags)]
    env = {**runs.environment(PYTHON=sys.executable), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize(("flags", "words"), [
    (["--laers", "2"], "did you mean --layers?"), (["--tp", "2"], "1 process cannot hold tp 2"),
])
def test_the_bash_form_of_a_recipe_returns_2(data: list[str], tmp_path: Path, flags: list[str], words: str) -> None:
    done = recipe("pretrain_tiny.sh", *data, "--out", tmp_path / "out", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_7b_model_on_one_process_is_refused_in_plain_words(data: list[str], tmp_path: Path) -> None:
    launcher = ("torchrun",)
    done = recipe("pretrain_7b.sh", *data, "--out", tmp_path / "out", launcher=launcher)
    if "step 1/" in done.stdout:
        pytest.skip("this machine holds a 7B model")
    assert done.returncode == 1, "torchrun's own code"
    assert "exitcode  : 2" in done.stderr, "the worker's"
    assert "error: training 7b in bfloat16 needs " in done.stderr and "Traceback" not in done.stderr.split("error:")[0]
    assert "bash examples/pretrain_tiny.sh" in done.stderr and "What would hold it: one GPU of 141 GB" in done.stderr
    assert not list(tmp_path.iterdir())


def test_tuning_and_verification_say_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main([]) == 2
    assert "give its folder" in capsys.readouterr().err
    for flags, words in ((["--data", "x"], "--data: verification trains on tokens and weights made from --seed"),
                         (["--dtype", "bf16"], "layouts are compared in fp64 or fp32"),
                         (["--tp", "2"], "1 process cannot hold tp 2")):
        assert verify.main(flags) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_the_command_itself_returns_2(data: list[str], tmp_path: Path) -> None:
    done = runs.pretrain(*runs.MODEL, *data, "--out", tmp_path / "out", "--stpes", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --stpes; did you mean --steps?\n"
    assert not list(tmp_path.iterdir())

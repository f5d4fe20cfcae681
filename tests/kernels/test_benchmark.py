"""The benchmark of kernels without a GPU: its arithmetic, table, files and flow, with timings that are made up."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/kernels.py, under a name of its own: transformers would take `kernels` for Hugging Face's."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield load("kernels")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    return load("sanitize")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Clock:
    """Takes the seconds a call returns for those it took; the n-th turn takes n times as long."""

    def __init__(self) -> None:
        self.turns: dict[Any, int] = {}
        self.order: list[float] = []

    def seconds(self, run: Callable[[], float]) -> float:
        taken = run()
        self.turns[run] = self.turns.get(run, 0) + 1
        self.order.append(taken)
        return taken * self.turns[run]

    def extra(self, run: Callable[[], float]) -> int:
        return int(run() * 1e9)


FLOOR = (lambda: 0.001, lambda: 0.002)
"""A copy of 2 GiB of traffic in 1 ms, a product of 8192^3 in 2 ms."""


def broken(device: torch.device) -> Callable[[], float]:
    raise RuntimeError("no such luck\nand more")


def breaks_later(device: torch.device) -> Callable[[], float]:
    calls = iter([0.001, 0.001, 0.001])
    return lambda: next(calls)


def measured(bench: ModuleType, rounds: int = 3, **changes: Any) -> Any:
    """The row of a case that moves 1 GiB in 0.8 ms; its peer takes twice that."""
    case = bench.Case(**{"kernel": "norm", "shape": "8 x 8", "dtype": "bf16", "build": lambda device: lambda: 0.0008,
                         "bytes": 1 << 30, "target": 0.6,
                         "peers": {"torch": lambda device: lambda: 0.0016, "absent": lambda device: None}, **changes})
    return bench.measure("family", case, Clock(), rounds, FLOOR, CPU, "c0ffee")


def test_time_share_rate_and_ratio(bench: ModuleType) -> None:
    row = measured(bench)
    assert row.ours.seconds == pytest.approx([0.0008, 0.0016, 0.0024]) and row.ours.median == pytest.approx(0.0016)
    assert row.copy_rate == pytest.approx(2 * (1 << 30) / 0.002)
    assert row.floor == pytest.approx(0.001) and row.share(row.ours) == pytest.approx(0.625)
    assert row.rate(row.ours) == (pytest.approx((1 << 30) / 0.0016 / 1e12), "TB/s")
    assert row.ratio(row.sides[1]) == pytest.approx(2.0) and row.ratio(row.ours) == 1.0
    assert row.ours.extra == 800_000 and row.verdict == "met"
    assert measured(bench, target=0.63).verdict == "missed" and measured(bench, target=0.0).verdict == ""


def test_what_multiplies_is_held_against_the_product(bench: ModuleType) -> None:
    row = measured(bench, bytes=1 << 20, flops=8192**3)
    assert row.product_rate == pytest.approx(2 * 8192**3 / 0.004)
    assert row.share(row.ours) == pytest.approx(0.002 / 0.0016)
    assert row.rate(row.ours) == (pytest.approx(8192**3 / 0.0016 / 1e12), "TFLOP/s")


def test_sides_and_floor_take_turns(bench: ModuleType) -> None:
    clock = Clock()
    case = bench.Case(kernel="k", shape="s", dtype="fp32", build=lambda device: lambda: 1.0, bytes=8, flops=8,
                      peers={"a": lambda device: lambda: 2.0, "b": lambda device: lambda: 3.0})
    bench.measure("family", case, clock, 2, FLOOR, CPU, "")
    assert clock.order == [1.0, 2.0, 3.0, 0.001, 0.002] * 2


def test_a_peer_that_fails_or_is_absent_ends_nothing(bench: ModuleType) -> None:
    row = measured(bench, peers={"broken": broken, "later": breaks_later, "absent": lambda device: None,
                                 "fine": lambda device: lambda: 0.0004})
    whys = {side.name: side.why for side in row.sides}
    assert whys["broken"] == "RuntimeError: no such luck" and whys["later"] == "StopIteration"
    assert whys["absent"] == "not installed, or cannot run here"
    assert whys["ours"] == whys["fine"] == ""
    assert row.ratio(row.sides[-1]) == pytest.approx(0.5) and row.verdict == "met"
    text = "\n".join(" ".join(line) for line in bench.lines([row]))
    assert "broken: RuntimeError: no such luck  - - -" in text


@pytest.mark.parametrize("build", [broken, breaks_later])
def test_ours_that_fails_is_a_row_that_says_so(bench: ModuleType, build: Any, tmp_path: Path) -> None:
    row = measured(bench, build=build)
    assert row.verdict == "failed" and [side.name for side in row.sides] == ["ours"]
    assert row.ours.why in bench.lines([row])[1][0] and bench.lines([row])[1][5] == "failed"
    bench.write_csv([row], tmp_path / "kernels.csv")
    assert row.ours.why in (tmp_path / "kernels.csv").read_text()


def test_the_table_has_a_line_for_each_side(bench: ModuleType) -> None:
    head, ours, peer, absent = bench.lines([measured(bench)])
    assert head == ["case", "dtype", "us", "rate", "of floor", "target", "time / ours", "extra MB"]
    assert ours == ["norm, 8 x 8", "bf16", "1,600.0", "0.67 TB/s", "62%", "60% met", "", "0.8"]
    assert peer == ["    torch", "", "3,200.0", "0.34 TB/s", "31%", "", "2.00", "1.6"]
    assert absent == ["    absent: not installed, or cannot run here", "", "-", "-", "-", "", "-", "-"]


def test_the_csv_has_a_line_for_each_side(bench: ModuleType, tmp_path: Path) -> None:
    bench.write_csv([measured(bench)], tmp_path / "kernels.csv")
    ours, torchs, absent = csv.DictReader((tmp_path / "kernels.csv").open())
    assert ours == {"family": "family", "kernel": "norm", "shape": "8 x 8", "dtype": "bf16", "side": "ours",
                    "microseconds": "1600.00", "rate": "0.6711", "unit": "TB/s", "share_of_floor": "0.6250",
                    "time_over_ours": "1.0000", "extra_bytes": "800000", "target": "0.6", "verdict": "met", "why": "",
                    "commit": "c0ffee"}
    assert torchs["time_over_ours"] == "2.0000" and torchs["verdict"] == ""
    assert absent["microseconds"] == "" and absent["why"].startswith("not installed")


@pytest.fixture
def results(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Results in a folder, as on a machine with a GPU of that name."""
    pytest.importorskip("triton")
    facts = bench.machine()
    return lambda gpu: (monkeypatch.setattr(bench, "machine", lambda: {**facts, "gpu": gpu}),
                        bench.Results(tmp_path))[1]


def test_a_later_call_keeps_the_rows_it_did_not_run(bench: ModuleType, results: Callable[[str], Any],
                                                    tmp_path: Path) -> None:
    first = results("H100")
    first.add(measured(bench))
    first.add(measured(bench, shape="9 x 9"))
    second = results("H100")
    second.add(measured(bench, rounds=5))
    saved = json.loads((tmp_path / "kernels.json").read_text())
    assert saved["machine"]["gpu"] == "H100" and saved["machine"]["triton"]
    assert {row["shape"]: len(row["sides"][0]["seconds"]) for row in saved["rows"]} == {"8 x 8": 5, "9 x 9": 3}
    assert len((tmp_path / "kernels.csv").read_text().splitlines()) == 7


def test_rows_of_another_gpu_are_not_mixed_in(bench: ModuleType, results: Callable[[str], Any], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    results("H100").add(measured(bench))
    assert not results("A100").rows
    assert "written anew" in capsys.readouterr().out


def test_the_pictures_of_all_families_are_one_file(bench: ModuleType, results: Callable[[str], Any],
                                                   tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = results("H100")
    found.add(measured(bench))
    found.add(measured(bench, shape="9 x 9", build=broken))
    found.plot()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.csv", "kernels.json", "kernels.pdf"]
    assert (tmp_path / "kernels.pdf").read_bytes().startswith(b"%PDF")


def test_without_matplotlib_a_line_says_so(bench: ModuleType, results: Callable[[str], Any], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = results("H100")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found.add(measured(bench))
    found.plot()
    assert "triax[plot]" in capsys.readouterr().out and not list(tmp_path.glob("*.pdf"))


def test_the_budget_stops_between_cases_and_names_what_is_left(bench: ModuleType,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    todo = [("family", bench.Case(kernel=name, shape="", dtype="", build=broken)) for name in ("a", "b", "c", "d e")]
    times = iter([0.0, 0.0, 40.0, 100.0, 150.0])  # the longest case took 60 s: a fourth may not fit into 200
    assert [case.kernel for _, case in bench.within(200.0, todo, clock=lambda: next(times))] == ["a", "b", "c"]
    assert capsys.readouterr().out == ("left out after 150 s of 200: 1 cases. Go on with: "
                                       "python benchmarks/kernels.py --save --only 'd e'\n")
    assert len(list(bench.within(200.0, todo, clock=lambda: 0.0))) == 4


def test_only_takes_files_and_kernels_and_refuses_other_words(bench: ModuleType) -> None:
    assert {family for family, _ in bench.picked(["adamw"])} == {"adamw"}
    assert {(family, case.kernel) for family, case in bench.picked(["adamw", "gradient norm"])} == {
        ("adamw", "AdamW"), ("gradient_norm", "gradient norm")}
    with pytest.raises(SystemExit, match="no cases named horse; there are"):
        bench.picked(["horse"])


def test_peers_are_chosen_by_words_in_their_names(bench: ModuleType) -> None:
    todo = bench.picked([])
    assert bench.with_peers(todo, "all") == todo
    few = bench.with_peers(todo, "eager, SDPA")
    names = {name for _, case in few for name in case.peers}
    assert {"torch eager", "SDPA flash", "SDPA cuDNN"} <= names and not {"torch.compile", "Liger", "apex"} & names
    assert [case.build for _, case in few] == [case.build for _, case in todo]
    for words, named in (("eager,hors", "hors"), ("", "''")):
        with pytest.raises(SystemExit, match=f"no peers named {named}; there are all: .*FlexAttention"):
            bench.with_peers(todo, words)


def test_every_kernel_has_tiny_cases_of_a_fiftieth_of_the_work_at_most(bench: ModuleType) -> None:
    """What the sanitizer watches: at real shapes it comes to a few of them in its time."""
    real, tiny = (bench.cases.all_cases(tiny=size) for size in (False, True))
    assert {case.kernel for case in tiny} == {case.kernel for case in real}
    for kernel in {case.kernel for case in tiny}:
        most, least = (edge(case.bytes + case.flops for case in some if case.kernel == kernel)
                       for edge, some in ((max, tiny), (min, real)))
        assert 0 < most < least / 50, (kernel, most, least)


@pytest.mark.parametrize("family", ["adamw", "gradient_norm", "rope", "softmax"])
def test_what_the_sanitizer_watches_runs(sanitize: ModuleType, bench: ModuleType, family: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    sanitize.run_cases([family], DEVICE)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bench.cases.all_cases([family], tiny=True)) + 1 and lines[-1] == "all cases"


LARGER = ["activation", "attention", "cross_entropy", "dropout", "linear_cross_entropy", "norm"]


@pytest.mark.soak
@pytest.mark.parametrize("family", LARGER)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_what_the_sanitizer_watches_runs_for_larger_kernels(sanitize: ModuleType, bench: ModuleType,
                                                            family: str) -> None:
    pytest.importorskip("triton")
    sanitize.run_cases([family], DEVICE)


def test_every_case_can_be_held_against_a_floor_and_told_from_the_others(bench: ModuleType) -> None:
    found = [case for _, case in bench.picked([])]
    names = [(case.kernel, case.shape, case.dtype) for case in found]
    assert len(set(names)) == len(names)
    for case in found:
        assert case.bytes or case.flops, case.kernel
        assert 0 < case.target <= 1, case.kernel
        assert case.peers and "ours" not in case.peers, case.kernel
        assert case.dtype in ("bf16", "fp16", "fp32"), case.kernel


@pytest.mark.parametrize(("builds", "code", "says"), [
    ([lambda device: lambda: 0.0008], 0, "1 cases, 0 below target, 0 failed"),
    ([broken, lambda device: lambda: 0.001], 1, "2 cases, 1 below target, 1 failed")], ids=["fine", "one fails"])
def test_the_whole_flow_measures_all_and_exits_by_what_failed(
        bench: ModuleType, builds: list[Any], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    todo = [("family", bench.Case(kernel=f"kernel {number}", shape="8 x 8", dtype="bf16", build=build, bytes=1 << 30,
                                  target=0.6)) for number, build in enumerate(builds)]
    for name, value in {"obstacle": lambda: "", "CudaMeter": Clock, "floors": lambda device: FLOOR,
                        "picked": lambda only: todo}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--rounds", "1", "--save", str(tmp_path)])
    assert bench.main() == code
    out = capsys.readouterr().out
    assert says in out and "a GPU\n" in out
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) == len(builds)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing_and_what_runs_instead() -> None:
    done = subprocess.run([sys.executable, "benchmarks/kernels.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("benchmarks/kernels.py needs a CUDA GPU, and ") and "benchmarks/resources.py" in line


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_make_targets_of_a_gpu_say_that_there_is_none_and_build_nothing(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for target in ("gpu", "gpu-first", "gpu-bench"):
        command = ["make", "--no-print-directory", target, f"PY={sys.executable}"]  # the suite itself may run in make
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"make {target}: no torch that sees a CUDA GPU here, nothing was run\n"
    assert [path.name for path in tmp_path.iterdir()] == ["Makefile"]


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu-first")
def test_the_first_run_on_a_gpu_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/first_run.py", "--tiny", "--save", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "failed: nothing", done.stdout + done.stderr
    checks = json.loads((tmp_path / "first_run.json").read_text())["checks"]
    assert len(checks) > 25 and {check["how"] for check in checks} == {"PASS"}


def test_a_part_of_the_first_run_that_cannot_be_prepared_does_not_end_the_others(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["first_run.py", "--tiny", "--save", str(tmp_path)])
    room = load("first_run")

    def short(*shape: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(room, "normal", short)
    monkeypatch.setattr(room, "step", lambda report: report.check("a step", lambda: "done"))
    monkeypatch.setattr(room, "full", lambda report, save: None)
    assert room.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "failed: ops came to its end"
    checks = json.loads((tmp_path / "first_run.json").read_text())["checks"]
    assert [check["how"] for check in checks if check["name"] in ("a step", "full came to its end")] == ["PASS"] * 2


def test_what_the_sanitizer_said_is_told_in_a_line(sanitize: ModuleType) -> None:
    said = "========= COMPUTE-SANITIZER\ncase norm, 8 x 8, bf16\ncase rope, 9, bf16\n"
    assert sanitize.verdict("memcheck", 0, said + "all cases\n", 270) == ("memcheck: nothing found in 2 cases", False)
    text, wrong = sanitize.verdict("racecheck", sanitize.FOUND, said, 270)
    assert wrong and text.splitlines()[-1] == "racecheck: found something, the last case begun was rope, 9, bf16"
    assert sanitize.verdict("memcheck", 1, said, 270)[1]
    assert sanitize.verdict("memcheck", None, said, 270) == (
        "memcheck: nothing found in 1 cases, ended after 270 s in rope, 9, bf16", False)


def test_a_machine_without_the_sanitizer_is_told_in_a_line(sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    assert sanitize.main() == 0 and "is not here" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "under", lambda *args: (1, "Error: no permission\n"))
    assert sanitize.main() == 0 and capsys.readouterr().out.endswith("nothing was run: Error: no permission\n")

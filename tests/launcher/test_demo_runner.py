"""The stage runner of `make demo`: what is done is reused, what changed is made again, a failure is one line."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triax_demo", DEMO)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def chain(demo: ModuleType, number: int = 1) -> list:
    """Two stages: one writes a number, the next reads it and writes its double; each leaves a mark when it runs."""
    first = f"import os; open('demo/a', 'w').write('{number}'); print('made a', os.environ['WORD'])"
    second = "open('demo/b', 'w').write(str(2 * int(open('demo/a').read()))); print('made b')"
    return [demo.Stage(name="a", what="a number", commands=(("python", "-c", first),), makes=("demo/a",),
                       env={"WORD": "two words"}, result=lambda root: "it says " + (root / "demo/a").read_text()),
            demo.Stage(name="b", what="its double", commands=(("python", "-c", second),), makes=("demo/b",),
                       after=("a",)),
            demo.Stage(name="c", what="a greeting", commands=(("python", "-c", "print('hello')"),), after=("b",),
                       replay=True)]


def test_stages_run_in_order_and_say_what_came_out(demo: ModuleType, tmp_path: Path, capsys) -> None:
    demo.Runner(tmp_path, chain(demo)).run()
    out = capsys.readouterr().out
    assert (tmp_path / "demo/b").read_text() == "2"
    assert "[1/3] a: a number\n    | $ WORD='two words' python -c" in out
    assert "    | made a two words\n[1/3] a: done in" in out
    assert " s: it says 1\n[2/3] b: its double\n" in out
    assert "made b" in (tmp_path / "demo/logs/b.log").read_text()


def test_a_second_run_reuses_everything_and_shows_the_samples_again(demo: ModuleType, tmp_path: Path, capsys) -> None:
    demo.Runner(tmp_path, chain(demo)).run()
    capsys.readouterr()
    demo.Runner(tmp_path, chain(demo)).run()
    out = capsys.readouterr().out
    assert out.count(": reused (took ") == 3 and "made" not in out.replace("when it was made", "")
    assert "    | hello\n" in out and "it says 1" in out


@pytest.mark.parametrize("change", ["command", "result gone", "stamp gone"])
def test_what_changed_is_made_again_and_all_that_follows(demo: ModuleType, tmp_path: Path, capsys, change: str) -> None:
    demo.Runner(tmp_path, chain(demo)).run()
    if change == "result gone":
        (tmp_path / "demo/a").unlink()
    if change == "stamp gone":
        (tmp_path / "demo/stamps/a.json").unlink()
    capsys.readouterr()
    demo.Runner(tmp_path, chain(demo, 5 if change == "command" else 1)).run()
    assert "reused" not in capsys.readouterr().out
    assert (tmp_path / "demo/b").read_text() == ("10" if change == "command" else "2")


def test_a_newer_tool_makes_its_stage_again(demo: ModuleType, tmp_path: Path, capsys) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text("print('old')")
    stages = [demo.Stage(name="t", what="a tool", commands=(("python", "tool.py"),))]
    demo.Runner(tmp_path, stages).run()
    os.utime(tool, ns=(time.time_ns() + 10**9,) * 2)
    capsys.readouterr()
    demo.Runner(tmp_path, stages).run()
    assert "reused" not in capsys.readouterr().out


def test_a_failure_names_stage_command_and_log_and_is_not_reused(demo: ModuleType, tmp_path: Path, capsys) -> None:
    stages = [demo.Stage(name="bad", what="fails", commands=(("python", "-c", "print('why'); raise SystemExit(3)"),))]
    for _ in range(2):
        with pytest.raises(demo.StageFailed, match="stage 'bad' failed with exit code 3: python -c .*logs/bad.log"):
            demo.Runner(tmp_path, stages).run()
    assert (tmp_path / "demo/logs/bad.log").read_text().endswith("why\n")
    assert capsys.readouterr().out.count("    | why\n") == 2


def test_a_stage_that_does_not_make_what_it_promised_fails(demo: ModuleType, tmp_path: Path) -> None:
    stages = [demo.Stage(name="lazy", what="nothing", commands=(("python", "-c", ""),), makes=("demo/x",))]
    with pytest.raises(demo.StageFailed, match="stage 'lazy' made no demo/x"):
        demo.Runner(tmp_path, stages).run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_child_behind(tmp_path: Path, number: signal.Signals) -> None:
    child = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(DEMO.parent)!r})
import demo
demo.ROOT = Path({str(tmp_path)!r})
demo.stages = lambda: [demo.Stage(name="s", what="sleeps", commands=(("python", "-c", {child!r}),))]
sys.exit(demo.main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    pid = next(int(line.split()[-1]) for line in process.stdout if line.startswith("    | pid"))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_every_stage_of_the_demo_is_made_again_when_what_it_reads_was(demo: ModuleType) -> None:
    maker: dict[str, str] = {}
    for stage in demo.stages():
        assert stage.makes or stage.replay
        maker |= {path.removesuffix(".bin"): stage.name for path in stage.makes}
        for word in (word for command in stage.commands for word in command):
            if word.startswith("demo/") and word != "demo/data":
                assert maker[word] in (stage.name, *stage.after), f"{stage.name} reads {word} of {maker[word]}"

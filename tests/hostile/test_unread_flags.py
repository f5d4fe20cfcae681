"""No flag goes by in silence: an entry point reads each field of the config, or refuses it as a flag by name."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine import finetune, pretrain, verify
from engine.config.flags import parse_values
from engine.config.idle import default_values

ROOT = Path(__file__).parents[2]
ENTRIES: dict[str, ModuleType] = {"engine.pretrain": pretrain, "engine.finetune": finetune, "engine.verify": verify}
EARLY = {
    "model": "names the preset that the other fields come from", "load": "read before there is a config",
    "resume": "read before there is a config", "resume_from": "read before there is a config",
    "tokenizer": "read before there is a config",
    "max_positions": "a rule on --seq-len, and config.json; the table where positions are learned",
}
"""Fields that are read where tests/hostile/chain.py does not look."""

# The launcher library asks for a file descriptor that captured output does not have.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


def other_value(name: str, usual: Any) -> list[str]:
    """The flag with a value that is not its default."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(usual, bool):
        return [flag]
    return [flag, "other" if isinstance(usual, str) else str((usual or 0) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_field_is_read_or_refused(entry: str, chain: Any) -> None:
    unread, reads = set(ENTRIES[entry].UNREAD), chain.reads[entry]
    assert set(default_values()) - unread - reads - set(EARLY) == set(), "neither read nor refused"
    assert unread <= set(default_values())


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_not_read_is_refused_by_name(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ENTRIES[entry].UNREAD:
        assert ENTRIES[entry].main(other_value(name, default_values()[name])) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --{name.replace('_', '-')}: ") and said.count("\n") == 1, said


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.sh")), ids=lambda path: path.stem)
def test_a_recipe_says_nothing_that_its_entry_point_does_not_read(path: Path) -> None:
    entry = finetune if path.stem.startswith("finetune") else pretrain
    block = path.read_text().split('ARGS = shlex.split("""')[1].split('"""')[0]
    assert not set(parse_values(shlex.split(block, comments=True))) & set(entry.UNREAD)


@pytest.mark.slow
def test_another_entry_point_s_config_is_taken_and_what_is_left_out_is_named(
        chain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--config", str(chain.folder / "run" / "config.yaml"), "--steps", "1", "--check"]) == 0
    said = capsys.readouterr().out
    assert "of --config, engine.verify does not read --data, --split, --tokenizer, --out, --eval-every" in said
    assert "tiny in float64" in said, "auto is fp64 here"
    argv = ["--config", str(chain.folder / "run" / "config.yaml"), "--load", str(chain.folder / "run"), "--out",
            str(chain.folder / "never"), "--data", str(chain.folder / "rows.jsonl"), "--steps", "2", "--check"]
    assert finetune.main(argv) == 0
    assert not (chain.folder / "never").exists()


@pytest.mark.parametrize(("flags", "words"), [
    ("--eval-every 5", "--eval-every 5: nothing is held back to evaluate; give --valid-data or --split"),
    ("--split 0.1 --valid-data {corpus}", "--split 0.1: --valid-data is given, so nothing of --data is held back"),
    ("--save-every 5", "--save-every 5: nothing is saved without --out"),
    ("--save-wait", "nothing is saved without --out"), ("--out never --save-wait", "that is waited for anyway"),
    ("--new-data", "it goes with --resume"),
    ("--decay constant --min-lr 1e-6", "--decay constant never goes down to it"),
    ("--epochs 2 --steps 10", "--epochs 2 and --steps 10 both say how long the run is"),
    ("--world-size 4", "--world-size 4 is for --check and --dry-run"),
])
def test_a_flag_that_does_nothing_beside_the_others_is_refused(flags: str, words: str,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(flags.format(corpus="x").split()) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1

"""The demonstration corpus: made from this Python alone, the same every time, with nothing held back leaking in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.demo import DemoCounts, make_demo
from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("corpus.jsonl", "heldout.jsonl", "instructions.jsonl", "heldout_instructions.jsonl", "README.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoCounts]:
    folder = tmp_path_factory.mktemp("demo") / "new"
    return folder, make_demo(folder, 4)


def rows(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_there_is_enough_of_everything(made: tuple[Path, DemoCounts]) -> None:
    folder, counts = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert counts.megabytes > 1 and counts.documents > 500 and counts.held_out > 20
    assert counts.instructions > 2000 and counts.held_out_instructions > 50
    assert len(rows(folder / "corpus.jsonl")) == counts.documents
    assert "PSF" in (folder / "README.txt").read_text()


def test_texts_are_clean_and_none_is_there_twice(made: tuple[Path, DemoCounts]) -> None:
    folder, _ = made
    texts = [row["text"] for name in NAMES[:2] for row in rows(folder / name)]
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() + "\n" and len(text) >= 40 for text in texts)


def test_held_back_text_is_nowhere_in_the_corpus(made: tuple[Path, DemoCounts]) -> None:
    folder, _ = made
    corpus = "\n".join(row["text"] for row in rows(folder / "corpus.jsonl"))
    for row in rows(folder / "heldout.jsonl"):
        assert row["text"] not in corpus
    asked = {row["messages"][0]["content"] for row in rows(folder / "instructions.jsonl")}
    assert not asked & {row["messages"][0]["content"] for row in rows(folder / "heldout_instructions.jsonl")}


def test_instructions_are_question_and_answer(made: tuple[Path, DemoCounts]) -> None:
    folder, _ = made
    answers = {}
    for row in rows(folder / "instructions.jsonl") + rows(folder / "heldout_instructions.jsonl"):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] and assistant["content"] and "\n" not in assistant["content"]
        answers[user["content"]] = assistant["content"]
    known = [answer for question, answer in answers.items() if "textwrap.dedent" in question]
    assert "Remove any common leading whitespace from every line in `text`." in known


@pytest.mark.slow
def test_twice_gives_the_same_bytes_and_the_size_is_kept(made: tuple[Path, DemoCounts], tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "make_demo_data.py"), "--output", "again"]
    subprocess.run(tool, cwd=tmp_path, check=True, capture_output=True)
    for name in NAMES:
        assert (tmp_path / "again" / name).read_bytes() == (made[0] / name).read_bytes()
    assert 0.2 < make_demo(tmp_path / "small", 0.5).megabytes <= 0.5


@pytest.mark.slow
def test_bad_output_and_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        make_demo(tmp_path / "file" / "below", 0.01)
    with pytest.raises(UserError, match="must be above 0"):
        make_demo(tmp_path, 0)

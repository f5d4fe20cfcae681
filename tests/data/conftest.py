"""What the tests of the preparation share: a vocabulary, and files of documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.tokenizer.train import train

TEXTS = [f"document {n}: " + "the cat sat on the mat. " * (n % 7 + 1) for n in range(500)]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small tokenizer whose end-of-document token is 2."""
    folder = tmp_path_factory.mktemp("vocabulary")
    train(lambda: TEXTS, folder, vocab_size=310)
    return str(folder)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    """`jsonl(name, texts)` writes a file of JSONL."""

    def write(name: str, texts: list[str]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write

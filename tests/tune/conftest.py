"""What the tests of tuning share: a vocabulary of ours, and a byte-level one of somebody else."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.train import train

DATA = Path(os.environ["TRIAX_DATA"]) if os.environ.get("TRIAX_DATA") else None


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of ours, sentencepiece with a space before every text, trained on a module of Python's library."""
    folder = tmp_path_factory.mktemp("own")
    train(lambda: [Path(argparse.__file__).read_text("utf-8")], folder, vocab_size=600)
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level vocabulary whose BOS is <|im_start|> and which joins newlines."""
    if DATA is None:
        pytest.skip("TRIAX_DATA is not set: the shared test data is elsewhere")
    folder = tmp_path_factory.mktemp("byte_level")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DATA / "tokenizer" / f"minimind_{name}").read_bytes())
    return folder


@pytest.fixture(scope="session")
def tokenizer(own: Path) -> Tokenizer:
    return load_tokenizer(str(own))

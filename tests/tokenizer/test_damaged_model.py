"""A sentencepiece model with damaged bytes is one line that names it, at once and whatever is damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.tokenizer import load_tokenizer
from engine.tokenizer.train import train

TEXTS = [f"document {n}: " + "the cat sat on the mat. " * (n % 7 + 1) for n in range(100)]
DAMAGED = Path(__file__).parent / "damaged"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A vocabulary's bytes; it is small, so that changes meet its settings as often as its pieces."""
    folder = tmp_path_factory.mktemp("whole")
    train(lambda: TEXTS, folder, vocab_size=300)
    return (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(("name", "message"), [
    ("sentencepiece-1.model", "is a damaged sentencepiece model: it holds pieces that are not UTF-8"),
    ("sentencepiece-2.model", "is no sentencepiece model, or a damaged one: a number at byte 4 does not end"),
])  # fmt: skip
def test_models_that_other_tools_stumble_over_are_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{name} {message}") as caught:
        load_tokenizer(str(DAMAGED / name))
    assert "\n" not in str(caught.value)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Bytes changed, a bit flipped, cut short, or some left out."""
    changed, how = bytearray(content), chance.randrange(4)
    place = chance.randrange(len(changed))
    if how == 0:
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    elif how == 1:
        changed[place] ^= 1 << chance.randrange(8)
    elif how == 2:
        del changed[place:]
    else:
        del changed[place : place + chance.randrange(1, 20)]
    return bytes(changed)


def use(path: Path) -> bool:
    """Whether the model could be loaded and used; what it raises but UserError fails the test."""
    try:
        tokenizer = load_tokenizer(str(path))
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 1000
        return False
    tokenizer.describe()
    tokenizer.decode(tokenizer.encode("the cat sat, 中文 <s>"))
    tokenizer.encode_documents(["the cat", "é\n  x"])
    tokenizer.token_id("<|im_end|>")
    return True


def test_mutations_are_refused_or_used(whole: bytes, tmp_path: Path) -> None:
    check(whole, tmp_path, 200)


@pytest.mark.soak
def test_many_mutations_are_refused_or_used(whole: bytes, tmp_path: Path) -> None:
    check(whole, tmp_path, 6000)


def check(whole: bytes, folder: Path, count: int) -> None:
    chance, used = random.Random(0), 0
    for _ in range(count):
        path = folder / "tokenizer.model"
        path.write_bytes(mutated(whole, chance))
        used += use(path)
    assert 0 < used < count

"""Generation: the cache changes nothing, sampling draws from the right set, and text streams in whole characters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.errors import UserError
from engine.generate import TextStream, begin, generate, parse
from engine.model import Decoder, Parts
from engine.parallel.init import initialize
from engine.sampling import nucleus, sample
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.train import train

LLAMA: dict[str, Any] = dict(layers=2, hidden=32, ffn_hidden=56, heads=4, kv_heads=2, head_dim=8, vocab_size=91,
                             max_positions=48, init_std=0.3)
GPT2 = {**LLAMA, "family": "gpt2", "kv_heads": 4, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied": True}
PROMPT = [3, 14, 15, 9, 26, 5]


def decoder(shape: dict[str, Any], dtype: torch.dtype = torch.float64, seed: int = 7) -> Decoder:
    config = ModelConfig(**shape)
    model = Decoder(Parts(config, dtype=dtype), range(config.layers))
    for parameter in model.parameters():
        initialize(parameter, seed)
    return model


def recomputed(model: Decoder, ids: Sequence[int], count: int, temperature: float, seed: int) -> list[int]:
    """The same tokens without a cache: the whole sequence again for each."""
    generator, out = torch.Generator().manual_seed(seed), list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([out])))[0, -1, : model.parts.config.vocab_size]
        out.append(sample(logits, temperature, 0.9, generator))
    return out[len(ids) :]


@pytest.mark.parametrize("shape", [LLAMA, GPT2, {**LLAMA, "qk_norm": True, "tied": True}], ids=["llama", "gpt2", "qk"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_equals_recomputation(shape: dict[str, Any], temperature: float) -> None:
    model = decoder(shape)
    cached = list(generate(model, PROMPT, max_tokens=40, temperature=temperature, top_p=0.9, seed=3))
    assert cached == recomputed(model, PROMPT, 40, temperature, 3)
    assert len(set(cached)) > 3, "a constant answer would prove little"


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = decoder(LLAMA)
    texts = [list(generate(model, PROMPT, max_tokens=30, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_takes_the_likeliest_whatever_the_seed() -> None:
    model = decoder(LLAMA)
    texts = [list(generate(model, PROMPT, max_tokens=30, temperature=0.0, seed=seed)) for seed in (1, 2)]
    assert texts[0] == texts[1]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([PROMPT + texts[0]])))[0, len(PROMPT) - 1 : -1, :91]
    assert logits.argmax(-1).tolist() == texts[0]


def test_stop_tokens_end_the_text_and_are_not_part_of_it() -> None:
    model = decoder(LLAMA)
    whole = list(generate(model, PROMPT, max_tokens=30, temperature=0.0))
    stop = whole[12]
    assert list(generate(model, PROMPT, max_tokens=30, temperature=0.0, stop_ids={stop})) == whole[: whole.index(stop)]


def test_padded_columns_are_never_drawn() -> None:
    model = decoder(LLAMA)
    assert model.head is not None
    with torch.no_grad():
        model.head.weight[91:] = 10 * model.head.weight[:37]  # padding that would win if it were looked at
    assert max(generate(model, PROMPT, max_tokens=40, temperature=5.0, top_p=1.0)) < 91
    assert max(generate(model, PROMPT, max_tokens=40, temperature=5.0, top_p=1.0, vocab_size=20)) < 20


@pytest.mark.parametrize(
    ("ids", "more", "said"),
    [
        (PROMPT, {"max_tokens": 43}, "6 prompt tokens and max-tokens 43 .* 48 positions; use .* 42"),
        ([1] * 48, {"max_tokens": 1}, "use a shorter prompt"),
        (PROMPT, {"max_tokens": 0}, "use --max-tokens 1 to 42"),
        ([], {"max_tokens": 1}, "no tokens"),
        ([91], {"max_tokens": 1}, "token id 91, outside the model's vocabulary of 91"),
        ([1, -1], {"max_tokens": 1}, "token id -1"),
        (PROMPT, {"max_tokens": 1, "temperature": -0.5}, "temperature -0.5"),
        (PROMPT, {"max_tokens": 1, "temperature": float("nan")}, "temperature nan"),
        (PROMPT, {"max_tokens": 1, "top_p": 0.0}, "top-p 0.0"),
        (PROMPT, {"max_tokens": 1, "top_p": 1.5}, "top-p 1.5"),
    ],
)
def test_settings_out_of_range_are_refused_at_the_call(ids: list[int], more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate(decoder(LLAMA), ids, **more)


def test_the_last_position_can_be_filled() -> None:
    assert len(list(generate(decoder(GPT2), PROMPT, max_tokens=42))) == 42


def test_damaged_weights_are_named_not_sampled() -> None:
    model = decoder(LLAMA)
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        list(generate(model, PROMPT, max_tokens=2))


def test_nucleus_is_the_fewest_tokens_that_reach_top_p() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    order = [1, 3, 2, 0]
    for top_p, kept in [(1e-9, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4), (1.0, 4)]:
        assert nucleus(logits, 1.0, top_p)[0].tolist() == order[:kept]
    # At half the temperature the probabilities are squared: 0.16 / 0.30 of the mass is on one token.
    assert nucleus(logits, 0.5, 0.53)[0].tolist() == [1]
    assert nucleus(torch.zeros(5), 1.0, 0.5)[0].tolist() == [0, 1, 2], "ties go to the lowest id"


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.floats(0.05, 3.0), st.floats(0.01, 1.0))
def test_nucleus_is_minimal_and_sufficient(values: list[float], temperature: float, top_p: float) -> None:
    ids, probabilities = nucleus(torch.tensor(values), temperature, top_p)
    assert float(probabilities.sum()) >= top_p - 1e-9
    if top_p < 1.0:
        assert len(ids) == 1 or float(probabilities[:-1].sum()) < top_p
    left_out = set(range(len(values))) - set(ids.tolist())
    assert all(values[i] <= min(values[j] for j in ids.tolist()) + 1e-5 for i in left_out)


def test_drawn_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(logits, 1.0, 0.9, generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert float((shares - expected).abs().max()) < 0.03 and shares[3] == 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(lambda: [Path(argparse.__file__).read_text("utf-8")], folder, vocab_size=500)
    return load_tokenizer(str(folder))


@settings(max_examples=60, deadline=None)
@given(before=st.text(st.sampled_from("ab. \n你"), max_size=20), text=st.text(max_size=30))
def test_streamed_text_is_the_text_in_whole_characters(tokenizer: Tokenizer, before: str, text: str) -> None:
    context, whole = tokenizer.encode(before), tokenizer.encode(before + text)
    if whole[: len(context)] != context:
        return
    stream = TextStream(tokenizer, context)
    pieces = [stream.push(token) for token in whole[len(context) :]]
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text
    assert "".join(pieces) + stream.flush() == text


def test_bytes_that_are_no_text_are_shown_and_hold_nothing_back(tokenizer: Tokenizer) -> None:
    byte = [tokenizer.token_id(f"<0x{n:02X}>") for n in range(256)]
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in (byte[0xFF], *(byte[n] for n in "你".encode()), byte[0xE4])]
    assert "".join(shown) == "\ufffd你"
    assert stream.flush() == "\ufffd", "half a character at the end can only be shown as such"
    many = [stream.push(byte[0xFF]) for _ in range(20)]
    assert "".join(many) == "\ufffd" * 17


def test_a_text_begins_as_the_tokenizers_files_say(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert begin(tokenizer, "a b") == tokenizer.encode("a b")
    assert begin(tokenizer, "") == [tokenizer.eos_id]
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"add_bos_token": true}')
    tokenizer.files["tokenizer_config.json"], ours = config, tokenizer.files.get("tokenizer_config.json")
    try:
        assert begin(tokenizer, "a") == [tokenizer.bos_id, *tokenizer.encode("a")]
    finally:
        if ours is not None:
            tokenizer.files["tokenizer_config.json"] = ours


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--load", "x"], "--prompt"),
        (["--load", "x", "--prompt", "y", "--max-token", "3"], "--max-token"),
        (["--load", "x", "--prompt", "y", "--top-p", "many"], "top-p.*many"),
        (["--load", "x", "--prompt", "y", "--dtype", "int8"], "dtype.*int8"),
    ],
)
def test_wrong_flags_are_user_errors(argv: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(argv)

"""Vocabularies: text never becomes a control token, and the three forms of one vocabulary give equal ids."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.tokenizer import load_tokenizer
from engine.tokenizer.train import train

CASES = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  two  spaces   three ",
    "\n",
    "\n\n\n",
    " \n \n",
    "\ttab\r\nCRLF\rCR",
    "def f(x):\n    return x + 1\n\n\n        # deep\n",
    "1234567890 3.14 12,345",
    "数学是利用符号语言研究数量、结构、变化以及空间等概念的一门学科。",
    "混合 mixed 文字 text",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪 done",
    "rare \u4dff \U00020000 \ufffd \u0000 nul",
    "e\u0301 \u00e9 ﬁ ｆｕｌｌ \u3000wide",
    "\u2581already\u2581marked",
    "ааааа aaaaaaaaaaaaaaaaa !!!!!!!!!!!!!!!!!",
    "-" * 50 + "=" * 33,
    "<0x41> <0x0A>",
    "</s", "<", "|im_start|>",
]  # fmt: skip
CONTROL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
SPECIALS = [*CONTROL, "x</s>y", "a <|im_end|>\n", "<unk> @-@ <unk>"]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """English, Chinese and code-like text; real shared text where it is there."""
    rng = random.Random(0)
    words = ["the", "cat", "数学", "function", "returns", "1234", "naïve", "x", "\n", "    ", "语言", ".", "(a, b)"]
    made = [" ".join(rng.choices(words, k=60)) for _ in range(300)]
    if "TRIAX_DATA" not in os.environ:
        return made
    folder = Path(os.environ["TRIAX_DATA"]) / "text"
    files = [(folder / name).read_text("utf-8") for name in ("c4_demo.jsonl", "zhwiki_articles_a.jsonl")]
    return made + [json.loads(line)["text"] for file in files for line in file.splitlines()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / "t"
    train(lambda: documents, output, vocab_size=3000 if len(documents) > 300 else 330)
    return output


def test_special_strings_in_text_stay_text_in_every_form(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    for path in (folder, tmp_path):
        tokenizer = load_tokenizer(str(path))
        control = {tokenizer.token_id(piece) for piece in CONTROL}
        assert control == {0, 1, 2, 3, 4, 5}
        for text in SPECIALS:
            ids = tokenizer.encode(text)
            assert not control & set(ids), text
            assert tokenizer.decode(ids) == text


def test_round_trip_keeps_every_character(folder: Path, documents: list[str]) -> None:
    tokenizer = load_tokenizer(str(folder))
    for text in [*(case for case in CASES if "\u2581" not in case), *documents[:400]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_json_gives_the_ids_of_the_model(folder: Path, documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    model, fast = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path))
    assert type(model) is not type(fast) and model.vocab_size == fast.vocab_size
    texts = [*CASES, *SPECIALS, *documents]
    names = ("tinyshakespeare.txt", "wikitext2-valid.txt", "wiki_demo_en.txt") if "TRIAX_DATA" in os.environ else ()
    for name in names:
        whole = (Path(os.environ["TRIAX_DATA"]) / "text" / name).read_text(encoding="utf-8")
        texts += [whole[at : at + 5000] for at in range(0, 400_000, 5000)]
    rng = random.Random(1)
    texts += ["".join(rng.choices(" \n\tab數1.<|>\u3000🙂", k=40)) for _ in range(2000)]
    for text, one, two in zip(texts, model.encode_batch(texts), fast.encode_batch(texts), strict=True):
        assert one == two, text[:200]
        assert model.decode(one) == fast.decode(two)


def test_transformers_loads_the_folder_and_gives_equal_ids(folder: Path, documents: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(str(folder))
    for text in [*CASES, *documents[:100]]:
        assert theirs(text)["input_ids"] == ours.encode(text), text[:200]
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert set(theirs("a")) == {"input_ids", "attention_mask"}
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == ours.token_id("<|im_end|>")


def test_lone_surrogate_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for path in (folder, tmp_path):
        with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 1"):
            load_tokenizer(str(path)).encode("a\ud800")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04pickle", b"{" * 100000])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_broken_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_paths_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.model"):
        with pytest.raises(UserError, match="tokenizer.model"):
            load_tokenizer(str(path))


def test_json_with_added_tokens_wins_over_a_smaller_model(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"])
    content["added_tokens"].append({**content["added_tokens"][0], "id": size, "content": "<|new|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.token_id("<|new|>"), tokenizer.eos_id) == (size + 1, size, 2)
    assert size not in tokenizer.encode("<|new|>")
    assert set(tokenizer.files) == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}


def test_truncation_and_padding_settings_do_not_reach_documents(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "one two three four five six seven eight"
    assert load_tokenizer(str(tmp_path)).encode(text) == load_tokenizer(str(folder)).encode(text)


def test_real_llama_vocabulary_in_both_forms(tmp_path: Path) -> None:
    if "TRIAX_DATA" not in os.environ:
        pytest.skip("TRIAX_DATA is not set: no real vocabulary to read")
    shared = Path(os.environ["TRIAX_DATA"]) / "tokenizer"
    model = load_tokenizer(str(shared / "llama2.model"))
    assert (model.vocab_size, model.bos_id, model.eos_id, model.pad_id) == (32000, 1, 2, None)
    assert list(model.files) == ["tokenizer.model"] and len(model.hash) == 64
    assert model.token_id("<|im_end|>") is None
    (tmp_path / "tokenizer.json").write_bytes((shared / "llama_hf_tokenizer.json").read_bytes())
    fast = load_tokenizer(str(tmp_path))
    for text in [case for case in CASES if "\0" not in case] + SPECIALS:
        assert fast.encode(text) == model.encode(text), text


def test_real_byte_level_vocabulary(tmp_path: Path) -> None:
    if "TRIAX_DATA" not in os.environ:
        pytest.skip("TRIAX_DATA is not set: no real vocabulary to read")
    shared = Path(os.environ["TRIAX_DATA"]) / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shared / f"minimind_{name}").read_bytes())
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>") is not None
    for text in [*CASES, "<|im_start|>user", "<|im_end|>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids and tokenizer.token_id("<|im_start|>") not in ids
        assert tokenizer.decode(ids) == text

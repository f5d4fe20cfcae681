"""Texts for the tokenizer tests: a small corpus to train on, cases that break encoders, and the shared real files."""

# ruff: noqa: E501  (texts as they are, not broken over lines)
from __future__ import annotations

import csv
import json
import random
from pathlib import Path

WORDS = (
    "the cat sat on a mat and function returns value while naïve café 1234 3.14 x y (a, b) don't it's He'll :: -> == "
    "数学 是 研究 数量 结构 变化 空间 的 学科 语言 我们 你们 他们 中国 北京 мир привет שלום مرحبا"
).split()
CASES = [
    "", " ", "  ", "   ", "a", " a", "a ", "  a", "a  ", " a  b   c ", "\n", "\n\n\n", " \n", "\n ", " \n \n",
    "\t\t x", "\r\nCRLF\r\n  CR\r x", "x\n  y\n\n    z", "def f(x):\n    return x + 1\n\n\n        # deep\n",
    "1234567890 3.14 12,345", "\u2581", "\u2581\u2581", " \u2581", "\u2581 ", "a\u2581b", "a \u2581b", "a\u2581 b",
    "\u2581already \u2581\u2581marked\u2581", "e\u0301 \u00e9 ﬁ ｆｕｌｌ \u3000wide\u3000 x",
    "a\u00a0b \u00a0c\u2003 d \u2028 e",
    "\0nul \0", "\x01\x02 \x0b \x0c\x1c \x1f x\x7f", "🙂👩\u200d👩\u200d👧\u200d👦🇩🇪 ✊🏽 done", "שלום עולם", "مَرْحَبًا",
    "rare \u4dff \U00020000 \ufffd \ufeff x", "ааааа aaaaaaaaaaaaaaaaa !!!!!!!", "-" * 50 + "=" * 33,
    "<s>", "</s> x</s>y", "<unk> @-@ <unk>", "<|endoftext|>", "a<|im_start|>user\n<|im_end|>", "<pad>", "<0x41> <0x0A>",
    "<think>hm</think> <tool_call>", "don't DON'T it's 'S 'ſ", "混合 mixed 文字 text，ｗｉｔｈ　both。",
    "数学是利用符号语言研究数量、结构、变化以及空间等概念的一门学科。",
    "x" * 300, "数" * 300, " " * 300, "\n" * 300, "ab " * 200, "a  b" * 100,
]  # fmt: skip


def corpus(documents: int = 300, seed: int = 0) -> list[str]:
    """Documents of made-up words with spaces, newlines and some without either."""
    rng = random.Random(seed)
    gaps = [" "] * 12 + ["", "", "\n", "  ", ", ", ". ", "\n    "]
    return ["".join(word + rng.choice(gaps) for word in rng.choices(WORDS, k=60)) for _ in range(documents)]


def noise(pieces: list[str], number: int = 2000, seed: int = 1) -> list[str]:
    """Random strings of characters and pieces, many of them spaces."""
    rng = random.Random(seed)
    alphabet = [*"    \n\t\u2581abzA'st019.,!?-_<|>/", *"数学的е\u0301\u200d🙂\u3000\xa0\0\x1cſK", *pieces]
    return ["".join(rng.choices(alphabet, k=rng.randrange(25))) for _ in range(number)]


def real_texts(shared: Path, limit: int = 300_000) -> dict[str, list[str]]:
    """The shared files as documents, about `limit` characters of each."""

    def read(name: str) -> str:
        return (shared / name).read_text(encoding="utf-8")

    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in read(name).splitlines()]

    found = {
        "c4": [row["text"] for row in rows("text/c4_demo.jsonl")],
        "wikitext with <unk>": read("text/wikitext2-valid.txt").split("\n"),
        "one long text": [read("text/wikitext2-valid.txt")[: 2 * limit]],
        "shakespeare": read("text/tinyshakespeare.txt").split("\n\n"),
        "Chinese articles": [row["text"] for row in rows("text/zhwiki_articles_a.jsonl")],
        "poems": [json.dumps(row, ensure_ascii=False) for row in json.loads(read("text/poet.song.0.json"))],
        "Chinese chat": [json.dumps(row, ensure_ascii=False) for row in rows("sft/sharegpt_zh_1K.jsonl")],
        "chat with <s>": [row[0] for row in csv.reader(read("sft/dev_sft_zh.csv").splitlines())],
        "indented": [json.dumps(row, indent=2) for row in json.loads(read("sft/glaive_toolcall_en_demo.json"))],
    }
    for name, texts in found.items():
        kept, left = [], limit
        while texts and left > 0:
            left -= len(texts[0])
            kept.append(texts.pop(0))
        found[name] = kept
    return found

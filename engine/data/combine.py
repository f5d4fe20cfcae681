"""Several corpora into one: tokens are copied, indexes put together; nothing is decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.checksum import FileSums, Summing
from engine.data.facts import Facts, file_sums, read_facts
from engine.data.indexed import IndexedDataset, IndexedWriter, one_corpus_twice, with_suffix
from engine.errors import UserError

_DOCUMENTS = 1 << 16  # looked at at a time
_TOKENS = 4 << 20  # copied at a time, or a document where one is longer


class Combined(NamedTuple):
    """What came out; described: whether there is a P.json; copies: inputs that hold the tokens of one before them, as
    (that one, the copy). They may be meant: so a corpus counts twice."""

    documents: int
    tokens: int
    described: bool
    copies: tuple[tuple[str, str], ...] = ()


def combine(prefixes: Sequence[str], output_prefix: str, overwrite: bool = False) -> Combined:
    """Writes the documents of all corpora, in the order given.

    Raises UserError for corpora of different vocabularies, a broken one, and an output that exists or is an input."""
    _check_distinct(prefixes)
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    facts = [read_facts(prefix) for prefix in prefixes]
    _check_output(prefixes, output_prefix, overwrite)
    vocab_size = _check_alike(corpora, facts)
    try:
        with IndexedWriter(output_prefix, vocab_size, dtype=corpora[0].dtype) as writer:
            return _write(prefixes, corpora, facts, writer)
    except OSError as error:
        raise UserError(f"cannot write {output_prefix}: {error.strerror or error}; nothing of it is left") from None


def _write(prefixes: Sequence[str], corpora: Sequence[IndexedDataset], facts: Sequence[Facts | None],
           writer: IndexedWriter) -> Combined:
    """Raises UserError for a corpus whose bytes are not those that its checksums vouch for, OSError of a full disk."""
    first: dict[FileSums, str] = {}
    copies: list[tuple[str, str]] = []
    for corpus, fact in zip(corpora, facts, strict=True):
        sums = file_sums(fact)
        if sums is not None:
            deque(sums["idx"].read(corpus.idx_path), maxlen=0)
        corpus.verify_index()
        copied = _copy(corpus, writer, sums["bin"] if sums else None)
        before = first.setdefault(copied, corpus.prefix)
        if before != corpus.prefix and copied.size:
            copies.append((before, corpus.prefix))
    whole = _facts(prefixes, facts, writer)
    writer.finish(whole)
    return Combined(writer.documents, writer.tokens, whole is not None, tuple(copies))


def _check_distinct(prefixes: Sequence[str]) -> None:
    """Raises UserError where a corpus is given twice."""
    twice = one_corpus_twice(prefixes)
    if twice is not None:
        first, second = twice
        what = f"{second} is given twice" if first == second else f"{first} and {second} are one corpus"
        raise UserError(f"{what}; its documents would be there twice. To train on a corpus more often, give it a "
                        "larger weight in a blend: --data P:2,Q:1")


def _check_output(prefixes: Sequence[str], output_prefix: str, overwrite: bool) -> None:
    for prefix in prefixes:
        same = one_corpus_twice([prefix, output_prefix])
        if same is not None or Path(prefix).resolve() == Path(output_prefix).resolve():
            raise UserError(f"{prefix} is an input and would be overwritten; choose another --output-prefix")
    existing = [str(path) for suffix in (".bin", ".idx", ".json")
                if (path := with_suffix(output_prefix, suffix)).exists()]
    if existing and not overwrite:
        raise UserError(f"{', '.join(existing)} exists; choose another --output-prefix or say --overwrite")
    try:
        Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {Path(output_prefix).parent}: {error.strerror}") from None


def _check_alike(corpora: Sequence[IndexedDataset], facts: Sequence[Facts | None]) -> int | None:
    """The size of the vocabulary that all share; None where one of them does not tell."""
    first = corpora[0]
    for corpus in corpora:
        if corpus.dtype != first.dtype:
            raise UserError(f"{first.prefix} holds {first.dtype.name} ids and {corpus.prefix} {corpus.dtype.name}: "
                            "they are of different vocabularies")
    known = [(corpus.prefix, fact) for corpus, fact in zip(corpora, facts, strict=True) if fact is not None]
    for prefix, fact in known:
        for name, one, other in (("tokenizer", known[0][1]["tokenizer"], fact["tokenizer"]),
                                 ("end-of-document token", known[0][1].get("eod_id"), fact.get("eod_id"))):
            if one != other:
                raise UserError(f"{known[0][0]} and {prefix} differ in their {name}: {one} and {other}")
    return int(known[0][1]["tokenizer"]["vocab_size"]) if len(known) == len(corpora) else None


def _copy(corpus: IndexedDataset, writer: IndexedWriter, sums: FileSums | None) -> FileSums:
    """The checksums of the tokens copied. Raises UserError where they are not those that `sums` vouch for: the copy
    would vouch for them."""
    copied = Summing(sums.block_bytes) if sums else Summing()
    index = corpus.document_index
    for at in range(0, corpus.documents, _DOCUMENTS):
        firsts = index[at : at + _DOCUMENTS + 1]  # the first sequence of each, and of the next
        sizes = corpus.sizes[int(firsts[0]) : int(firsts[-1])].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(sizes)])[firsts - firsts[0]]  # tokens before each document
        start = corpus.token_start(at)
        low = 0
        while low < len(firsts) - 1:
            high = max(low + 1, int(np.searchsorted(ends, ends[low] + _TOKENS, side="right")) - 1)
            tokens = corpus.tokens[start + int(ends[low]) : start + int(ends[high])]
            copied.update(tokens.data)
            writer.add_documents(
                tokens,
                sizes[int(firsts[low] - firsts[0]) : int(firsts[high] - firsts[0])],
                np.diff(firsts[low : high + 1]),
            )
            low = high
    found = copied.sums()
    if sums is not None:
        sums.check_same(corpus.bin_path, found)
    return found


def _facts(
    prefixes: Sequence[str], facts: Sequence[Facts | None], writer: IndexedWriter
) -> Facts | None:
    """P.json of the whole: what all share, and each part's own. None where a part has none: what nobody knows of it
    should not be claimed."""
    known = [fact for fact in facts if fact is not None]
    if len(known) < len(facts):
        return None
    shared = {name: known[0].get(name) for name in ("format", "version", "tokenizer", "dtype", "eod_id")}
    counts = {"documents": writer.documents, "tokens": writer.tokens,
              "text_bytes": sum(fact["counts"].get("text_bytes", 0) for fact in known)}
    parts = [
        {"name": Path(prefix).name, **{name: fact.get(name) for name in ("counts", "settings", "inputs", "parts")
                                       if name in fact}}
        for prefix, fact in zip(prefixes, known, strict=True)
    ]
    return {**shared, "counts": counts, "parts": parts}

"""What a corpus holds, to read: counts, how long its documents are, one document, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.data.facts import Facts, file_sums, read_facts, why_unproven
from engine.data.indexed import IndexedDataset, check_ids
from engine.data.progress import Progress
from engine.errors import UserError
from engine.tokenizer import Tokenizer

_BLOCK = 1 << 18
_BAR = 40
_SHOWN_IDS = 64


def overview(prefix: str) -> list[str]:
    """Lines with counts and a histogram of lengths. Reads the index in constant memory. Raises UserError."""
    corpus, facts = IndexedDataset(prefix), read_facts(prefix)
    documents, tokens = corpus.documents, len(corpus.tokens)
    lines = [
        f"{prefix}: {documents:,} documents, {len(corpus.sizes):,} sequences, {tokens:,} tokens "
        f"({corpus.dtype.name}, {tokens * corpus.dtype.itemsize / 1e6:,.1f} MB)"
    ]
    if facts is not None:
        lines += _made(facts, tokens)
    return [*lines, *_histogram(corpus)]


def _made(facts: Facts, tokens: int) -> Iterator[str]:
    tokenizer, counts = facts["tokenizer"], facts["counts"]
    yield (f"vocabulary of {tokenizer.get('vocab_size'):,}, hash {str(tokenizer.get('hash'))[:12]}, "
           f"end of document {facts.get('eod_id')}")
    if counts.get("text_bytes"):
        yield f"{counts['text_bytes']:,} bytes of text, {counts['text_bytes'] / max(tokens, 1):.3f} a token"
    settings = facts.get("settings")
    if isinstance(settings, dict):
        yield "made with " + ", ".join(f"{name} {value}" for name, value in settings.items())
    for source in facts.get("inputs") or []:
        yield f"from {source.get('name')}, {source['size']:,} bytes"


def document_lengths(corpus: IndexedDataset) -> Iterator[np.ndarray]:
    """Tokens in each document, int64, in parts. Raises UserError where the index goes backwards."""
    item = corpus.dtype.itemsize
    for at in range(0, corpus.documents, _BLOCK):
        firsts = corpus.document_index[at : at + _BLOCK + 1]
        if int(firsts.min()) < 0 or int(firsts.max()) > len(corpus.sizes):
            raise UserError(f"{corpus.idx_path}: a document after {at} begins at no sequence; --verify says where")
        inside = firsts < len(corpus.sizes)
        starts = np.full(len(firsts), len(corpus.tokens), np.int64)
        starts[inside] = corpus.pointers[firsts[inside]] // item
        lengths = np.diff(starts)
        if lengths.size and int(lengths.min()) < 0:
            raise UserError(f"{corpus.idx_path}: a document after {at} ends before it begins; --verify says where")
        yield lengths


def _histogram(corpus: IndexedDataset) -> Iterator[str]:
    """How many documents have up to 1, 2, 4, 8.. tokens, as bars."""
    counts, low, high = np.zeros(65, np.int64), 1 << 62, 0
    for lengths in document_lengths(corpus):
        bits = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64) + (lengths > 0)
        counts += np.bincount(bits, minlength=65)
        low, high = min(low, int(lengths.min())), max(high, int(lengths.max()))
    if corpus.documents == 0:
        return
    mean = len(corpus.tokens) / corpus.documents
    yield f"tokens in a document: {low:,} to {high:,}, {mean:,.1f} on average"
    used = np.flatnonzero(counts)
    for bits in range(int(used[0]), int(used[-1]) + 1):
        share = int(counts[bits]) / corpus.documents
        upper = f"{1 << (bits - 1):,}" if bits else "0"
        yield f"{'to ' + upper:>16}  {int(counts[bits]):>14,}  {'#' * round(share * _BAR)}".rstrip()


def show_document(prefix: str, number: int, tokenizer: Tokenizer | None) -> list[str]:
    """A document's first ids and, with a tokenizer, its text. Raises UserError for one that is not there."""
    corpus = IndexedDataset(prefix)
    if not 0 <= number < corpus.documents:
        raise UserError(f"no document {number}: {prefix} has {corpus.documents:,}, from 0 to {corpus.documents - 1}")
    ids = corpus.document(number)
    more = f" and {len(ids) - _SHOWN_IDS:,} more" if len(ids) > _SHOWN_IDS else ""
    lines = [f"document {number}: {len(ids):,} tokens", " ".join(map(str, ids[:_SHOWN_IDS].tolist())) + more]
    if tokenizer is not None:
        _check_tokenizer(prefix, tokenizer)
        try:
            text = tokenizer.decode(ids)
        except ValueError as error:
            raise UserError(f"{prefix}: document {number} is of another vocabulary: {error}") from None
        # Control characters of a document are not for a reader's terminal.
        lines.append("".join(sign if sign.isprintable() or sign in "\n\t" else "\ufffd" for sign in text))
    return lines


def verify(prefix: str, tokenizer: Tokenizer | None) -> str:
    """Reads everything; one line to say that all is well. Raises UserError at the first thing that is not."""
    corpus, facts = IndexedDataset(prefix), read_facts(prefix)
    if tokenizer is not None:
        _check_tokenizer(prefix, tokenizer)
    size = tokenizer.vocab_size if tokenizer else facts["tokenizer"].get("vocab_size") if facts else None
    proof = _verify_bytes(corpus, facts, size)
    if facts is not None:
        found = {"documents": corpus.documents, "tokens": len(corpus.tokens)}
        told = {name: facts["counts"].get(name) for name in found}
        if told != found:
            raise UserError(f"{prefix}.json tells of {told}, the files hold {found}: they do not belong together")
    known = f"every id is below {size:,}" if size else "no id is negative (which vocabulary they are of is not known)"
    return f"verified: {len(corpus.sizes):,} pointers and {len(corpus.tokens):,} ids; {known}; {proof}"


def _verify_bytes(corpus: IndexedDataset, facts: Facts | None, vocab_size: int | None) -> str:
    """Reads both files once; says what proves their bytes. Raises UserError."""
    sums = file_sums(facts)
    if sums is None:
        corpus.verify(vocab_size)
        return f"nothing proves the bytes: {why_unproven(corpus.prefix, facts)}"
    with Progress(sums["idx"].size + sums["bin"].size) as progress:
        for block in sums["idx"].read(corpus.idx_path):
            progress.add(len(block), 0)
        corpus.verify_index()
        token = 0
        for block in sums["bin"].read(corpus.bin_path):
            ids = np.frombuffer(block, corpus.dtype)
            check_ids(ids, vocab_size, f"{corpus.bin_path}, from token {token}")
            token += len(ids)
            progress.add(len(block), 0)
    return "every byte of both files matches its checksum"


def _check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    facts = read_facts(prefix)
    if facts is not None and facts["tokenizer"].get("hash") != tokenizer.hash:
        raise UserError(f"{prefix} was made with another tokenizer (hash {str(facts['tokenizer'].get('hash'))[:12]}, "
                        f"not {tokenizer.hash[:12]})")

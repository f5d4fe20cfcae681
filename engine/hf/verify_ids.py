"""The proof that an export's tokenizer is the one of the checkpoint: the ids of texts, by transformers itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.data.chat import CHATML_TEMPLATE, ChatEncoder, Message
from engine.errors import UserError, shown
from engine.tokenizer import Tokenizer, is_tokenizer, load_tokenizer, tokenizer_files
from engine.tokenizer.equal import Comparison, compare_texts, comparison_texts
from engine.tokenizer.folder import adds_bos

Say = Callable[[str], None]
_TALK = (("system", "Be brief. Réponds vite, 请简短。"), ("user", "What is 2 + 2?\n\n  And 3?"),
         ("assistant", "4, and 3."))


def compare_ids(before: Path, after: Path, hf: Path | None, say: Say) -> bool:
    """Whether the tokenizers in two folders give the same ids, and where one of them (hf) is a Hugging Face folder,
    transformers' AutoTokenizer the same too."""
    held = [is_tokenizer(tokenizer_files(folder)) for folder in (before, after)]
    if not any(held):
        say("ids: not compared, neither folder has a tokenizer")
        return True
    if not all(held):
        say(f"ids: not equal, {shown(after if held[0] else before)} has no tokenizer and the other folder has one")
        return False
    ours, theirs = load_tokenizer(str(before)), load_tokenizer(str(after))
    texts = comparison_texts(ours)
    mine = ours.encode_batch(texts)
    found = compare_texts(texts, mine, theirs.encode_batch(texts), _read(ours, theirs.decode, mine))
    if not _said("Triax", found, say):
        return False
    if hf is None:
        return True
    if importlib.util.find_spec("transformers") is None:
        say("ids: not compared with transformers, it is not installed (pip install 'triax[hf]')")
        return True
    return _client(ours, hf, texts, mine, say)


def _client(ours: Tokenizer, folder: Path, texts: Sequence[str], ids: Sequence[list[int]], say: Say) -> bool:
    """The same by transformers, as a user of the folder calls it: ids in a batch and one by one, back to text, the
    control pieces, and a conversation."""
    import transformers

    client = _open(folder)
    name = f"transformers {transformers.__version__} ({type(client).__name__})"
    # In what a user types transformers finds the control pieces, if it is not told otherwise; that is its own.
    known = [*client.all_special_tokens, *client.get_added_vocab()]
    plain = [n for n, text in enumerate(texts) if not any(piece in text for piece in known)]
    chosen, mine = [texts[n] for n in plain], [list(ids[n]) for n in plain]
    begin = [ours.bos_id] if ours.bos_id is not None and adds_bos(ours.files) else []
    expected = [[*begin, *one] for one in mine]

    def decode(numbers: list[int]) -> str:
        return str(client.decode(numbers, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    batch = [list(one) for one in client(chosen)["input_ids"]]
    if not _said(name, compare_texts(chosen, expected, batch, _read(ours, decode, mine)), say):
        return False
    for text, one in zip(chosen[::40], expected[::40], strict=True):
        if list(client.encode(text)) != one:
            say(f"ids: not equal, {name} encodes {shown(text, 80)!r} alone otherwise than in a batch")
            return False
    wrong = _roles(ours, client)
    if wrong is None and client.chat_template == CHATML_TEMPLATE:
        wrong = _conversation(ours, client)
    if wrong is not None:
        say(f"ids: not equal, {name} {wrong}")
    return wrong is None


def _open(folder: Path) -> Any:
    from transformers import AutoTokenizer  # optional, and slow to import

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it raises whatever its parts raise
        raise UserError(f"transformers does not load the tokenizer in {shown(folder)}: {shown(error, 300)}") from None


def _read(ours: Tokenizer, theirs: Callable[[list[int]], str], ids: Sequence[list[int]]) -> list[tuple[str, str]]:
    """Both sides' text of our ids; nothing where they hold the unknown piece, for which each library has a sign."""
    unknown = ours.token_id("<unk>")
    return [("", "") if unknown in one else (ours.decode(one), theirs(one)) for one in ids]


def _said(name: str, found: Comparison, say: Say) -> bool:
    if found.equal:
        say(f"ids: equal, {found.texts:,} texts of many scripts by {name}")
    else:
        say(f"ids: not equal, {name} differs on {found.differing:,} of {found.texts:,} texts, first {found.example}")
    return found.equal


def _roles(ours: Tokenizer, client: Any) -> str | None:
    """What is wrong with the ids of special tokens, in words."""
    for role, number in (("bos", ours.bos_id), ("eos", ours.eos_id), ("pad", ours.pad_id)):
        found = getattr(client, f"{role}_token_id")
        if number is not None and found != number:
            return f"has the {role} id {found}, not {number}"
    return None


def _conversation(ours: Tokenizer, client: Any) -> str | None:
    """What is wrong with the ids of a conversation in ChatML, in words."""
    mine = ChatEncoder(ours).encode([Message(role, content) for role, content in _TALK])[0]
    rows = [{"role": role, "content": content} for role, content in _TALK]
    theirs = list(client.apply_chat_template(rows, tokenize=True, return_dict=False))
    return None if mine == theirs else f"renders a conversation as {theirs[:12]}.., not {mine[:12]}.."

"""Repairs where markup was dropped within a sentence: spaces, commas and brackets that now hold nothing."""

from __future__ import annotations

MARK = "\0"
"""Stands where something was dropped, so that only there is anything repaired. XML cannot hold it."""

BREAK = "\1"
"""At a line's beginning: the line is no continuation of the paragraph before it. XML cannot hold it either."""
NEW_LINE = "\n" + BREAK

_SEPARATORS = " ,;:/，、；："
_OPENING, _CLOSING = ("(", "（", "["), (")", "）", "]")
_COMMAS = tuple(",;，、；")
_NO_SPACE_BEFORE = tuple(" ,.;:!?)\n") + _CLOSING + tuple("，。、；：")


def close_gaps(text: str) -> str:
    """`(MARK; MARK)` goes, `(MARK; born` becomes `(born`, `died MARK)` becomes `died)`, `a MARK , b` becomes `a, b`.
    Marks remain, for a line may have nothing else."""
    if MARK not in text:
        return text
    pieces = text.split(MARK)
    out: list[str] = []
    bare, tail = _parted(pieces[0])  # what stands left of the mark; it may be long, and many marks may follow it
    for right in pieces[1:]:
        left, body = bare, right.lstrip(_SEPARATORS)
        if bare.endswith(_OPENING):
            if not body.startswith(_CLOSING):
                right = body
                if not body:
                    tail = ""
                    continue  # separators alone: another gap follows
            else:
                left, right = bare[:-1], body[1:]
                if left.endswith(" ") and right.startswith(_NO_SPACE_BEFORE):
                    left = left[:-1]
        elif body.startswith(_CLOSING):
            right = body
        elif right[:1] in _COMMAS and tail.rstrip(" ")[-1:] in _COMMAS:
            tail, right = tail.rstrip(" "), right[1:]
            if not body:
                continue
            left = bare + tail
        elif tail.endswith(" ") and right.startswith(_NO_SPACE_BEFORE):
            left = bare + tail[:-1]
        else:
            left = bare + tail
        out.append(left)
        bare, tail = _parted(right)
    out.append(bare + tail)
    return MARK.join(out)


def _parted(text: str) -> tuple[str, str]:
    """A text without the separators at its end, and those."""
    bare = text.rstrip(_SEPARATORS)
    return bare, text[len(bare) :]

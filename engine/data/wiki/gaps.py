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
    left = pieces[0]
    for right in pieces[1:]:
        bare, body = left.rstrip(_SEPARATORS), right.lstrip(_SEPARATORS)
        if bare.endswith(_OPENING):
            if not body.startswith(_CLOSING):
                left, right = bare, body
                if not body:
                    continue  # separators alone: another gap follows
            else:
                left, right = bare[:-1], body[1:]
                if left.endswith(" ") and right.startswith(_NO_SPACE_BEFORE):
                    left = left[:-1]
        elif body.startswith(_CLOSING):
            left, right = bare, body
        elif left != bare and right[:1] in _COMMAS and left.rstrip(" ")[-1:] in _COMMAS:
            left, right = left.rstrip(" "), right[1:]
            if not body:
                continue
        elif left.endswith(" ") and right.startswith(_NO_SPACE_BEFORE):
            left = left[:-1]
        out.append(left)
        left = right
    out.append(left)
    return MARK.join(out)

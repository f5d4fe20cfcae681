"""The one error users are meant to see, and the wrapper that turns it into one line and exit code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

SHOWN = 200
"""Characters of foreign text that a message repeats at most."""
LONGEST = 2000
"""Characters of a whole message; what is longer is our own mistake, and is cut."""


class UserError(Exception):
    """Bad input. The message says what is wrong, gives the numbers, and tells what to change. It is one line:
    control characters in it are escaped, and it is cut after `LONGEST` characters."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message, LONGEST))


def shown(value: object, most: int = SHOWN) -> str:
    """Foreign text (a name, a path, a value of a file) as a message may repeat it: control characters and lone
    surrogates escaped, at most `most` characters, the others counted. Quotation marks are the caller's."""
    text = str(value)
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    more = len(text) - most
    if len(kept) > most:
        kept, more = kept[:most], max(more, 0) + len(kept) - most
    return f"{kept}... ({more:,} characters more)" if more > 0 else kept


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that looks most like `word`, or None when nothing is close."""
    lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6)
    return lower[found[0]] if found else None


def run_cli(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a tool's `main(argv)` and exits with its code; a UserError, or a file that cannot be used, becomes
    `error: ...` and exit code 2."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        code = 0  # the reader (head, less) has gone; nothing is wrong with us
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)  # not to be read, too long a name, ..
        code = 2
    sys.stdout.flush()
    sys.exit(code)

"""The one error users are meant to see, and the wrapper that turns it into one line and exit code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message says what is wrong, gives the numbers, and tells what to change."""


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

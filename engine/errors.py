"""The one error users are meant to see, and the wrapper that turns it into one line and exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

BAD_INPUT, INTERRUPTED = 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN = 200
"""Characters of foreign text that a message repeats at most."""
ALIKE = 0.78
"""How alike (difflib's ratio) two words must be for one to be proposed: a typing error is, another word is not."""
LONGEST = 2000
"""Characters of a whole message; what is longer is our own mistake, and is cut."""


class UserError(Exception):
    """Bad input. The message says what is wrong, gives the numbers, and tells what to change. It is one line:
    control characters in it are escaped, and it is cut after `LONGEST` characters. A word of more than `SHOWN`
    characters is none of ours (a path, a name, a value), and is cut too."""

    def __init__(self, message: str) -> None:
        words = re.sub(rf"\S{{{SHOWN + 1},}}", lambda word: shown(word[0]), message)
        super().__init__(shown(words, LONGEST))


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
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=ALIKE)
    return lower[found[0]] if found else None


class _Output(io.TextIOWrapper):
    """Standard output. Whoever prints may be writing a file too: a full disk here must not be taken for one there."""

    def write(self, text: str, /) -> int:
        with _named():
            return super().write(text)

    def flush(self) -> None:
        with _named():
            super().flush()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Raises UserError where standard output cannot be written, but for a reader that has gone."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise UserError(f"standard output cannot be written: {error.strerror or error}") from None


def replace_unprintable() -> None:
    """What a terminal cannot show (PYTHONIOENCODING=ascii) is replaced in what we print, and raises nothing. What is
    printed to a closed output (`>&-`) goes nowhere, and one that cannot be written is named (`_Output`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # opened at once, so that no file of the run gets the free descriptor
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests put other things there
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    out = sys.__stdout__  # keeps the buffer open that both share
    if sys.stdout is out and isinstance(out, io.TextIOWrapper) and not isinstance(out, _Output):
        sys.stdout = _Output(out.buffer, encoding=out.encoding, errors=out.errors, line_buffering=out.line_buffering,
                             write_through=out.write_through)


def print_all(text: str) -> None:
    """Prints the whole of what a command has to say. The reader (head, less) may go before the end: that is no error.
    Raises UserError where the output goes to a full disk."""
    try:
        with _named():
            print(text, flush=True)
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """What is still unwritten goes nowhere, so that Python does not complain of it when it ends."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def run_cli(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a tool's `main(argv)` and exits with its code. A UserError, a file that cannot be used and a full disk
    become one line `error: ...` and exit code 2; Ctrl-C becomes 130."""
    replace_unprintable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see engine/quiet.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(guarded(lambda: main(sys.argv[1:])))


def guarded(body: Callable[[], int]) -> int:
    """The exit code of `body`, its failures turned into a line: see `run_cli`."""
    try:
        try:
            code = body()
        except SystemExit as end:  # argparse's --help
            code = end.code if isinstance(end.code, int) else 0
        if sys.stdout is not None:
            with _named():
                sys.stdout.flush()
        return code
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 0  # the reader (head, less) has gone; nothing is wrong with us
    except MemoryError:
        return _refuse("not enough memory")
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        where = f"{shown(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
        return _refuse(f"{where}{error.strerror}")


def _refuse(message: str) -> int:
    print(f"error: {shown(message, LONGEST)}", file=sys.stderr)
    return BAD_INPUT

"""The parser of `engine.generate` and of the tools: argparse whose mistakes are one line that names the right flag."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from engine.config.foreign import unknown_option
from engine.config.foreign_tools import TOOLS
from engine.errors import UserError, nearest, print_all, shown


class Command(argparse.ArgumentParser):
    """An ArgumentParser of the program `prog` (a key of TOOLS). Raises UserError where argparse would print its usage
    and exit; words of other programs are answered with ours; `--inp` is no short form of `--input`."""

    def __init__(self, prog: str, description: str | None) -> None:
        runs = f"python -m {prog}" if prog.startswith("engine.") else prog
        super().__init__(prog=runs, description=description, allow_abbrev=False)
        self._tables = TOOLS[prog]

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def print_help(self, file: Any = None) -> None:
        """Prints the help; argparse itself would swallow a full disk."""
        print_all(self.format_help().rstrip("\n"))

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags of a command line. Raises UserError for what they cannot be."""
        ours = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        for word in argv:
            # Before argparse looks: it would first complain of the flag that is missing, not of the one misspelt.
            key = word.partition("=")[0]
            if word == "--":
                break
            if word.startswith("--") and " " not in key and key not in self._option_string_actions:
                raise UserError(unknown_option(key[2:], key[2:], ours, self._tables))
        found, rest = self.parse_known_args(argv)
        if rest:
            raise UserError(f"unexpected argument {shown(rest[0], 80)!r}; --help lists the flags")
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # Most often an unset variable of a shell. Looked at before it is converted: the path "" is the folder one is
        # in. A default that is empty says that empty means something.
        if arg_string == "" and action.default != "" and action.type is not given_text:
            if not action.option_strings:
                raise UserError(f"{action.metavar or action.dest} is empty; give a value")
            raise UserError(f"{action.option_strings[0]} is empty; give a value, or leave the flag out")
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            options = list(map(str, action.choices))
            close = nearest(str(value), options)
            hint = f"did you mean {close}?" if close else f"use {', '.join(options)}"
            raise UserError(f"{'/'.join(action.option_strings)} {shown(value, 80)!r} is not known; {hint}")


def given_text(text: str) -> str:
    """The type of a flag whose value may be empty."""
    return text


def whole(least: int = -1 << 62, most: int = 1 << 62) -> Callable[[str], int]:
    """The type of a flag that is a whole number from `least` to `most`."""
    def convert(text: str) -> int:
        digits = text.strip().replace("_", "")
        if not digits.removeprefix("-").isdecimal() or len(digits) > 40 or not least <= int(digits) <= most:
            raise argparse.ArgumentTypeError(f"{shown(text, 80)!r} is not a whole number from {least} to {most}")
        return int(digits)

    return convert


def real(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag that is a number from `least` to `most`."""
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{shown(text, 80)!r} is not a number from {least:g} to {most:g}")
        return value

    return convert

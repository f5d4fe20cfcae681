"""Typed reading of a config.json: every value is checked, and every complaint names its key."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import UserError

_MISSING = object()


class Keys:
    """The keys of a config.json; `place` is the file, for messages. A default stands in for a missing or null key."""

    def __init__(self, content: Mapping[str, Any], place: str) -> None:
        self.content = content
        self.place = place

    def fail(self, key: str, what: str) -> UserError:
        """An error about a key."""
        return UserError(f"{self.place}: {key} {str(self.content.get(key))[:60]!r} {what}")

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """A value as it stands."""
        value = self.content.get(key)
        if value is None:
            if default is _MISSING:
                raise UserError(f"{self.place} has no {key}")
            return default
        return value

    def whole(self, key: str, most: int, default: Any = _MISSING) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.fail(key, f"is not a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A finite number from 0."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < 1e30 or not math.isfinite(value):
            raise self.fail(key, "is not a number from 0")
        return float(value)

    def positive(self, key: str, default: Any = _MISSING) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30 or not math.isfinite(value):
            raise self.fail(key, "is not a number above 0")
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> bool:
        """true or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.fail(key, "is not true or false")
        return value

    def only(self, key: str, known: Collection[Any], why: str) -> None:
        """The key, where present, must have one of the known values: nothing else is computed."""
        value = self.content.get(key)
        if value is not None and not any(type(value) is type(word) and value == word for word in known):
            raise self.fail(key, f"is not supported: {why}")

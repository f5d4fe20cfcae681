"""The run's config as a manifest holds it: read with suspicion, and what a newer Triax has put there is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import __version__
from engine.checkpoint.source import compress
from engine.config import RunConfig
from engine.config.check import check_choices, check_model
from engine.config.flags import from_dict, unknown_fields
from engine.errors import UserError, shown


def stored_config(content: Mapping[str, Any], place: Path, writer: str) -> RunConfig:
    """The RunConfig in the manifest of `place`, which the Triax of version `writer` wrote ("" where it is not told).

    Raises UserError for fields of a newer Triax, and for a model that cannot be.
    """
    unknown = unknown_fields(content)
    if unknown:
        by = f" ({shown(writer, 40)})" if writer else ""
        raise UserError(f"{shown(place)} was written by a newer Triax{by}: its config has {compress(unknown)}, which "
                        f"this one ({__version__}) does not know; update Triax")
    try:
        config = from_dict(content)
        check_choices(RunConfig(model=config.model))
        check_model(config.model)
    except UserError as error:
        raise of_newer(UserError(f"{shown(place)}: {error}"), place, writer) from None
    return config


def of_newer(error: UserError, place: Path, writer: str) -> UserError:
    """The error itself, or where a newer Triax than this one wrote `place`, the error with that said first."""
    if _numbers(writer) <= _numbers(__version__):
        return error
    return UserError(f"{shown(place)} was written by a newer Triax ({shown(writer, 40)}, and this is {__version__}): "
                     f"{error}; update Triax")


def _numbers(version: str) -> list[int]:
    """`1.10.2` as numbers that compare."""
    return [int(number) for number in re.findall(r"[0-9]{1,9}", version)]

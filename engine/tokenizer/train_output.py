"""The folder a vocabulary is written to: looked at before the work begins, and filled at once when it is done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from engine.errors import UserError

MODEL, JSON, CONFIG, ABOUT = "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "training.json"
OUTPUTS = (MODEL, JSON, CONFIG, ABOUT)


def check_output(output: Path, *, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Raises UserError where a vocabulary can't be put into the folder: it holds something (with `overwrite`: something
    of another name, or an input of ours), or can't be made or written to."""
    for path in inputs:
        real = Path(path).resolve()
        if real.parent == output.resolve() and real.name in OUTPUTS:
            raise UserError(f"{path} is an input and would be overwritten; choose another --output")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; --output is a folder")
    try:
        held = sorted(path.name for path in output.iterdir()) if output.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {output}: {error.strerror}") from None
    if held and not overwrite:
        names = ", ".join(held[:3]) + (f" and {len(held) - 3:,} more" if held[3:] else "")
        raise UserError(f"{output} is not empty ({names}); choose another --output, or say --overwrite, which "
                        f"replaces {', '.join(OUTPUTS)} there")
    nearest = next((path for path in (output, *output.absolute().parents) if path.exists()), Path("/"))
    if not nearest.is_dir():
        raise UserError(f"cannot make {output}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {output}: no permission to write in {nearest}")


def place(output: Path, contents: Mapping[str, bytes]) -> None:
    """Writes the files, all or none. Raises UserError where that fails; then, and at Ctrl-C, nothing is left behind.

    Files of an earlier vocabulary go first, so that a run killed in between leaves too few files, never a mixture."""
    drafts = {name: output / f".{name}.partial" for name in contents}
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, draft in drafts.items():
            _write(draft, contents[name])
        for name in OUTPUTS:
            (output / name).unlink(missing_ok=True)
        for name, draft in drafts.items():
            os.replace(draft, output / name)
    except BaseException as error:
        _discard(drafts.values(), made)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {output}: {error.strerror or error}") from None
        raise


def _discard(drafts: Iterable[Path], made: Iterable[Path]) -> None:
    try:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
    except OSError:
        pass  # it was never made, or cannot be removed either


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

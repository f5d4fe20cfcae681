"""`engine.kernels`: a package whose files lie in `kernels/` in the source tree, in `engine/kernels/` once installed.

The folder has no `__init__.py`: Hugging Face publishes a package named `kernels`, `transformers` probes for it, and a
regular top-level package of that name in the working directory would break every model import. So this module stands in
for the `__init__.py` and says where the files are; setting `__path__` makes it a package for the import system.
"""

from __future__ import annotations

from pathlib import Path


def _folder() -> Path:
    """`engine/kernels` beside this file where it is installed; the source tree has `kernels` one level up instead."""
    installed = Path(__file__).with_name("kernels")
    return installed if installed.is_dir() else Path(__file__).parents[1] / "kernels"


__path__ = [str(_folder())]

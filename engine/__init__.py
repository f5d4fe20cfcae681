"""Triax: a 3D-parallel engine in which every layout computes the same run."""

import sys

from engine.errors import end_quietly

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and any(word == "-m" and name.startswith("engine.")
                                  for word, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)):
    end_quietly()  # `python -m engine.pretrain`: this package is read first, then what takes seconds

"""Triax: a 3D-parallel engine in which every layout computes the same run."""

import sys

from engine.quiet import end_quietly

__version__ = "0.1.0"

_module = sys.argv[:1] == ["-m"] and any(word == "-m" and name.startswith("engine.")
                                         for word, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
_recipe = sys.argv[:1] != [] and sys.argv[0].endswith(".sh")  # examples/*.sh, which Python runs too
if _module or _recipe:
    end_quietly()  # this package is read first, then what takes seconds

    from engine.train.threads import share_cores  # no torch in it: its threads are settled before it is imported

    share_cores(sys.argv[1:], getattr(sys.modules["__main__"], "ARGS", ()))  # ARGS: a recipe's own flags

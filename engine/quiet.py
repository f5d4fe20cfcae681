"""Ctrl-C while a program is being read. This module imports next to nothing: it comes before all imports."""

import signal


def end_quietly() -> None:
    """Until `run_cli` is called, Ctrl-C ends the process without a traceback: imports take seconds. Where SIGINT is
    ignored (nohup, a shell's background), it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

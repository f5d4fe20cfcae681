"""One rank's frame: how each kind of end looks, its device, its threads, its allocator.

Bad input is known before a process group exists: one rank says it in one line and every rank exits with 2. A crash in
one rank is written to the store with its name; the watch of every other rank reads it there and ends its process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from engine.errors import UserError, shown
from engine.train.place import Place, place_from_environment
from engine.train.rendezvous import START_SECONDS, Ended, NoMeeting, Reported, end_run, linger, refuse

BAD_INPUT, CRASHED, INTERRUPTED = 2, 1, 130
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's names for what `mallopt` sets (malloc.h)."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""What torch's allocator of GPU memory reads when it is first used. torch 2.11 to 2.14 read all three; the first is the
newest name, of which no version warns."""
LOG_ERRORS = 2
"""c10's level that leaves warnings out (c10/util/logging_is_not_google_glog.h)."""


class Diverged(RuntimeError):
    """The loss or the gradient norm is not finite; no weight has moved."""


def run_rank(body: Callable[[Place], int], *, alone: bool = False) -> int:
    """Runs one rank's work and turns each kind of end into an exit code and a message. `alone` is for a process that is
    no rank, whatever started it."""
    quiet_torch()
    expand_segments()
    # Python takes its handlers away before it has ended: a launcher's SIGTERM would change the exit code then.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(Exception):  # stderr may have no descriptor
        faulthandler.enable(all_threads=True)
    place = Place(0, 1, 0, 1)
    try:
        place = place if alone else place_from_environment()
        return body(place)
    except (UserError, Diverged) as error:
        code = BAD_INPUT if isinstance(error, UserError) else CRASHED
        tell_launcher(f"error: {error}")
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))  # torchrun has seen another of us end
        if isinstance(error, NoMeeting):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            refuse(place, code, f"error: {error}")
        return _leave(code)
    except Ended as error:
        if error.code:
            tell_launcher(str(error))
        return _leave(error.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return _leave(INTERRUPTED)
    except Exception as error:
        if place.world == 1:
            tell_launcher(f"{type(error).__name__}: {error}", without_frames(traceback.format_exc()))
            raise
        _crash(place, error)


def _crash(place: Place, error: Exception) -> NoReturn:
    """Shows why a rank has crashed, and ends its process."""
    told = isinstance(error, Reported)
    cause = error.__cause__ if told else error
    assert cause is not None
    details = without_frames("".join(traceback.format_exception(cause)))
    tell_launcher(f"{type(cause).__name__}: {cause}", details)
    print(details, end="", file=sys.stderr, flush=True)
    if not told:  # before the ranks have met: nobody watches over this one yet
        said = shown(str(cause).partition("\n")[0], 1000)
        refuse(place, CRASHED, f"rank {place.rank} failed: {type(cause).__name__}: {said}", patience=START_SECONDS)
    os._exit(CRASHED)  # a peer may hang in a collective with us: no orderly shutdown is to be had


def ended(store: dist.Store, place: Place, error: UserError | Diverged) -> Ended:
    """What to raise instead of an error that all ranks find when they have met; the first of them has said it."""
    code = BAD_INPUT if isinstance(error, UserError) else CRASHED
    first = True
    with contextlib.suppress(RuntimeError):  # rank 0 has gone, and with it the store
        first = end_run(store, place.rank, code, f"error: {error}")
    if first:
        print(f"error: {error}", file=sys.stderr, flush=True)
    linger(store, place.world)
    return Ended(code, f"error: {error}")


def _leave(code: int) -> int:
    """The exit code; ends the process where a group is up: to take it apart while a peer is in a collective with us
    aborts the process."""
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)
    return code


def tell_launcher(line: str, details: str = "") -> None:
    """Writes the file whose content torchrun's closing block repeats as this rank's error, where torchrun asks for one:
    `details`, or else the line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": line, "extraInfo": {"py_callstack": details or line, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}), encoding="utf-8")


def without_frames(text: str) -> str:
    """A traceback without the C++ frames that torch appends to its messages."""
    kept, skipping = [], False
    for line in text.splitlines(keepends=True):
        if line.startswith("Exception raised from ") and "(most recent call first)" in line:
            skipping = True
        elif skipping and not line.startswith(("frame #", "<omitting python frames>", "\n")):
            skipping = False
        if not skipping:
            kept.append(line)
    return "".join(kept)


def quiet_torch() -> None:
    """Leaves torch's C++ warnings out, unless the user has set their level: each names a lost connection by some 20
    lines of C++ frames, and the watch says in one line who has died."""
    if "TORCH_CPP_LOG_LEVEL" in os.environ:
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: the symbol is another's
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
        level = ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
        level.value = max(level.value, LOG_ERRORS)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` is this rank's GPU where there is one; its bf16 products are from then on summed in fp32. Raises UserError
    when CUDA is asked for and not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no GPU; use --device cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; "
                        "start fewer processes per node")
    # Where cuBLAS splits the sum of a product over blocks, it would add their parts in bf16: coarser than one block's.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", local_rank)


def expand_segments() -> None:
    """Lets torch's allocator grow its ranges of GPU memory instead of taking many of fixed sizes, whose gaps tensors of
    other sizes cannot use. What the user has set wins. Before CUDA is initialised: torch reads its variable once."""
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def tune_allocator() -> None:
    """Keeps freed memory instead of returning it to the system, and asks for huge pages: on CPUs a step allocates and
    frees activations of many megabytes, and each new page costs a fault (6 to 9 % of a step, benchmarks/LOG.md).

    glibc only, elsewhere nothing happens; before the first tensor, since torch reads its variable once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((M_MMAP_THRESHOLD, 1 << 25), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 1 << 26)):
        mallopt(option, value)

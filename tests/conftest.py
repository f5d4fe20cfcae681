"""What tests share: the pool of rank processes, and where the shared data lies."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch and numpy are imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy, under Triton's interpreter: 3 to 10 times faster

import torch  # noqa: E402

settings.register_profile("suite", deadline=None)  # a loaded machine is no fault of the code
settings.load_profile("suite")

# A shell that starts the suite in the background, or nohup, ignores signals; what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests go first: processes that take one file after another then end at the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


TIMEOUT = 120.0
"""Seconds a job on the pool may take; a rank that hangs fails its test, not the session."""

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated, so before anything imports them

# Processes are forked from one that has imported these: the imports take a rank four seconds of a core.
multiprocessing.set_forkserver_preload(["engine.pretrain", "engine.finetune", "engine.verify", "engine.generate",
                                        "tokenizers", "sentencepiece"])


def _serve(pipe: Connection, rank: int) -> None:
    """A rank process: waits for jobs, each in a process group of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        job = pipe.recv()
        if job is None:
            return
        path, name, world, store, kwargs = job
        try:
            if world > 1:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                                        timeout=timedelta(seconds=60))
            result = getattr(_module(path), name)(rank, world, **kwargs)
            pipe.send((True, result))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _module(path: str) -> Any:
    """A test module by its file (tests are not a package)."""
    spec = importlib.util.spec_from_file_location(f"pool_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RankPool:
    """Processes that live for the whole session: importing torch eight times a test is what makes such tests slow."""

    def __init__(self, folder: Path) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.folder = folder
        self.workers: list[tuple[Any, Connection]] = []
        self.jobs = 0

    def __call__(self, world: int, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """Runs `function(rank, world, **kwargs)` of a test module on `world` ranks; their results, by rank."""
        while len(self.workers) < world:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there, len(self.workers)), daemon=True)
            process.start()
            self.workers.append((process, here))
        self.jobs += 1
        store = self.folder / f"store-{self.jobs}"
        path = function.__code__.co_filename
        for _, pipe in self.workers[:world]:
            pipe.send((path, function.__name__, world, store, kwargs))
        results = [self._result(pipe) for _, pipe in self.workers[:world]]
        failed = [(rank, text) for rank, (good, text) in enumerate(results) if not good]
        if failed:
            self.close()
            pytest.fail("\n".join(f"rank {rank} of {world}:\n{text}" for rank, text in failed), pytrace=False)
        return [value for _, value in results]

    def _result(self, pipe: Connection) -> tuple[bool, Any]:
        if pipe.poll(TIMEOUT):
            return pipe.recv()  # type: ignore[no-any-return]
        return False, f"no answer within {TIMEOUT:.0f} s"

    def close(self) -> None:
        """Ends all processes; the next job starts new ones."""
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers.clear()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks(4, function, **kwargs)` runs a function of the test's module on 4 gloo ranks."""
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        yield pool
        pool.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped, saying so, where TRIAX_DATA is unset."""
    folder = os.environ.get("TRIAX_DATA")
    if not folder:
        pytest.skip("TRIAX_DATA is not set: the real data is not here")
    return Path(folder)

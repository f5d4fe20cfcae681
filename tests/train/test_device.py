"""What a rank settles about its device before anything computes on it. Torch is told of a GPU: none is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from engine.config import Layout, parse
from engine.train import launch
from engine.train.gather import gathered
from engine.train.job import Job
from engine.train.launch import ALLOCATOR, choose_device, run_rank
from engine.train.place import Place

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that sees two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("gpu")
def test_products_in_bf16_are_summed_in_fp32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_bf16_reduced_precision_reduction = True  # torch's default
        assert choose_device("auto", 1) == torch.device("cuda", 1)
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_a_rank_lets_the_gpus_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "place_from_environment", lambda: Place(0, 1, 0, 1))
    found: list[dict[str, str]] = []

    def body(place: Place) -> int:
        found.append({name: os.environ[name] for name in ALLOCATOR if name in os.environ})
        return 0

    assert run_rank(body) == 0
    for name in ALLOCATOR:
        with monkeypatch.context() as user:
            user.delenv(ALLOCATOR[0])
            user.setenv(name, "max_split_size_mb:512")
            assert run_rank(body) == 0
    assert found[0] == {ALLOCATOR[0]: "expandable_segments:True"}
    assert found[1:] == [{name: "max_split_size_mb:512"} for name in ALLOCATOR]


def test_torch_reads_the_setting_after_it_is_imported_and_does_not_warn() -> None:
    read = ("import torch; from engine.train.launch import expand_segments; expand_segments(); "
            "print(torch._C._accelerator_getAllocatorSettings())")
    env = {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", read], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "expandable_segments:True\n", "")


def test_one_process_on_a_gpu_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a process group, for one process")

    for name in ("init_process_group", "new_group", "split_group", "TCPStore", "barrier"):
        monkeypatch.setattr(dist, name, refuse)
    config = parse(["--model", "tiny", "--device", "cuda"])
    job = cast(Job, SimpleNamespace(config=config, device=GPU, layout=Layout(), data=()))
    with gathered(job, Place(0, 1, 0, 1)) as mesh:
        assert not mesh.groups and not mesh.channels and not dist.is_initialized()

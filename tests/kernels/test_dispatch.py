"""Only `auto` chooses; whoever asks for what cannot run gets an error, and one line says what runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from engine.kernels.dispatch import Kernels, KernelsUnavailable, choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = {"norm": "torch", "rope": "torch", "activation": "torch", "loss": "torch", "optimizer": "torch"}
FUSED = dict.fromkeys(PLAIN, "triton")


def words(kernels: Kernels) -> dict[str, str]:
    return {name: getattr(kernels, name) for name in PLAIN}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_auto_on_a_cpu_is_torch(dtype: torch.dtype) -> None:
    found = choose("auto", "auto", CPU, dtype)
    assert words(found) == PLAIN and found.attention == "sdpa" and not found.wide_products


def test_auto_on_cuda_is_triton_and_its_products_add_in_fp32() -> None:
    found = choose("auto", "auto", CUDA, torch.bfloat16, here=False)
    assert words(found) == FUSED and found.attention == "triton" and found.wide_products
    single = choose("auto", "auto", CUDA, torch.float32, here=False)
    assert words(single) == FUSED and not single.wide_products
    assert single.attention == "sdpa", "in fp32 ours is for proofs"
    assert choose("auto", "triton", CUDA, torch.float32, here=False).attention == "triton"


def test_heads_wider_than_a_tile_go_to_torch_unless_triton_is_asked_for() -> None:
    assert choose("auto", "auto", CUDA, torch.bfloat16, head_dim=320, here=False).attention == "sdpa"
    with pytest.raises(KernelsUnavailable, match="--attention triton: .* up to 256 columns, --head-dim is 320"):
        choose("auto", "triton", CUDA, torch.bfloat16, head_dim=320, here=False)


def test_auto_on_cuda_in_fp64_is_torch_and_says_why() -> None:
    found = choose("auto", "auto", CUDA, torch.float64, here=False)
    assert words(found) == PLAIN and found.attention == "sdpa" and "fp32" in str(found)


def test_torch_and_an_attention_may_be_asked_for() -> None:
    found = choose("torch", "auto", CUDA, torch.bfloat16, here=False)
    assert words(found) == PLAIN and found.attention == "sdpa"
    assert choose("auto", "sdpa", CUDA, torch.bfloat16, here=False).attention == "sdpa"
    assert choose("auto", "reference", CUDA, torch.bfloat16, here=False).attention == "unfused"
    assert choose("torch", "reference", CUDA, torch.bfloat16, here=False).attention == "reference"
    mixed = choose("torch", "triton", CUDA, torch.bfloat16, here=False)
    assert words(mixed) == PLAIN and mixed.attention == "triton"


def test_apex_norms_leave_the_rest_to_triton() -> None:
    assert words(choose("apex", "auto", CUDA, torch.bfloat16, here=False)) == {**FUSED, "norm": "apex"}


@pytest.mark.parametrize(("kernels", "attention", "device", "dtype", "says"), [
    ("triton", "auto", CUDA, torch.float64, "--kernels triton: its kernels compute in fp32"),
    ("auto", "triton", CUDA, torch.float64, "--attention triton"),
    ("apex", "auto", CPU, torch.float32, "--kernels apex: NVIDIA Apex runs on CUDA"),
    ("apex", "auto", CUDA, torch.float64, "fp64"),
])
def test_what_cannot_run_is_an_error(kernels: str, attention: str, device: torch.device, dtype: torch.dtype,
                                     says: str) -> None:
    with pytest.raises(KernelsUnavailable, match=says):
        choose(kernels, attention, device, dtype, here=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="apex may be installed where there is a GPU")
def test_apex_must_be_here_and_prove_itself() -> None:
    with pytest.raises(KernelsUnavailable, match="the package `apex` on PyPI is another project"):
        choose("apex", "auto", CUDA, torch.bfloat16)


def test_the_line_names_every_operation() -> None:
    line = str(choose("auto", "auto", CPU, torch.float32))
    assert line == ("kernels: torch (norms, RoPE, activation, loss, optimizer); attention: torch "
                    "scaled_dot_product_attention (a CPU)")
    line = str(choose("apex", "auto", CUDA, torch.bfloat16, here=False))
    assert line.startswith("kernels: apex (norms); triton (RoPE, activation, loss, optimizer); attention: triton; ")


def plain_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code without the interpreter that the tests switch on."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine runs compiled kernels")
def test_on_a_cpu_triton_is_an_error_that_names_the_way_out() -> None:
    found = plain_python("import sys; from engine.pretrain import main; "
                         "sys.exit(main(['--kernels', 'triton', '--device', 'cpu', '--data', 'x']))")
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1].endswith("set TRITON_INTERPRET=1); use --kernels torch")


def test_without_triton_everything_imports_and_the_error_says_what_to_install() -> None:
    found = plain_python("""
import sys, torch
sys.modules["triton"] = None
import engine.train.run, engine.kernels.softmax, engine.kernels.dropout
from engine.kernels.dispatch import choose
print(choose("auto", "auto", torch.device("cpu"), torch.float32))
print(choose("auto", "auto", torch.device("cuda"), torch.bfloat16, here=False))
try:
    choose("triton", "auto", torch.device("cuda"), torch.bfloat16)
except ValueError as error:
    print(error)
""")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == (
        "--kernels triton: triton is not installed; pip install 'triax[gpu]', or use --kernels torch")

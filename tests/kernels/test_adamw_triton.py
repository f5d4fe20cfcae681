"""The fused AdamW step against float64, over ten steps, beside torch's fused kernel in fp32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels.adamw import BLOCK_N, _adamw, adamw_, launch
from engine.kernels.language import INTERPRETING
from tests.kernels.rule import DEVICE, FLOATS, assert_as_good, assert_repeats, needs_triton, normal

pytestmark = needs_triton

ROOT = Path(__file__).parents[2]

OPTIONS: dict[str, Any] = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 10


def control(scale: float, skip: bool = False) -> torch.Tensor:
    """What the engine computes on the device: by what the gradient is multiplied, and whether nothing is written."""
    return torch.tensor([scale, float(skip)], dtype=torch.float64, device=DEVICE)


LENGTHS = [1000, BLOCK_N, 2 * BLOCK_N + 5]


def ten_steps(by: str, **changes: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """(weights, gradients of ten steps) -> weights and moments after them."""
    def steps(master: torch.Tensor, grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p, m, v = master.detach().clone(), torch.zeros_like(master), torch.zeros_like(master)
        for step, grad in enumerate(grads.detach(), 1):
            adamw_(p, grad.clone(), m, v, step=step, by=by, **{**OPTIONS, **changes})
        return p, m.detach(), v.detach()

    return steps


def gradients(length: int, scale: float) -> torch.Tensor:
    """Of ten steps, [10, length], a thousandth to a hundred times the scale."""
    return torch.stack([normal(length, seed=step, scale=scale * 10.0 ** (step % 6 - 3)) for step in range(STEPS)])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0}, {"control": control(0.37)},
                                     {"beta2": 0.999, "eps": 1e-6}],
                         ids=["decay", "no-decay", "clipped", "slow"])
def test_ten_steps_are_as_good_as_torchs(length: int, changes: dict[str, Any]) -> None:
    inputs = [normal(length, seed=99), gradients(length, 1.0)]
    assert_as_good(ten_steps("triton", **changes), ten_steps("torch", **changes), inputs, torch.float32)


@pytest.mark.parametrize("length", [1, 3, 17])
def test_a_short_buffer_goes_as_the_beginning_of_a_long_one(length: int) -> None:
    master, grads = normal(2000, seed=99).float(), gradients(2000, 1.0).float()
    found = ten_steps("triton")(master[:length], grads[:, :length].contiguous())
    for short, long in zip(found, ten_steps("triton")(master, grads), strict=True):
        torch.testing.assert_close(short, long[:length], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e6, 1e15])
def test_tiny_and_large_gradients_are_as_good_as_torchs(scale: float) -> None:
    inputs = [normal(300, seed=99), gradients(300, scale)]
    assert_as_good(ten_steps("triton"), ten_steps("torch"), inputs, torch.float32)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, in the interpreter
def test_a_gradient_whose_square_overflows_leaves_nothing_infinite() -> None:
    p, m, v = ten_steps("triton")(normal(20).float(), gradients(20, 1e20).float())
    assert p.isfinite().all() and m.isfinite().all() and v.isfinite().all()


def test_zero_gradients_only_decay() -> None:
    p, m, v = ten_steps("triton")(normal(700, seed=99).float(), torch.zeros(STEPS, 700, device=DEVICE))
    assert not m.any() and not v.any()
    torch.testing.assert_close(p.double(), normal(700, seed=99) * (1 - 0.001) ** STEPS, rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [0, 1, 3, *LENGTHS])
@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_out_holds_the_master_weights_rounded(dtype: torch.dtype, grad_dtype: torch.dtype, length: int) -> None:
    p, m, v = normal(length).float(), torch.zeros(length, device=DEVICE), torch.zeros(length, device=DEVICE)
    plain, out = p.clone(), torch.full((length,), 9.0, dtype=dtype, device=DEVICE)
    grad = normal(length, seed=1).to(grad_dtype)
    adamw_(p, grad, m, v, step=1, out=out, by="triton", **OPTIONS)
    adamw_(plain, grad.float(), torch.zeros_like(m), torch.zeros_like(v), step=1, by="triton", **OPTIONS)
    assert torch.equal(p, plain) and torch.equal(out, p.to(dtype))
    assert torch.equal(grad, normal(length, seed=1).to(grad_dtype)), "the gradient stays as it is"


@pytest.mark.parametrize("shift", [1, 3, 4])
def test_buffers_that_begin_anywhere_give_the_same_numbers_and_nothing_around_them_changes(shift: int) -> None:
    length = BLOCK_N + 9

    def step(at: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        wholes = [torch.full((length + 16,), 7.0, device=DEVICE) for _ in range(4)]
        wholes.append(torch.full((length + 16,), 7.0, dtype=torch.bfloat16, device=DEVICE))
        parts = [whole[at : at + length] for whole in wholes]
        for number, part in enumerate(parts):
            part.copy_(normal(length, seed=number).abs())
        adamw_(*parts[:4], step=3, out=parts[4], by="triton", **OPTIONS)
        return parts, [torch.cat([whole[:at], whole[at + length :]]) for whole in wholes]

    parts, around = step(shift)
    for one, other in zip(parts, step(0)[0], strict=True):
        last_place = 1e-6 if one.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(one, other, rtol=last_place, atol=0)
    assert all((rest == 7.0).all() for rest in around)


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_a_step_that_is_skipped_writes_nothing(by: str) -> None:
    length = BLOCK_N + 9
    buffers = [normal(length, seed=number).abs().float() for number in range(4)]
    buffers[1][3] = torch.inf
    out = torch.full((length,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    if by == "torch":
        out.copy_(buffers[0])  # the weights are the master weights rounded, before and after
    known = [buffer.clone() for buffer in (buffers[0], *buffers[2:], out)]
    adamw_(*buffers, step=3, control=control(torch.nan, skip=True), out=out, by=by, **OPTIONS)
    assert all(torch.equal(one, other) for one, other in zip((buffers[0], *buffers[2:], out), known, strict=True))


def test_two_runs_give_the_same_bits() -> None:
    assert_repeats(ten_steps("triton", control=control(0.5)), [normal(2000), gradients(2000, 1.0)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_step_has_the_bits_of_its_fused_kernel_after_a_multiplication(dtype: torch.dtype) -> None:
    for scale in (1.0, 0.37):
        found, known = ([normal(500, seed=seed).abs().to(dtype) for seed in range(4)] for _ in range(2))
        out = torch.empty(500, dtype=torch.bfloat16, device=DEVICE)
        adamw_(*found, step=4, control=control(scale), out=out, **OPTIONS)
        known[1].mul_(scale)
        torch._fused_adamw_([known[0]], [known[1]], [known[2]], [known[3]], [], [torch.tensor(4.0, device=DEVICE)],
                            amsgrad=False, maximize=False, **OPTIONS)
        assert all(torch.equal(one, other) for one, other in zip(found, known, strict=True))
        assert torch.equal(out, known[0].bfloat16())


def test_buffers_that_do_not_fit_together_are_refused() -> None:
    flat, wide = torch.zeros(8, device=DEVICE), torch.zeros(16, device=DEVICE)
    for buffers in ([flat, wide, flat, flat], [wide[::2], flat, flat, flat], [flat.double(), flat, flat, flat]):
        with pytest.raises(ValueError, match="AdamW"):
            adamw_(*buffers, step=1, by="triton", **OPTIONS)


def test_a_buffer_past_two_to_the_31_elements_is_addressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU only the last two programs run: what nobody touches of such a buffer takes no memory."""
    programs = (1 << 21) + 2
    length = programs * BLOCK_N - 40
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 18 * length:
        pytest.skip("18 bytes for each of 2^31 parameters do not fit this GPU")
    buffers = [torch.empty(length, device=DEVICE) for _ in range(4)]
    weights = torch.empty(length, dtype=torch.bfloat16, device=DEVICE)
    ends = [buffer[-BLOCK_N - 5 :] for buffer in buffers]
    for number, end in enumerate(ends):
        end.copy_(normal(len(end), seed=number).abs())
    short = [end.clone() for end in ends]
    adamw_(*short, step=2, by="triton", **OPTIONS)
    if INTERPRETING:
        run_programs(range(programs - 2, programs), monkeypatch)
    launch(*buffers, weights, 2, control=control(1.0), **OPTIONS)
    for end, expected in zip(ends, short, strict=True):
        torch.testing.assert_close(end, expected, rtol=1e-6, atol=0)
    assert torch.equal(weights[-BLOCK_N - 5 :], ends[0].to(torch.bfloat16))


def run_programs(which: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the interpreter runs these programs of a launch alone, and copies no tensor."""
    from triton.runtime import interpreter

    class Few(interpreter.GridExecutor):
        def __call__(self, *args: Any, **options: Any) -> None:
            self.grid = (len(which),)
            super().__call__(*args, **options)

        def _restore_args_dev(self, *args: Any) -> None:
            pass

    builder = interpreter.interpreter_builder
    place, size = builder.set_grid_idx, builder.set_grid_dim
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: place(which[x], y, z))
    monkeypatch.setattr(builder, "set_grid_dim", lambda *dims: size(which.stop, 1, 1))
    monkeypatch.setattr(interpreter, "GridExecutor", Few)


def test_the_operation_is_one_that_torch_can_trace() -> None:
    buffers = [normal(300, seed=number).abs().float() for number in range(4)]
    numbers = tuple(OPTIONS[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay"))
    for out in (None, torch.empty(300, dtype=torch.bfloat16, device=DEVICE)):
        torch.library.opcheck(_adamw, (*buffers, out, 3, *numbers, control(0.5)))

    def step(master: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
        adamw_(master, grad, m, v, step=3, out=out, by="triton", **OPTIONS)

    plain, traced = ([*(buffer.clone() for buffer in buffers), torch.empty(300, dtype=torch.float16, device=DEVICE)]
                     for _ in range(2))
    step(*plain)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    assert all(torch.equal(one, other) for one, other in zip(plain, traced, strict=True))
    assert not torch.equal(plain[0], buffers[0])


COMPILE = """
import sys
sys.path.insert(0, "benchmarks")
import common, resources, torch
from engine.kernels.adamw import launch
def flat(length, dtype=torch.float32):
    return torch.empty(length, dtype=dtype, device="meta")
options = dict(step=1, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1,
               control=flat(2, torch.float64))
with resources.compiling(90) as found:
    launch(*(flat(1003) for _ in range(4)), flat(1003, torch.bfloat16), **options)
text = found[0][1].asm["ptx"]
print(text.count("ld.global.v4.b32"), text.count("st.global.v4.b32"), text.count("shared."))
"""


def test_whole_blocks_of_any_length_are_read_and_written_16_bytes_at_a_time() -> None:
    """Compiled for Hopper: 8 elements a thread in 2 accesses of each of 4 buffers, 3 of them written."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "6", "0"]

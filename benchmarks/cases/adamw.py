"""AdamW over one flat shard, clip folded in; a bucket of 2^27 parameters stands for any number of them."""

from __future__ import annotations

import torch

from cases.base import Build, Case, Run
from engine.kernels.adamw import launch, reference

LENGTH, SHORT = 1 << 27, (1 << 14) + 77
OPTIONS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SCALE = 0.5


def buffers(device: torch.device, wide: bool, length: int) -> tuple[torch.Tensor, ...]:
    """Master weights, gradient, both moments (fp32), and bf16 weights unless the master weights are the weights."""
    master, grad, exp_avg = (torch.empty(length, device=device).normal_() for _ in range(3))
    weights = master if wide else torch.empty(length, dtype=torch.bfloat16, device=device)
    return master, grad, exp_avg, torch.empty(length, device=device).uniform_(), weights


def ours(wide: bool, length: int) -> Build:
    def build(device: torch.device) -> Run:
        master, grad, exp_avg, exp_avg_sq, weights = buffers(device, wide, length)
        control = torch.tensor([SCALE, 0.0], dtype=torch.float64, device=device)
        return lambda: launch(master, grad, exp_avg, exp_avg_sq, None if wide else weights, 10, control=control,
                              **OPTIONS)

    return build


def torch_fused(wide: bool, length: int) -> Build:
    """What the engine does by torch: three passes."""
    def build(device: torch.device) -> Run:
        master, grad, exp_avg, exp_avg_sq, weights = buffers(device, wide, length)
        counter = torch.tensor(10.0, device=device)

        def step() -> None:
            grad.mul_(SCALE)
            torch._fused_adamw_([master], [grad], [exp_avg], [exp_avg_sq], [], [counter], amsgrad=False,
                                maximize=False, **OPTIONS)
            if not wide:
                weights.copy_(master)

        return step

    return build


def apex(wide: bool, length: int) -> Build:
    """The kernel under apex's FusedAdam, with the passes that it leaves to others."""
    def build(device: torch.device) -> Run | None:
        try:
            from amp_C import multi_tensor_adam
        except ImportError:
            return None
        master, grad, exp_avg, exp_avg_sq, weights = buffers(device, wide, length)
        overflow = torch.zeros(1, dtype=torch.int32, device=device)

        def step() -> None:
            grad.mul_(SCALE)
            multi_tensor_adam(1 << 16, overflow, [[grad], [master], [exp_avg], [exp_avg_sq]], OPTIONS["lr"],
                              OPTIONS["beta1"], OPTIONS["beta2"], OPTIONS["eps"], 10, 1, 1, OPTIONS["weight_decay"])
            if not wide:
                weights.copy_(master)

        return step

    return build


def torch_compile(wide: bool, length: int) -> Build:
    """The formula, fused by torch's compiler."""
    def build(device: torch.device) -> Run:
        master, grad, exp_avg, exp_avg_sq, weights = buffers(device, wide, length)

        @torch.compile(fullgraph=True)
        def step(master: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
                 weights: torch.Tensor) -> None:
            reference(master, grad * SCALE, exp_avg, exp_avg_sq, step=10, **OPTIONS)
            if not wide:
                weights.copy_(master)

        return lambda: step(master, grad, exp_avg, exp_avg_sq, weights)

    return build


def case(wide: bool, length: int) -> Case:
    return Case(kernel="AdamW", shape=f"{length:,} parameters", dtype="fp32" if wide else "bf16",
                build=ours(wide, length), bytes=length * (28 if wide else 30), target=0.85,
                peers={"torch fused": torch_fused(wide, length), "torch.compile": torch_compile(wide, length),
                       "apex": apex(wide, length)})


CASES, TINY = ([case(wide=False, length=length), case(wide=True, length=length)] for length in (LENGTH, SHORT))

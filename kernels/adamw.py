"""AdamW (arXiv:1711.05101) over flat buffers: clipped gradient, moments, master weights and model weights in one pass.

g = scale * grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps);  out = p, rounded.

In fp32 that is 28 bytes a parameter, 30 with bf16 weights beside the master weights.
"""

from __future__ import annotations

import torch

from engine.kernels.language import cdiv, jit, rounded, tl

BLOCK_N = 1024
NUM_WARPS = 4
"""A thread has 8 elements of each buffer: two loads of 16 bytes from each of four are in flight, and its 56 registers
leave room for 9 such blocks on a multiprocessor: 147 KB are under way, several times bandwidth times latency."""

LARGEST = tl.constexpr(3.4e38)
"""A little less than the largest number of fp32."""


def adamw_(master: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, *, step: int,
           lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, control: torch.Tensor | None = None,
           out: torch.Tensor | None = None, by: str = "torch") -> None:
    """One step in place on flat, contiguous tensors of one length, `step` counting from 1.

    `control`, float64 [2] on the buffers' device, is (scale, skip): the gradient counts `scale` times (clipping), and
    where `skip` is not 0 nothing is written. It is computed on the device, so that the host need not wait for the
    gradient's norm; None is (1, 0). `out` receives the master weights in its own dtype. By "torch" all but `out` have
    one dtype, and the scale is multiplied into `grad` where it lies; by "triton" master weights and moments are fp32,
    grad of any dtype up to that, and grad stays as it is.
    """
    if by == "triton":
        control = master.new_tensor((1.0, 0.0), dtype=torch.float64) if control is None else control
        _adamw(master, grad, exp_avg, exp_avg_sq, out, step, lr, beta1, beta2, eps, weight_decay, control)
        return
    skip = None
    if control is not None and control.device.type == "cpu":  # the host has it already
        scale, skipped = control.tolist()
        if skipped:
            return
        if scale != 1.0:
            grad.mul_(scale)
    elif control is not None:
        # Torch's kernel has a divisor of its own for the gradient (grad_scale), but dividing by 1 / scale rounds twice.
        grad.mul_(control[0])
        skip = control[1].float()
    counter = torch.tensor(float(step), dtype=torch.float32, device=master.device)
    torch._fused_adamw_([master], [grad], [exp_avg], [exp_avg_sq], [], [counter], lr=lr, beta1=beta1, beta2=beta2,
                        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, found_inf=skip)
    if out is not None:
        out.copy_(master)


def reference(parameter: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, *,
              step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """The formula, written out."""
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    parameter.mul_(1 - lr * weight_decay)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    parameter.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


@jit
def adamw_kernel(master, grad, exp_avg, exp_avg_sq, out, control, length, take1, take2, decay, rate, unbias2, eps,
                 OUT: tl.constexpr, BLOCK_N: tl.constexpr):
    """One block of all buffers. Whole blocks go unmasked: a mask by a length that is no multiple of 4 would cut their
    accesses to single elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    scale = tl.load(control).to(tl.float32)
    if tl.load(control + 1) != 0.0:
        return
    if start + BLOCK_N <= length:
        _update(master, grad, exp_avg, exp_avg_sq, out, start, length, scale, take1, take2, decay, rate, unbias2, eps,
                OUT, False, BLOCK_N)
    else:
        _update(master, grad, exp_avg, exp_avg_sq, out, start, length, scale, take1, take2, decay, rate, unbias2, eps,
                OUT, True, BLOCK_N)


@jit
def _update(master, grad, exp_avg, exp_avg_sq, out, start, length, scale, take1, take2, decay, rate, unbias2, eps,
            OUT: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """take = 1 - beta: x + take (new - x) has no drift, where beta and 1 - beta rounded to fp32 do not sum to 1."""
    offs = start + tl.arange(0, BLOCK_N)
    mask = offs < length if MASKED else None
    g = tl.load(grad + offs, mask=mask).to(tl.float32) * scale
    m = tl.load(exp_avg + offs, mask=mask)
    v = tl.load(exp_avg_sq + offs, mask=mask)
    p = tl.load(master + offs, mask=mask)
    m = m + (g - m) * take1
    v = v + (tl.minimum(g * g, LARGEST) - v) * take2  # an infinite v would never come down again
    p = p - p * decay - rate * (m / (tl.sqrt(v) * unbias2 + eps))
    tl.store(exp_avg + offs, m, mask=mask)
    tl.store(exp_avg_sq + offs, v, mask=mask)
    tl.store(master + offs, p, mask=mask)
    if OUT:
        # Said to be contiguous by 4 only: a thread would store 8 of a 16-bit dtype at once, and to match it all other
        # stores would be turned over in shared memory. A warp's 256 bytes are whole sectors either way.
        tl.store(out + tl.max_contiguous(offs, 4), rounded(p, out.dtype.element_ty), mask=mask)


def launch(master: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
           out: torch.Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
           weight_decay: float, control: torch.Tensor) -> None:
    """One step by one launch. Raises ValueError where a buffer is not contiguous or not as long as the others."""
    buffers = [master, grad, exp_avg, exp_avg_sq, *([] if out is None else [out])]
    length = master.numel()
    if any(buffer.numel() != length or not buffer.is_contiguous() for buffer in buffers):
        raise ValueError(f"AdamW takes contiguous buffers of one length, not {[tuple(b.shape) for b in buffers]}")
    if any(state.dtype != torch.float32 for state in (master, exp_avg, exp_avg_sq)):
        raise ValueError("AdamW's kernel keeps master weights and moments in fp32")
    if length == 0:
        return
    # Corrections in double, then fp32: 1 - beta2^t of small t would lose digits otherwise.
    adamw_kernel[(cdiv(length, BLOCK_N),)](
        master, grad, exp_avg, exp_avg_sq, master if out is None else out, control, length, 1.0 - beta1, 1.0 - beta2,
        float(lr * weight_decay), lr / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5, float(eps),
        OUT=out is not None, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS)


@torch.library.custom_op("triax::adamw_", mutates_args=("master", "exp_avg", "exp_avg_sq", "out"))
def _adamw(master: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
           out: torch.Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
           weight_decay: float, control: torch.Tensor) -> None:
    launch(master, grad, exp_avg, exp_avg_sq, out, step, lr, beta1, beta2, eps, weight_decay, control)


@_adamw.register_fake
def _(master: torch.Tensor, *rest: object) -> None:
    return None

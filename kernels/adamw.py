"""AdamW (arXiv:1711.05101) over flat buffers.

m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
"""

from __future__ import annotations

import torch


def adamw_(parameter: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, *, step: int,
           lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """One step in place on flat tensors of one dtype, `step` counting from 1. Torch's fused kernel: one pass."""
    counter = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
    torch._fused_adamw_([parameter], [grad], [exp_avg], [exp_avg_sq], [], [counter], lr=lr, beta1=beta1, beta2=beta2,
                        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False)


def reference(parameter: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, *,
              step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """The formula, written out."""
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    parameter.mul_(1 - lr * weight_decay)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    parameter.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))

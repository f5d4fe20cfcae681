"""The output projection with its cross-entropy, losses and both gradients: three matrix products are the floor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from cases.base import FEW, TOKENS, Build, Case, Run
from engine.kernels.cross_entropy import launch_gradient_, launch_statistics
from engine.kernels.linear_cross_entropy import chunk_tokens, linear_cross_entropy

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(device: torch.device, tokens: int, hidden: int, columns: int) -> Inputs:
    """x [tokens, hidden] and the head [columns, hidden] in bf16, and labels."""
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device)
    weight = torch.randn(columns, hidden, dtype=torch.bfloat16, device=device).mul_(hidden**-0.5)
    return x, weight, torch.randint(columns, (tokens,), device=device)


def kernels(device: torch.device, columns: int) -> Run:
    """The launches of one chunk: what there is to compile."""
    logits = torch.empty(chunk_tokens(columns), columns, dtype=torch.bfloat16, device=device)
    labels = torch.empty(len(logits), dtype=torch.int64, device=device)

    def run() -> None:
        _, tops, sums = launch_statistics(logits, labels, 0, columns, 0.0, True)
        launch_gradient_(logits, labels, tops, sums, None, 1 / TOKENS, 0, columns, 0.0)

    return run


def ours(tokens: int, hidden: int, columns: int) -> Build:
    """As the engine runs it: the weight's gradient is added up in fp32."""
    def build(device: torch.device) -> Run:
        if device.type == "meta":
            return kernels(device, columns)
        x, weight, labels = inputs(device, tokens, hidden, columns)
        total = torch.zeros(columns, hidden, device=device)

        def add(dlogits: torch.Tensor, rows: torch.Tensor, dx: torch.Tensor | None) -> None:
            if device.type == "cuda":
                torch.addmm(total, dlogits.t(), rows, out_dtype=total.dtype, out=total)
            else:  # a rehearsal: no other device has a product of two bf16 matrices into fp32
                total.addmm_(dlogits.t().float(), rows.float())

        return lambda: linear_cross_entropy(x, weight, labels, scale=1 / tokens, vocab=columns, by="triton",
                                            add_weight_grad=add)

    return build


def differentiated(tokens: int, hidden: int, columns: int, loss: Callable[[Inputs], torch.Tensor],
                   compiled: bool = False) -> Build:
    """A peer: the mean loss and its backward pass."""
    def build(device: torch.device) -> Run:
        tensors = inputs(device, tokens, hidden, columns)
        x, weight, _ = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors)
        function = torch.compile(loss) if compiled else loss

        def run() -> None:
            x.grad = weight.grad = None
            function(tensors).backward()

        return run

    return build


def whole(tensors: Inputs) -> torch.Tensor:
    """All logits at once."""
    x, weight, labels = tensors
    return F.cross_entropy(x @ weight.t(), labels)


def torchs(tokens: int, hidden: int, columns: int) -> Build:
    """torch's own chunks, where it has them."""
    def build(device: torch.device) -> Run | None:
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if options is None or not hasattr(F, "linear_cross_entropy"):
            return None
        return differentiated(tokens, hidden, columns,
                              lambda t: F.linear_cross_entropy(*t, options=options()))(device)

    return build


def liger(tokens: int, hidden: int, columns: int) -> Build:
    """Chunks too; the weight's gradient is added up in bf16."""
    def build(device: torch.device) -> Run | None:
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        except ImportError:
            return None
        return differentiated(tokens, hidden, columns, lambda t: liger_fused_linear_cross_entropy(*t))(device)

    return build


def case(tokens: int, hidden: int, columns: int) -> Case:
    """One head, or one rank's rows of it."""
    return Case(
        kernel="linear + cross-entropy", shape=f"{tokens} x {hidden} x {columns}", dtype="bf16",
        build=ours(tokens, hidden, columns), flops=3 * 2 * tokens * hidden * columns, matmul=True, target=0.75,
        peers={"torch eager": differentiated(tokens, hidden, columns, whole),
               "torch.compile": differentiated(tokens, hidden, columns, whole, compiled=True),
               "F.linear_cross_entropy": torchs(tokens, hidden, columns),
               "Liger": liger(tokens, hidden, columns)})


CASES = [case(TOKENS, 4096, 128256), case(TOKENS, 4096, 32000), case(TOKENS, 8192, 16032)]
TINY = [case(FEW, 64, 128256), case(FEW, 64, 16032)]

"""The next token from a row of logits: greedy, or at random by temperature and nucleus (top-p, arXiv:1904.09751)."""

from __future__ import annotations

import torch

from engine.errors import UserError


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises UserError when a setting is out of its range."""
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature} is not a number from 0 (greedy) upwards; usual are 0.6 to 1.0")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"top-p {top_p} is not above 0 and at most 1; 1 keeps every token")


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest likeliest tokens whose probabilities, at this temperature, sum to top_p or more.

    logits [vocab], temperature above 0. Returns their ids and their probabilities (among the whole vocabulary), both
    [kept], likeliest first; of equally likely tokens the lowest id. In float64: the edge is the same everywhere.
    """
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    probabilities, ids = torch.sort(probabilities, descending=True, stable=True)
    before = probabilities.cumsum(0) - probabilities  # what the likelier ones already sum to
    # Always a prefix, and never empty; without top-p, rounding must not cut the tail.
    kept = len(ids) if top_p >= 1.0 else max(1, int((before < top_p).sum()))
    return ids[:kept], probabilities[:kept]


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token of logits [vocab]; temperature 0 is greedy. The random number is drawn on the CPU, so a seed gives the
    same text on every device whose logits are the same. Raises UserError when the logits are not finite."""
    logits = logits.detach().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise UserError("the model's output is not finite (inf or NaN): its weights are damaged, or fp32 is needed")
    if temperature == 0.0:
        return int(logits.argmax())
    ids, probabilities = nucleus(logits, temperature, top_p)
    cumulative = probabilities.cumsum(0)
    drawn = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
    # rand gives [0, 1): token i owns [cumulative[i - 1], cumulative[i]), hence the right edge.
    return int(ids[min(int(torch.searchsorted(cumulative, drawn, right=True)), len(ids) - 1)])

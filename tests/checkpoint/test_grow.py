"""A loaded model grows its vocabulary: new rows are the mean of the old ones, bit for bit the same in every layout."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from engine.checkpoint import Entry, load_weights
from engine.checkpoint.grow import GrownSource, grown
from engine.config import ModelConfig
from engine.errors import UserError
from engine.model import Decoder, Parts, stage_layers
from engine.model.shapes import VOCABULARY, logical_shapes
from engine.parallel.collectives import TensorParallel
from engine.parallel.sharding import pieces, shard_of

OLD, NEW = 131, 300
"""300 rows are padded to 320 on one rank and to 512 on four: a rank may hold old, new and padding rows, or one kind."""
SMALL = ModelConfig(layers=3, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, head_dim=8, vocab_size=OLD)


class Held:
    """Weights in memory as a TensorSource."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.place = "memory"
        self.tensors = {name: torch.randn(shape, generator=generator).to(dtype)
                        for name, shape in logical_shapes(config).items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
        return self.tensors[name][tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))]


def config(tied: bool, vocab: int = NEW) -> ModelConfig:
    return ModelConfig(**{**vars(SMALL), "tied": tied, "vocab_size": vocab})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "stages"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)])
def test_every_layout_gets_the_old_rows_and_their_mean(tp: int, stages: int, tied: bool, dtype: torch.dtype) -> None:
    held, model = Held(config(tied, OLD), dtype), config(tied)
    shapes = logical_shapes(model)
    source = grown(held, shapes, VOCABULARY)
    wanted = dict(held.tensors)
    for name in VOCABULARY[: 1 if tied else 2]:
        mean = torch.from_numpy(np.mean(held.tensors[name].double().numpy(), axis=0)).to(dtype)
        wanted[name] = torch.cat([held.tensors[name], mean.expand(NEW - OLD, -1)])
    seen: dict[str, int] = {}
    for rank in range(tp):
        for stage, layers in enumerate(stage_layers(model.layers, stages)):
            part = Decoder(Parts(model, TensorParallel(group=None, rank=rank, size=tp), dtype), layers,
                           first=stage == 0, last=stage == stages - 1)
            entries = [Entry("model", piece, p.detach()[slice(*piece.rows)]) for p in part.parameters()
                       for piece in pieces(shard_of(p), 0, p.shape[0])]
            load_weights(source, entries, shapes)
            for entry in entries:
                start, extent = entry.piece.start, entry.piece.extent
                window = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
                name = entry.piece.member.name
                assert torch.equal(entry.tensor, wanted[name][window]), name
                seen[name] = seen.get(name, 0) + entry.tensor.numel()
    assert seen["model.embed_tokens.weight"] >= NEW * SMALL.hidden and set(seen) == set(shapes)


def test_a_rectangle_of_any_rows_and_columns_is_cut_from_the_grown_matrix() -> None:
    held, name = Held(SMALL, torch.float64), "lm_head.weight"
    source = GrownSource(held, NEW, VOCABULARY)
    whole = source.read(name, (0, 0), (NEW, 32))
    for start, extent in (((100, 3), (60, 9)), ((131, 0), (1, 32)), ((0, 31), (131, 1)), ((299, 5), (1, 2))):
        rows, columns = (slice(a, a + n) for a, n in zip(start, extent, strict=True))
        assert torch.equal(source.read(name, start, extent), whole[rows, columns])
    assert source.dtype(name) == torch.float64 and source.place == "memory"


def test_nothing_else_grows_and_nothing_shrinks() -> None:
    held = Held(SMALL, torch.float32)
    assert grown(held, logical_shapes(SMALL), VOCABULARY) is held
    assert grown(held, logical_shapes(config(False, 99)), VOCABULARY) is held
    wider = ModelConfig(**{**vars(SMALL), "vocab_size": NEW, "ffn_hidden": 96})
    with pytest.raises(UserError, match="mlp.up_proj"):
        load_weights(grown(held, logical_shapes(wider), VOCABULARY), [], logical_shapes(wider))

"""The proof of a conversion: every tensor bit for bit, transformers' logits beside the engine's, the ids of texts."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from engine.checkpoint.dtypes import DTYPES
from engine.checkpoint.slices import Entry
from engine.checkpoint.source import TensorSource, compress, load_weights
from engine.config import ModelConfig
from engine.errors import UserError
from engine.hf.convert import Model, differences, open_model, same_network
from engine.hf.verify_ids import compare_ids
from engine.model import Decoder, Parts
from engine.model.shapes import logical_shapes
from engine.parallel.sharding import pieces, shard_of

TOLERANCE = 1e-5
"""Of the logits' largest magnitude: what two orders of fp32 summation differ by, with room."""
BATCH, TOKENS = 2, 64

Say = Callable[[str], None]


def verify(load: Path, save: Path, dtype: str | None, say: Say) -> bool:
    """Reads both folders again and compares them; says what was found, returns whether they are equal."""
    before, after = open_model(load), open_model(save)
    if not same_network(before.config, after.config):
        say("not equal: the two folders describe different networks")
        return False
    shapes = logical_shapes(before.config)
    wrong = [name for name, same in differences(before.source, after.source, dtype, shapes) if not same]
    values = sum(math.prod(shape) for shape in shapes.values())
    if wrong:
        say(f"not equal: {len(wrong)} of {len(shapes)} tensors differ: {compress(wrong)}")
        return False
    say(f"equal: {len(shapes)} tensors, {values:,} values, bit for bit{f' after the cast to {dtype}' if dtype else ''}")
    equal = True
    if {before.kind, after.kind} == {"hf", "engine"}:
        equal = _compare_logits(before, after, load if before.kind == "hf" else save, dtype, say)
    client = next((model.folder for model in (after, before) if model.kind == "hf"), None)
    return compare_ids(before.folder, after.folder, client, say) and equal


def _compare_logits(before: Model, after: Model, hf: Path, dtype: str | None, say: Say) -> bool:
    """Whether transformers on the HF folder and the engine on the other give the same logits."""
    config = before.config
    if importlib.util.find_spec("transformers") is None:
        say("logits: not compared, transformers is not installed (pip install 'triax[hf]')")
        return True
    need, free = 4 * sum(math.prod(shape) for shape in logical_shapes(config).values()), _free_memory()
    if need * 1.2 > free:
        say(f"logits: not compared, {need / 1e9:.1f} GB of fp32 weights do not fit the {free / 1e9:.1f} GB free")
        return True
    ids = torch.randint(config.vocab_size, (BATCH, min(TOKENS, config.max_positions)),
                        generator=torch.Generator().manual_seed(0))
    engine = after if after.kind == "engine" else before
    ours = engine_logits(config, engine.source, ids, dtype)
    theirs = hf_logits(hf, ids, dtype)
    if ours.shape != theirs.shape:
        say(f"logits: not equal, shapes {list(ours.shape)} and {list(theirs.shape)}")
        return False
    scale, apart = float(theirs.abs().max()), float((ours - theirs).abs().max())
    equal = math.isfinite(scale) and apart <= TOLERANCE * max(scale, 1e-30)
    say(f"logits: {'equal' if equal else 'not equal'}, {BATCH} x {ids.shape[1]} tokens in fp32: largest difference "
        f"{apart:.2e}, largest logit {scale:.2f}, ratio {apart / max(scale, 1e-30):.1e} (at most {TOLERANCE:.0e})")
    return equal


def engine_logits(config: ModelConfig, source: TensorSource, ids: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """The engine's logits [batch, seq, vocab] in fp32, of weights rounded to `dtype`."""
    model = Decoder(Parts(config), range(config.layers))
    entries = []
    for parameter in model.parameters():
        parameter.data.zero_()  # padding rows
        entries += [Entry("model", piece, parameter.data[piece.rows[0] : piece.rows[1]])
                    for piece in pieces(shard_of(parameter), 0, parameter.shape[0])]
    load_weights(source, entries, logical_shapes(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPES[dtype or "fp32"]))
        return model.logits(model(ids))[..., : config.vocab_size]  # type: ignore[no-any-return]


def hf_logits(folder: Path, ids: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """transformers' logits [batch, seq, vocab] in fp32, of weights rounded to `dtype`."""
    from transformers import AutoModelForCausalLM  # optional, and slow to import
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype or "fp32"], local_files_only=True,
                                                     trust_remote_code=False)
    except TypeError:  # transformers 4 before 4.56 says torch_dtype
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=DTYPES[dtype or "fp32"], local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers does not load {folder}: {' '.join(str(error).split())[:300]}") from None
    with torch.no_grad():
        return model.float().eval()(ids).logits  # type: ignore[no-any-return]


def _free_memory() -> int:
    """Bytes of memory that are free."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

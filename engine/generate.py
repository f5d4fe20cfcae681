"""Text from a checkpoint, on one process, with a KV cache: `python -m engine.generate --load DIR --prompt TEXT`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import MappingProxyType

import torch

from engine.checkpoint import Entry, TensorSource, load_weights, open_checkpoint, resolve
from engine.checkpoint.source import match_names
from engine.config import ModelConfig
from engine.config.command import Command, given_text, real, whole
from engine.data.chat import ChatEncoder, Message
from engine.errors import UserError, run_cli
from engine.hf import open_hf, read_token_ids, token_ids
from engine.kernels.dispatch import choose
from engine.model import Decoder, Parts
from engine.model.cache import LayerCache
from engine.model.shapes import logical_shapes
from engine.parallel.micro_batch import MicroBatch
from engine.parallel.sharding import pieces, shard_of
from engine.sampling import check_sampling, sample
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer.folder import adds_bos

MOST_PROMPT = 16 << 20
"""Bytes of the longest prompt that is read: no model takes as many."""
_DTYPES = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64})


def generate(
    model: Decoder,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """The tokens that follow ids, one by one, until one of stop_ids (which is not given out) or max_tokens.

    The prompt passes through the model once, then each token alone, over cached keys and values. Temperature 0 is
    greedy. Only ids below vocab_size are drawn (the model's own if not given; a tokenizer's may be smaller), so never a
    column of the padded vocabulary. Settings are checked at the call, before the first token.
    Raises UserError for settings out of range and for lengths past the model's max_positions.
    """
    config = model.parts.config
    check_sampling(temperature, top_p)
    room = config.max_positions - len(ids)
    if not ids:
        raise UserError("the prompt has no tokens; give at least one")
    if max_tokens < 1 or max_tokens > room:
        fits = f"use --max-tokens 1 to {room}" if room > 0 else "use a shorter prompt"
        raise UserError(
            f"{len(ids)} prompt tokens and max-tokens {max_tokens} do not fit the model's {config.max_positions} "
            f"positions; {fits}"
        )
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(
            f"the prompt has token id {wrong}, outside the model's vocabulary of {config.vocab_size}; "
            "the tokenizer is not this model's"
        )
    generator = torch.Generator().manual_seed(seed % 2**63)
    columns = min(config.vocab_size, vocab_size or config.vocab_size)

    def draw(logits: torch.Tensor) -> int:
        return sample(logits[:columns], temperature, top_p, generator)

    return _tokens(model, list(ids), max_tokens, stop_ids, draw)


def _tokens(
    model: Decoder, fed: list[int], max_tokens: int, stop: Collection[int], draw: Callable[[torch.Tensor], int]
) -> Iterator[int]:
    caches = [LayerCache() for _ in model.blocks]
    position = 0
    for _ in range(max_tokens):
        with torch.inference_mode():  # not around the yield: it would leak into the caller's code
            x = torch.tensor([fed], device=model.parts.device)  # [1, new tokens]
            y = model(x, MicroBatch.of(x, first=position), caches)
            last = y[:, -1:]  # the head runs for one position, not for all
            token = draw(model.logits(last)[0, -1])
        if token in stop:
            return
        yield token
        position += len(fed)
        fed = [token]


class TextStream:
    """Decodes tokens as they come: never half a UTF-8 character, and spaced as in the whole text.

    Each piece of text is the difference between decoding a short window with and without the new tokens, as a token's
    text depends on its neighbours (a leading space, a character of several bytes).
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """context: the tokens before the first; only their end matters."""
        self.tokenizer = tokenizer
        self.window = list(context[-8:])
        self.shown = tokenizer.decode(self.window)

    def push(self, token: int) -> str:
        """The text that is complete with this token, perhaps none."""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        # Bytes that are no text decode to U+FFFD. The last three may be the start of a character still to be finished.
        held = min(3, len(text) - len(text.rstrip("\ufffd")))
        new = text[len(self.shown) : len(text) - held]
        self.shown += new
        if not held:
            self.window = self.window[-8:]
            self.shown = self.tokenizer.decode(self.window)
        return new

    def flush(self) -> str:
        """What is left when nothing more will come."""
        new = self.tokenizer.decode(self.window)[len(self.shown):]
        self.window, self.shown = [], ""
        return new


def begin(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text to be continued. BOS comes first only where the tokenizer's own files say that every text
    begins with it: models pretrained here never saw it. An empty text begins a document, after the end of another."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None and adds_bos(tokenizer.files):
        return [tokenizer.bos_id, *ids]
    if not ids and tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    return ids


def load_for_inference(path: str, dtype: torch.dtype, device: torch.device) -> tuple[Decoder, ModelConfig, Tokenizer]:
    """The model of a run folder, step folder or Hugging Face folder, whole on one device, its config and tokenizer.

    Raises UserError for what cannot be read, and for a tokenizer larger than the model's vocabulary."""
    resolved = resolve(path)
    source: TensorSource
    if resolved.kind == "hf":
        folder = open_hf(resolved.folder)
        config, source, assets = folder.config, folder, resolved.folder
    else:
        checkpoint = open_checkpoint(resolved.folder)
        config, source, assets = checkpoint.run_config().model, checkpoint.source(), checkpoint.assets
    match_names(source.place, source.shapes, logical_shapes(config))  # before memory is taken for what is not there
    tokenizer = load_tokenizer(str(assets))  # before the weights, which take long
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {assets} has {tokenizer.vocab_size} entries, the model {config.vocab_size}; they do not "
            "belong together"
        )
    kernels = choose("auto", "sdpa", device, dtype)
    model = Decoder(Parts(config, dtype=dtype, device=device, kernels=kernels), range(config.layers)).eval()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False).zero_()  # padding rows are in no file
    entries = [
        Entry("model", piece, parameter[slice(*piece.rows)])
        for parameter in parameters
        for piece in pieces(shard_of(parameter), 0, parameter.shape[0])
    ]
    load_weights(source, entries, logical_shapes(config))
    return model, config, tokenizer


def stop_ids(path: str, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends an answer: those of the folder's generation_config.json (else of its config.json), the
    tokenizer's end of a document, and the end of a chat turn."""
    found = resolve(path)
    folder = found.folder if found.kind == "hf" else found.folder / "hf"
    return {*read_token_ids(folder).eos, *token_ids(tokenizer).eos}


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags. Raises UserError for what they cannot be."""
    parser = Command("engine.generate", __doc__)
    parser.add_argument("--load", required=True, help="run folder, step folder or Hugging Face folder")
    parser.add_argument("--prompt", required=True, type=given_text, help="text to continue; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message; the answer is generated")
    parser.add_argument("--max-tokens", type=whole(), default=128, help="stop after so many tokens (%(default)s)")
    parser.add_argument("--temperature", type=real(), default=0.8, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-p", type=real(), default=0.95,
                        help="probability of the tokens drawn from (%(default)s)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token; --temperature 0")
    parser.add_argument("--seed", type=whole(), default=0, help="the same seed gives the same text (%(default)s)")
    parser.add_argument("--dtype", choices=("auto", *_DTYPES), default="auto", help="auto: bf16 on CUDA, fp32 on CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser.read(argv)


def main(argv: list[str]) -> int:
    """Prints the text as it comes; a line about speed goes to standard error."""
    flags = parse(argv)
    temperature = 0.0 if flags.greedy else flags.temperature
    check_sampling(temperature, flags.top_p)
    prompt = _prompt(flags.prompt)
    device = _device(flags.device)
    dtype = flags.dtype if flags.dtype != "auto" else ("bf16" if device.type == "cuda" else "fp32")
    model, _, tokenizer = load_for_inference(flags.load, _DTYPES[dtype], device)
    ids = ChatEncoder(tokenizer).prompt([Message("user", prompt)]) if flags.chat else begin(tokenizer, prompt)
    stop = stop_ids(flags.load, tokenizer)
    tokens = generate(model, ids, max_tokens=flags.max_tokens, temperature=temperature, top_p=flags.top_p,
                      seed=flags.seed, stop_ids=stop, vocab_size=tokenizer.vocab_size)
    stream = TextStream(tokenizer, ids)
    count, began = 0, time.perf_counter()
    try:
        for token in tokens:
            count += 1
            print(stream.push(token), end="", flush=True)
    except KeyboardInterrupt:
        pass  # enough was read; what has come so far stands
    print(stream.flush())
    seconds = time.perf_counter() - began
    print(f"{len(ids)} prompt tokens, {count} generated in {seconds:.1f} s ({count / seconds:.1f} a second)",
          file=sys.stderr)
    return 0


def _prompt(given: str) -> str:
    """The text of --prompt, or of standard input, whatever encoding the terminal claims (LC_ALL=C)."""
    data = sys.stdin.buffer.read(MOST_PROMPT + 1) if given == "-" else os.fsencode(given)
    if len(data) > MOST_PROMPT:
        raise UserError(f"--prompt is longer than {MOST_PROMPT >> 20} MiB")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text.removesuffix("\n") if given == "-" else text  # `echo` ends its line, which is no part of the prompt


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: this machine has no CUDA device that torch can use; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    run_cli(main)

"""Every rule that joins two numbers of a run, in one place, in the user's words, before any process group exists."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from engine.config.recompute import AUTO, read_recompute
from engine.config.schema import ModelConfig, RunConfig
from engine.errors import UserError, nearest, shown

VOCAB_MULTIPLE = 64
"""The vocabulary is padded at run time to a multiple of this times tp, so that every shard is a round matrix."""
MACHINE = 8
"""Largest tp that a message proposes: tensor parallelism wants the links inside one machine."""
MOST = MappingProxyType({
    "layers": 1 << 14, "hidden": 1 << 20, "ffn_hidden": 1 << 22, "heads": 1 << 16, "kv_heads": 1 << 16,
    "head_dim": 1 << 16, "vocab_size": 1 << 24, "max_positions": 1 << 30})
"""Beyond any model: a number mistyped, or a file that lies, would otherwise be planned for hours."""


LONGEST_WAIT = 31_536_000
"""Seconds. Timers of the system and of torch overflow somewhere beyond."""
MOST_EPOCHS = 1_000_000
MOST_MICROS = 1 << 16
"""A step's schedule is a list that has them all."""
COUNT = 1 << 53
"""More steps, samples or sequences than any run has; beyond it a float is no count any more."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of the rank grid's axes."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.pp * self.dp * self.cp * self.tp

    def __str__(self) -> str:
        return " ".join(f"{axis}{size}" for axis, size in vars(self).items() if axis != "cp" or size > 1)


def plan_layout(config: RunConfig, world: int) -> Layout:
    """The layout of `world` processes; dp is what tp, pp and cp leave. Raises UserError when it does not divide."""
    par = config.parallel
    for flag in ("tp", "pp", "cp", "virtual_stages"):
        _at_least(flag, getattr(par, flag), 1)
    if par.cp != 1:
        raise UserError(f"--cp {par.cp}: context parallelism is not available yet; use --cp 1")
    model_ranks = par.tp * par.pp
    if world % model_ranks:
        raise UserError(f"{world} process{'es' if world > 1 else ''} cannot hold tp {par.tp} x pp {par.pp} = "
                        f"{model_ranks}; start a multiple of {model_ranks} processes (--nproc-per-node), or lower "
                        "--tp or --pp")
    return Layout(pp=par.pp, dp=world // model_ranks, cp=par.cp, tp=par.tp)


def check(config: RunConfig, world: int) -> Layout:
    """Checks every rule and returns the layout; raises UserError with the flag, both numbers and valid choices."""
    check_choices(config)
    check_model(config.model)
    layout = plan_layout(config, world)
    _check_parallel(config)
    _check_batch(config, layout)
    _check_optimizer(config)
    return layout


def _at_least(flag: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"--{flag.replace('_', '-')} {value} must be at least {least}")
    if isinstance(value, int) and value > COUNT:
        raise UserError(f"--{flag.replace('_', '-')} {shown(value, 40)} is beyond any run; use at most {COUNT}")


def _divisors(n: int, most: int = 64) -> str:
    """The divisors of n as words: `1, 2, 3, 5 or 6`, those above `most` left out."""
    found = [str(d) for d in range(1, min(n, most) + 1) if n % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


CHOICES = (
    ("model", "family", ("llama", "gpt2")),
    ("parallel", "schedule", ("1f1b", "interleaved")),
    ("optimizer", "decay", ("cosine", "linear", "constant")),
    ("runtime", "dtype", ("auto", "fp64", "fp32", "bf16")),
    ("runtime", "device", ("auto", "cpu", "cuda")),
    ("runtime", "kernels", ("auto", "triton", "torch", "apex")),
    ("runtime", "attention", ("auto", "triton", "sdpa", "reference")),
    ("data", "chat_template", ("chatml",)),
)


def check_choices(config: RunConfig) -> None:
    """Raises UserError for a word that is none of a flag's."""
    if config.runtime.dtype == "fp16":
        raise UserError("--dtype fp16 needs loss scaling, which Triax does not have; use --dtype bf16 or fp32")
    if config.runtime.recompute != AUTO:
        read_recompute(config.runtime.recompute)
    for group, name, options in CHOICES:
        value = getattr(getattr(config, group), name)
        if value not in options:
            # A family's name is never guessed: gptj looks like gpt2 and is another network.
            close = nearest(value, options) if name != "family" else None
            hint = f"did you mean {close}?" if close else f"use {', '.join(options)}"
            raise UserError(f"--{name.replace('_', '-')} {shown(value, 80)!r} is not known; {hint}")


def check_model(model: ModelConfig) -> None:
    """Raises UserError for a network that cannot be."""
    for flag, most in MOST.items():
        _at_least(flag, getattr(model, flag), 1)
        if getattr(model, flag) > most:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(model, flag)} is beyond any model; use at most "
                            f"{most}")
    _at_least("init_std", model.init_std, 0)
    for flag in ("norm_eps", "rope_theta"):
        if getattr(model, flag) <= 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(model, flag)} must be above 0")
    if model.family == "gpt2" and model.rope_theta != ModelConfig.rope_theta:
        raise UserError(f"--rope-theta {model.rope_theta}: the family gpt2 learns its positions and turns nothing; "
                        f"leave the flag out, or use --rope-theta {ModelConfig.rope_theta}")
    if model.heads % model.kv_heads:
        raise UserError(f"heads {model.heads} is not divisible by kv-heads {model.kv_heads}; "
                        f"use --kv-heads {_divisors(model.heads)}")
    if model.family == "llama" and model.head_dim % 2:
        raise UserError(f"head-dim {model.head_dim} is odd, and RoPE rotates pairs; use --head-dim "
                        f"{model.head_dim + 1}")


def _check_parallel(config: RunConfig) -> None:
    par, model = config.parallel, config.model
    if model.heads % par.tp:
        raise UserError(f"heads {model.heads} is not divisible by tp {par.tp}; "
                        f"use --tp {_divisors(model.heads, MACHINE)}")
    if model.kv_heads % par.tp and par.tp % model.kv_heads:
        raise UserError(f"kv-heads {model.kv_heads} and tp {par.tp}: one must divide the other; "
                        f"use --tp {_divisors(model.kv_heads, MACHINE)}")
    if model.ffn_hidden % par.tp:
        raise UserError(f"ffn-hidden {model.ffn_hidden} is not divisible by tp {par.tp}; "
                        f"use --tp {_divisors(model.ffn_hidden, MACHINE)}")
    stages = par.pp * par.virtual_stages
    if model.layers < stages:
        raise UserError(f"layers {model.layers} are fewer than pp {par.pp} x virtual-stages {par.virtual_stages} = "
                        f"{stages} stages; lower --pp or --virtual-stages")
    if par.schedule == "1f1b" and par.virtual_stages > 1:
        raise UserError(f"--schedule 1f1b has one chunk a rank, not --virtual-stages {par.virtual_stages}; "
                        "use --schedule interleaved")
    if par.sequence_parallel and config.batch.seq_len % par.tp:
        raise UserError(f"--sequence-parallel splits seq-len {config.batch.seq_len} over tp {par.tp}, which does not "
                        f"divide it; use --seq-len {-(-config.batch.seq_len // par.tp) * par.tp}")


def _check_batch(config: RunConfig, layout: Layout) -> None:
    batch = config.batch
    for flag in ("micro_batch", "global_batch", "seq_len", "steps"):
        _at_least(flag, getattr(batch, flag), 1)
    if not 0 <= batch.epochs <= MOST_EPOCHS:
        raise UserError(f"--epochs {batch.epochs:g} must be at least 0 and at most {MOST_EPOCHS}")
    one_pass = batch.micro_batch * layout.dp
    if batch.global_batch % one_pass:
        raise UserError(f"global-batch {batch.global_batch} is not divisible by micro-batch {batch.micro_batch} x dp "
                        f"{layout.dp} = {one_pass}; use --global-batch {-(-batch.global_batch // one_pass) * one_pass}")
    micros = batch.global_batch // one_pass
    if micros > MOST_MICROS:
        raise UserError(f"global-batch {batch.global_batch} is {micros} micro-batches on each dp rank, and more than "
                        f"{MOST_MICROS} are beyond any run; raise --micro-batch or lower --global-batch")
    if batch.seq_len > config.model.max_positions:
        raise UserError(f"seq-len {batch.seq_len} is longer than the model's positions {config.model.max_positions}; "
                        f"lower --seq-len or raise --max-positions")


def _check_optimizer(config: RunConfig) -> None:
    opt, save = config.optimizer, config.save
    for flag in ("lr", "warmup", "weight_decay", "clip", "adam_eps", "skip_nonfinite"):
        _at_least(flag, getattr(opt, flag), 0)
    _at_least("min_lr", opt.min_lr or 0.0, 0)
    for flag in ("beta1", "beta2"):
        if not 0 <= getattr(opt, flag) < 1:
            raise UserError(f"--{flag} {getattr(opt, flag)} must be at least 0 and below 1")
    if opt.min_lr is not None and opt.min_lr > opt.lr:
        raise UserError(f"--min-lr {opt.min_lr} is above --lr {opt.lr}")
    for flag in ("save_every", "eval_every", "keep", "eval_samples"):
        _at_least(flag, getattr(save, flag), 0)
    _at_least("log_every", save.log_every, 1)
    _at_least("stop_after", config.batch.stop_after, 0)
    _at_least("peak_tflops", config.runtime.peak_tflops, 0)
    if not 0 <= config.runtime.seed < 1 << 64:
        raise UserError(f"--seed {config.runtime.seed} must be at least 0 and below 2^64")
    for flag in ("timeout", "save_timeout"):
        seconds = getattr(config.runtime, flag)
        if not 0 < seconds <= LONGEST_WAIT:
            raise UserError(f"--{flag.replace('_', '-')} {seconds:g} must be above 0 seconds and at most "
                            f"{LONGEST_WAIT} (a year)")
    if not 0 <= config.data.split < 1:
        raise UserError(f"--split {config.data.split} must be at least 0 and below 1")

"""What flags of other tools are called here: for the message on an unknown option, and for docs/foreign-flags.md.

A word maps to (our flag, why). The flag is empty where there is none, and `why` says so, or how a value is converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from engine.errors import nearest, shown

Table = Mapping[str, tuple[str, str]]
"""Word without dashes -> (our flag, why)."""

_LORA = ("", "LoRA is not there yet; tuning changes every weight")
_QUANTIZED = ("", "quantized weights are not there yet; use --dtype bf16")
_MOE = ("", "experts are not there yet")
_DROPOUT = ("", "dropout is not there yet")
_ROPE = ("", "scaled RoPE is not there yet")
_FP8 = ("", "fp8 is not there yet; use --dtype bf16")
_SCALING = ("", "fp16 with loss scaling is not there yet; use --dtype bf16")
_TRACKER = ("", "trackers are not there yet; metrics.jsonl in --out has every step")
_PACKING = ("", "packing of short tuning rows is not there yet")
_PREFERENCE = ("", "preference training is not there yet")
_ZERO = ("", "the optimizer is always sharded over dp; sharding beyond it is not there yet")
_ADAMW = ("", "AdamW is the only optimizer")
_FAMILY = ("", "it follows from --family: llama (RMSNorm, RoPE, SwiGLU) or gpt2 (LayerNorm, learned positions, GELU)")
_ANSWERS = ("", "tuning always learns the answers alone")
_LAUNCHER = ("", "processes are started outside: torchrun --nproc-per-node N -m engine.pretrain")
_DP = ("", "dp is what --tp and --pp leave of the processes")
_FORMAT = ("", "checkpoints are safetensors with everything in them, and any layout reads them")
_WEIGHTS = ("--load", "weights alone, with a fresh optimizer; --resume continues with everything")
_WARMUP = ("--warmup", "in steps: the share x --steps")
_RECOMPUTE = ("--recompute", "none, selective, full, full:N or auto")
_RECOMPUTE_SELECTIVE = ("--recompute selective", "the outputs of norms and of the MLP's activation; attention's scores "
                        "are never kept")
_RECOMPUTE_BLOCKS = ("--recompute full:N", "the first N blocks of a stage")
_ACCUMULATION = ("", "it follows from --global-batch, which is --micro-batch x dp x accumulation")
_EVERY = ("--save-every", "in steps; 0 saves at the end only")
_EVAL_EVERY = ("--eval-every", "in steps; 0 evaluates at the end only")
_KERNELS = ("--kernels", "triton, torch or apex")
_ATTENTION = ("--attention", "triton, sdpa or reference")
_DECAY = ("--decay", "cosine, linear or constant, down to --min-lr at --steps")
_UNTIL = ("--steps", "the learning rate decays until the last step")

MEGATRON: Table = MappingProxyType({
    "num-layers": ("--layers", ""), "hidden-size": ("--hidden", ""), "ffn-hidden-size": ("--ffn-hidden", ""),
    "num-attention-heads": ("--heads", ""), "num-query-groups": ("--kv-heads", ""), "kv-channels": ("--head-dim", ""),
    "group-query-attention": ("--kv-heads", "with fewer than --heads"),
    "max-position-embeddings": ("--max-positions", ""), "position-embedding-type": _FAMILY,
    "use-rotary-position-embeddings": _FAMILY, "rotary-base": ("--rope-theta", ""),
    "rotary-percent": ("", "RoPE rotates the whole head"), "use-rope-scaling": _ROPE,
    "normalization": _FAMILY, "norm-epsilon": ("--norm-eps", ""), "layernorm-epsilon": ("--norm-eps", ""),
    "swiglu": _FAMILY, "add-qkv-bias": ("--qkv-bias", ""), "qk-layernorm": ("--qk-norm", ""),
    "add-bias-linear": ("--mlp-bias", "and --qkv-bias, --out-bias"),
    "disable-bias-linear": ("--no-mlp-bias", "and --no-qkv-bias, --no-out-bias; the llama presets have none"),
    "untie-embeddings-and-output-weights": ("--no-tied", "which is the default of the llama presets"),
    "init-method-std": ("--init-std", ""),
    "make-vocab-size-divisible-by": ("", "the vocabulary is padded at run time only, to a multiple of 64 x tp"),
    "attention-dropout": _DROPOUT, "hidden-dropout": _DROPOUT, "window-size": ("", "sliding windows are not there yet"),
    "tensor-model-parallel-size": ("--tp", ""), "pipeline-model-parallel-size": ("--pp", ""),
    "context-parallel-size": ("--cp", "1 for now: context parallelism is not there yet"), "data-parallel-size": _DP,
    "expert-model-parallel-size": _MOE, "expert-tensor-parallel-size": _MOE, "num-experts": _MOE,
    "moe-router-topk": _MOE, "moe-grouped-gemm": _MOE, "moe-ffn-hidden-size": _MOE,
    "num-layers-per-virtual-pipeline-stage": (
        "--virtual-stages", "in chunks a rank: layers / pp / this number, with --schedule interleaved"),
    "num-virtual-stages-per-pipeline-rank": ("--virtual-stages", "with --schedule interleaved"),
    "use-distributed-optimizer": _ZERO, "use-torch-fsdp2": _ZERO,
    "overlap-grad-reduce": ("", "there is no such switch here"), "overlap-param-gather": ("", "there is no such switch "
                                                                                        "here"),
    "tp-comm-overlap": ("", "there is no such switch here"),
    "micro-batch-size": ("--micro-batch", ""), "global-batch-size": ("--global-batch", ""),
    "rampup-batch-size": ("", "a batch that grows is not there yet"), "seq-length": ("--seq-len", ""),
    "train-iters": ("--steps", ""), "train-samples": ("--steps", "in optimizer steps: samples / --global-batch"),
    "exit-interval": ("--stop-after", ""),
    "exit-duration-in-mins": ("--stop-after", "in steps; SIGTERM saves and ends a run at any time"),
    "lr-decay-style": _DECAY, "lr-decay-iters": _UNTIL, "lr-decay-samples": _UNTIL,
    "lr-warmup-iters": ("--warmup", ""), "lr-warmup-fraction": _WARMUP,
    "lr-warmup-samples": ("--warmup", "in steps: samples / --global-batch"),
    "adam-beta1": ("--beta1", ""), "adam-beta2": ("--beta2", ""), "clip-grad": ("--clip", ""), "optimizer": _ADAMW,
    "start-weight-decay": ("--weight-decay", "which is constant"), "end-weight-decay": ("--weight-decay", "which is "
                                                                                         "constant"),
    "data-path": ("--data", "a prefix, or a blend written P1:0.7,P2:0.3"), "train-data-path": ("--data", ""),
    "valid-data-path": ("--valid-data", ""),
    "test-data-path": ("--valid-data", "the one set that is evaluated"),
    "data-cache-path": ("", "the order of samples is computed, so nothing is cached"),
    "mock-data": ("--data", "of a corpus that tools/make_demo_data.py and tools/preprocess_data.py make"),
    "tokenizer-type": ("", "the kind is read from the files of --tokenizer"), "tokenizer-model": ("--tokenizer", ""),
    "vocab-file": ("--tokenizer", "the folder that holds it"), "merge-file": ("--tokenizer", "the folder that holds "
                                                                              "it"),
    "reset-attention-mask": ("--mask-documents", ""), "reset-position-ids": (
        "--mask-documents", "which keeps attention within documents; positions count from the sample's start"),
    "eod-mask-loss": ("", "every token counts in pretraining's loss"),
    "save": ("--out", ""), "save-interval": ("--save-every", ""), "ckpt-format": _FORMAT, "use-dist-ckpt": _FORMAT,
    "no-save-optim": _FORMAT, "no-save-rng": _FORMAT, "no-load-optim": _WEIGHTS, "no-load-rng": _WEIGHTS,
    "finetune": _WEIGHTS, "pretrained-checkpoint": _WEIGHTS,
    "use-checkpoint-args": ("", "--load takes the model's shape from the checkpoint"),
    "async-save": ("", "checkpoints are written beside training anyway; --save-wait waits for them"),
    "eval-interval": ("--eval-every", ""), "eval-iters": ("--eval-samples", "in sequences: iterations x "
                                                          "--global-batch"),
    "log-interval": ("--log-every", ""), "tensorboard-dir": _TRACKER, "wandb-project": _TRACKER,
    "wandb-exp-name": _TRACKER, "bf16": ("--dtype bf16", ""), "fp16": _SCALING, "loss-scale": _SCALING,
    "initial-loss-scale": _SCALING, "fp8-format": _FP8, "fp8": _FP8,
    "accumulate-allreduce-grads-in-fp32": ("", "gradients are always accumulated in fp32"),
    "recompute-activations": _RECOMPUTE_SELECTIVE, "recompute-granularity": _RECOMPUTE,
    "recompute-method": _RECOMPUTE_BLOCKS, "recompute-num-layers": _RECOMPUTE_BLOCKS,
    "recompute-modules": _RECOMPUTE_SELECTIVE, "checkpoint-activations": ("--recompute full", ""),
    "use-flash-attn": _ATTENTION, "attention-backend": _ATTENTION, "transformer-impl": _KERNELS,
    "masked-softmax-fusion": _KERNELS, "bias-gelu-fusion": _KERNELS, "bias-swiglu-fusion": _KERNELS,
    "rope-fusion": _KERNELS, "gradient-accumulation-fusion": _KERNELS,
    "distributed-backend": ("", "NCCL on GPUs, gloo and shared memory on CPUs; --device chooses"),
    "distributed-timeout-minutes": ("--timeout", "in seconds: minutes x 60"),
    "num-workers": ("", "the next step is read while one is computed; there is nothing to set"),
})
"""Flags of Megatron-LM's pretrain_gpt.py."""

TRANSFORMERS: Table = MappingProxyType({
    "model-name-or-path": ("--load", ""), "tokenizer-name": ("--tokenizer", ""), "tokenizer-name-or-path": (
        "--tokenizer", ""),
    "num-hidden-layers": ("--layers", ""), "intermediate-size": ("--ffn-hidden", ""),
    "num-key-value-heads": ("--kv-heads", ""), "rms-norm-eps": ("--norm-eps", ""),
    "layer-norm-epsilon": ("--norm-eps", ""), "initializer-range": ("--init-std", ""),
    "tie-word-embeddings": ("--tied", ""), "attention-bias": ("--qkv-bias", "and --out-bias"), "hidden-act": _FAMILY,
    "sliding-window": ("", "sliding windows are not there yet"), "rope-scaling": _ROPE,
    "per-device-train-batch-size": ("--micro-batch", ""), "gradient-accumulation-steps": _ACCUMULATION,
    "per-device-eval-batch-size": ("--micro-batch", "for evaluation too"),
    "learning-rate": ("--lr", ""), "num-train-epochs": ("--epochs", ""), "max-steps": ("--steps", ""),
    "warmup-steps": ("--warmup", ""), "warmup-ratio": _WARMUP, "lr-scheduler-type": _DECAY,
    "max-grad-norm": ("--clip", ""), "adam-epsilon": ("--adam-eps", ""), "optim": _ADAMW,
    "output-dir": ("--out", ""), "overwrite-output-dir": ("--out", "a new folder; none is written over"),
    "logging-steps": ("--log-every", ""), "logging-dir": _TRACKER, "report-to": _TRACKER, "run-name": _TRACKER,
    "save-steps": ("--save-every", ""), "save-strategy": _EVERY, "eval-steps": ("--eval-every", ""),
    "eval-strategy": _EVAL_EVERY, "evaluation-strategy": _EVAL_EVERY, "save-total-limit": ("--keep", ""),
    "save-only-model": _FORMAT,
    "resume-from-checkpoint": ("--resume", "which continues --out from its latest step, or --resume-from N"),
    "gradient-checkpointing": ("--recompute full", ""), "torch-dtype": ("--dtype", ""),
    "tf32": ("--dtype", "fp32, bf16 or fp64"),
    "attn-implementation": _ATTENTION, "use-liger-kernel": _KERNELS, "fsdp": _ZERO, "deepspeed": _ZERO,
    "ddp-timeout": ("--timeout", ""), "data-seed": ("--seed", "of weights and data order"),
    "dataset-name": ("--data", "a file on this machine"), "train-file": ("--data", ""),
    "validation-file": ("--valid-data", ""), "dataset-text-field": ("", "tools/preprocess_data.py --json-key names it"),
    "max-seq-length": ("--seq-len", ""), "max-length": ("--seq-len", ""), "model-max-length": ("--seq-len", ""),
    "packing": _PACKING, "assistant-only-loss": _ANSWERS, "completion-only-loss": _ANSWERS,
    "chat-template-path": ("--chat-template", ""), "use-peft": _LORA, "lora-r": _LORA, "lora-alpha": _LORA,
    "lora-dropout": _LORA, "lora-target-modules": _LORA, "load-in-4bit": _QUANTIZED, "load-in-8bit": _QUANTIZED,
    "neftune-noise-alpha": ("", "noise on embeddings is not there yet"),
    "label-smoothing-factor": ("", "label smoothing is not there yet"),
    "beta": _PREFERENCE, "loss-type": _PREFERENCE, "trust-remote-code": ("", "no code of a model's folder is run"),
    "push-to-hub": ("", "nothing is sent anywhere; tools/convert_ckpt.py makes the folder to push"),
    "dataloader-num-workers": ("", "the next step is read while one is computed; there is nothing to set"),
    "do-train": ("", "engine.pretrain and engine.finetune always train"),
    "do-eval": ("--valid-data", "is evaluated where it is given"), "torch-compile": ("", "torch.compile is not used"),
    "load-best-model-at-end": ("", "every kept step folder under --out is a checkpoint to choose"),
    "disable-tqdm": ("", "there is a progress bar on a terminal only"),
})
"""Arguments of transformers' TrainingArguments, of TRL, and fields of config.json."""

FACTORY: Table = MappingProxyType({
    "stage": ("", "engine.pretrain pretrains and engine.finetune tunes"), "finetuning-type": _LORA,
    "template": ("--chat-template", ""), "dataset": ("--data", "the file itself"),
    "eval-dataset": ("--valid-data", "the file itself"), "dataset-dir": ("--data", "the file itself, with its folder"),
    "cutoff-len": ("--seq-len", ""), "val-size": ("--split", "as a share"),
    "max-samples": ("--data", "of a file that holds so many rows"),
    "preprocessing-num-workers": ("", "rows are encoded at the start, by every process"),
    "overwrite-cache": ("", "rows are encoded anew at every start"), "lora-rank": _LORA, "lora-target": _LORA,
    "adapter-name-or-path": _LORA, "quantization-bit": _QUANTIZED, "quantization-method": _QUANTIZED,
    "pure-bf16": ("--dtype bf16", ""), "flash-attn": _ATTENTION, "neat-packing": _PACKING, "train-on-prompt": _ANSWERS,
    "plot-loss": _TRACKER, "freeze-trainable-layers": ("", "tuning changes every weight"), "pref-beta": _PREFERENCE,
    "pref-loss": _PREFERENCE, "enable-liger-kernel": _KERNELS,
})
"""Keys of LLaMA-Factory's YAML files."""

AXOLOTL: Table = MappingProxyType({
    "base-model": ("--load", ""), "datasets": ("--data", "the files themselves, separated by commas"),
    "test-datasets": ("--valid-data", "the files themselves"), "val-set-size": ("--split", "as a share"),
    "sequence-len": ("--seq-len", ""), "sample-packing": _PACKING, "num-epochs": ("--epochs", ""),
    "lr-scheduler": _DECAY, "gradient-clipping": ("--clip", ""), "adapter": _LORA, "lora-model-dir": _LORA,
    "lora-target-linear": _LORA, "train-on-inputs": _ANSWERS, "flash-attention": _ATTENTION,
    "sdp-attention": ("--attention sdpa", ""), "tensor-parallel-size": ("--tp", ""),
    "sequence-parallel-degree": ("--cp", "1 for now: context parallelism is not there yet"),
    "saves-per-epoch": _EVERY, "evals-per-epoch": _EVAL_EVERY, "pad-to-sequence-len": (
        "", "a step is as long as its longest row"),
    "early-stopping-patience": ("", "stopping early is not there yet; --stop-after counts steps"),
    "special-tokens": ("--tokenizer", "whose files say them"), "rl": _PREFERENCE,
    "dataset-prepared-path": ("", "rows are encoded anew at every start"),
})
"""Keys of axolotl's YAML files."""

COMMON: Table = MappingProxyType({
    "n-layer": ("--layers", ""), "n-layers": ("--layers", ""), "n-head": ("--heads", ""), "n-heads": ("--heads", ""),
    "n-embd": ("--hidden", ""), "dim": ("--hidden", ""), "d-model": ("--hidden", ""), "n-kv-heads": ("--kv-heads", ""),
    "block-size": ("--seq-len", ""), "context-length": ("--seq-len", ""), "sequence-length": ("--seq-len", ""),
    "max-iters": ("--steps", ""), "num-steps": ("--steps", ""), "iterations": ("--steps", ""), "iters": ("--steps", ""),
    "batch-size": ("--global-batch", "of a whole step; --micro-batch is what one process computes at a time"),
    "epoch": ("--epochs", ""), "warmup-iters": ("--warmup", ""), "grad-clip": ("--clip", ""), "wd": (
        "--weight-decay", ""),
    "betas": ("--beta1", "and --beta2"), "momentum": ("--beta1", "of AdamW"), "scheduler": _DECAY,
    "dropout": _DROPOUT, "lora": _LORA, "qlora": _LORA, "dora": _LORA, "peft": _LORA, "dpo": _PREFERENCE,
    "moe": _MOE, "experts": _MOE, "fp32": ("--dtype fp32", ""), "fp64": ("--dtype fp64", ""),
    "precision": ("--dtype", "fp32, bf16 or fp64"), "mixed-precision": ("--dtype bf16", ""), "amp": (
        "--dtype bf16", ""),
    "init-from": ("--load", ""), "model-path": ("--load", ""), "model-dir": ("--load", ""), "checkpoint": (
        "--load", ""),
    "checkpoint-path": ("--load", ""), "ckpt": ("--load", ""), "save-dir": ("--out", ""), "out-dir": ("--out", ""),
    "output": ("--out", ""), "log-dir": _TRACKER, "wandb": _TRACKER, "train-data": ("--data", ""),
    "val-data": ("--valid-data", ""), "eval-data": ("--valid-data", ""), "input": ("--data", ""),
    "tp-size": ("--tp", ""), "pp-size": ("--pp", ""), "cp-size": ("--cp", "1 for now"), "dp": _DP, "dp-size": _DP,
    "tensor-parallel": ("--tp", ""), "pipeline-parallel": ("--pp", ""), "ep": _MOE, "ep-size": _MOE,
    "context-parallel": ("--cp", "1 for now"), "zero-stage": _ZERO, "zero": _ZERO, "compile": (
        "", "torch.compile is not used"),
    "activation-checkpointing": _RECOMPUTE, "nproc-per-node": _LAUNCHER, "nproc": _LAUNCHER, "nnodes": _LAUNCHER,
    "node-rank": _LAUNCHER, "master-addr": _LAUNCHER, "master-port": _LAUNCHER, "local-rank": _LAUNCHER,
    "rank": _LAUNCHER, "gpus": _LAUNCHER, "num-gpus": _LAUNCHER, "num-nodes": _LAUNCHER,
    "world-size": ("--world-size", "for --dry-run and --check"),
})
"""What nanoGPT, torchtitan and habit call things."""

RUN: Mapping[str, Table] = MappingProxyType({
    "Megatron-LM": MEGATRON, "transformers and TRL": TRANSFORMERS, "LLaMA-Factory": FACTORY, "axolotl": AXOLOTL,
    "others": COMMON})
"""The words of training, by where they come from."""


def unknown_option(key: str, name: str, ours: Iterable[str], tables: Mapping[str, Table]) -> str:
    """What is wrong with option `--key`, whose last part is `name`: what a foreign word is called here, else the
    option of `ours` that it resembles."""
    said = f"unknown option --{shown(key, 80)}"
    word = name.replace("_", "-").lower()
    for table in tables.values():
        for spelled in (word, word.removeprefix("no-")):
            if spelled in table:
                flag, why = table[spelled]
                return f"{said}, which is {flag} here{f' ({why})' if why else ''}" if flag else f"{said}: {why}"
    close = nearest(word, [option.replace("_", "-") for option in ours])
    return f"{said}; did you mean --{close}?" if close else f"{said}; --help lists them"

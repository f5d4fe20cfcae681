"""The only schema of a run: one small frozen dataclass a concern. Leaf names are unique, so each is a flag.

The string under a field is its help text: `engine.config.flags.describe` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. `model` names a preset; every other field overrides what the preset says."""

    model: str = "tiny"
    """Preset: tiny, 125m, 1b, 7b, 8b, 13b, 70b, gpt2. A loaded model keeps its own name."""
    family: str = "llama"
    """llama (RMSNorm, RoPE, SwiGLU) or gpt2 (LayerNorm, learned positions, GELU, biases)."""
    layers: int = 4
    """Number of decoder blocks."""
    hidden: int = 128
    """Width of the residual stream."""
    ffn_hidden: int = 344
    """Width inside the MLP."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 4
    """Key and value heads; fewer than heads is grouped-query attention."""
    head_dim: int = 32
    """Width of one head."""
    vocab_size: int = 4096
    """True vocabulary size (padding is added at run time only); more than a loaded model has grows it by mean rows."""
    max_positions: int = 4096
    """Longest sequence; the table's length where positions are learned."""
    norm_eps: float = 1e-5
    """Epsilon of the norms."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before RoPE (Qwen3)."""
    tied: bool = False
    """The output head is the token embedding."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections into the residual stream use std / sqrt(2 layers)."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are laid over processes; data parallelism is what is left of the world size."""

    tp: int = 1
    """Tensor-parallel size: each layer's matrices are split over so many processes."""
    pp: int = 1
    """Pipeline-parallel size: the layers are split into so many stages."""
    cp: int = 1
    """Context-parallel size (1 for now)."""
    virtual_stages: int = 1
    """Model chunks on each pipeline rank; more than 1 needs --schedule interleaved."""
    schedule: str = "1f1b"
    """Pipeline schedule: 1f1b or interleaved."""
    sequence_parallel: bool = False
    """Between the tensor-parallel regions, split activations along the sequence."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much is read in a step, and how many steps there are."""

    micro_batch: int = 1
    """Sequences in one forward pass of one data-parallel rank."""
    global_batch: int = 8
    """Sequences in one optimizer step, over all ranks."""
    seq_len: int = 256
    """Tokens in a sequence."""
    steps: int = 100
    """Optimizer steps of the whole run."""
    epochs: float = 0.0
    """Passes over --data, instead of --steps: the run's config then has the steps that they are."""
    stop_after: int = 0
    """Save and stop after this step, the learning-rate schedule still being that of --steps; 0 runs to the end."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) with a warm-up and a decay."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the decay; a tenth of --lr if not given."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: str = "cosine"
    """After the warm-up: cosine, linear or constant."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon of AdamW."""
    clip: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    skip_nonfinite: int = 0
    """A step whose loss or gradient norm is not finite moves no weight and is skipped, but the Nth of them in a row
    ends the run. With 0 the first one does."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from."""

    data: str = ""
    """Dataset prefix, or a blend P1:0.7,P2:0.3; for tuning, files of chat rows (json, csv, parquet): F1,F2."""
    valid_data: str = ""
    """Held-back data of the same kind."""
    new_data: bool = False
    """With --resume: go on with other data than the run was trained on, which is an error otherwise."""
    split: float = 0.0
    """Share of --data held back for evaluation when --valid-data is not given: the last documents of a corpus; in
    tuning, rows chosen by what they say."""
    ignore_keys: str = ""
    """In tuning, keys of rows and messages to leave out though they hold content, joined by commas."""
    verify_data: bool = False
    """Before the first step, read the corpora through and compare them with the checksums their .json files hold."""
    mask_documents: bool = False
    """In pretraining, a token attends to its own document only, not to those packed before it into the sample."""
    tokenizer: str = ""
    """Folder or file of the tokenizer; saved with every checkpoint."""
    chat_template: str = "chatml"
    """Template that turns messages into text when tuning: chatml."""


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """The run's folder and its checkpoints."""

    out: str = ""
    """Run folder: config, metrics, samples, checkpoints."""
    load: str = ""
    """Start from the weights of a run folder, a step folder or a Hugging Face folder; the optimizer starts fresh."""
    resume: bool = False
    """Continue --out from its latest checkpoint with everything."""
    resume_from: int | None = None
    """Like --resume, from the checkpoint of this step: later ones are set aside as step-00000020.old."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    save_wait: bool = False
    """Train on only when a checkpoint is on the disk. Else a copy of the state is taken in the machine's memory, and
    written while the next steps train."""
    keep: int = 0
    """Checkpoints kept, newest first; 0 keeps all. After a skipped step none is deleted."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates only at the end, when there is held-back data."""
    eval_samples: int = 64
    """Held-back sequences in one evaluation."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl has every step."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Numbers and machines."""

    seed: int = 1234
    """Seed of weights and data order."""
    dtype: str = "auto"
    """fp64, fp32 or bf16 (fp32 main gradients and master weights); auto is bf16 on CUDA and fp32 on CPU."""
    device: str = "auto"
    """auto, cpu or cuda."""
    kernels: str = "auto"
    """triton (ours), torch, or apex (norms by NVIDIA Apex, the rest as auto); auto is triton on CUDA, torch on CPU."""
    attention: str = "auto"
    """triton (ours), sdpa (torch's fused attention) or reference (plain softmax); auto follows --kernels."""
    recompute: str = "none"
    """Made again in the backward pass: none; selective (norms, activation); full (blocks); full:N (the first N blocks
    of a stage, the rest selective); auto (the least that fits). Alone it means full."""
    timeout: float = 300.0
    """Seconds a rank may stand still in a step, or wait for one that does not answer, before the run ends."""
    save_timeout: float = 3600.0
    """The same while checkpoints are written, and while weights and data are opened: a disk may be slow."""
    requeue_exit: bool = False
    """When a signal has stopped the run before its end, exit with 75, not with 0: for a batch system that requeues."""
    peak_tflops: float = 0.0
    """Peak rate of one device for the MFU; 0 takes the known value of the GPU, or leaves MFU out."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

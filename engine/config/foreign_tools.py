"""What flags of other programs are called by `engine.generate` and by the tools; `engine.config.foreign` has those of
training, and says how a table reads."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engine.config.foreign import Table

_KIND = ("", "the kind is read from the files of --tokenizer")
_SEARCH = ("", "beam search is not there yet; tokens are drawn, or the likeliest taken with --greedy")
_LAYOUT = ("", "a checkpoint has no layout of its own: any tp and pp reads it")
_BATCH = ("", "one prompt is continued at a time")
_OFFLINE = ("", "nothing is sent anywhere; push the folder --save yourself")

GENERATE: Table = MappingProxyType({
    "model": ("--load", "a folder"), "model-name-or-path": ("--load", ""), "model-path": ("--load", ""),
    "checkpoint": ("--load", ""), "ckpt": ("--load", ""), "tokenizer": ("--load", "whose folder holds its tokenizer"),
    "max-new-tokens": ("--max-tokens", ""), "max-length": ("--max-tokens", "counted after the prompt"),
    "tokens-to-generate": ("--max-tokens", ""), "num-tokens-to-generate": ("--max-tokens", ""),
    "n-predict": ("--max-tokens", ""), "num-tokens": ("--max-tokens", ""), "temp": ("--temperature", ""),
    "do-sample": ("", "tokens are drawn unless --greedy is given"), "num-beams": _SEARCH, "beam-size": _SEARCH,
    "top-k": ("--top-p", "the number of tokens cannot be bound yet"), "nucleus": ("--top-p", ""),
    "repetition-penalty": ("", "penalties are not there yet"), "presence-penalty": ("", "penalties are not there yet"),
    "frequency-penalty": ("", "penalties are not there yet"), "min-p": ("--top-p", ""), "num-samples": (
        "", "start it again with another --seed"),
    "num-return-sequences": ("", "start it again with another --seed"), "n": ("", "start it again with another --seed"),
    "batch-size": _BATCH, "torch-dtype": ("--dtype", ""), "bf16": ("--dtype bf16", ""), "fp16": ("--dtype bf16", ""),
    "fp32": ("--dtype fp32", ""), "precision": ("--dtype", ""), "device-map": ("--device", "one device"),
    "text": ("--prompt", ""), "input": ("--prompt", "of which - reads standard input"), "file": (
        "--prompt", "of which - reads standard input"),
    "interactive": ("--chat", "for one message"), "system-prompt": ("", "a system message is not there yet"),
    "stop": ("", "it stops at the model's end of text, or after --max-tokens"),
    "tp": ("", "generation is on one process"), "tensor-parallel-size": ("", "generation is on one process"),
    "load-in-4bit": ("", "quantized weights are not there yet"), "load-in-8bit": (
        "", "quantized weights are not there yet"),
    "trust-remote-code": ("", "no code of a model's folder is run"), "stream": ("", "text is printed as it comes"),
})
"""transformers' generate, vLLM, llama.cpp, Megatron-LM's and nanoGPT's samplers."""

PREPROCESS: Table = MappingProxyType({
    "json-keys": ("--json-key", "one key"), "text-column": ("--json-key", ""), "text-key": ("--json-key", ""),
    "tokenizer-type": _KIND, "tokenizer-model": ("--tokenizer", ""), "tokenizer-name-or-path": ("--tokenizer", ""),
    "vocab-file": ("--tokenizer", "the folder that holds it"), "vocab": ("--tokenizer", "the folder that holds it"),
    "merge-file": ("--tokenizer", "the folder that holds it"), "vocab-size": ("", "the tokenizer says it"),
    "output": ("--output-prefix", ""), "output-dir": ("--output-prefix", "a path without .bin"),
    "dataset-impl": ("", "the format is always .bin and .idx"), "split-sentences": ("--split-text", ""),
    "keep-newlines": ("", "newlines are kept"), "lang": ("", "text is not split into sentences"),
    "partitions": ("", "parts are made by themselves; --workers counts processes"),
    "keep-sequential-samples": ("--no-shuffle", ""), "log-interval": ("", "there is no such switch"),
    "num-proc": ("--workers", ""), "num-workers": ("--workers", ""), "preprocessing-num-workers": ("--workers", ""),
    "seed": ("--shuffle-seed", ""), "eod": ("--append-eod", ""), "files": ("--input", ""), "data": ("--input", ""),
    "dataset": ("--input", "files"), "seq-length": ("", "documents are kept whole; --seq-len is training's"),
    "seq-len": ("", "documents are kept whole; --seq-len is training's"), "dedupe": ("--dedup exact", ""),
    "deduplicate": ("--dedup exact", ""), "out-prefix": ("--output-prefix", ""),
    "append-bos": ("", "a document begins with its text; --append-eod ends it"),
})
"""Megatron-LM's tools/preprocess_data.py and its kin."""

_MADE = ("--output", "the folder that the new vocabulary is written to")
_FIXED = ("", "<unk>, <s>, </s> and <pad> are made with the ids 0 to 3")

TOKENIZER: Table = MappingProxyType({
    "model-type": ("--model", "bpe or unigram"), "model-prefix": ("--output", "a folder"),
    "output-dir": ("--output", ""), "save": ("--output", ""), "input-sentence-size": ("--sample-megabytes", ""),
    "character-coverage": ("", "what has no piece is spelled in bytes, so everything is covered"),
    "byte-fallback": ("", "bytes are always there"), "user-defined-symbols": ("--special", ""),
    "control-symbols": ("--special", ""), "special-tokens": ("--special", ""), "files": ("--input", ""),
    "data": ("--input", ""), "num-threads": ("", "all cores are used"),
    "normalization-rule-name": ("", "text is left as it is; tools/preprocess_data.py --clean changes it"),
    "shuffle-input-sentence": ("--seed", "of what is drawn"), "json-keys": ("--json-key", "one key"),
    "jsonl-keys": ("--json-key", "one key"), "text-column": ("--json-key", ""), "text-key": ("--json-key", ""),
    "vocab-file": _MADE, "vocab": _MADE, "merge-file": _MADE, "merges-file": _MADE, "tokenizer-model": _MADE,
    "output-prefix": ("--output", "a folder"), "out": ("--output", "a folder"), "output-file": ("--output", "a folder"),
    "tokenizer": ("", "a vocabulary is made new; tools/preprocess_data.py --tokenizer takes one that is there"),
    "tokenizer-type": ("--model", "bpe or unigram"), "min-frequency": ("", "what --vocab-size has room for is learned"),
    "num-workers": ("", "all cores are used"), "workers": ("", "all cores are used"), "dataset": ("--input", "files"),
    "max-sentence-length": ("", "documents of any length are read"), "bos-id": _FIXED, "eos-id": _FIXED,
    "unk-id": _FIXED, "pad-id": _FIXED,
})
"""sentencepiece's spm_train and tokenizers' trainers."""

CONVERT: Table = MappingProxyType({
    "load-dir": ("--load", ""), "save-dir": ("--save", ""), "input-dir": ("--load", ""), "output-dir": ("--save", ""),
    "input": ("--load", ""), "output": ("--save", ""), "out": ("--save", ""), "checkpoint": ("--load", ""),
    "model": ("--load", "a folder"), "model-name-or-path": ("--load", ""), "hf-path": ("--load", "or --save"),
    "loader": ("", "what --load holds is recognised"), "saver": ("--to", "hf or engine"),
    "model-type": ("", "the family is read from what --load holds"),
    "target-tensor-parallel-size": _LAYOUT, "target-pipeline-parallel-size": _LAYOUT, "target-tp": _LAYOUT,
    "target-pp": _LAYOUT, "tp": _LAYOUT, "pp": _LAYOUT, "tensor-model-parallel-size": _LAYOUT,
    "pipeline-model-parallel-size": _LAYOUT, "torch-dtype": ("--dtype", ""), "bf16": ("--dtype bf16", ""),
    "fp16": ("--dtype", "bf16 or fp32"), "max-shard-size": ("--shard-gb", "in GB"), "format": ("--to", "hf or engine"),
    "tokenizer": ("", "the checkpoint holds it, and it goes along"), "push-to-hub": _OFFLINE,
    "true-vocab-size": ("", "the padding is left out by itself"), "check": ("--verify", ""),
})
"""Megatron-LM's and Megatron-Bridge's converters."""

MERGE: Table = MappingProxyType({
    "inputs": ("--input", ""), "data": ("--input", ""), "output": ("--output-prefix", ""),
    "output-dir": ("--output-prefix", "a path without .bin"), "out": ("--output-prefix", ""),
    "out-prefix": ("--output-prefix", ""),
})
"""Megatron-LM's tools/merge_datasets.py takes a folder; this one takes prefixes."""

INSPECT: Table = MappingProxyType({
    "input": ("", "the corpus is given without a flag: inspect_data.py P"),
    "data": ("", "the corpus is given without a flag: inspect_data.py P"), "document": ("--doc", ""),
    "tokenizer-model": ("--tokenizer", ""),
})

DEMO: Table = MappingProxyType({
    "output-dir": ("--output", ""), "output-prefix": ("--output", "a folder"), "out": ("--output", ""),
    "size": ("--megabytes", ""),
})

TOOLS: Mapping[str, Mapping[str, Table]] = MappingProxyType({
    "engine.generate": {"others": GENERATE}, "preprocess_data.py": {"others": PREPROCESS},
    "train_tokenizer.py": {"others": TOKENIZER}, "convert_ckpt.py": {"others": CONVERT},
    "merge_datasets.py": {"others": MERGE}, "inspect_data.py": {"others": INSPECT},
    "make_demo_data.py": {"others": DEMO}})
"""By program: what `engine.config.command.Command` is given."""

"""Names of number formats: ours (`bf16`), those of safetensors (`BF16`) and torch's, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from engine.errors import UserError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
})
"""Our words for the formats weights may have."""

CODES: Mapping[str, str] = MappingProxyType({"fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16"})
"""The same formats in a safetensors header."""

CODE_BYTES: Mapping[str, int] = MappingProxyType({
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
})
"""Bytes an element of every format a safetensors header may name, also of those we do not read."""


def dtype_name(dtype: torch.dtype) -> str:
    """Our word for a torch dtype; UserError for one that weights cannot have."""
    for name, kind in DTYPES.items():
        if kind == dtype:
            return name
    raise UserError(f"weights cannot be stored as {dtype}; use {', '.join(DTYPES)}")


def code_dtype(code: str, what: str) -> torch.dtype:
    """The torch dtype of a safetensors code; UserError naming `what` where it is no floating-point weight."""
    for name, known in CODES.items():
        if known == code:
            return DTYPES[name]
    raise UserError(f"{what} is stored as {code}; only {', '.join(CODES.values())} weights are read "
                    "(a quantised model must be dequantised first)")

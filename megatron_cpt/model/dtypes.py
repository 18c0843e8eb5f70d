"""torch's dtypes by the names that configurations give them."""

from __future__ import annotations

import torch


def dtype_of(name: str) -> torch.dtype:
    """torch dtype from our names (fp32, bf16, fp16) or HF's (float32, bfloat16, float16)."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return names[name]

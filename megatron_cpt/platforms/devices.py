"""What hardware there is, for code that needs no process groups: fine-tuning, evaluation, chat, studies."""

from __future__ import annotations

import os

import torch


def device_type() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def visible_gpus() -> list[str]:
    """Names as CUDA_VISIBLE_DEVICES has them; empty: there are none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]

"""Where code meets hardware: the one place that says "cuda".

`current_platform()` is CUDA when torch sees a device and CPU otherwise; `MEGATRON_CPT_PLATFORM=cpu|cuda` overrides.
Importing a room changes nothing: `prepare_platform()` adapts torch and megatron-core where a model is run. Modules that
import from megatron import `imported_megatron` before (a test says so).
"""

from __future__ import annotations

import functools
import logging
import os
import warnings

import torch

from megatron_cpt.platforms.base import Platform
from megatron_cpt.utils.errors import InputError


@functools.cache
def current_platform() -> Platform:
    """The platform of this process."""
    name = os.environ.get("MEGATRON_CPT_PLATFORM") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        from megatron_cpt.platforms.cpu import CpuPlatform

        return CpuPlatform()
    if name == "cuda":
        from megatron_cpt.platforms.cuda import CudaPlatform

        return CudaPlatform()
    raise InputError(f"MEGATRON_CPT_PLATFORM is {name!r}; expected 'cpu' or 'cuda'")


@functools.cache
def prepare_platform() -> Platform:
    """Make megatron-core run on this machine (once per process; hardly anything on CUDA); returns the platform."""
    import megatron_cpt.platforms.imported_megatron  # noqa: F401

    # megatron-core uses torch interfaces that warn of their future; a user can do nothing about it.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    # Since 0.19 every GPTModel says that it is deprecated; docs/platforms.md has what that means here
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    # and every rank that its layout of the parameters is made where it always was made
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    platform = current_platform()
    platform.prepare()
    return platform


__all__ = ["Platform", "current_platform", "prepare_platform"]

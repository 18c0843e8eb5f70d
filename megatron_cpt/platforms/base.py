"""What a platform has to say about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cpt.data.loader import Batch


class Platform(Protocol):
    """Device, process-group backend and layer implementations of one kind of hardware."""

    name: str
    backend: str  # of torch.distributed

    def prepare(self) -> None:
        """Adapt torch and megatron-core; before megatron is imported."""

    def device(self, local_rank: int) -> torch.device:
        """Select and return the device of the process with this local rank."""

    def block_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """The transformer layers of this pipeline stage, as megatron-core wants them described."""

    def page_locked(self, batch: Batch) -> Batch:
        """The same micro-batch in memory from which it can be copied to the device while something else is computed."""

    def peak_memory_bytes(self) -> int:
        """Highest memory use of this process so far: device memory on CUDA, resident memory on CPU."""

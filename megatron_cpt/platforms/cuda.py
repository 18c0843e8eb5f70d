"""CUDA: NCCL, Transformer Engine's layers when it is installed, torch's own attention and norm when it is not.

megatron-core takes FusedAdam from Transformer Engine or Apex by itself; only where neither is installed is it given ours.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cpt.data.loader import Batch


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (it is optional: `pip install megatron-cpt[gpu]`)."""
    return importlib.util.find_spec("transformer_engine") is not None


class CudaPlatform:
    """NVIDIA GPUs."""

    name = "cuda"
    backend = "nccl"

    def prepare(self) -> None:
        if not (has_transformer_engine() or importlib.util.find_spec("apex")):
            # torch's AdamW keeps its step count where the distributed optimizer cannot save it; ours keeps it where
            # Apex does.
            from megatron_cpt.platforms.fused_adam import install_fused_adam

            install_fused_adam()

    def device(self, local_rank: int) -> torch.device:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def block_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        if not has_transformer_engine():
            from megatron_cpt.platforms.torch_layers import torch_block_spec

            return torch_block_spec(config, vp_stage)
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, normalization=config.normalization, vp_stage=vp_stage
        )

    def page_locked(self, batch: Batch) -> Batch:
        arrays = (batch.tokens, batch.loss_mask, batch.cu_seqlens)
        # numpy's view keeps torch's page-locked tensor alive
        return type(batch)(*(None if a is None else torch.from_numpy(a).pin_memory().numpy() for a in arrays))

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

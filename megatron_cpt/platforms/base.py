"""What a platform has to say about itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cpt.config.parallel import ParallelConfig
    from megatron_cpt.config.run import TrainingConfig
    from megatron_cpt.mixture.loader import Batch


FUSIONS = (
    "gradient_accumulation_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "apply_rope_fusion",
)


def needs_transformer_engine(parallel: ParallelConfig, training: TrainingConfig, here: str) -> str | None:
    """The first setting that only Transformer Engine on a GPU can do; `here`: why there is none."""
    settings = {
        "parallel.context_parallel_size": (parallel.context_parallel_size, 1),
        "parallel.tp_comm_overlap": (parallel.tp_comm_overlap, False),
        "training.fp8": (training.fp8, None),
    }
    for name, (value, without) in settings.items():
        if value != without:
            return f"{name} is {value}, which needs a GPU and Transformer Engine's layers, and {here}; expected {without}"
    return None


class Platform(Protocol):
    """Device, process-group backend and layer implementations of one kind of hardware."""

    name: str
    backend: str  # of torch.distributed

    def importing(self) -> contextlib.AbstractContextManager[None]:
        """For the import of megatron-core: what it must not find or do on this machine. Nothing of it lasts."""

    def prepare(self) -> None:
        """Adapt torch and megatron-core, when that is imported, to this machine: once in a process that runs a model."""

    def device(self, local_rank: int) -> torch.device:
        """Select and return the device of the process with this local rank."""

    def before_layers(self, parallel: ParallelConfig, training: TrainingConfig, seq_length: int, hidden_size: int) -> None:
        """Start what the layers of a training run will share; on all ranks, after the process groups."""

    def transformer_impl(self, params_dtype: torch.dtype) -> str:
        """Whose layers a model of this type gets unless it is told: "transformer_engine" or "local" (torch's)."""

    def block_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """The transformer layers of this pipeline stage, as megatron-core wants them described."""

    def refuses(self, parallel: ParallelConfig, training: TrainingConfig) -> str | None:
        """Which setting this platform cannot do, and why; None: it can do them all."""

    def fusions(self, params_dtype: torch.dtype, transformer_impl: str) -> dict[str, bool]:
        """Which of TransformerConfig's fused computations to use for parameters of this type in such layers."""

    def monitored(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Gives what is to be called after each step, for a monitor outside the process that ends it when it hangs."""

    def page_locked(self, batch: Batch) -> Batch:
        """The same micro-batch in memory from which it can be copied to the device while something else is computed."""

    def peak_memory_bytes(self) -> int:
        """Highest memory use of this process so far: device memory on CUDA, resident memory on CPU."""

    def device_name(self) -> str:
        """The model of this process's device."""

    def peak_tflops(self) -> float | None:
        """Dense bf16 TFLOP/s of this process's device by its data sheet; None if that is not known."""

    def library_versions(self) -> dict[str, str]:
        """Versions of what this hardware needs beside the Python packages."""

"""CUDA: NCCL, Transformer Engine's layers when it is installed, torch's own attention and norm when it is not.

megatron-core takes FusedAdam from Transformer Engine or Apex by itself; only where neither is installed is it given ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_cpt.platforms.base import FUSIONS, needs_transformer_engine

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cpt.config.parallel import ParallelConfig
    from megatron_cpt.config.run import TrainingConfig
    from megatron_cpt.mixture.loader import Batch


# Words of torch.cuda.get_device_name() -> dense bf16 TFLOP/s; the first that fits counts, so variants come before the rest.
PEAK_TFLOPS = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIE", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800 PCIE", 756.0),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
OTHER_DEVICES = {"MIG", "LAPTOP", "D", "TI", "MAX"}  # a part of a GPU, or another chip under the name of one listed


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (it is optional: `pip install megatron-cpt[gpu]`)."""
    return importlib.util.find_spec("transformer_engine") is not None


def import_transformer_engine() -> None:
    """Import it with the cuDNN that torch was built with.

    It takes that of the system first, where there is one. With two versions in one process torch refuses cuDNN, and cuDNN
    its own parts.
    """
    folder = Path(torch.__file__).parent.parent / "nvidia" / "cudnn"  # where torch's wheels from PyPI get it from
    libraries = sorted((folder / "lib").glob("libcudnn*.so*"))
    if libraries:
        os.environ.setdefault("CUDNN_HOME", str(folder))
        for library in libraries:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    importlib.import_module("transformer_engine.pytorch")


def cudnn_version() -> str:
    """Of torch's cuDNN; where torch refuses it, why."""
    try:
        return str(torch.backends.cudnn.version())
    except RuntimeError as error:  # another version than torch was built with
        return f"refused by torch: {' '.join(str(error).split())}"


def leave_out_broken_transformer_engine() -> None:
    """Go on without a Transformer Engine that cannot be imported: megatron-core would end with its error.

    Its core without the extension for torch, or one that was built for another torch, is such a one.
    """
    from megatron_cpt.platforms.everywhere import hide

    if not has_transformer_engine():
        return
    try:
        import_transformer_engine()
    except (ImportError, OSError) as error:
        hide("transformer_engine")
        if os.environ.get("RANK", "0") == "0":
            reason = " ".join(str(error).split())
            logger.info(f"note: Transformer Engine cannot be imported ({reason}): torch's layers are used")


def has_weight_gradient_kernel() -> bool:
    """Whether Apex was built with the kernel of `gradient_accumulation_fusion`.

    megatron-core's own linear layers refuse the setting without it, and with Transformer Engine the output layer is one.
    """
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def unlike_transformer_engine(parallel: ParallelConfig, training: TrainingConfig) -> str | None:
    """The first setting that cannot be done with Transformer Engine's layers, or does nothing with them."""
    if parallel.context_parallel_size > 1 and training.params_dtype == "fp32":
        size = parallel.context_parallel_size
        return (
            f"parallel.context_parallel_size is {size} with training.params_dtype fp32, for which Transformer Engine has no "
            "attention over several devices; expected bf16"
        )
    if "layernorm" in (parallel.recompute_modules or []):
        return (
            "parallel.recompute_modules has layernorm, which is a part of Transformer Engine's linear layers, and not "
            "computed again; expected core_attn or mlp, or training.transformer_impl local"
        )
    return None


class CudaPlatform:
    """NVIDIA GPUs."""

    name = "cuda"
    backend = "nccl"

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        from megatron_cpt.platforms.everywhere import quiet, withheld

        leave_out_broken_transformer_engine()
        with withheld("wandb"), quiet("torch.utils.cpp_extension"):
            yield

    def prepare(self) -> None:
        from megatron_cpt.platforms.everywhere import save_without_queue_server

        save_without_queue_server()
        if not has_weight_gradient_kernel():
            from megatron_cpt.platforms.torch_fusions import add_weight_gradients_where_they_are_summed

            add_weight_gradients_where_they_are_summed()
        # Of torch's layers, which a run can have beside an installed Transformer Engine
        from megatron_cpt.platforms.torch_fusions import rotate_in_one_function
        from megatron_cpt.platforms.torch_layers import recompute_norms_without_fp8

        rotate_in_one_function()
        recompute_norms_without_fp8()
        if not (has_transformer_engine() or importlib.util.find_spec("apex")):
            from megatron_cpt.platforms.fused_adam import install_fused_adam
            from megatron_cpt.platforms.torch_fusions import scale_gradients_in_place

            # torch's AdamW keeps its step count where the distributed optimizer cannot save it; ours keeps it where
            # Apex does.
            install_fused_adam()
            scale_gradients_in_place()

    def device(self, local_rank: int) -> torch.device:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def before_layers(self, parallel: ParallelConfig, training: TrainingConfig, seq_length: int, hidden_size: int) -> None:
        if not parallel.tp_comm_overlap:
            return
        # Transformer Engine's layers overlap through these buffers, and do not build without them.
        from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, initialize_ub

        tokens = seq_length * training.micro_batch_size // parallel.context_parallel_size
        initialize_ub(
            [tokens, hidden_size],
            parallel.tensor_model_parallel_size,
            quantization_modes=[UserBufferQuantizationMode.NONE if training.fp8 is None else UserBufferQuantizationMode.FP8],
            dtype=torch.float32 if training.params_dtype == "fp32" else torch.bfloat16,
            bootstrap_backend=self.backend,
        )

    def transformer_impl(self, params_dtype: torch.dtype) -> str:
        return "transformer_engine" if has_transformer_engine() and params_dtype != torch.float32 else "local"

    def block_spec(self, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        if config.transformer_impl == "local":
            from megatron_cpt.platforms.torch_layers import torch_block_spec

            return torch_block_spec(config, vp_stage)
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(
            config, use_transformer_engine=True, normalization=config.normalization, vp_stage=vp_stage
        )

    def refuses(self, parallel: ParallelConfig, training: TrainingConfig) -> str | None:
        wanted = training.transformer_impl
        if not has_transformer_engine():
            if wanted == "transformer_engine":
                return f"training.transformer_impl is {wanted}, which is not installed; expected local"
            return needs_transformer_engine(parallel, training, "Transformer Engine is not installed")
        if wanted is None and training.params_dtype == "fp32":
            return needs_transformer_engine(parallel, training, "fp32 is computed by torch's (training.params_dtype)")
        if wanted == "local":
            return needs_transformer_engine(parallel, training, "training.transformer_impl is local")
        return unlike_transformer_engine(parallel, training)

    def fusions(self, params_dtype: torch.dtype, transformer_impl: str) -> dict[str, bool]:
        here = {
            "apply_rope_fusion": transformer_impl == "transformer_engine",
            # It rounds the gradient of the logits to bf16, whatever they are
            "cross_entropy_loss_fusion": params_dtype == torch.bfloat16,
        }
        return {name: here.get(name, True) for name in FUSIONS}

    @contextlib.contextmanager
    def monitored(self) -> Iterator[Callable[[], None]]:
        # ft_launcher, of NVIDIA's resiliency extension, names its monitor's socket to the processes it starts
        if "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ:
            yield lambda: None
            return
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

        client = RankMonitorClient()
        client.init_workload_monitoring()
        try:
            yield client.send_heartbeat
        finally:
            client.shutdown_workload_monitoring()

    def page_locked(self, batch: Batch) -> Batch:
        arrays = (batch.tokens, batch.loss_mask, batch.cu_seqlens)
        # numpy's view keeps torch's page-locked tensor alive
        return type(batch)(*(None if a is None else torch.from_numpy(a).pin_memory().numpy() for a in arrays))

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def device_name(self) -> str:
        return torch.cuda.get_device_name()

    def peak_tflops(self) -> float | None:
        return known_peak_tflops(self.device_name())

    def library_versions(self) -> dict[str, str]:
        found = {"cuda": torch.version.cuda, "cudnn": cudnn_version()}
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        return {name: str(version) for name, version in found.items() if version}


def known_peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s (no sparsity) of a GPU by its name, from the makers' data sheets; None for others."""
    words = name.upper().replace("-", " ").replace("/", " ").split()
    if OTHER_DEVICES.intersection(words):
        return None
    for model, peak in PEAK_TFLOPS:
        if all(word in words for word in model.split()):
            return peak
    return None

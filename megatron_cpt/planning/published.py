"""Throughput that others have published, in the terms of the planner: what its model of time is fitted to and tested on.

Runs of FSDP (torchtitan, llm-foundry, Automodel) are data parallelism with `fully_sharded`; MPT models are Llama shapes with
the same weights in matrix products.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.planning.hardware import Cluster, find_device
from megatron_cpt.planning.layouts import Layout, TrainingJob
from megatron_cpt.planning.presets import MODELS


@dataclass(frozen=True)
class Published:
    """One published figure: tokens per second and device.

    Attributes:
        torchao: FP8 by torchao's layers instead of Transformer Engine's. They quantize weights again for each micro-batch,
            and activations in kernels of their own, which the estimate leaves out: it is too high
    """

    source: str
    model: str
    device: str
    devices: int
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    tokens_per_second_per_device: float
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fully_sharded: bool = True
    fp8: bool = False
    torchao: bool = False
    memory_gb_per_s: float | None = None

    @property
    def job(self) -> TrainingJob:
        return TrainingJob(SHAPES[self.model], self.seq_length, self.global_batch_size, "bf16", self.fp8)

    @property
    def layout(self) -> Layout:
        parallel = self.parallel
        model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        data = self.devices // (model * parallel.context_parallel_size)
        microbatches = self.global_batch_size // (data * self.micro_batch_size)
        return Layout(self.parallel, data, self.micro_batch_size, microbatches, self.fully_sharded)

    @property
    def cluster(self) -> Cluster:
        return Cluster(find_device(self.device, memory_gb_per_s=self.memory_gb_per_s), self.devices)


def mpt(layers: int, hidden: int, heads: int) -> LlamaConfig:
    """MPT: an MLP of two matrices, hidden x 4 hidden, is three of 8/3 hidden here; tied embeddings of 50,368 tokens."""
    return LlamaConfig(
        layers, hidden, round(hidden * 8 / 3), heads, heads, hidden // heads, 50368, 65536, 1e-5, 1e4, None, True, "bfloat16"
    )


SHAPES = MODELS | {
    "MPT-7B": mpt(32, 4096, 32),
    "MPT-13B": mpt(40, 5120, 40),
    "MPT-30B": mpt(48, 7168, 56),
    "MPT-70B": mpt(80, 8192, 64),
}
FULL = ParallelConfig(recompute_granularity="full")
# torchtitan's selective checkpointing by operation computes every second matrix product again: about half of the layers.
HALF = ParallelConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=16)
TITAN = "torchtitan, benchmarks and docs/performance.md"  # H100s with 2.4 TB/s of memory and a limit of 500 W
FOUNDRY = "llm-foundry, scripts/train/benchmarking"
BRIDGE = "Megatron-Bridge, performance summary"
AUTOMODEL = "NeMo Automodel, performance summary"


def _tp8(recomputation: ParallelConfig, overlap: bool = False) -> ParallelConfig:
    return dataclasses.replace(recomputation, tensor_model_parallel_size=8, sequence_parallel=True, tp_comm_overlap=overlap)


# As Megatron-Bridge's recipes for Llama 3 set it: also gradients in bf16 (`grad_reduce_in_fp32 = False`), all overlaps on.
BRIDGE_70B = ParallelConfig(
    tensor_model_parallel_size=4,
    pipeline_model_parallel_size=8,
    virtual_pipeline_model_parallel_size=5,
    sequence_parallel=True,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
    grad_reduce_in_bf16=True,
    tp_comm_overlap=True,
)
DDP = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True, grad_reduce_in_bf16=True)

PUBLISHED = [
    Published(TITAN, "8B", "h100", 8, 8192, 2, 16, 6667, HALF, memory_gb_per_s=2400),
    Published(TITAN, "8B", "h100", 8, 8192, 2, 16, 8532, HALF, fp8=True, torchao=True, memory_gb_per_s=2400),
    Published(TITAN, "70B", "h100", 256, 8192, 16, 512, 597, _tp8(FULL), memory_gb_per_s=2400),
    Published(TITAN, "70B", "h100", 256, 8192, 16, 512, 652, _tp8(FULL, overlap=True), memory_gb_per_s=2400),
    Published(TITAN, "70B", "h100", 256, 8192, 16, 512, 942, _tp8(FULL, True), fp8=True, torchao=True, memory_gb_per_s=2400),
    Published(TITAN, "8B", "h100", 64, 8192, 12, 96, 4378, _tp8(HALF), memory_gb_per_s=2400),
    Published(TITAN, "8B", "h100", 64, 8192, 12, 96, 4809, _tp8(HALF, overlap=True), memory_gb_per_s=2400),
    Published(TITAN, "8B", "a100-80g", 64, 8192, 1, 64, 2973, HALF),
    Published(TITAN, "70B", "a100-80g", 64, 8192, 1, 64, 331, FULL),
    Published(TITAN, "8B", "h200", 32, 8192, 2, 64, 10938, HALF, fp8=True, torchao=True),
    Published(TITAN, "8B", "h200", 64, 8192, 2, 128, 10753, HALF, fp8=True, torchao=True),
    Published(AUTOMODEL, "70B", "h100", 64, 8192, 1, 128, 867, dataclasses.replace(FULL, context_parallel_size=2)),
    Published(BRIDGE, "70B", "h100", 64, 8192, 1, 256, 1664, BRIDGE_70B, fully_sharded=False, fp8=True),
    Published(BRIDGE, "70B", "h100", 64, 8192, 1, 128, 1602, BRIDGE_70B, fully_sharded=False, fp8=True),
    Published(BRIDGE, "8B", "h100", 8, 8192, 1, 128, 14451, fp8=True),
    Published(BRIDGE, "8B", "b200", 8, 8192, 2, 128, 30624, DDP, fully_sharded=False, fp8=True),
    Published(BRIDGE, "8B", "gb200", 8, 8192, 2, 128, 31508, DDP, fully_sharded=False, fp8=True),
    Published(BRIDGE, "8B", "gb300", 8, 8192, 2, 128, 37556, DDP, fully_sharded=False, fp8=True),
    Published(FOUNDRY, "MPT-70B", "a100-80g", 64, 2048, 8, 2048, 410, FULL),
    Published(FOUNDRY, "MPT-70B", "h100", 64, 2048, 8, 2048, 1039, FULL),
    Published(FOUNDRY, "MPT-7B", "h100", 8, 2048, 6, 48, 10643),
    Published(FOUNDRY, "MPT-7B", "a100-80g", 8, 2048, 6, 96, 4641),
    Published(FOUNDRY, "MPT-30B", "h100", 32, 2048, 14, 1344, 2308, FULL),
    Published(FOUNDRY, "MPT-30B", "a100-80g", 8, 2048, 3, 504, 916, FULL),
    Published(FOUNDRY, "MPT-13B", "h100", 64, 2048, 2, 128, 4800),
]

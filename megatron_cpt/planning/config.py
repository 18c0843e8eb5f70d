"""What a plan can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cpt.config.parallel import RecomputeModule
from megatron_cpt.config.require import Requirements, require


@dataclass(frozen=True)
class PlanConfig:
    """Layouts of a training job on a cluster: do they fit, and how fast are they."""

    model: str
    """8B, 70B, 405B (Llama 3.1), 1B, 3B (3.2), or a Hugging Face or Megatron checkpoint folder."""
    devices: int
    """Devices in all."""
    device: str = "h100"
    """Device type: a100-40g, a100-80g, h100, h200, b200, gb200, gb300."""
    run: str | None = None
    """Configuration of pretrain_cpt.py (YAML): plan that run and no other. Its layout, batch, precision and length, and its
    mixture's seq_length, take the place of the settings below; if it does not fit, that is an error."""
    seq_length: int = 2048
    """Tokens of a sample."""
    global_batch_size: int = 256
    """Samples per optimizer step."""
    tokens: float = 1e11
    """Token budget, for the days it takes."""
    params_dtype: Literal["bf16", "fp32"] = "bf16"
    """Bf16 with fp32 main weights and gradients, or fp32 (matrix products in TF32)."""
    fp8: bool = False
    """Matrix products in FP8, with Transformer Engine's layers."""
    transformer_impl: Literal["transformer_engine", "local"] | None = None
    """Whose layers, as in the run's configuration: what they keep for the backward pass differs. Default: Transformer
    Engine's with FP8 or context parallelism, which need them, else torch's ("local"), which keep more."""
    tensor_model_parallel_size: int | None = None
    """Only layouts with this size. Default: powers of two up to two nodes."""
    pipeline_model_parallel_size: int | None = None
    """Only layouts with this size. Default: all that divide the devices, up to the number of layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Only layouts with this many model chunks per stage; 1: no interleaving. Default: whichever is best."""
    context_parallel_size: int | None = None
    """Only layouts with this size. Default: powers of two that leave each device 8,192 tokens of a sample or more."""
    micro_batch_size: int | None = None
    """Only layouts with this size. Default: powers of two."""
    sequence_parallel: bool = True
    """Sequence parallelism wherever there is tensor parallelism."""
    recompute_granularity: Literal["none", "selective", "full"] | None = None
    """Only this recomputation. Default: whichever is best of none, the MLPs, and all layers."""
    recompute_modules: list[RecomputeModule] | None = None
    """With selective: what to compute again. Default: mlp."""
    overlap_grad_reduce: bool = True
    """As in the run's configuration."""
    overlap_param_gather: bool = True
    """As in the run's configuration."""
    grad_reduce_in_bf16: bool = False
    """As in the run's configuration."""
    tp_comm_overlap: bool = False
    """As in the run's configuration."""
    memory_gib: float | None = None
    """Memory of a device that can be allocated, GiB. Default: as known for the device type; so for all that follow."""
    bf16_tflops: float | None = None
    """Dense bf16 peak of a device, TFLOP/s."""
    fp8_tflops: float | None = None
    """Dense FP8 peak of a device, TFLOP/s."""
    memory_gb_per_s: float | None = None
    """Bandwidth of a device's memory, GB/s."""
    nvlink_gb_per_s: float | None = None
    """Bandwidth between devices of a node, GB/s per device and direction."""
    network_gb_per_s: float | None = None
    """Bandwidth between nodes, GB/s per device and direction (400 Gbit/s are 50)."""
    devices_per_node: int | None = None
    """Devices that NVLink joins."""
    matmul_efficiency: float | None = None
    """Share of the bf16 peak that matrix products reach."""
    fp8_efficiency: float | None = None
    """Share of the FP8 peak that matrix products reach."""
    measured: str | None = None
    """What tools/check_cluster.py has written (check_cluster.json): its device, memory, bandwidths and efficiencies take the
    place of those known for the device type. What is given here stays."""
    overhead_gib: float = 4.0
    """Memory of a device for the CUDA context, NCCL's buffers and workspaces, GiB."""
    fragmentation: float = 0.05
    """Allowance for what the allocator cannot use, as a share of activations."""
    top: int = 20
    """Layouts to show."""
    json: str | None = None
    """Write all layouts to this file, with memory and time by part."""
    write: str | None = None
    """Write a layout to this file (YAML): settings for `pretrain_cpt.py --config`, after the run's own."""
    row: int = 1
    """Which of the layouts shown `write` takes. Default: the first."""
    simulate: int | None = None
    """Build this rank of the real job under fake tensors, and compare it with the plan. The layout is that of
    tensor_model_parallel_size, pipeline_model_parallel_size and micro_batch_size (default 1 each)."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, devices=1, seq_length=1, global_batch_size=1, tokens=1, top=1, simulate=0)
            sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
            need.at_least(self, **dict.fromkeys(sizes, 1), micro_batch_size=1, devices_per_node=1, context_parallel_size=1)
            need.at_least(self, row=1)
            with need.noted():
                require(self.row <= 1 or self.write is not None, "write", self.write, f"a file for row {self.row}")
            for name in ("run", "simulate"):
                with need.noted():
                    alone = self.write is None or getattr(self, name) is None
                    require(alone, name, getattr(self, name), "none with write")
            need.at_least(self, overhead_gib=0, fragmentation=0)
            for name in ("run", "measured", "json", "write"):
                need.field(self, name, bool, "the name of a file")
            for name in (
                "memory_gib",
                "bf16_tflops",
                "fp8_tflops",
                "memory_gb_per_s",
                "nvlink_gb_per_s",
                "network_gb_per_s",
            ):
                need.field(self, name, lambda value: value > 0, "a number above 0")
            for name in ("matmul_efficiency", "fp8_efficiency"):
                need.field(self, name, lambda share: 0 < share <= 1, "a number above 0, up to 1")
            with need.noted():
                fits = self.recompute_modules is None or self.recompute_granularity == "selective"
                wanted = "selective with recompute_modules"
                require(fits, "recompute_granularity", self.recompute_granularity, wanted)
            with need.noted():
                require(not self.fp8 or self.params_dtype == "bf16", "params_dtype", self.params_dtype, "bf16 with fp8")
            with need.noted():
                sums = self.grad_reduce_in_bf16 and self.params_dtype != "bf16"
                require(not sums, "params_dtype", self.params_dtype, "bf16 with grad_reduce_in_bf16")

"""What is computed (`TrainingJob`), how it is spread over devices (`Layout`), and what each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.model.layout import check_layout, check_microbatches, layers_of_stages
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.utils.errors import InputError


@dataclass(frozen=True)
class TrainingJob:
    """What is computed, whatever the layout.

    Attributes:
        transformer_impl: whose layers. None: Transformer Engine's where no others can (FP8, context parallelism), else
            torch's
    """

    llama: LlamaConfig
    seq_length: int
    global_batch_size: int
    params_dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: bool = False
    transformer_impl: Literal["transformer_engine", "local"] | None = None

    @property
    def element_bytes(self) -> int:
        """Of a parameter and of an activation."""
        return 2 if self.params_dtype == "bf16" else 4

    def has_transformer_engine(self, layout: Layout) -> bool:
        """Whether the layers are Transformer Engine's."""
        if self.transformer_impl is not None:
            return self.transformer_impl == "transformer_engine"
        return self.fp8 or layout.context > 1

    def gradient_bytes(self, layout: Layout) -> int:
        """Of a gradient in its buffer: fp32, whatever the parameters are, unless the run asks for bf16."""
        return 2 if layout.parallel.grad_reduce_in_bf16 and self.params_dtype == "bf16" else 4


@dataclass(frozen=True)
class Layout:
    """How a job is spread over devices; parallelism that is not named in `parallel` is data parallelism.

    `fully_sharded` is no layout of ours: parameters and gradients are sharded over data-parallel ranks too, and gathered for
    each micro-batch, as in FSDP and ZeRO-3 (Rajbhandari et al., 2020). It is there to compare with others' runs.
    """

    parallel: ParallelConfig
    data_parallel_size: int
    micro_batch_size: int
    num_microbatches: int
    fully_sharded: bool = False

    @property
    def tensor(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        return self.parallel.pipeline_model_parallel_size

    @property
    def context(self) -> int:
        """Devices that share each sample's sequence."""
        return self.parallel.context_parallel_size

    @property
    def shards(self) -> int:
        """Devices with the same parameters, over which gradients are reduced and optimizer states sharded."""
        return self.data_parallel_size * self.context

    @property
    def virtual(self) -> int:
        """Model chunks in each pipeline stage."""
        return self.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.shards


@dataclass(frozen=True)
class ModelChunk:
    """Consecutive layers that one rank computes at once; a stage has several under the interleaved schedule."""

    layers: int
    has_embedding: bool
    has_output: bool


def chunks_of_stage(llama: LlamaConfig, layout: Layout, stage: int) -> list[ModelChunk]:
    """The model chunks of a pipeline stage, in the order of the forward pass."""
    layers = layers_of_stages(llama.num_hidden_layers, layout.parallel)[stage]
    last = layout.virtual - 1
    return [
        ModelChunk(layers // layout.virtual, stage == 0 and chunk == 0, stage == layout.pipeline - 1 and chunk == last)
        for chunk in range(layout.virtual)
    ]


def layers_of_uneven_first_stage(num_layers: int, pipeline: int) -> int | None:
    """Layers of a first stage that is shorter than the others, where equal shares do not come out even; None: not needed."""
    if num_layers % pipeline == 0:
        return None
    rest = num_layers - (pipeline - 1) * -(-num_layers // pipeline)
    return rest if rest > 0 else None


def check_transformer_engine(job: TrainingJob, layout: Layout) -> None:
    """Raise InputError for what only Transformer Engine's layers can do with others, and for what these cannot."""
    for name, value, needed in (("fp8", job.fp8, job.fp8), ("context_parallel_size", layout.context, layout.context > 1)):
        if needed and not job.has_transformer_engine(layout):
            raise InputError(f"{name} is {value}; expected transformer_engine as transformer_impl, which is local")
    if layout.context > 1 and job.params_dtype == "fp32":
        raise InputError(
            f"context_parallel_size is {layout.context} with fp32; expected bf16, for Transformer Engine's attention"
        )
    if job.has_transformer_engine(layout) and "layernorm" in (layout.parallel.recompute_modules or []):
        raise InputError(
            "recompute_modules has layernorm, a part of Transformer Engine's linear layers; expected core_attn or mlp"
        )


def check_job(job: TrainingJob, layout: Layout) -> None:
    """Raise InputError, with the numbers, if the job cannot be spread this way at all (memory is another question)."""
    check_layout(job.llama, layout.parallel, job.seq_length)
    check_transformer_engine(job, layout)
    samples = layout.data_parallel_size * layout.micro_batch_size
    if job.global_batch_size % samples:
        raise InputError(
            f"global_batch_size {job.global_batch_size} is not divisible by data-parallel size "
            f"{layout.data_parallel_size} x micro_batch_size {layout.micro_batch_size}"
        )
    check_microbatches(layout.parallel, layout.num_microbatches)

"""How a model and a batch are spread over processes, and what is computed twice to save memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_cpt.config.require import Requirements
from megatron_cpt.utils.errors import FieldError, InputError

RecomputeModule = Literal["core_attn", "mlp", "layernorm"]
# Which settings need which others
UNEVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
RECOMPUTED = {"recompute_method": "full", "recompute_num_layers": "full", "recompute_modules": "selective"}
OVERLAPS = {"tp_comm_overlap": "sequence_parallel", "overlap_param_gather": "overlap_grad_reduce"}


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes; data parallelism takes what remains."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Processes that share the stack of layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks in each pipeline stage (interleaved schedule): a smaller pipeline bubble for more communication."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, when not an equal share."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, when not an equal share: it also has the output layer, which costs as much as several
    layers when the vocabulary is large."""
    pipeline_model_parallel_layout: str | None = None
    """What each stage holds, in megatron-core's notation: Et*3|t*4|t*4|t*3L (E embedding, t layer, L loss)."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel processes."""
    context_parallel_size: int = 1
    """Processes that share each sample's sequence; needs a GPU and Transformer Engine."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel processes while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass begins; needs overlap_grad_reduce."""
    grad_reduce_in_bf16: bool = False
    """With bf16 parameters: sum gradients over micro-batches and processes in bf16 instead of fp32. Half of their memory
    and traffic, less exact."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with matrix products; needs a GPU, Transformer Engine and sequence_parallel."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass computes again instead of keeping: whole layers, or the parts named in recompute_modules."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: groups of recompute_num_layers layers each ("uniform"), or only the first recompute_num_layers layers of a
    stage ("block"). Default: uniform."""
    recompute_num_layers: int | None = None
    """With full: see recompute_method. Default: 1."""
    recompute_modules: list[RecomputeModule] | None = None
    """With selective: what to compute again. Default: core_attn."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(
                self,
                tensor_model_parallel_size=1,
                pipeline_model_parallel_size=1,
                virtual_pipeline_model_parallel_size=2,
                context_parallel_size=1,
                recompute_num_layers=1,
                num_layers_in_first_pipeline_stage=1,
                num_layers_in_last_pipeline_stage=1,
            )
            for name in (*UNEVEN, "virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"):
                with need.noted():
                    self._check_pipelined(name)
            for name, granularity in RECOMPUTED.items():
                with need.noted():
                    self._check_recomputed(name, granularity)
            for name, needed in OVERLAPS.items():
                with need.noted():
                    self._check_overlap(name, needed)
            for check in (self._check_uneven, self._check_sequence):
                with need.noted():
                    check()

    def _check_sequence(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise InputError("sequence_parallel is true with tensor_model_parallel_size 1; it needs 2 or more")

    def _check_overlap(self, name: str, needed: str) -> None:
        if getattr(self, name) and not getattr(self, needed):
            raise InputError(f"parallel.{name} is true without {needed}, which it needs")

    def _check_pipelined(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and self.pipeline_model_parallel_size == 1:
            found = f"parallel.{name} is {value} with pipeline_model_parallel_size 1"
            raise FieldError(name, f"{found}; it needs 2 or more")

    def _check_uneven(self) -> None:
        if self.pipeline_model_parallel_layout is not None:
            for name in UNEVEN:
                if getattr(self, name) is not None:
                    raise InputError(
                        f"parallel.{name} and parallel.pipeline_model_parallel_layout are both given; expected one"
                    )

    def _check_recomputed(self, name: str, granularity: str) -> None:
        value, found = getattr(self, name), self.recompute_granularity
        if value is not None and found != granularity:
            raise InputError(f"parallel.{name} is {value} with recompute_granularity {found}; it needs {granularity}")

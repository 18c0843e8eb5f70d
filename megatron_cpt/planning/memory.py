"""Memory of the fullest rank, by part."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.planning.activations import stage_bytes, working_bytes
from megatron_cpt.planning.layouts import Layout, TrainingJob
from megatron_cpt.planning.weights import fp8_bytes, gathered_bytes, state_bytes

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline stage at the fullest moment; they add up to `total`.

    Attributes:
        weights, gradients, optimizer: see StateBytes
        fp8_weights: FP8 copies of the weights (fp8_bytes)
        activations: of all micro-batches in flight, by part
        working: what is held for a moment
        overhead: CUDA context, NCCL, workspaces; and fragmentation
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    fp8_weights: int
    activations: dict[str, int]
    working: int
    overhead: int

    @property
    def total(self) -> int:
        state = self.weights + self.gradients + self.optimizer + self.fp8_weights
        return state + sum(self.activations.values()) + self.working + self.overhead


def memory_of_stage(job: TrainingJob, layout: Layout, stage: int, overhead_gib: float, fragmentation: float) -> Memory:
    """See Memory; `fragmentation` is a share of activations and working memory."""
    state = state_bytes(job, layout, stage)
    activations = stage_bytes(job, layout, stage)
    working = working_bytes(job, layout, stage) + (gathered_bytes(job, layout) if layout.fully_sharded else 0)
    moving = sum(activations.values()) + working
    return Memory(
        stage=stage,
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        fp8_weights=fp8_bytes(job, layout, stage),
        activations=activations,
        working=working,
        overhead=int(overhead_gib * GIB + fragmentation * moving),
    )


def fullest(job: TrainingJob, layout: Layout, overhead_gib: float, fragmentation: float) -> Memory:
    """The stage that needs most: the first (most micro-batches in flight), the one after an uneven first, or the last."""
    stages = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
    return max((memory_of_stage(job, layout, s, overhead_gib, fragmentation) for s in sorted(stages)), key=lambda m: m.total)

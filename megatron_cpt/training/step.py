"""One optimizer step, and the forward pass it shares with validation, on megatron-core's schedules."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_cpt.config.run import OptimizerConfig
from megatron_cpt.mixture.loader import Batch
from megatron_cpt.platforms.process_groups import RankInfo
from megatron_cpt.training.rerun import Reruns
from megatron_cpt.training.stopping import StopRequestedError, StopRequests

# Per-token losses [b, s], targets [b, s], loss mask [b, s] -> (summed loss to differentiate, sums to report)
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# None in a batch's place: the run is asked to stop and the batch was not waited for.
Batches = Iterator[Batch | None]


@dataclass(frozen=True)
class StepShape:
    """What one call of the pipeline schedule gets.

    `packed`: the batches have cu_seqlens; each micro-batch goes through the layers as one sequence of micro_batch_size *
    seq_length tokens, whose documents attention and positions tell apart.
    """

    num_microbatches: int
    micro_batch_size: int
    seq_length: int
    packed: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step has to say; the same on every rank.

    Attributes:
        loss: mean over the global batch's targets that count
        grad_norm: before clipping; NaN when the loss already was not finite
        skip_reason: why the weights were not changed, None if they were
        stop, save: whether any rank was asked to stop after this step, or to save after it and go on
    """

    loss: float
    grad_norm: float
    skip_reason: str | None
    stop: bool = False
    save: bool = False


def summed_loss(losses: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss summed over the targets that count, and for the log (in double precision) that sum and their number."""
    losses = losses.float() * mask
    return losses.sum(), torch.stack([losses.detach().double().sum(), mask.double().sum()])


def packed_seq_params(cu_seqlens: np.ndarray, device: torch.device) -> PackedSeqParams:
    """What megatron-core's attention and rotary embedding need to know of documents laid end to end.

    `max_seqlen` is the longest document's length, not an upper bound: where it is that of the whole pack, megatron-core
    takes positions from the beginning of the pack instead of restarting them.
    """
    longest = int(np.diff(cu_seqlens).max())
    on_device = torch.from_numpy(cu_seqlens).to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=on_device, cu_seqlens_kv=on_device, max_seqlen_q=longest, max_seqlen_kv=longest
    )


@dataclass
class Microbatches:
    """Computes micro-batches for megatron-core's schedules, as its `forward_step_func`.

    Once the run is asked to stop, the micro-batches that are left pass through the pipeline uncomputed, so that no rank
    waits for another: within a micro-batch the schedule is over. What it returns is then worthless (`skipped`).
    """

    shape: StepShape
    ranks: RankInfo
    loss_function: LossFunction
    stopping: Callable[[], bool]
    forward_only: bool
    skipped: bool = False
    calls: Counter[int] = field(default_factory=Counter)

    def __call__(self, iterator: Batches | None, module: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Forward pass of one micro-batch through one model chunk: its output, and what makes a loss of it."""
        batch = Batch(None, None, None) if iterator is None else next(iterator)
        self.calls[id(module)] += 1
        if self.ranks.model_parallel_any(batch is None or self.stopping()):
            self.skipped = True
            if not self._has_to_be_computed(module):
                return self._dummy_forward(module.module)
            batch = Batch(None, None, None) if iterator is None else self._any_batch()
        assert batch is not None
        return self._compute(batch, module)

    def _has_to_be_computed(self, module: DistributedDataParallel) -> bool:
        """The backward pass of a chunk's last micro-batch begins the reduction of its gradients, where the two overlap."""
        last = self.calls[id(module)] == self.shape.num_microbatches
        return last and module.ddp_config.overlap_grad_reduce and not self.forward_only

    def _any_batch(self) -> Batch:
        size, length = self.shape.micro_batch_size, self.shape.seq_length
        packing = np.array([0, size * length], np.int32) if self.shape.packed else None
        return Batch(np.zeros((size, length + 1), np.int64), np.ones((size, length), np.float32), packing)

    def _dummy_forward(self, chunk: GPTModel) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Something of the right shape that can be differentiated."""
        if chunk.pre_process:
            config, shape = chunk.config, self.shape
            length, size = shape.seq_length, shape.micro_batch_size
            if shape.packed:
                length, size = size * length, 1
            length //= self.ranks.context_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
            output = torch.zeros(
                length, size, config.hidden_size, dtype=config.params_dtype, device=self.ranks.device, requires_grad=True
            )
        else:
            output = chunk.decoder.input_tensor * 1
        if chunk.post_process:
            output = output.sum()
        return output, lambda output: (output, torch.zeros((), dtype=torch.int, device=self.ranks.device), {})

    def _compute(self, batch: Batch, module: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        chunk, device = module.module, self.ranks.device
        if self.shape.packed != (batch.cu_seqlens is not None):
            without = "without" if self.shape.packed else "with"
            raise ValueError(f"packed is {self.shape.packed} but a batch came {without} cu_seqlens")
        packing = None if batch.cu_seqlens is None else packed_seq_params(batch.cu_seqlens, device)
        if not (chunk.pre_process or chunk.post_process):  # in the middle: activations come from the chunk before
            return module(None, None, None, packed_seq_params=packing), lambda output: (output, {})
        assert batch.tokens is not None
        assert batch.loss_mask is not None
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        mask = torch.from_numpy(batch.loss_mask).to(device, non_blocking=True)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.ranks.context_size > 1:
            inputs, targets, mask = of_this_context_rank({"i": inputs, "t": targets, "m": mask}).values()
        labels = targets if chunk.post_process else None
        if self.shape.packed:
            inputs, labels = inputs.view(1, -1), None if labels is None else labels.view(1, -1)
        # Rotary positions follow from the length of the sequence or from the packing: no position_ids.
        output = module(inputs, None, None, labels=labels, packed_seq_params=packing)

        def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            value, report = self.loss_function(losses.view_as(targets), targets, mask)
            return value, mask.sum().int(), {"report": report}

        return output, loss


def of_this_context_rank(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of each sequence that this context-parallel rank computes."""
    # Asked for since megatron-core 0.18
    new = {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
    part: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(batch, **new)
    return part


def never() -> bool:
    """Nobody asks to stop."""
    return False


def run_schedule(
    chunks: Sequence[DistributedDataParallel],
    batches: Batches,
    shape: StepShape,
    ranks: RankInfo,
    loss_function: LossFunction,
    forward_only: bool = False,
    stopping: Callable[[], bool] = never,
) -> tuple[torch.Tensor | None, bool]:
    """Run the micro-batches through the pipeline.

    The gradient is that of the summed loss divided by the number of targets that count in the whole global batch.

    Args:
        chunks: this rank's model chunks
        batches: read by the first and the last stage, for tokens, and when packed by all, for cu_seqlens
        stopping: whether the run is asked to stop; looked at before each micro-batch

    Returns:
        The summed reports of `loss_function` on the last stage, else None; and whether this rank has left out
        micro-batches, so that nothing that was computed may be used.
    """
    compute = Microbatches(shape, ranks, loss_function, stopping, forward_only)
    reports = get_forward_backward_func()(
        forward_step_func=compute,
        data_iterator=iterators(chunks, batches, shape),
        model=list(chunks),
        num_microbatches=shape.num_microbatches,
        seq_length=shape.micro_batch_size * shape.seq_length if shape.packed else shape.seq_length,
        micro_batch_size=1 if shape.packed else shape.micro_batch_size,
        forward_only=forward_only,
    )
    if compute.skipped or not ranks.is_last_stage:
        return None, compute.skipped
    return torch.stack([report["report"] for report in reports]).sum(dim=0), False


def iterators(
    chunks: Sequence[DistributedDataParallel], batches: Batches, shape: StepShape
) -> list[Batches | None] | Batches | None:
    """What each chunk reads its batches from: None where it needs none; a list where there are several chunks."""
    reads = [shape.packed or chunk.module.pre_process or chunk.module.post_process for chunk in chunks]
    if len(chunks) == 1:
        return batches if reads[0] else None
    if sum(reads) == 1:
        return [batches if needed else None for needed in reads]
    copies = iter(itertools.tee(itertools.islice(batches, shape.num_microbatches), sum(reads)))
    return [next(copies) if needed else None for needed in reads]


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Batches,
    shape: StepShape,
    lr: float,
    settings: OptimizerConfig,
    ranks: RankInfo,
    requests: StopRequests | None = None,
    reruns: Reruns | None = None,
    is_spike: Callable[[float, float], str | None] = lambda loss, grad_norm: None,
) -> StepResult:
    """Forward, backward, clip and update; the result is the same on every rank.

    The weights stay as they were if the loss or the gradient is not finite, if no target of the global batch counts, or if
    `is_spike(loss, grad_norm)` gives a reason to. With `reruns`, `batches` are its.

    Raises:
        StopRequestedError: the run was asked to stop on the way; nothing has changed
    """
    apply_settings(optimizer, lr, settings)
    requests = requests or StopRequests()
    for _ in reruns.attempts() if reruns is not None else range(1):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        report, skipped = run_schedule(chunks, batches, shape, ranks, summed_loss, stopping=requests.stopping)
        if reruns is not None and report is not None:
            reruns.check(report[0])
    if report is None:
        report = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    (loss_sum, targets), flags = ranks.reduce_from_last_pipeline_stage(report, skipped, requests.stopping(), requests.save)
    any_skipped, stop, save = flags
    if any_skipped:
        raise StopRequestedError
    loss = loss_sum / targets if targets else math.nan
    if not math.isfinite(loss):
        reason = f"the loss is {loss}" if targets else "no target of the global batch counts"
        return StepResult(loss, math.nan, reason, stop, save)
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    skip_reason = is_spike(loss, grad_norm) if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"
    if skip_reason is None:
        apply_gradients(optimizer, grad_norm, settings.clip_grad)
    return StepResult(loss, grad_norm, skip_reason, stop, save)


def apply_gradients(optimizer: MegatronOptimizer, grad_norm: float, clip_grad: float) -> None:
    """What `MegatronOptimizer.step` does after it has the gradient norm, which we look at first."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        parameters = part.get_parameters()
        if clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def apply_settings(optimizer: MegatronOptimizer, lr: float, settings: OptimizerConfig) -> None:
    """Give the configuration's values to every parameter group.

    Before each step, because a loaded checkpoint brings its own, and because megatron-core leaves it to its scheduler to
    free norms and biases of weight decay (their `wd_mult` is 0).
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (settings.adam_beta1, settings.adam_beta2)
        group["eps"] = settings.adam_eps

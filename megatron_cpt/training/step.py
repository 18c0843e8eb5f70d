"""One optimizer step, and the forward pass it shares with validation, on megatron-core's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cpt.config.run import OptimizerConfig
from megatron_cpt.data.loader import Batch
from megatron_cpt.platforms.process_groups import Ranks

# Per-token losses [b, s], targets [b, s], loss mask [b, s] -> (summed loss to differentiate, sums to report)
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What a step has to say: mean loss over the global batch's targets that count, gradient norm before clipping."""

    loss: float
    grad_norm: float


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


def run_schedule(
    model: DistributedDataParallel,
    batches: Iterator[Batch],
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    ranks: Ranks,
    loss_function: LossFunction,
    forward_only: bool = False,
    packed: bool = False,
) -> torch.Tensor | None:
    """Run the micro-batches through the pipeline; the summed reports of `loss_function` on the last stage, else None.

    The gradient is that of the summed loss divided by the number of targets that count in the whole global batch.

    Args:
        batches: read by the first and the last stage, for tokens, and when `packed` by all, for cu_seqlens
        packed: the batches have cu_seqlens: each micro-batch goes through the layers as one sequence of
            micro_batch_size * seq_length tokens, whose documents attention and positions tell apart
    """

    def forward_step(iterator: Iterator[Batch] | None, module: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = Batch(None, None, None) if iterator is None else next(iterator)
        if packed != (batch.cu_seqlens is not None):
            raise ValueError(f"packed is {packed} but a batch came {'without' if packed else 'with'} cu_seqlens")
        packing = None if batch.cu_seqlens is None else packed_seq_params(batch.cu_seqlens, ranks.device)
        if batch.tokens is None or batch.loss_mask is None:  # a middle stage: activations come from the stage before
            return module(None, None, None, packed_seq_params=packing), lambda output: (output, {})
        tokens = torch.from_numpy(batch.tokens).to(ranks.device, non_blocking=True)
        mask = torch.from_numpy(batch.loss_mask).to(ranks.device, non_blocking=True)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        labels = targets if ranks.is_last_stage else None
        if packed:
            inputs, labels = inputs.view(1, -1), None if labels is None else labels.view(1, -1)
        # Rotary positions follow from the length of the sequence or from the packing: no position_ids.
        output = module(inputs, None, None, labels=labels, packed_seq_params=packing)

        def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            value, report = loss_function(losses.view_as(targets), targets, mask)
            return value, mask.sum().int(), {"report": report}

        return output, loss

    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if packed or ranks.reads_tokens else None,
        model=[model],
        num_microbatches=num_microbatches,
        seq_length=micro_batch_size * seq_length if packed else seq_length,
        micro_batch_size=1 if packed else micro_batch_size,
        forward_only=forward_only,
    )
    if not ranks.is_last_stage:
        return None
    return torch.stack([report["report"] for report in reports]).sum(dim=0)


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    batches: Iterator[Batch],
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    lr: float,
    settings: OptimizerConfig,
    ranks: Ranks,
    packed: bool = False,
) -> StepResult:
    """Forward, backward, clip and update; the result is the same on every rank.

    Raises:
        FloatingPointError: the loss or the gradient is not finite, or no target of the global batch counts (the
            parameters are then left as they were)
    """
    apply_settings(optimizer, lr, settings)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    report = run_schedule(model, batches, num_microbatches, micro_batch_size, seq_length, ranks, summed_loss, packed=packed)
    if report is None:
        report = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    loss_sum, targets = ranks.sum_from_last_stage(report).tolist()
    if not targets:
        raise FloatingPointError("no target of the global batch counts in the loss")
    loss = loss_sum / targets
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    # megatron-core clips and updates in one go, so the norm is asked for before.
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm}")
    optimizer.step()
    return StepResult(loss, grad_norm)


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

"""One optimizer step, and the forward pass it shares with validation, on megatron-core's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cpt.config.run import OptimizerConfig
from megatron_cpt.data.loader import Batch
from megatron_cpt.platforms.process_groups import Ranks

# Per-token losses [b, s], targets [b, s], sample mask [b] -> (loss to differentiate, sums to report)
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What a step has to say: mean loss per token over the global batch, and the gradient norm before clipping."""

    loss: float
    grad_norm: float


def mean_loss(losses: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the tokens of a micro-batch, and its sum over tokens (in double precision, for the log)."""
    losses = losses.float()
    return losses.mean(), losses.detach().double().sum().reshape(1)


def run_schedule(
    model: DistributedDataParallel,
    batches: Iterator[Batch],
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    ranks: Ranks,
    loss_function: LossFunction,
    forward_only: bool = False,
) -> torch.Tensor | None:
    """Run the micro-batches through the pipeline; the summed reports of `loss_function` on the last stage, else None.

    Only the first and the last stage read `batches`.
    """

    def forward_step(iterator: Iterator[Batch] | None, module: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        if iterator is None:  # a middle stage: activations come from the stage before
            return module(None, None, None), lambda output: (output, {})
        batch = next(iterator)
        tokens = torch.from_numpy(batch.tokens).to(ranks.device, non_blocking=True)
        mask = torch.from_numpy(batch.mask).to(ranks.device, non_blocking=True)
        targets = tokens[:, 1:].contiguous()
        position_ids = torch.arange(seq_length, device=ranks.device).expand(len(tokens), -1)
        output = module(tokens[:, :-1].contiguous(), position_ids, None, labels=targets if ranks.is_last_stage else None)

        def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value, report = loss_function(losses, targets, mask)
            return value, {"report": report}

        return output, loss

    reads_data = ranks.is_first_stage or ranks.is_last_stage
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if reads_data else None,
        model=[model],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
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
) -> StepResult:
    """Forward, backward, clip and update; the result is the same on every rank.

    Raises:
        FloatingPointError: the loss or the gradient is not finite (the parameters are then left as they were)
    """
    apply_settings(optimizer, lr, settings)
    model.zero_grad_buffer()
    optimizer.zero_grad()
    report = run_schedule(model, batches, num_microbatches, micro_batch_size, seq_length, ranks, mean_loss)
    if report is None:
        report = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    tokens = num_microbatches * micro_batch_size * seq_length * ranks.data_size
    loss = ranks.sum_from_last_stage(report).item() / tokens
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

"""Steps that go wrong: which step is a spike, how often one may be, and whether replicas still agree."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import check_param_hashes_across_dp_replicas

from megatron_cpt.checkpoint.save_load import Progress
from megatron_cpt.config.run import LossSpikesConfig
from megatron_cpt.platforms.process_groups import RankInfo
from megatron_cpt.utils.errors import RunError


@dataclass(frozen=True)
class SpikeHistory:
    """What decides whether the next step is a spike; a part of every checkpoint, so that a resume decides alike.

    Attributes:
        losses: of the last accepted steps, oldest first, at most spike_window of them
        skipped: steps in a row that did not change the weights, up to now
        before: where the run was before the first of them
    """

    losses: tuple[float, ...] = ()
    skipped: int = 0
    before: Progress | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(saved: dict[str, Any]) -> SpikeHistory:
        """What `to_json` made."""
        before = saved["before"]
        return SpikeHistory(tuple(saved["losses"]), saved["skipped"], before and Progress(**before))

    def accepted(self, loss: float, config: LossSpikesConfig) -> SpikeHistory:
        """After a step that changed the weights."""
        kept = (*self.losses, loss)[-config.spike_window :] if config.spike_sigmas is not None else ()
        return SpikeHistory(kept)

    def with_skipped_step(self, progress: Progress) -> SpikeHistory:
        """After a step that did not; `progress` as before it."""
        return dataclasses.replace(self, skipped=self.skipped + 1, before=self.before or progress)


def is_spike(history: SpikeHistory, config: LossSpikesConfig, loss: float, grad_norm: float) -> str | None:
    """Why a step with this loss and gradient norm is a spike; None if it is not."""
    if config.spike_grad_norm is not None and grad_norm > config.spike_grad_norm:
        return f"the gradient norm {grad_norm:.4g} is above loss_spikes.spike_grad_norm {config.spike_grad_norm:g}"
    if config.spike_sigmas is None or len(history.losses) < config.spike_window:
        return None
    mean, deviation = statistics.fmean(history.losses), statistics.stdev(history.losses)
    if loss > mean + config.spike_sigmas * deviation:
        return (
            f"the loss {loss:.4g} is more than {config.spike_sigmas:g} standard deviations ({deviation:.3g}) above the mean "
            f"{mean:.4g} of the last {len(history.losses)} steps"
        )
    return None


def check_replicas(chunks: Sequence[DistributedDataParallel], iteration: int, ranks: RankInfo) -> None:
    """Compare the weights of all data-parallel replicas, by hash; all ranks hear of a difference anywhere.

    Raises:
        RunError: they differ: some device or link computes wrongly
    """
    same = check_param_hashes_across_dp_replicas([chunk.module for chunk in chunks], cross_check=True)
    if ranks.any(not same):
        raise RunError(
            f"after step {iteration} data-parallel replicas hold different weights "
            "(loss_spikes.check_weight_hash_across_dp_replicas_interval): a device or a link computes wrongly; "
            "megatron-core's warnings above name the parameters"
        )

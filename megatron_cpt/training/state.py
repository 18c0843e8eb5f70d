"""What the parts of a run pass to each other: what stays (RunContext) and what changes (TrainState)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.checkpoint.save_load import Progress
from megatron_cpt.checkpoint.saver import Saver
from megatron_cpt.config.run import RunConfig
from megatron_cpt.platforms.process_groups import RankInfo
from megatron_cpt.training.baseline import Baseline
from megatron_cpt.training.log import RunLog
from megatron_cpt.training.loss_spikes import SpikeHistory
from megatron_cpt.training.stopping import StopController
from megatron_cpt.training.validate_config import CheckedRun


@dataclass(frozen=True)
class RunContext:
    """What every part of the run needs: passed by argument, never global.

    Attributes:
        hf_files: configuration and tokenizer of the HF model, for every checkpoint (on the first rank): in memory, as the
            checkpoint that the run resumed from goes the way of all old ones, and nobody promised to keep checkpoint.load
    """

    run: CheckedRun
    ranks: RankInfo
    log: RunLog
    stop_controller: StopController
    saver: Saver
    hf_files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        """As the user gave it."""
        return self.run.config


@dataclass
class TrainState:
    """What a checkpoint restores.

    Attributes:
        chunks: model chunks of this rank
        baselines: what the figures of validation sets are compared with
        evaluated: whether the evaluation that was due at this step was done
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    progress: Progress = field(default_factory=Progress)
    history: SpikeHistory = field(default_factory=SpikeHistory)
    baselines: list[Baseline] = field(default_factory=list)
    evaluated: bool = False

"""Everything that can be known to be wrong before a process group starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.checkpoint.layout import newest_complete
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import RunConfig
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.mixture.ledger import unreached
from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.model.build import LayerType, TransformerConfig, make_transformer_config, numerics_of
from megatron_cpt.model.dtypes import dtype_of
from megatron_cpt.model.layout import check_batch, check_layout, check_recomputed_chunk
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.platforms import current_platform
from megatron_cpt.training.baseline import Baseline, from_json
from megatron_cpt.training.loss_spikes import SpikeHistory
from megatron_cpt.training.run_files import (
    RunData,
    check_began_with,
    check_can_resume,
    check_is_own,
    check_profile,
    check_run_data,
    check_save_folder,
    check_schedule,
    check_together,
    find_start,
    is_run_complete,
    length_of,
    read_model,
    read_token_bytes,
)
from megatron_cpt.training.schedule import LearningRate, RunLength
from megatron_cpt.training.trackers import check_logging
from megatron_cpt.utils.errors import InputError, Refusals


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says beside weights and optimizer.

    Attributes:
        manifest: as a whole
        history: see `SpikeHistory`
        baselines: what the figures of validation sets are compared with
        evaluated: whether the evaluation that was due at its step was done
    """

    manifest: dict[str, Any]
    history: SpikeHistory
    baselines: list[Baseline]
    evaluated: bool


@dataclass(frozen=True)
class CheckedRun:
    """A configuration whose files exist and fit each other.

    Attributes:
        token_bytes: int64 [vocab_size of the model], UTF-8 bytes of text each id stands for (for bits per byte)
        start_from: checkpoint folder to load
        resumed: what it says, when the run goes on where that was; None: only its weights are taken
        complete: there is nothing left to do
        data: the order of the samples and where the run is in it
        length: where the run is and where it ends
        schedule: the learning rate
        notes: what the person who started it should know
    """

    config: RunConfig
    llama: LlamaConfig
    mixture: Mixture
    data: RunData
    length: RunLength
    schedule: LearningRate
    data_parallel_size: int
    token_bytes: np.ndarray
    start_from: str
    resumed: Resumed | None
    complete: bool
    notes: tuple[str, ...] = ()

    @property
    def hf_folder(self) -> str:
        """HF configuration and tokenizer that travel with the weights."""
        return os.path.join(self.start_from, "hf")


def check_run(config: RunConfig, world_size: int, damaged: Mapping[str, str] | None = None) -> CheckedRun:
    """Open everything the run names and compare it with the layout.

    `damaged`: checkpoints of the run that cannot be resumed from, and a sentence for each.

    Raises:
        InputError: naming the value found and the values that would do; InputErrors: several of them
    """
    refusals = Refusals()  # of checks that do not need each other
    with refusals.noted():
        check_save_folder(config.checkpoint.save)
        start_from, manifest = find_start(config, damaged)
        check_began_with(config, start_from, manifest)
        llama = read_model(start_from)
    with refusals.noted():
        mixture = load_mixture(config.mixture)
    with refusals.noted():
        data_parallel_size = check_batch(config, world_size)
    with refusals.noted():
        check_machine(config)
    with refusals.noted():
        check_together(config)
    refusals.raise_any()
    with refusals.noted():
        check_layout(llama, config.parallel, mixture.seq_length, f"{mixture.path}: ")
        check_engine(config, llama)
    with refusals.noted():
        token_bytes = read_token_bytes(start_from, mixture, llama.vocab_size)
    refusals.raise_any()
    length = length_of(config, mixture.seq_length, manifest)
    complete = is_run_complete(length, manifest)
    with refusals.noted():
        if not complete:
            check_can_resume(config, start_from, manifest)
    with refusals.noted():
        if not complete:
            check_profile(config, length.train_iters, world_size)
    with refusals.noted():
        schedule = check_schedule(config, mixture.seq_length, length, manifest)
    with refusals.noted():
        data = check_run_data(config, mixture, length, manifest)
    refusals.raise_any()
    if complete:
        check_is_own(config, start_from, length)
    late = unreached(mixture, data.schedule, data.run_samples)
    return CheckedRun(
        notes=(
            *(f"passed over: {folder}" for folder in newest_complete(config.checkpoint.save, True, damaged)[1]),
            *untold_tokenizers(mixture),
            *([late] if late else []),
        ),
        config=config,
        llama=llama,
        mixture=mixture,
        data=data,
        length=length,
        schedule=schedule,
        data_parallel_size=data_parallel_size,
        token_bytes=token_bytes,
        start_from=start_from,
        resumed=resumed_from(manifest) if manifest is not None else None,
        complete=complete,
    )


def resumed_from(manifest: dict[str, Any]) -> Resumed:
    """A manifest's parts."""
    state = manifest["training"]
    return Resumed(manifest, SpikeHistory.from_json(state["history"]), from_json(state["baseline"]), state["evaluated"])


def check_machine(config: RunConfig) -> None:
    """InputError unless what the configuration asks for is installed on this machine and can run on it."""
    check_logging(config.logging)
    refusal = current_platform().refuses(config.parallel, config.training)
    if refusal is not None:
        raise InputError(refusal)


def check_engine(config: RunConfig, llama: LlamaConfig) -> None:
    """Whether megatron-core can do what the configuration asks for.

    Raises:
        InputError: with megatron-core's words, where it is megatron-core that refuses
    """
    try:
        transformer_config = make_transformer_config(
            llama, config.parallel, dtype_of(config.training.params_dtype), numerics_of(config.training)
        )
    except (AssertionError, ValueError) as error:
        raise InputError(f"megatron-core refuses this configuration: {error}") from error
    if config.parallel.pipeline_model_parallel_layout is not None:
        check_pipeline_layout(config.parallel, transformer_config)


def check_pipeline_layout(parallel: ParallelConfig, transformer_config: TransformerConfig) -> None:
    """What only megatron-core's reading of pipeline_model_parallel_layout tells.

    Raises:
        InputError: it has more or fewer parts than the settings, or recomputation does not come out even in one
    """
    stages = transformer_config.pipeline_model_parallel_layout.layout  # of each stage, of each model chunk, the layers
    chunks = len(stages[0])
    if chunks != (parallel.virtual_pipeline_model_parallel_size or 1):
        raise InputError(
            f"parallel.pipeline_model_parallel_layout has {len(stages) * chunks} parts for pipeline_model_parallel_size "
            f"{len(stages)}; give virtual_pipeline_model_parallel_size {chunks}"
        )
    for stage in stages:
        for chunk in stage:
            check_recomputed_chunk(parallel, sum(layer == LayerType.decoder for layer in chunk))


def untold_tokenizers(mixture: Mixture) -> list[str]:
    """A note where manifests are of before the fingerprint of what a tokenizer does: only its tokens could be compared."""
    old = [f"{corpus.prefix}.json" for corpus in mixture.corpora if corpus.manifest.tokenizer.behaviour_sha256 is None]
    if not old:
        return []
    others = f" and {len(old) - 1} others" if len(old) > 1 else ""
    return [
        f"{old[0]}{others}: no tokenizer.behaviour_sha256 (made before there was one); its tokens are those of the model's "
        f"tokenizer, and whether they split text alike was not compared"
    ]

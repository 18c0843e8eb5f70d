"""Everything that can be known to be wrong before a process group starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.checkpoint.layout import find_checkpoint, is_of_a_run, newest_complete, read_checkpoint_manifest
from megatron_cpt.checkpoint.save_load import dtype_of
from megatron_cpt.config.parallel import ParallelConfig
from megatron_cpt.config.run import RunConfig
from megatron_cpt.data.ledger import Ledger, check_limits, make_ledger, unreached
from megatron_cpt.data.mixture import Mixture
from megatron_cpt.data.mixture_file import load_mixture
from megatron_cpt.data.stages import Schedule
from megatron_cpt.data.state import DataState, begin, resume
from megatron_cpt.errors import InputError, Refusals
from megatron_cpt.model.build import LayerType, TransformerConfig, arithmetic_of, transformer_config
from megatron_cpt.model.layout import check_batch, check_layout, check_recomputed_chunk
from megatron_cpt.model.llama import LlamaConfig
from megatron_cpt.platforms import current_platform
from megatron_cpt.training.baseline import Baseline, from_json
from megatron_cpt.training.run_files import (
    check_checkpoint_folder,
    check_folder,
    check_profile,
    check_together,
    read_model,
    read_token_bytes,
)
from megatron_cpt.training.schedule import LearningRate, RunLength, continue_schedule, make_schedule, run_length
from megatron_cpt.training.sinks import check_logging
from megatron_cpt.training.trouble import History


@dataclass(frozen=True)
class RunData:
    """The run's data: `run_samples` in all, also those that were read before this start."""

    schedule: Schedule
    state: DataState
    run_samples: int

    def ledger(self, mixture: Mixture) -> Ledger:
        """What is left to read, by this mixture: from where it (or this global batch size) began to the end of the run."""
        now = self.state.now
        return make_ledger(mixture, self.schedule, self.run_samples, now.start)


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says beside weights and optimizer.

    Attributes:
        manifest: as a whole
        history: see `History`
        baselines: what the figures of validation sets are compared with
        evaluated: whether the evaluation that was due at its step was done
    """

    manifest: dict[str, Any]
    history: History
    baselines: list[Baseline]
    evaluated: bool

    @property
    def has_all(self) -> bool:
        """Whether only steps can be missing, not the evaluation after the last, in which a run may have been stopped."""
        return self.evaluated or not self.manifest["optimizer"]


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
        start_from, resumed = find_start(config, damaged)
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
    manifest = resumed.manifest if resumed else {"iteration": 0, "consumed_samples": 0}
    length = run_length(config.training, mixture.seq_length, manifest["iteration"], manifest["consumed_samples"])
    complete = resumed is not None and length.iteration >= length.train_iters and resumed.has_all
    if resumed is not None and not complete:
        check_can_resume(config, start_from, resumed.manifest)
    with refusals.noted():
        if not complete:
            check_profile(config, length.train_iters, world_size)
    with refusals.noted():
        schedule = check_schedule(config, mixture.seq_length, length, resumed, complete)
    with refusals.noted():
        data = check_data(config, mixture, length, resumed, complete)
    refusals.raise_any()
    if complete and not is_own(config, start_from):
        raise InputError(
            f"checkpoint.load {start_from} is of step {length.iteration} and the run ends with step {length.train_iters}: "
            f"there is nothing left to do; make it longer"
        )
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
        resumed=resumed,
        complete=complete,
    )


def find_start(config: RunConfig, damaged: Mapping[str, str] | None = None) -> tuple[str, Resumed | None]:
    """The checkpoint to load, and what it says if the run goes on where that was; none of those that are `damaged`.

    Raises:
        InputError: there is none; the folder belongs to another run; or all of a checkpoint is wanted that has only weights
    """
    settings = config.checkpoint
    check_folder(settings.save)
    own, passed_over = newest_complete(settings.save, True, damaged)
    if own is None and passed_over:
        raise InputError(f"{passed_over[0]}; empty the folder to begin anew, or use another checkpoint.save")
    if own is not None and is_of_a_run(own):
        manifest = read_checkpoint_manifest(own)
        began_with = manifest["config"]["checkpoint"]["load"]
        if os.path.realpath(began_with) != os.path.realpath(settings.load):
            raise InputError(
                f"checkpoint.load is {settings.load} but the run in {settings.save} began with {began_with}; "
                f"use that, or another folder as checkpoint.save"
            )
        return own, resumed_from(manifest)
    check_checkpoint_folder(settings.load)
    folder = find_checkpoint(settings.load)
    if settings.load_state == "weights":
        return folder, None
    if not is_of_a_run(folder):
        raise InputError(
            f"checkpoint.load_state is all but {folder} holds converted weights, no checkpoint of a run; expected weights"
        )
    return folder, resumed_from(read_checkpoint_manifest(folder))


def is_own(config: RunConfig, start_from: str) -> bool:
    """Whether a checkpoint lies in the run's own folder: the run goes on, it is not a fork."""
    return os.path.dirname(os.path.realpath(start_from)) == os.path.realpath(config.checkpoint.save)


def resumed_from(manifest: dict[str, Any]) -> Resumed:
    """A manifest's parts."""
    state = manifest["training"]
    return Resumed(manifest, History.from_json(state["history"]), from_json(state["baseline"]), state["evaluated"])


def check_can_resume(config: RunConfig, checkpoint: str, manifest: dict[str, Any]) -> None:
    """InputError unless the checkpoint has an optimizer's state."""
    if not manifest["optimizer"]:
        raise InputError(
            f"{checkpoint} holds no optimizer state (checkpoint.save_optim was false), so the run cannot go on from it; "
            f"start another one from its weights: checkpoint.load {checkpoint}, and another folder as checkpoint.save than "
            f"{config.checkpoint.save}"
        )


def check_schedule(
    config: RunConfig, seq_length: int, length: RunLength, resumed: Resumed | None, complete: bool
) -> LearningRate:
    """The learning rate of what is left of the run.

    Raises:
        InputError: it does not fit into the run, or is not what the run's checkpoint was trained with
    """
    if resumed is None:
        return make_schedule(config, seq_length, length)
    saved = resumed.manifest["training"]["lr_schedule"]
    if complete:  # no step will use it: no need to compare
        return LearningRate(**saved)
    return continue_schedule(saved, config, seq_length, length)


def check_data(config: RunConfig, mixture: Mixture, length: RunLength, resumed: Resumed | None, complete: bool) -> RunData:
    """Where the run is in its data, and what it will read.

    Raises:
        InputError: it would read a corpus more often than allowed, or has read another mixture so far
    """
    batch, data = config.training.global_batch_size, config.data
    if data.order == "megatron":
        schedule = mixture.megatron_schedule(length.run_samples, max(data.num_workers, 1))
    else:
        schedule = mixture.schedule(length.run_samples)
    if resumed is None or complete:  # nothing was read, or nothing will be: no need to compare
        state = begin(mixture, schedule, batch)
    else:
        saved, longer = resumed.manifest["data"], config.training.extend_to is not None
        state = resume(saved, length.consumed_samples, mixture, schedule, batch, data.accept_new_mixture, longer)
    schedule = state.continued(mixture, schedule)
    if not complete:
        check_limits(mixture, schedule, length.run_samples)
    return RunData(schedule, state, length.run_samples)


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
        engine = transformer_config(
            llama, config.parallel, dtype_of(config.training.params_dtype), arithmetic_of(config.training)
        )
    except (AssertionError, ValueError) as error:
        raise InputError(f"megatron-core refuses this configuration: {error}") from error
    if config.parallel.pipeline_model_parallel_layout is not None:
        check_pipeline_layout(config.parallel, engine)


def check_pipeline_layout(parallel: ParallelConfig, engine: TransformerConfig) -> None:
    """What only megatron-core's reading of pipeline_model_parallel_layout tells.

    Raises:
        InputError: it has more or fewer parts than the settings, or recomputation does not come out even in one
    """
    stages = engine.pipeline_model_parallel_layout.layout  # of each stage, of each model chunk, the layers
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

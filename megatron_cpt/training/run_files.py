"""What can be known of a run's files before torch is imported: whether they are there, and fit each other and the layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.checkpoint.layout import find_checkpoint, is_of_a_run, newest_complete, read_checkpoint_manifest
from megatron_cpt.checkpoint.run_folder import PRETRAINING, check_own_folder
from megatron_cpt.config.cli import launched_world_size
from megatron_cpt.config.require import require
from megatron_cpt.config.run import CheckpointConfig, RunConfig
from megatron_cpt.mixture.file import load_mixture, read_seq_length
from megatron_cpt.mixture.ledger import Ledger, check_max_epochs, make_ledger
from megatron_cpt.mixture.mixture import Mixture
from megatron_cpt.mixture.stages import Schedule, describe_megatron
from megatron_cpt.mixture.state import DataState, compare_phases, initial_state, resume
from megatron_cpt.model.layout import check_batch, check_layout
from megatron_cpt.model.llama import LlamaConfig, read_llama_config
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.base import token_bytes_sha256
from megatron_cpt.tokenizer.behaviour import behaviour_sha256
from megatron_cpt.training import trackers
from megatron_cpt.training.schedule import LearningRate, RunLength, continue_schedule, make_schedule, run_length
from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.input_files import why_unwritable

Manifest = dict[str, Any]  # of a checkpoint of a run
# In the folder of a run, from run.json on; status.json comes before it where a run is stopped early
WRITTEN = ("metrics.jsonl", "report.md", "report.png", "ledger.json", "learning_rate.json")


@dataclass(frozen=True)
class RunData:
    """The run's data: `run_samples` in all, also those that were read before this start."""

    schedule: Schedule
    state: DataState
    run_samples: int

    def ledger(self, mixture: Mixture) -> Ledger:
        """What is left to read, by this mixture: from where it (or this global batch size) began to the end of the run."""
        current = self.state.current
        return make_ledger(mixture, self.schedule, self.run_samples, current.start)


def check_pretrain_files(config: RunConfig) -> None:
    """Check what a configuration names, whatever is wrong with it (see config/partial.py).

    Raises:
        InputError: naming the file; InputErrors: several are wrong
    """
    refusals, is_own = Refusals(), False
    with refusals.noted():
        check_save_folder(config.checkpoint.save)
        is_own = True
    with refusals.noted():
        check_batch(config, world_size_of(config))
    with refusals.noted():
        trackers.check_logging(config.logging)
    with refusals.noted():
        check_together(config)
    start: tuple[str, Manifest | None] | None = None
    with refusals.noted():
        start = find_start(config) if is_own else find_loaded(config.checkpoint)
    with refusals.noted():
        if start is not None:
            check_began_with(config, *start)
    llama: LlamaConfig | None = None
    with refusals.noted():
        llama = read_model(start[0]) if start is not None else None
    mixture: Mixture | None = None
    with refusals.noted():
        mixture = load_mixture(config.mixture)
    with refusals.noted():
        if llama is not None:
            check_layout(llama, config.parallel, read_seq_length(config.mixture), f"{config.mixture}: ")
    with refusals.noted():
        if llama is not None and mixture is not None and start is not None:
            read_token_bytes(start[0], mixture, llama.vocab_size)
    with refusals.noted():
        check_rest(config, mixture, start)
    refusals.raise_any()


def check_rest(config: RunConfig, mixture: Mixture | None, start: tuple[str, Manifest | None] | None) -> None:
    """Check what is left of a run: its schedule, and what it would read. `start`: see `find_start`; None: it is not known.

    Raises:
        InputError: one is wrong; InputErrors: several are
    """
    refusals, seq_length = Refusals(), read_seq_length(config.mixture)
    folder, manifest = start or ("", None)
    length = length_of(config, seq_length, manifest)
    if is_run_complete(length, manifest):
        check_is_own(config, folder, length)
        return
    with refusals.noted():
        check_can_resume(config, folder, manifest)
    with refusals.noted():
        check_profile(config, length.train_iters, world_size_of(config))
    with refusals.noted():
        check_schedule(config, seq_length, length, manifest)
    with refusals.noted():
        if mixture is not None and config.data.order == "megatron":
            check_megatron_order(config, mixture, length, manifest)
        elif mixture is not None:
            check_run_data(config, mixture, length, manifest)
    refusals.raise_any()


def check_megatron_order(config: RunConfig, mixture: Mixture, length: RunLength, manifest: Manifest | None) -> None:
    """As `check_run_data` in Megatron-LM's order, as far as it can be checked without building it, which takes long."""
    mixture.schedule_of_one_almr(length.run_samples)
    if manifest is not None:
        described, longer = describe_megatron(length.run_samples), config.training.extend_to is not None
        accepted = config.data.accept_new_mixture
        compare_phases(manifest["data"], length.consumed_samples, mixture, described, accepted, longer)


def length_of(config: RunConfig, seq_length: int, manifest: Manifest | None) -> RunLength:
    """Where a run is, and where it ends."""
    done = manifest or {"iteration": 0, "consumed_samples": 0}
    return run_length(config.training, seq_length, done["iteration"], done["consumed_samples"])


def is_run_complete(length: RunLength, manifest: Manifest | None) -> bool:
    """Whether there is nothing left to do, not even the evaluation after the last step, in which a run may be stopped."""
    if manifest is None or length.iteration < length.train_iters:
        return False
    return bool(manifest["training"]["evaluated"] or not manifest["optimizer"])


def check_together(config: RunConfig) -> None:
    """Raise InputError for settings of several sections that do not go together."""
    if config.parallel.context_parallel_size > 1 and config.data.reset_attention_mask:
        raise InputError("data.reset_attention_mask is true with context_parallel_size above 1; expected one of them")


def check_profile(config: RunConfig, train_iters: int, world_size: int) -> None:
    """InputError if the profiler would wait for a step or a rank that never comes."""
    first, ranks = config.logging.profile_step_start, config.logging.profile_ranks
    if first is not None and first > train_iters:
        raise InputError(f"logging.profile_step_start is {first} but the run ends with step {train_iters}")
    if first is not None and max(ranks) >= world_size:
        raise InputError(f"logging.profile_ranks has {max(ranks)} but the processes are 0 to {world_size - 1}")


def world_size_of(config: RunConfig) -> int:
    """Number of processes that a configuration is checked for."""
    return (config.world_size if config.check_only else None) or launched_world_size()


def check_save_folder(path: str) -> None:
    """Raise InputError unless the run's folder is one, or can become one, that can be written to, and no other's."""
    why = why_unwritable(path) if path else "it is empty"
    require(why is None, "checkpoint.save", path or "''", f"a folder to write to, or a name for a new one ({why})")
    check_own_folder(path, "checkpoint.save", PRETRAINING, WRITTEN)


def find_start(config: RunConfig, damaged: Mapping[str, str] | None = None) -> tuple[str, Manifest | None]:
    """The checkpoint to load, and its manifest if the run goes on where that was; none of those that are `damaged`.

    Raises:
        InputError: there is none; or all of a checkpoint is wanted that has only weights
    """
    settings = config.checkpoint
    own, passed_over = newest_complete(settings.save, True, damaged)
    if own is None and passed_over:
        raise InputError(f"{passed_over[0]}; empty the folder to begin anew, or use another checkpoint.save")
    if own is not None and is_of_a_run(own):  # then what the run began with need not be there any more
        return own, read_checkpoint_manifest(own)
    return find_loaded(settings)


def find_loaded(settings: CheckpointConfig) -> tuple[str, Manifest | None]:
    """As `find_start`, of a run that has saved nothing."""
    check_checkpoint_folder(settings.load)
    folder = find_checkpoint(settings.load)
    if settings.load_state == "weights":
        return folder, None
    if not is_of_a_run(folder):
        raise InputError(
            f"checkpoint.load_state is all but {folder} holds converted weights, no checkpoint of a run; expected weights"
        )
    return folder, read_checkpoint_manifest(folder)


def is_own(config: RunConfig, start_from: str) -> bool:
    """Whether a checkpoint lies in the run's own folder: the run goes on, it is not a fork."""
    return os.path.dirname(os.path.realpath(start_from)) == os.path.realpath(config.checkpoint.save)


def check_began_with(config: RunConfig, start_from: str, manifest: Manifest | None) -> None:
    """Raise InputError where the folder belongs to a run that began with another checkpoint."""
    if manifest is None or not is_own(config, start_from):
        return
    settings, began_with, place = config.checkpoint, manifest["config"]["checkpoint"]["load"], manifest.get("began_with")
    if not is_same_start(settings.load, began_with, place):
        raise InputError(
            f"checkpoint.load is {settings.load} but the run in {settings.save} began with {place or began_with}; "
            f"use that, or another folder as checkpoint.save"
        )


def is_same_start(load: str, began_with: str, place: object) -> bool:
    """Whether `load` is what a run began with.

    Args:
        began_with: as somebody typed it, perhaps in another folder than today's
        place: where that was; not known of runs of earlier versions
    """
    if isinstance(place, str) and (os.path.realpath(load) == place or os.path.exists(place)):
        return os.path.realpath(load) == place
    return os.path.realpath(load) == os.path.realpath(began_with)  # it may have moved, together with the run


def check_is_own(config: RunConfig, start_from: str, length: RunLength) -> None:
    """Raise InputError where a finished run is not one's own, but one to go on from in another folder."""
    if not is_own(config, start_from):
        raise InputError(
            f"checkpoint.load {start_from} is of step {length.iteration} and the run ends with step {length.train_iters}: "
            f"there is nothing left to do; make it longer"
        )


def check_can_resume(config: RunConfig, checkpoint: str, manifest: Manifest | None) -> None:
    """Raise InputError unless a run that goes on has an optimizer's state."""
    if manifest is not None and not manifest["optimizer"]:
        raise InputError(
            f"{checkpoint} holds no optimizer state (checkpoint.save_optim was false), so the run cannot go on from it; "
            f"start another one from its weights: checkpoint.load {checkpoint}, and another folder as checkpoint.save than "
            f"{config.checkpoint.save}"
        )


def check_schedule(config: RunConfig, seq_length: int, length: RunLength, manifest: Manifest | None) -> LearningRate:
    """The learning rate of what is left of the run.

    Raises:
        InputError: it does not fit into the run, or is not what the run's checkpoint was trained with
    """
    if manifest is None:
        return make_schedule(config, seq_length, length)
    saved = manifest["training"]["lr_schedule"]
    if is_run_complete(length, manifest):  # no step will use it: no need to compare
        return LearningRate(**saved)
    return continue_schedule(saved, config, seq_length, length)


def schedule_of(mixture: Mixture, order: str, run_samples: int, threads: int) -> Schedule:
    """The stages of a run of so many samples in the order that data.order names. InputError: it cannot have them."""
    return mixture.megatron_schedule(run_samples, threads) if order == "megatron" else mixture.schedule(run_samples)


def check_run_data(config: RunConfig, mixture: Mixture, length: RunLength, manifest: Manifest | None) -> RunData:
    """Where the run is in its data, and what it will read.

    Raises:
        InputError: it would read a corpus more often than allowed, or has read another mixture so far
    """
    batch, data, complete = config.training.global_batch_size, config.data, is_run_complete(length, manifest)
    schedule = schedule_of(mixture, data.order, length.run_samples, max(data.num_workers, 1))
    if manifest is None or complete:  # nothing was read, or nothing will be: no need to compare
        state = initial_state(mixture, schedule, batch)
    else:
        longer = config.training.extend_to is not None
        consumed = length.consumed_samples
        state = resume(manifest["data"], consumed, mixture, schedule, batch, data.accept_new_mixture, longer)
    schedule = state.continued(mixture, schedule)
    if not complete:
        check_max_epochs(mixture, schedule, length.run_samples)
    return RunData(schedule, state, length.run_samples)


def check_checkpoint_folder(path: str) -> None:
    """Raise InputError unless `checkpoint.load` is a folder."""
    if not os.path.isdir(path):
        raise InputError(f"checkpoint.load is {path!r}; expected the folder of a checkpoint or a run (no such folder)")


def read_model(checkpoint: str) -> LlamaConfig:
    """The architecture of a checkpoint. InputError: it does not say what it is."""
    hf = os.path.join(checkpoint, "hf")
    if not os.path.exists(os.path.join(hf, "config.json")):
        advice = "convert it with tools/convert_checkpoint.py megatron-to-hf, and the result with hf-to-megatron"
        raise InputError(f"checkpoint {checkpoint} has no hf/config.json, so it is of other software; {advice}")
    return read_llama_config(hf)


def read_token_bytes(checkpoint: str, mixture: Mixture, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: the table of a checkpoint's tokenizer, with 0 for embeddings that no token uses.

    Raises:
        InputError: the corpora were made with another vocabulary, so their ids would mean other words to the model
    """
    used, hf_folder = mixture.manifest.tokenizer, os.path.join(checkpoint, "hf")
    if used.vocab_size > vocab_size:
        raise InputError(
            f"{mixture.path}: the corpora have token ids below {used.vocab_size} (tokenizer {used.path}) but the model in "
            f"{checkpoint} has {vocab_size} embeddings"
        )
    tokenizer = load_tokenizer(hf_folder)
    if token_bytes_sha256(tokenizer) != used.token_bytes_sha256:
        raise InputError(
            f"{mixture.path}: the corpora were made with tokenizer {used.name} ({used.path}, {used.vocab_size} tokens); the "
            f"model's own in {hf_folder} ({tokenizer.vocab_size} tokens) has another vocabulary"
        )
    if used.behaviour_sha256 not in (None, behaviour_sha256(tokenizer)):
        raise InputError(
            f"{mixture.path}: the corpora were made with tokenizer {used.name} ({used.path}), which has the tokens of the "
            f"model's own in {hf_folder} but splits text in another way; expected corpora made with the model's own"
        )
    known = tokenizer.token_bytes()[:vocab_size]
    return np.pad(known.astype(np.int64), (0, vocab_size - len(known)))

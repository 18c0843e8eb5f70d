"""Everything that can be known to be wrong before a process group starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from megatron_cpt.checkpoint.layout import find_checkpoint, latest_checkpoint, read_checkpoint_manifest
from megatron_cpt.config.run import RunConfig
from megatron_cpt.data.ledger import Ledger, check_limits, make_ledger
from megatron_cpt.data.mixture import Mixture
from megatron_cpt.data.mixture_file import load_mixture
from megatron_cpt.data.stages import Schedule
from megatron_cpt.data.state import DataState, begin, resume
from megatron_cpt.errors import InputError
from megatron_cpt.model.llama import LlamaConfig, check_layout, read_llama_config
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.base import token_bytes_sha256


@dataclass(frozen=True)
class RunData:
    """The run's data: `run_samples` in all, also those that were read before this start."""

    schedule: Schedule
    state: DataState
    run_samples: int

    def ledger(self, mixture: Mixture) -> Ledger:
        """What is left to read, by this mixture: from where it (or this global batch size) began to the end of the run."""
        now = self.state.now
        return make_ledger(mixture, self.schedule, self.run_samples, now.start, now.samples_before())


@dataclass(frozen=True)
class CheckedRun:
    """A configuration whose files exist and fit each other.

    Attributes:
        token_bytes: int64 [vocab_size of the model], UTF-8 bytes of text each id stands for (for bits per byte)
        start_from: checkpoint folder to load
        resumes: whether that is a checkpoint of this very run (weights, optimizer and position) or only weights
        complete: there is nothing left to do
        data: the order of the samples and where the run is in it
    """

    config: RunConfig
    llama: LlamaConfig
    mixture: Mixture
    data: RunData
    data_parallel_size: int
    token_bytes: np.ndarray
    start_from: str
    resumes: bool
    complete: bool

    @property
    def hf_folder(self) -> str:
        """HF configuration and tokenizer that travel with the weights."""
        return os.path.join(self.start_from, "hf")


def check_run(config: RunConfig, world_size: int) -> CheckedRun:
    """Open everything the run names and compare it with the layout.

    Raises:
        InputError: naming the value found and the values that would do
    """
    resume_from = latest_checkpoint(config.checkpoint.save)
    start_from = resume_from or find_checkpoint(config.checkpoint.load)
    llama = read_llama_config(os.path.join(start_from, "hf"))
    mixture = load_mixture(config.mixture)
    check_layout(llama, config.parallel, mixture.seq_length)
    vocab_size = mixture.manifest.tokenizer.vocab_size
    if vocab_size > llama.vocab_size:
        raise InputError(
            f"{mixture.path}: the corpora have token ids below {vocab_size} "
            f"(tokenizer {mixture.manifest.tokenizer.path}) but the model in {start_from} has {llama.vocab_size} embeddings"
        )
    complete = resume_from is not None and is_complete(resume_from, config)
    return CheckedRun(
        config=config,
        llama=llama,
        mixture=mixture,
        data=check_data(config, mixture, resume_from, complete),
        data_parallel_size=check_batch(config, world_size),
        token_bytes=read_token_bytes(os.path.join(start_from, "hf"), mixture, llama.vocab_size),
        start_from=start_from,
        resumes=resume_from is not None,
        complete=complete,
    )


def is_complete(checkpoint: str, config: RunConfig) -> bool:
    """Whether a run's newest checkpoint is its last one.

    Raises:
        InputError: there are steps left to do but the checkpoint cannot be resumed from
    """
    manifest = read_checkpoint_manifest(checkpoint)
    began_with = manifest["config"]["checkpoint"]["load"]
    if began_with != config.checkpoint.load:
        raise InputError(
            f"checkpoint.load is {config.checkpoint.load} but the run in {config.checkpoint.save} began with {began_with}; "
            f"use that, or another folder as checkpoint.save"
        )
    if manifest["iteration"] >= config.training.train_iters:
        return True
    if not manifest["optimizer"]:
        raise InputError(
            f"{checkpoint} holds no optimizer state (checkpoint.save_optim was false), so the run in "
            f"{config.checkpoint.save} cannot resume; start another one from it: checkpoint.load {checkpoint}, and another "
            f"folder as checkpoint.save"
        )
    return False


def check_data(config: RunConfig, mixture: Mixture, resume_from: str | None, complete: bool) -> RunData:
    """Where the run is in its data, and what it will read.

    Raises:
        InputError: it would read a corpus more often than allowed, or has read another mixture so far
    """
    batch, data = config.training.global_batch_size, config.data
    iteration = consumed = 0
    saved = None
    if resume_from is not None:
        manifest = read_checkpoint_manifest(resume_from)
        iteration, consumed, saved = manifest["iteration"], manifest["consumed_samples"], manifest["data"]
    run_samples = consumed + max(config.training.train_iters - iteration, 0) * batch
    if data.order == "megatron":
        schedule = mixture.megatron_schedule(run_samples, max(data.num_workers, 1))
    else:
        schedule = mixture.schedule(run_samples)
    if saved is None or complete:  # nothing will be read: no need to compare
        state = begin(mixture, schedule, batch)
    else:
        state = resume(saved, consumed, mixture, schedule, batch, data.accept_new_mixture)
    if not complete:
        check_limits(mixture, schedule, run_samples, state.offsets(mixture, schedule))
    return RunData(schedule, state, run_samples)


def read_token_bytes(hf_folder: str, mixture: Mixture, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: the table of the checkpoint's tokenizer, with 0 for embeddings that no token uses.

    Raises:
        InputError: the corpora were made with another vocabulary, so their ids would mean other words to the model
    """
    tokenizer = load_tokenizer(hf_folder)
    used = mixture.manifest.tokenizer
    if token_bytes_sha256(tokenizer) != used.token_bytes_sha256:
        raise InputError(
            f"{mixture.path}: the corpora were made with tokenizer {used.name} ({used.path}, {used.vocab_size} tokens); the "
            f"model's own in {hf_folder} ({tokenizer.vocab_size} tokens) has another vocabulary"
        )
    known = tokenizer.token_bytes()[:vocab_size]
    return np.pad(known.astype(np.int64), (0, vocab_size - len(known)))


def check_batch(config: RunConfig, world_size: int) -> int:
    """Whether processes and batch come out even; returns the data-parallel size."""
    parallel, training = config.parallel, config.training
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size % model_parallel:
        raise InputError(
            f"{world_size} processes cannot hold tensor_model_parallel_size {parallel.tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size {parallel.pipeline_model_parallel_size}; start a multiple of {model_parallel}"
        )
    data_parallel = world_size // model_parallel
    if training.global_batch_size % (training.micro_batch_size * data_parallel):
        raise InputError(
            f"global_batch_size {training.global_batch_size} is not divisible by micro_batch_size "
            f"{training.micro_batch_size} x data-parallel size {data_parallel}"
        )
    return data_parallel

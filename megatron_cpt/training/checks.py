"""Everything that can be known to be wrong before a process group starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from megatron_cpt.checkpoint.layout import find_checkpoint, latest_checkpoint, read_checkpoint_manifest
from megatron_cpt.config.run import RunConfig
from megatron_cpt.data.mixture import Mixture, load_mixture
from megatron_cpt.errors import InputError
from megatron_cpt.model.llama import LlamaConfig, check_layout, read_llama_config
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.base import token_bytes_sha256


@dataclass(frozen=True)
class CheckedRun:
    """A configuration whose files exist and fit each other.

    Attributes:
        token_bytes: int64 [vocab_size of the model], UTF-8 bytes of text each id stands for (for bits per byte)
        start_from: checkpoint folder to load
        resumes: whether that is a checkpoint of this very run (weights, optimizer and position) or only weights
        complete: there is nothing left to do
    """

    config: RunConfig
    llama: LlamaConfig
    mixture: Mixture
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
    return CheckedRun(
        config=config,
        llama=llama,
        mixture=mixture,
        data_parallel_size=check_batch(config, world_size),
        token_bytes=read_token_bytes(os.path.join(start_from, "hf"), mixture, llama.vocab_size),
        start_from=start_from,
        resumes=resume_from is not None,
        complete=resume_from is not None and is_complete(resume_from, config, mixture),
    )


def is_complete(checkpoint: str, config: RunConfig, mixture: Mixture) -> bool:
    """Whether a run's newest checkpoint is its last one.

    Raises:
        InputError: there are steps left to do but the checkpoint cannot be resumed from, or not with this data
    """
    manifest = read_checkpoint_manifest(checkpoint)
    another = f"start another one from it: checkpoint.load {checkpoint}, and another folder as checkpoint.save"
    for name, value in mixture.fingerprint().items():
        if manifest["data"][name] != value:
            now, then = (f" is {value}", f" with {manifest['data'][name]}") if name != "corpora" else (" differ", "")
            raise InputError(
                f"{mixture.path}: {name}{now} but the run in {config.checkpoint.save} has consumed samples{then}, "
                f"so its place in the data is lost; {another}"
            )
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
            f"{config.checkpoint.save} cannot resume; {another}"
        )
    batch, consumed = config.training.global_batch_size, manifest["consumed_samples"]
    if consumed % batch:
        raise InputError(
            f"training.global_batch_size {batch} does not divide the {consumed} samples that the run in "
            f"{config.checkpoint.save} has consumed; samples are shuffled within global batches, so some would come twice"
        )
    return False


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

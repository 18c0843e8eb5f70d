"""What can be known of a run's files before torch is imported: whether they are there, and fit each other and the layout."""

from __future__ import annotations

import os

import numpy as np

from megatron_cpt.checkpoint.layout import find_checkpoint, newest_complete
from megatron_cpt.config.cli import launched_world_size
from megatron_cpt.config.require import require
from megatron_cpt.config.run import CheckpointConfig, RunConfig
from megatron_cpt.data.ledger import check_limits
from megatron_cpt.data.mixture import Mixture
from megatron_cpt.data.mixture_file import load_mixture, read_seq_length
from megatron_cpt.errors import InputError, Refusals
from megatron_cpt.input_files import why_unwritable
from megatron_cpt.model.layout import check_batch, check_layout
from megatron_cpt.model.llama import LlamaConfig, read_llama_config
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.base import token_bytes_sha256
from megatron_cpt.tokenizer.behaviour import behaviour_sha256
from megatron_cpt.training import sinks
from megatron_cpt.training.schedule import make_schedule, run_length


def check_files(config: RunConfig) -> None:
    """Check what a configuration names, whatever is wrong with it (see config/partial.py).

    Raises:
        InputError: naming the file; InputErrors: several are wrong
    """
    refusals = Refusals()
    with refusals.noted():
        check_folder(config.checkpoint.save)
    with refusals.noted():
        check_batch(config, world_size_of(config))
    with refusals.noted():
        sinks.check_logging(config.logging)
    with refusals.noted():
        check_together(config)
    found: tuple[str, bool] | None = None
    with refusals.noted():
        found = find_checkpoint_of(config.checkpoint)
    llama: LlamaConfig | None = None
    with refusals.noted():
        llama = read_model(found[0]) if found is not None else None
    mixture: Mixture | None = None
    with refusals.noted():
        mixture = load_mixture(config.mixture)
    with refusals.noted():
        if llama is not None:
            check_layout(llama, config.parallel, read_seq_length(config.mixture), f"{config.mixture}: ")
    with refusals.noted():
        if llama is not None and mixture is not None and found is not None:
            read_token_bytes(found[0], mixture, llama.vocab_size)
    with refusals.noted():
        if found is None or not found[1]:  # else what is left of the run depends on its checkpoint
            check_length(config, mixture)
    refusals.raise_any()


def check_length(config: RunConfig, mixture: Mixture | None) -> None:
    """Check what a run has to be long enough for, or too short, when it begins.

    Raises:
        InputError: one is wrong; InputErrors: several are
    """
    seq_length = read_seq_length(config.mixture)
    length, refusals = run_length(config.training, seq_length), Refusals()
    with refusals.noted():
        check_profile(config, length.train_iters, world_size_of(config))
    with refusals.noted():
        make_schedule(config, seq_length, length)
    with refusals.noted():
        if mixture is not None and config.data.order == "default":  # the other order takes long to build
            check_limits(mixture, mixture.schedule(length.run_samples), length.run_samples)
    refusals.raise_any()


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


def check_folder(path: str) -> None:
    """Raise InputError unless the run's folder is one, or can become one, that can be written to."""
    why = why_unwritable(path) if path else "it is empty"
    require(why is None, "checkpoint.save", path or "''", f"a folder to write to, or a name for a new one ({why})")


def find_checkpoint_of(settings: CheckpointConfig) -> tuple[str, bool] | None:
    """The checkpoint that a run resumes from, or begins with, and whether the run has begun; None: its own are damaged.

    Raises:
        InputError: there is no checkpoint
    """
    own, passed_over = newest_complete(settings.save, own=True)
    if own is None and passed_over:
        return None
    if own is None:  # else what the run began with need not be there any more
        check_checkpoint_folder(settings.load)
    return own or find_checkpoint(settings.load), own is not None or settings.load_state == "all"


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

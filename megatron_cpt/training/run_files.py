"""What can be known of a run's files before torch is imported: whether they are there, and fit each other and the layout."""

from __future__ import annotations

import os

from megatron_cpt.checkpoint.layout import find_checkpoint, newest_complete
from megatron_cpt.config.cli import launched_world_size
from megatron_cpt.config.require import require
from megatron_cpt.config.run import CheckpointConfig, RunConfig
from megatron_cpt.data.mixture import Mixture
from megatron_cpt.data.mixture_file import load_mixture
from megatron_cpt.errors import InputError, Refusals
from megatron_cpt.input_files import why_unwritable
from megatron_cpt.model.layout import check_batch, check_layout
from megatron_cpt.model.llama import LlamaConfig, read_llama_config


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
    llama: LlamaConfig | None = None
    with refusals.noted():
        llama = find_model(config.checkpoint)
    mixture: Mixture | None = None
    with refusals.noted():
        mixture = load_mixture(config.mixture)
    with refusals.noted():
        if llama is not None and mixture is not None:
            check_layout(llama, config.parallel, mixture.seq_length, f"{mixture.path}: ")
    refusals.raise_any()


def world_size_of(config: RunConfig) -> int:
    """Number of processes that a configuration is checked for."""
    return (config.world_size if config.check_only else None) or launched_world_size()


def check_folder(path: str) -> None:
    """Raise InputError unless the run's folder is one, or can become one, that can be written to."""
    why = why_unwritable(path) if path else "it is empty"
    require(why is None, "checkpoint.save", path or "''", f"a folder to write to, or a name for a new one ({why})")


def find_model(settings: CheckpointConfig) -> LlamaConfig | None:
    """The architecture of the checkpoint that a run resumes from, or begins with; None: all of its own are damaged.

    Raises:
        InputError: there is no checkpoint, or it does not say what it is
    """
    own, passed_over = newest_complete(settings.save, own=True)
    if own is None and passed_over:
        return None
    if own is None:  # else what the run began with need not be there any more
        check_checkpoint_folder(settings.load)
    return read_model(own or find_checkpoint(settings.load))


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

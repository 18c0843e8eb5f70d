"""What can be known of a plan's model, devices and files at once, whatever is wrong with its settings."""

from __future__ import annotations

import os

from megatron_cpt.config.fields import ConfigReader
from megatron_cpt.config.renamed import print_notes
from megatron_cpt.config.require import Requirements
from megatron_cpt.config.run import RunConfig
from megatron_cpt.mixture.file import read_seq_length
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.hardware import find_device
from megatron_cpt.planning.measured import with_measured
from megatron_cpt.planning.presets import find_model
from megatron_cpt.planning.search import make_cluster
from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.input_files import load_yaml, why_unwritable


def check_plan_files(config: PlanConfig) -> None:
    """Check what a configuration names, whatever is wrong with it (see config/partial.py).

    Raises:
        InputError: something is not there, or not what it should be; InputErrors: several things are
    """
    with Requirements() as need:
        with need.noted():
            find_model(config.model)
        with need.noted():
            find_device(config.device)
            with need.noted():
                if config.measured is None:
                    make_cluster(config)
        with need.noted():
            with_measured(config)
        with need.noted():
            if config.run is not None:
                check_run_file(config.run)
        for name in ("json", "write"):
            with need.noted():
                check_place(name, getattr(config, name))


def check_run_file(path: str) -> None:
    """Raise InputError for what is wrong with a configuration of pretrain_cpt.py and the mixture that it names."""
    reader, refusals = ConfigReader(RunConfig, f"{path}: "), Refusals()
    with refusals.noted():
        reader.fields(load_yaml(path, "configuration"), reader.where)
        print_notes(reader.notes)
        run: RunConfig = reader.config()
        for error in reader.refusals.errors:
            refusals.add(error)
        with refusals.noted():
            read_seq_length(run.mixture)
    refusals.raise_any()


def check_place(name: str, path: str | None) -> None:
    """Raise InputError if a file cannot be written there; before the plan, which may take long."""
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder) or why_unwritable(folder):
        raise InputError(f"{name} is {path}; expected a file in a folder that is there")

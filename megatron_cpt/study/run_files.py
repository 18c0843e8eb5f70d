"""What can be known of the files of a study before torch is imported, whatever is wrong with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_cpt.checkpoint.layout import find_checkpoint
from megatron_cpt.config.fields import ConfigReader
from megatron_cpt.config.renamed import print_notes
from megatron_cpt.config.require import Requirements
from megatron_cpt.config.run import RunConfig
from megatron_cpt.mixture.file import load_mixture
from megatron_cpt.planning.hardware import find_device
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import check_no_stages, check_one_almr, check_study_folder, complete_base, read_fields
from megatron_cpt.study.settings import ChooseOptions
from megatron_cpt.training.run_files import check_checkpoint_folder, read_model
from megatron_cpt.utils.errors import Refusals, RefusedValueError
from megatron_cpt.utils.input_files import load_yaml, plain_number


def check_run_options(study: StudyConfig) -> None:
    """Check what `plan` and `run` read: the base configuration, and what it names for the runs to begin with.

    Raises:
        InputError: something is wrong with one of them; InputErrors: with several
    """
    refusals = Refusals()
    with refusals.noted():
        check_study(study)
    config: Any = None
    with refusals.noted():
        config = read_base_partly(study.base, Refusals())  # `check_study` has named what is wrong with it
    if config is not None:
        with refusals.noted():
            check_checkpoint_folder(config.checkpoint.load)
            read_model(find_checkpoint(config.checkpoint.load))
        with refusals.noted():
            load_mixture(config.mixture, first_almr(study))
    with refusals.noted():
        if study.device is not None:
            find_device(study.device)
    refusals.raise_any()


def check_study(study: StudyConfig) -> None:
    """Check what `fit` and `plot` read: the folder and the base configuration with its mixture file.

    Raises:
        InputError: something is wrong with one of them; InputErrors: with several
    """
    refusals = Refusals()
    with refusals.noted():
        check_study_folder(study.folder)
    with refusals.noted():
        check_base(study.base, refusals)
    refusals.raise_any()


def check_choice(study: ChooseOptions) -> None:
    """As `check_study`, with the configuration of the run to start."""
    with Requirements() as need:
        with need.noted():
            check_study(study)
        with need.noted():
            if study.target is not None:
                config = read_partly(study.target, read_given(study.target), need)
                check_no_stages(config.mixture, load_yaml(config.mixture, "mixture file", plain_number))


def check_base(path: str, refusals: Refusals) -> None:
    """Note what is wrong with the configuration that all runs follow, and raise InputError for its mixture file."""
    config = read_base_partly(path, refusals)
    check_one_almr(config.mixture, load_yaml(config.mixture, "mixture file", plain_number))


def read_base_partly(path: str, refusals: Refusals) -> RunConfig:
    """As `read_partly`, of the configuration that all runs follow."""
    fields = read_given(path)
    complete_base(fields, path, folder="the study's", train_tokens=1)
    return read_partly(path, fields, refusals)


def read_given(path: str) -> dict[str, Any]:
    """What a user's configuration says; notes are printed of old names in it."""
    notes: list[str] = []
    fields = read_fields(path, notes)
    print_notes(notes)
    return fields


def read_partly(path: str, fields: Mapping[str, Any], refusals: Refusals) -> RunConfig:
    """The configuration of a run with what is right of it (see config/partial.py); what is wrong is noted."""
    reader = ConfigReader(RunConfig, f"{path}: ")
    reader.fields(fields, reader.where)
    config: RunConfig = reader.config()
    for error in reader.refusals.errors:
        refusals.add(error)
    return config


def first_almr(study: StudyConfig) -> dict[str, Any]:
    """What a run has instead of the mixture file's own, as far as it is known."""
    try:
        return {"almr": str(study.almr[0])}
    except RefusedValueError:
        return {}

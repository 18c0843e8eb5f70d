"""Whether the files are there that SFT or DPO names, none is both trained on and evaluated on, and a run can be saved where
it is to be. Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_cpt.checkpoint.hf_tokenizer import read_folder
from megatron_cpt.checkpoint.run_folder import FINE_TUNING, check_own_folder
from megatron_cpt.checkpoint.weight_files import check_weights
from megatron_cpt.config.cli import launched_world_size
from megatron_cpt.config.require import Requirements, require
from megatron_cpt.model.hf_folder import can_look_into, check_model, check_positions, most_new_tokens, positions_of
from megatron_cpt.posttrain.identity import check_begun
from megatron_cpt.posttrain.rows import check_rows
from megatron_cpt.posttrain.template_files import check_chat_tokenizer, check_prompts, check_prompts_fit, read_template
from megatron_cpt.utils.errors import InputError, Refusals, RefusedValueError
from megatron_cpt.utils.input_files import why_unreadable, why_unwritable

if TYPE_CHECKING:
    from megatron_cpt.posttrain.settings import (
        ChatConfig,
        DpoConfig,
        SftConfig,
        SourceConfig,
        TrainingSettings,
        TuningDataConfig,
    )

LLAMAFACTORY_TEMPLATES = ("llama3", "chatml")  # that both know
LLAMAFACTORY_LOSSES = ("sigmoid", "hinge", "ipo")
WRITTEN = ("metrics.jsonl", "README.md")  # in the folder of a run


def check_tuning(config: SftConfig | DpoConfig) -> None:
    """Check the folders, data and chat template that a configuration names, whatever is wrong with it.

    Raises:
        InputError: naming the file; InputErrors: several are wrong
    """
    refusals = Refusals()
    with refusals.noted():
        if not exports(config):
            check_save(config.save)
            check_begun(config)
        elif not config.save:  # LLaMA-Factory will save there
            raise empty_save()
    with refusals.noted():
        check_model(config.model)
    with refusals.noted():
        if can_look_into(config.model):
            check_to_train(config)
    with refusals.noted():
        check_export(config)
    with refusals.noted():
        accumulation(config.training, launched_world_size())
    with refusals.noted():
        check_sources(config.data)
    with refusals.noted():
        if config.data.chat_template is not None and not is_foreign_template(config):
            read_template(config.data.chat_template, "data.chat_template")
    refusals.raise_any()


def check_chat(config: ChatConfig) -> None:
    """As `check_tuning`, of what a ChatConfig names."""
    refusals = Refusals()
    with refusals.noted():
        check_model(config.model)
    with refusals.noted():
        if can_look_into(config.model):
            with refusals.noted():
                check_weights(config.model)
            with refusals.noted():
                if config.prompt is not None:  # the text is gone on with, without a template
                    check_prompts(config.model, config.prompts())
                else:
                    check_chat_tokenizer(config.model, config.chat_template)
            with refusals.noted():
                new_tokens = config.max_new_tokens or most_new_tokens(positions_of(config.model))
                check_positions(config.model, new_tokens)
                check_prompts_fit(config.model, config.prompts(), new_tokens)
    with refusals.noted():
        if config.chat_template is not None:
            read_template(config.chat_template)
    refusals.raise_any()


def check_to_train(config: SftConfig | DpoConfig) -> None:
    """As `check_tuning`, of what is in the folder of the model."""
    with Requirements() as need:
        with need.noted():
            positions_of(config.model)
        with need.noted():
            check_weights(config.model)
        with need.noted():
            if is_foreign_template(config):
                read_folder(config.model)
            else:
                check_chat_tokenizer(config.model, config.data.chat_template, "data.chat_template")


def exports(config: SftConfig | DpoConfig) -> bool:
    """Whether data are known to be exported, instead of a run."""
    try:
        return config.export_to is not None
    except RefusedValueError:
        return False


def is_foreign_template(config: SftConfig | DpoConfig) -> bool:
    """Whether data are to be exported with a template that LLaMA-Factory lacks: `check_export` says all there is to say."""
    return exports(config) and config.data.chat_template not in LLAMAFACTORY_TEMPLATES


def check_export(config: SftConfig | DpoConfig) -> None:
    """Check what is to be written for LLaMA-Factory, if anything is.

    Raises:
        InputError: the chat template or the loss is none that both know, or the folder is not empty
    """
    folder, template = config.export_to, config.data.chat_template
    if folder is None:
        return
    with Requirements() as need:
        with need.noted():
            if template not in LLAMAFACTORY_TEMPLATES:
                found = "null" if template is None else template
                raise InputError(
                    f"data.chat_template is {found}; LLaMA-Factory has templates of its own, of which "
                    f"{' and '.join(LLAMAFACTORY_TEMPLATES)} are the same here: use one of them"
                )
        with need.noted():
            loss = getattr(config, "loss_type", LLAMAFACTORY_LOSSES[0])
            if loss not in LLAMAFACTORY_LOSSES:
                known = ", ".join(LLAMAFACTORY_LOSSES)
                raise InputError(f"loss_type is {loss}, which LLaMA-Factory does not have; expected one of {known}")
        with need.noted():
            beside = os.path.dirname(os.path.realpath(folder))  # where it is written before it gets its name
            why = (why_unwritable(folder) or why_unwritable(beside)) if folder else "it is empty"
            need(why is None, "export_to", folder or "''", f"a name for a new folder ({why})")
            if os.path.isdir(folder) and os.listdir(folder):
                raise InputError(f"export_to is {folder}, which is not empty; use another folder")


def accumulation(training: TrainingSettings, world_size: int) -> int:
    """Micro batches of a process in a step.

    Raises:
        InputError: the batch cannot be divided so
    """
    at_once = training.micro_batch_size * world_size
    if training.global_batch_size % at_once:
        parts = f"micro_batch_size {training.micro_batch_size} x {world_size} processes = {at_once}"
        raise InputError(f"training.global_batch_size is {training.global_batch_size}; expected a multiple of {parts}")
    return training.global_batch_size // at_once


def check_save(folder: str) -> None:
    """Raise InputError unless a run may begin, or resume, in a folder: it can be written to, and has nothing else in it."""
    if not folder:
        raise empty_save()
    if os.path.exists(os.path.join(folder, "hf")):
        raise InputError(f"{folder} holds a finished run; use another folder as save, or remove it")
    if (why := why_unwritable(folder)) is not None:
        raise InputError(f"save is {folder}, and {why}; use another name as save")
    check_own_folder(folder, "save", FINE_TUNING, WRITTEN)


def empty_save() -> InputError:
    """A run has to have a folder."""
    return InputError("save is empty; use the name of a folder")


def check_sources(data: TuningDataConfig) -> None:
    """Check that all files are there, and that rows to evaluate on are not those to train on.

    Raises:
        InputError: one is missing, not to be read, or there twice; InputErrors: several are
    """
    with Requirements() as need:
        sources = readable_sources(need, "data.sources", lambda: data.sources)
        validation = readable_sources(need, "data.validation", lambda: data.validation)
        advice = "use different files, or leave data.validation out: data.validation_share holds out of each source"
        for first, second in itertools.product(sources, validation):
            with need.noted():
                check_apart("data.sources and data.validation", first, second, advice)
        with need.noted():
            if not data.validation and data.validation_share > 0:
                advice = "name it once, or use validation files: what is held out of one is trained on in the other"
                for first, second in itertools.combinations(sources, 2):
                    with need.noted():
                        check_apart("two of data.sources", first, second, advice)


def data_files(data: TuningDataConfig) -> list[str]:
    """All paths of the data, which are there; InputError as of `check_sources`."""
    check_sources(data)
    return [source.path for source in (*data.sources, *data.validation)]


def readable_sources(refusals: Refusals, name: str, sources: Callable[[], Sequence[SourceConfig]]) -> list[str]:
    """The paths of those sources that can be read; why the others cannot is noted."""
    paths = list[str]()
    with refusals.noted():
        for i, source in enumerate(sources()):
            with refusals.noted():
                path, why = source.path, why_unreadable(source.path)
                require(why is None, f"{name}[{i}].path", path or "''", f"a file ({why})")
                check_rows(path)
                paths.append(path)
    return paths


def check_apart(what: str, first: str, second: str, advice: str) -> None:
    """Raise InputError if two files have the same rows."""
    if same_content(first, second):
        both = f"{second} and {first} are " + ("one file" if os.path.samefile(first, second) else "equal")
        raise InputError(f"{what} have rows in common: {both}; {advice}")


def same_content(first: str, second: str) -> bool:
    """Whether two files have the same bytes, and any."""
    if os.path.samefile(first, second):
        return True
    if os.path.getsize(first) != os.path.getsize(second) or os.path.getsize(first) == 0:
        return False
    digests = []
    for path in (first, second):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").digest())
    return digests[0] == digests[1]

"""Checkpoints of SFT and DPO: checkpoint-N folders of transformers' trainer. The last file of each is a manifest.json with
sizes and checksums of all others, so that a run resumes from nothing but what was written. Only one run at a time is in a
folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from megatron_cpt.checkpoint.checksums import MANIFEST, MOST_THREADS, check_file, checksums_in, checksums_of, sealed
from megatron_cpt.checkpoint.layout import check_file_sizes, read_manifest, versions
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import sync_files, write_json, write_text
from megatron_cpt.utils.lock import locked

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# As the trainer writes it: a copy of another name, such as checkpoint-500-good, is none of its own
NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})", re.ASCII)
STATE = "trainer_state.json"  # what the trainer writes last
LOCK = "run.lock"
RUN = "run.json"  # what the run began with, written once
SAVING = "saving.txt"  # names the checkpoint that is being written
RESULT = "hf"  # folder of a run's result


def checkpoint_names(root: str) -> dict[int, str]:
    """Step -> path of all that has the name of a checkpoint, files and dead links, too; the newest first."""
    names = os.listdir(root) if os.path.isdir(root) else []
    found = {int(match[1]): os.path.join(root, match[0]) for name in names if (match := NAME.fullmatch(name))}
    return dict(sorted(found.items(), reverse=True))


def step_folders(root: str) -> dict[int, str]:
    """Step -> folder of the checkpoints of a run, complete or not, the newest first."""
    return {step: path for step, path in checkpoint_names(root).items() if os.path.isdir(path)}


def is_sealed(folder: str) -> bool:
    """Whether a checkpoint has a manifest, without a look at what it says."""
    return os.path.isfile(os.path.join(folder, MANIFEST))


def sealed_steps(root: str) -> list[int]:
    """Steps of the checkpoints that have a manifest."""
    return [step for step, folder in step_folders(root).items() if is_sealed(folder)]


def from_first(call: Callable[[], Answer]) -> Answer:
    """What a call returns on the first process, on all.

    Raises:
        InputError: the call did so; on all
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = call()
        except InputError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise InputError(answer[1])
    found: Answer = answer[0]
    return found


@contextlib.contextmanager
def locked_tuning_folder(root: str, seen: list[int]) -> Iterator[None]:
    """Keep other runs out of a run's folder, which is made, while the block runs.

    Args:
        root: the folder
        seen: `sealed_steps` when the run looked where it resumes

    Raises:
        InputError: another run is under way in it, or has been meanwhile; on all processes
    """

    def take() -> None:
        os.makedirs(root, exist_ok=True)
        path = os.path.join(root, LOCK)
        busy = f"another run is under way in {root} (it holds {path}); use another folder as save"
        stack.enter_context(locked(path, busy))
        if os.path.exists(os.path.join(root, RESULT)):
            raise InputError(f"another run has just finished in {root}; use another folder as save")
        if sealed_steps(root) != seen:
            raise InputError(f"another run has just saved a checkpoint in {root}; start again to resume from it")

    with contextlib.ExitStack() as stack:
        from_first(take)
        yield


def begin_saving(root: str, name: str) -> None:
    """Say which checkpoint is being written, for whoever finds it without a manifest: `seal` takes it back."""
    write_text(os.path.join(root, SAVING), name)


def seal(folder: str, step: int) -> None:
    """Write the manifest of a checkpoint. By the first process, when all have written their files and these are on disk."""
    root = os.path.dirname(folder)
    if os.path.exists(os.path.join(folder, MANIFEST)):  # of an earlier checkpoint of this name
        os.remove(os.path.join(folder, MANIFEST))
    sizes = sync_files(folder)
    run = run_id(root)
    facts = {"kind": "finetune_checkpoint", "iteration": step, "files": sizes, "run_id": run, "versions": versions()}
    write_json(os.path.join(folder, MANIFEST), sealed(facts, checksums_of(folder, sizes, MOST_THREADS)))
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(root, SAVING))


def run_id(root: str) -> str | None:
    """What tells a run from all others, of the run.json in its folder; None: it cannot be read (`check_same` says so)."""
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError),
        open(os.path.join(root, RUN), encoding="utf-8") as file,
    ):
        return str(json.load(file)["run_id"])
    return None


def check_sealed(folder: str) -> None:
    """Raise InputError, naming the file, unless all files of a checkpoint are as they were written, by this run and under
    this name."""
    manifest = read_manifest(os.path.join(folder, MANIFEST))
    checksums = checksums_in(manifest)
    check_file_sizes(folder, manifest)
    if checksums.keys() != {MANIFEST, *manifest.get("files", ())}:
        raise InputError(f"checkpoint {folder} is damaged: manifest.json has not one checksum for each file")
    name = f"checkpoint-{manifest.get('iteration')}"
    if name != os.path.basename(folder):
        raise InputError(f"checkpoint {folder} has another name than it was saved under; expected {name}")
    root = os.path.dirname(folder)
    if run_id(root) not in (None, manifest.get("run_id")):
        raise InputError(f"checkpoint {folder} was not saved by the run that {os.path.join(root, RUN)} describes")
    with ThreadPoolExecutor(MOST_THREADS) as pool:
        files = {name: wanted for name, wanted in checksums.items() if name != MANIFEST}
        for result in [pool.submit(check_file, folder, name, wanted) for name, wanted in files.items()]:
            result.result()


def check_readable(folder: str) -> None:
    """Raise InputError if a folder, or a file in it, is not this user's to read."""
    paths = (
        [folder, *(entry.path for entry in os.scandir(folder) if entry.is_file())]
        if os.access(folder, os.R_OK)
        else [folder]
    )
    for path in paths:
        if not os.access(path, os.R_OK):
            raise InputError(f"{path} cannot be read: Permission denied; expected a checkpoint of the user who resumes it")


def newest_checkpoint(root: str) -> tuple[str | None, list[str]]:
    """The newest checkpoint of a run with all that was written (None: there is none), and a sentence for each passed over.

    Raises:
        InputError: there were complete ones, and all are damaged: the run would begin anew without a word; or one is not
            this user's to read, which is no damage
    """
    passed_over, damaged = list[str](), list[str]()
    for folder in step_folders(root).values():
        check_readable(folder)
        if not is_sealed(folder):
            because = "manifest.json is missing (the run was ended while it saved, or an earlier version has saved it)"
            passed_over.append(f"checkpoint {folder} is not complete: {because}")
            continue
        try:
            check_sealed(folder)
        except InputError as error:
            passed_over.append(str(error))
            damaged.append(str(error))
            continue
        return folder, passed_over
    if damaged:
        raise InputError(f"{damaged[0]}; empty the folder to begin anew, or use another one as save")
    return None, passed_over


def find_trainer_checkpoint(root: str) -> str | None:
    """`newest_checkpoint`, looked for by the first process, which says what it passes over: all processes take the same.

    Raises:
        InputError: as `newest_checkpoint`, on all
    """

    def look() -> str | None:
        found, passed_over = newest_checkpoint(root)
        for sentence in passed_over:
            logger.info(f"passed over: {sentence}")
        return found

    return from_first(look)


def remove_older(root: str, keep: int) -> None:
    """Remove the checkpoints of steps before the newest `keep` complete ones.

    transformers would count, keep and remove all that begins with the name of a checkpoint, such as a copy that somebody has
    put aside as checkpoint-500-good.
    """
    kept = sealed_steps(root)[:keep]
    for step, folder in step_folders(root).items():
        if kept and step < kept[-1]:
            if os.path.islink(folder):
                os.remove(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def set_aside(root: str, newer_than: int) -> list[str]:
    """Rename what has the name of a checkpoint after a step, which a run that goes on from there has passed over; returns
    the new names.

    Under their old names the trainer would keep them, as the newest, instead of those that it saves from now on, or would
    write into them. What a kill has left of one is removed.
    """
    renamed = []
    for step, folder in checkpoint_names(root).items():
        if step <= newer_than:
            continue
        if left_by_a_kill(folder):
            shutil.rmtree(folder)
            continue
        wanted = os.path.join(root, f"damaged_{os.path.basename(folder)}")
        names = (wanted if number == 1 else f"{wanted}_{number}" for number in itertools.count(1))
        renamed.append(next(name for name in names if not os.path.lexists(name)))
        os.rename(folder, renamed[-1])
    return renamed


def left_by_a_kill(folder: str) -> bool:
    """Whether this is a checkpoint that was being written: its last files are missing, or only its manifest and the run says
    so."""
    if os.path.islink(folder) or not os.path.isdir(folder) or is_sealed(folder):
        return False
    root, name = os.path.split(folder)
    with contextlib.suppress(FileNotFoundError), open(os.path.join(root, SAVING), encoding="utf-8") as file:
        if file.read() == name:
            return True
    return not os.path.exists(os.path.join(folder, STATE))

"""Checkpoints of SFT and DPO: checkpoint-N folders of transformers' trainer. The last file of each is a manifest.json with
sizes and checksums of all others, so that a run resumes from nothing but what was written."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from megatron_cpt.checkpoint.checksums import MANIFEST, MOST_THREADS, check_file, checksums_in, checksums_of, sealed
from megatron_cpt.checkpoint.layout import check_sizes, read_manifest, sync_files, versions, write_json
from megatron_cpt.errors import InputError

NAME = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)
STATE = "trainer_state.json"  # what the trainer writes last


def step_folders(root: str) -> dict[int, str]:
    """Step -> folder of the checkpoints of a run, complete or not, the newest first."""
    names = os.listdir(root) if os.path.isdir(root) else []
    found = {int(match[1]): os.path.join(root, match[0]) for name in names if (match := NAME.fullmatch(name))}
    return dict(sorted(found.items(), reverse=True))


def seal(folder: str, step: int) -> None:
    """Write the manifest of a checkpoint. By the first process, when all have written their files and these are on disk."""
    if os.path.exists(os.path.join(folder, MANIFEST)):  # of an earlier checkpoint of this name
        os.remove(os.path.join(folder, MANIFEST))
    sizes = sync_files(folder)
    facts = {"kind": "finetune_checkpoint", "iteration": step, "files": sizes, "versions": versions()}
    write_json(os.path.join(folder, MANIFEST), sealed(facts, checksums_of(folder, sizes, MOST_THREADS)))


def check_sealed(folder: str) -> None:
    """Raise InputError, naming the file, unless all files of a checkpoint are as they were written."""
    manifest = read_manifest(os.path.join(folder, MANIFEST))
    checksums = checksums_in(manifest)
    check_sizes(folder, manifest)
    if checksums.keys() != {MANIFEST, *manifest["files"]}:
        raise InputError(f"checkpoint {folder} is damaged: manifest.json has not one checksum for each file")
    with ThreadPoolExecutor(MOST_THREADS) as pool:
        files = {name: wanted for name, wanted in checksums.items() if name != MANIFEST}
        for result in [pool.submit(check_file, folder, name, wanted) for name, wanted in files.items()]:
            result.result()


def newest_checkpoint(root: str) -> tuple[str | None, list[str]]:
    """The newest checkpoint of a run with all that was written (None: there is none), and a sentence for each passed over.

    Raises:
        InputError: there were complete ones, and all are damaged: the run would begin anew without a word
    """
    passed_over, damaged = list[str](), list[str]()
    for folder in step_folders(root).values():
        if not os.path.isfile(os.path.join(folder, MANIFEST)):
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


def find_checkpoint(root: str) -> str | None:
    """`newest_checkpoint`, looked for by the first process, which says what it passes over: all processes take the same.

    Raises:
        InputError: as `newest_checkpoint`, on all
    """
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0], passed_over = newest_checkpoint(root)
        except InputError as error:
            answer[1] = str(error)
        else:
            for sentence in passed_over:
                print(f"passed over: {sentence}", file=sys.stderr)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise InputError(answer[1])
    found: str | None = answer[0]
    return found


def set_aside(root: str, newer_than: int) -> list[str]:
    """Rename the checkpoints after a step, which a run that goes on from there has passed over; returns their new names.

    Under their old names the trainer would keep them, as the newest, instead of those that it saves from now on, or would
    write into them. What a kill has left of one is removed.
    """
    renamed = []
    for step, folder in step_folders(root).items():
        if step <= newer_than:
            continue
        if not any(os.path.exists(os.path.join(folder, name)) for name in (MANIFEST, STATE)):
            shutil.rmtree(folder)
            continue
        wanted = os.path.join(root, f"damaged_{os.path.basename(folder)}")
        names = (wanted if number == 1 else f"{wanted}_{number}" for number in itertools.count(1))
        renamed.append(next(name for name in names if not os.path.lexists(name)))
        os.rename(folder, renamed[-1])
    return renamed

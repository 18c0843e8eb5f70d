"""Folders that appear whole under their name, and vanish whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence

from megatron_cpt.checkpoint.layout import RELEASE, checkpoint_name, is_complete, iterations
from megatron_cpt.utils.files import fsync


def temporary_name(path: str) -> str:
    """Where a folder is written before it appears under its own name."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(parent, f".{name}.tmp")


def publish_folder(temporary: str, path: str) -> None:
    """Give a folder whose files are on disk its name, in place of what has that name."""
    fsync(temporary)
    replaced = temporary_name(path) + ".replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if os.path.exists(path):
        os.rename(path, replaced)  # kept until the new one has its name
    os.rename(temporary, path)
    fsync(os.path.dirname(os.path.abspath(path)))
    shutil.rmtree(replaced, ignore_errors=True)


def missing_parents(path: str) -> list[str]:
    """Folders above `path` that do not exist, the lowest first."""
    missing, parent = [], os.path.dirname(path)
    while not os.path.exists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    return missing


def remove_empty(folders: Sequence[str]) -> None:
    """Remove folders, the lowest first, in which nobody has put anything."""
    for folder in folders:
        with contextlib.suppress(OSError):
            os.rmdir(folder)


@contextlib.contextmanager
def atomic_folder(path: str) -> Iterator[str]:
    """A temporary folder beside `path` that takes its name when the block succeeds and vanishes when it fails."""
    path = os.path.realpath(path)  # a link keeps its place; `a/../b` is one folder, and needs no a
    temporary = temporary_name(path)
    made = missing_parents(temporary)
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        raise


def remove_unfinished(root: str) -> None:
    """Remove what saves and deletions that were killed have left below `root`."""
    for name in os.listdir(root) if os.path.isdir(root) else []:
        if name.startswith((".iter_", f".{RELEASE}")) and ".tmp" in name:
            shutil.rmtree(os.path.join(root, name), ignore_errors=True)


def to_delete(root: str, keep_last: int, keep_every: int | None, started_from: str) -> list[str]:
    """Checkpoints of training steps that retention does not keep.

    It keeps the newest `keep_last` complete ones, those at multiples of `keep_every`, the one the run started from, and what
    other software has saved there.
    """
    found = {iteration: folder for iteration, folder in _folders(root).items() if _is_ours(folder)}
    complete = [iteration for iteration in sorted(found, reverse=True) if is_complete(found[iteration])]
    kept = set(complete[:keep_last])
    if not complete:
        return []
    return [
        folder
        for iteration, folder in sorted(found.items())
        if iteration not in kept
        and iteration < complete[0]
        and not (keep_every and iteration % keep_every == 0)
        and os.path.realpath(folder) != os.path.realpath(started_from)
    ]


def set_aside_damaged(root: str, newer_than: int) -> list[str]:
    """Rename the checkpoints after a step that have all their bytes: a run that resumes from that step found them damaged.

    Under their old name they would count as the newest ones, for retention and for whoever wants the run's last weights.
    Returns their new names; nothing is deleted.
    """
    renamed = []
    for iteration, folder in sorted(_folders(root).items()):
        if iteration > newer_than and _is_ours(folder) and is_complete(folder):
            wanted = os.path.join(root, f"damaged_{checkpoint_name(iteration)}")
            names = (wanted if number == 1 else f"{wanted}_{number}" for number in itertools.count(1))
            renamed.append(next(name for name in names if not os.path.lexists(name)))
            os.rename(folder, renamed[-1])
    return renamed


def _folders(root: str) -> dict[int, str]:
    return {iteration: os.path.join(root, name) for iteration, name in iterations(root).items()}


def _is_ours(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "manifest.json"))


def make_tombstone(folder: str) -> str:
    """Rename a checkpoint so that it no longer counts; returns the name under which it is deleted."""
    tombstone = temporary_name(folder) + ".deleted"
    shutil.rmtree(tombstone, ignore_errors=True)
    os.rename(folder, tombstone)
    return tombstone

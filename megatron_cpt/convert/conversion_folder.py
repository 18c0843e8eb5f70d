"""A folder that several processes fill file by file, that appears whole, and that goes on where a killed attempt stopped."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import numpy as np
from rich.filesize import decimal

from megatron_cpt.checkpoint.background import ForkedWork, WorkerError
from megatron_cpt.checkpoint.folders import missing_parents, publish_folder, remove_empty, temporary_name
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import replacing
from megatron_cpt.utils.lock import is_named, open_lock, try_inherited
from megatron_cpt.utils.progress import ProgressBar

logger = logging.getLogger(__name__)

JOB = ".job"  # folder beside the files: what the job is, and a marker for each complete file
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class FileJob:
    """One file to write: `write(path, written)` writes it, forces it to disk, and tells `written` the bytes as they come.

    What it returns has to be made of lists, numbers and texts.
    """

    name: str
    bytes: int
    write: Callable[[str, Callable[[int], None]], Any]


@contextlib.contextmanager
def resumable_folder(path: str, identity: dict[str, Any]) -> Iterator[str]:
    """A temporary folder beside `path` that takes its name when the block succeeds.

    It vanishes when the block fails. When the process is killed or interrupted it stays, and the next call with the same
    `identity` (what goes in, and how) finds it as it was; with another one it begins anew.

    Raises:
        InputError: another process is at it
    """
    target = os.path.realpath(path)  # a link keeps its place, and what it leads to takes the folder's
    temporary = temporary_name(target)
    made = missing_parents(temporary)
    os.makedirs(os.path.join(temporary, JOB), exist_ok=True)
    try:
        with _locked(os.path.join(temporary, JOB, "description.json"), path) as job:
            if job.read() != json.dumps(identity):
                _clear(temporary, [])
                job.truncate(0)
                job.write(json.dumps(identity))
                job.flush()
            yield temporary
            shutil.rmtree(os.path.join(temporary, JOB))
            publish_folder(temporary, target)
    except BusyError:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{path} is unfinished; the same command goes on from here") from None
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty(made)
        if isinstance(error, OSError):
            raise InputError(f"{path} cannot be written: {error}") from error
        raise


class BusyError(InputError):
    """Another process is writing what this one was asked to write."""


@contextlib.contextmanager
def _locked(path: str, what: str) -> Iterator[TextIO]:
    """A file that only one process has at a time, at its beginning."""
    with open_lock(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", write_through=True) as file:
        if not (try_inherited(file) and is_named(file, path)):
            raise BusyError(f"{what} is being written by another process")
        file.seek(0)
        yield file


def _clear(folder: str, done: Sequence[FileJob]) -> None:
    """Remove everything but the description of the job, and the files that are complete with their markers."""
    kept = {JOB, *(job.name for job in done)}
    for name in set(os.listdir(folder)) - kept:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
    markers = {os.path.basename(_marker(folder, job)) for job in done}
    for name in set(os.listdir(os.path.join(folder, JOB))) - markers - {"description.json"}:
        os.remove(os.path.join(folder, JOB, name))


def file_stats(folder: str, names: Sequence[str]) -> dict[str, list[int]]:
    """Sizes and times of change of files: whether they are still the same."""
    stats = {name: os.stat(os.path.join(folder, name)) for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def write_files(folder: str, jobs: Sequence[FileJob], num_workers: int, description: str) -> list[Any]:
    """Write the files that are not there yet, in forked processes; what each job returned, now or in an earlier attempt.

    Whatever else an earlier attempt has left in the folder is removed.

    Raises:
        InputError, OSError: a job failed; the text says how
    """
    done = [job for job in jobs if os.path.exists(_marker(folder, job))]
    todo = [job for job in jobs if not os.path.exists(_marker(folder, job))]
    _clear(folder, done)
    count = min(num_workers, len(todo))
    workers: list[ForkedWork[None]] = []
    with _Meter(description, sum(job.bytes for job in jobs), sum(job.bytes for job in todo), count) as meter:
        try:
            for number in range(count):
                workers.append(ForkedWork(partial(_write_some, folder, todo[number::count], meter, number)))
            while any(worker.running() for worker in workers):
                time.sleep(SECONDS_BETWEEN_LOOKS)
                meter.show()
                for worker in workers:
                    if not worker.running():
                        worker.result()
            for worker in workers:
                worker.result()
        except WorkerError as error:
            text = str(error)
            system = text.startswith("[Errno")
            raise OSError(text) if system else InputError(text.removeprefix("InputError: ")) from error
        finally:
            for worker in workers:
                worker.kill()
    return [_take_result(folder, job) for job in jobs]


def _write_some(folder: str, jobs: Sequence[FileJob], meter: _Meter, number: int) -> None:
    for job in jobs:
        result = job.write(os.path.join(folder, job.name), partial(meter.advance, number))
        with replacing(_marker(folder, job)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(result, file)


def _marker(folder: str, job: FileJob) -> str:
    """Is there when the file is complete; holds what the job returned, as JSON."""
    return os.path.join(folder, JOB, f"{job.name}.done")


def _take_result(folder: str, job: FileJob) -> Any:
    with open(_marker(folder, job), encoding="utf-8") as file:
        return json.load(file)


class _Meter:
    """Bytes written by all processes: a bar while they are, and a line at the end."""

    def __init__(self, description: str, total: int, todo: int, processes: int) -> None:
        self._description, self._total, self._before = description, total, total - todo
        self._counts = np.frombuffer(mmap.mmap(-1, 8 * max(processes, 1)), np.int64)  # shared with the forked processes
        self._bar = ProgressBar(total, self._before, description)

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            earlier = f", after {decimal(self._before)} in an earlier attempt" if self._before else ""
            done = f"{decimal(self._total - self._before)} in {self._bar.seconds():.1f} s ({self._rate()}){earlier}"
            logger.info(f"{self._description}: {done}")

    def advance(self, number: int, count: int) -> None:
        """Called by process `number`."""
        self._counts[number] += count

    def show(self) -> None:
        """Called by the parent."""
        done = self._before + int(self._counts.sum())
        self._bar.show(done, f"{decimal(done)} of {decimal(self._total)}, {self._rate()}")

    def _rate(self) -> str:
        return decimal(int(self._counts.sum() / max(self._bar.seconds(), 1e-9))) + "/s"

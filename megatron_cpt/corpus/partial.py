"""A corpus in the making: `PREFIX.partial/`, which survives kill -9 and is turned into PREFIX.* by renames at the very end.

    tokens.bin      what PREFIX.bin will be
    lengths.bin     int32 tokens of each document
    metadata.jsonl  one line a document, when metadata was asked for
    errors.jsonl    one line a document that was left out
    documents.bin   24 bytes a document (`holdout.RECORD`), when some are to be held out
    state.json      the run it belongs to, how many units are complete, the sizes the files then had, and all counts

Every few seconds the files are synced and state.json is replaced; a resumed run cuts the files back to those sizes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from megatron_cpt.corpus.encoding import EncodedUnit
from megatron_cpt.utils.compare import describe_difference
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.files import atomic_file
from megatron_cpt.utils.lock import is_named, locked

STREAMS = ("tokens.bin", "lengths.bin", "metadata.jsonl", "errors.jsonl", "documents.bin")
SECONDS_BETWEEN_CHECKPOINTS = 10.0


@dataclass
class CorpusCounts:
    """Running totals, all of them in state.json. `records`, `documents`: per input file."""

    records: list[int]
    documents: list[int]
    tokens: int = 0
    text_bytes: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    read_bytes: int = 0
    seconds: float = 0.0


class PartialCorpus:
    """The folder PREFIX.partial, open for one run at a time. Use `open_partial`."""

    def __init__(self, folder: Path, run: dict[str, Any], encoder: str, sources: int, streams: dict[str, IO[bytes]]) -> None:
        self.folder, self._run, self._encoder, self._streams = folder, run, encoder, streams
        self.units = 0
        self.counts = CorpusCounts([0] * sources, [0] * sources)
        self.digest = hashlib.sha256()
        self._saved_at = time.monotonic()
        self._whole = True
        state = read_state(folder)
        if state is not None:
            self._resume(state)
        self._began = time.monotonic() - self.counts.seconds

    def _resume(self, state: dict[str, Any]) -> None:
        """Go back to the last checkpoint."""
        self.units = state["units"]
        found = state["counts"]
        self.counts = CorpusCounts(
            **found | {"skipped": Counter(found["skipped"]), "languages": Counter(found["languages"])}
        )
        for name, stream in self._streams.items():
            size = (self.folder / name).stat().st_size
            if size < state["sizes"][name]:
                wanted = f"expected at least {state['sizes'][name]}"
                raise InputError(f"{self.folder / name}: found {size} bytes; {wanted}; remove {self.folder} to begin anew")
            stream.truncate(state["sizes"][name])
            stream.seek(state["sizes"][name])
        with (self.folder / "tokens.bin").open("rb") as stream:
            while data := stream.read(1 << 22):
                self.digest.update(data)

    def add(self, unit: EncodedUnit, errors: bytes) -> None:
        """Append the documents of the next unit and count them. `errors`: lines for errors.jsonl."""
        self._whole = False
        data = unit.tokens.view(np.uint8).data
        stream = self._streams["tokens.bin"]
        begin = stream.tell()
        stream.write(data)
        if hasattr(os, "posix_fadvise"):  # begins to write it to disk, so that no checkpoint has to wait for much
            os.posix_fadvise(stream.fileno(), begin, len(data), os.POSIX_FADV_DONTNEED)
        self.digest.update(data)
        self._streams["lengths.bin"].write(unit.lengths.astype("<i4", copy=False).tobytes())
        self._streams["metadata.jsonl"].write(unit.metadata)
        self._streams["errors.jsonl"].write(errors)
        self._streams["documents.bin"].write(unit.documents)
        counts = self.counts
        for part in unit.parts:
            counts.records[part.source] += part.records
            counts.documents[part.source] += part.documents
            counts.skipped.update(problem.reason for problem in part.problems)
        counts.tokens += unit.tokens.size
        counts.text_bytes += unit.text_bytes
        counts.characters += unit.characters
        counts.languages.update(unit.languages)
        counts.compared += len(unit.audit)
        counts.read_bytes += unit.read_bytes
        self.units += 1
        self._whole = True

    def seconds(self) -> float:
        """How long this corpus has been in the making, in all runs."""
        return time.monotonic() - self._began

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved_at > SECONDS_BETWEEN_CHECKPOINTS

    def checkpoint(self) -> None:
        """Make what was added so far survive anything."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        self.counts.seconds = self.seconds()
        sizes = {name: stream.tell() for name, stream in self._streams.items()}
        self._write_state({"units": self.units, "sizes": sizes, "counts": vars(self.counts)})
        self._saved_at = time.monotonic()

    def last_checkpoint(self) -> None:
        """On the way out after an error: keep what is complete, if the disk allows; the checkpoint before stays good."""
        state = read_state(self.folder)
        if not self._whole or (state is not None and "publish" in state):
            return
        with suppress(OSError):
            self.checkpoint()

    def announce(self, files: dict[str, str]) -> None:
        """From here on the corpus is complete: even after a crash only renames are left ({file here: suffix of PREFIX})."""
        self._write_state({"units": self.units, "publish": files})

    def _write_state(self, state: dict[str, Any]) -> None:
        with atomic_file(self.folder / "state.json") as stream:
            stream.write(orjson.dumps({"run": self._run, "encoder": self._encoder, **state}))


def partial_folder(prefix: str) -> Path:
    """Where the corpus `prefix` is made."""
    return Path(prefix + ".partial")


def read_state(folder: Path) -> dict[str, Any] | None:
    """The content of state.json, or None."""
    try:
        state: dict[str, Any] = orjson.loads((folder / "state.json").read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise InputError(f"{folder}/state.json: not valid JSON ({error}); remove {folder} to begin anew") from None
    return state


def discard(folder: Path) -> None:
    """Remove a partial corpus, its state first: what is left of one that has none is never gone on with."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the partial corpus `folder` for this process. InputError: another process does.

    The lock goes with the process, however it ends. The file stays out of the folder, which is removed at the end.
    """
    path = folder.with_name(folder.name + ".lock")
    busy = f"{folder}: another process is writing this corpus; expected one at a time"
    with locked(path, busy) as file:
        if not is_named(file, path):
            raise InputError(busy)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what a run leaves that is killed after its last rename: the lock, and a folder that nothing goes on with."""
    if not folder.exists() and not folder.with_name(folder.name + ".lock").exists():
        return
    with suppress(InputError), lock(folder):  # another process may be writing after all
        if read_state(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder when writing into it fails: an error of `write` does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise InputError(f"{folder}: cannot be written ({error.strerror}); what was safe in it stays") from None


@contextmanager
def open_partial(folder: Path, run: dict[str, Any], encoder: str, sources: int) -> Iterator[PartialCorpus]:
    """Begin, or go on with, the corpus in `folder`; `run`: everything its content depends on, `encoder`: what makes it.

    Leaving on an error keeps what the last checkpoint has, for a later run to go on with, or nothing when it has nothing.
    InputError: it holds another run.
    """
    state = read_state(folder)
    if state is not None and state["run"] != run:
        found = describe_difference(state["run"], run)
        raise InputError(f"{folder}: an unfinished corpus of another run: {found}; give the settings of then, or overwrite")
    if state is None:
        discard(folder)
    folder.mkdir(exist_ok=True)
    streams: dict[str, IO[bytes]] = {}
    try:
        for name in STREAMS:
            streams[name] = (folder / name).open("r+b" if state is not None else "wb")
        yield PartialCorpus(folder, run, encoder, sources, streams)
    finally:
        for stream in streams.values():
            with suppress(OSError):  # a full disk shows again as the rest is flushed; state.json knows how much is good
                stream.close()
        if sys.exc_info()[0] is not None and (read_state(folder) or {}).get("units", 0) == 0:
            discard(folder)

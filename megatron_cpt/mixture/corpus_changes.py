"""While a run reads its corpora: are the files still those that preprocessing wrote, whose checksums are in the manifests?

Sizes are compared when the corpora are opened. Contents take as long as reading everything, so a thread of low priority
compares them in the background, once for each version of a file, and a file that is written to is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.corpus.indexed_dataset import FileReader
from megatron_cpt.mixture.mixture import Corpus
from megatron_cpt.utils.errors import RunError
from megatron_cpt.utils.files import atomic_file

CHECKED = "checked_files.json"
CHUNK = 1 << 22  # bytes
SECONDS_BETWEEN_LOOKS = 30.0


@dataclass(frozen=True)
class ExpectedFile:
    """A file of a corpus, and what its manifest says of it."""

    reader: FileReader
    manifest: str
    sha256: str

    @property
    def path(self) -> str:
        """Where it lies."""
        return os.path.realpath(self.reader.path)


def expected_files(corpora: Sequence[Corpus]) -> list[ExpectedFile]:
    """The files of these corpora, each once, the small ones first."""
    files = [
        ExpectedFile(corpus.data.files[name], f"{corpus.prefix}.json", info.sha256)
        for corpus in corpora
        for name, info in corpus.manifest.files.items()
    ]
    return sorted({file.path: file for file in files}.values(), key=lambda file: file.reader.size)


class FileChecks:
    """Compares files with their checksums in a thread; `poll` and `finish` say what is wrong with one.

    Context manager. What was found right is noted in a file of the run's folder, so that a run that is started again does
    not read everything again.
    """

    def __init__(self, files: Sequence[ExpectedFile], folder: str, remember: bool = True) -> None:
        self._files, self._record, self._remember = files, Path(folder, CHECKED), remember
        self._checked = self._recorded()
        self._problem: str | None = None
        self._stop = threading.Event()
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._compare_all, name="file-checks", daemon=True)

    def __enter__(self) -> FileChecks:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(1.0)  # a read that hangs ends with the process

    def poll(self) -> None:
        """RunError: a file is not the one that its manifest describes."""
        now = time.monotonic()
        if now - self._looked > SECONDS_BETWEEN_LOOKS and not self._thread.is_alive():
            self._looked = now
            self._look_again()
        if self._problem is not None:
            raise RunError(self._problem)

    def finish(self, seconds: float) -> list[str]:
        """Wait for what is left to compare, but not longer; returns the paths that were not. RunError: as `poll`."""
        end = time.monotonic() + seconds
        self._thread.join(seconds)
        if not self._thread.is_alive():  # files may have been written to since they were compared
            self._look_again()
            self._thread.join(max(0.0, end - time.monotonic()))
        if self._problem is not None:
            raise RunError(self._problem)
        return [file.path for file in self._files if self._outdated(file)]

    def _look_again(self) -> None:
        """Compare the files that were not, or not as they are now."""
        if self._problem is None and any(self._outdated(file) for file in self._files):
            self._thread = threading.Thread(target=self._compare_all, name="file-checks", daemon=True)
            self._thread.start()

    def _outdated(self, file: ExpectedFile) -> bool:
        """Whether this version of a file was not compared."""
        try:
            return self._checked.get(file.path) != [file.sha256, *file.reader.version()]
        except OSError:
            return True

    def _compare_all(self) -> None:
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread only (Linux)
        for file in self._files:
            try:
                if not self._outdated(file):
                    continue
                before = file.reader.version()
                found = self._sha256(file.reader)
                if found is None:
                    return
                if found != file.sha256:
                    self._problem = (
                        f"{file.path}: sha256 is {found}; expected {file.sha256}, as {file.manifest} says: the file was "
                        "replaced or damaged, and what this run has read of it is not what was preprocessed"
                    )
                    return
                self._checked[file.path] = [file.sha256, *before]
            except RunError as error:
                self._problem = str(error)
                return
            except OSError:  # the run itself will meet it, if it needs the file
                continue
        self._write()

    def _sha256(self, reader: FileReader) -> str | None:
        """Of a file as the run has opened it; None: it is not wanted any more."""
        digest = hashlib.sha256()
        for start in range(0, reader.size, CHUNK):
            if self._stop.is_set():
                return None
            digest.update(reader.read(start, min(CHUNK, reader.size - start)))
        return digest.hexdigest()

    def _recorded(self) -> dict[str, list[int | str]]:
        with suppress(OSError, ValueError):
            content = json.loads(self._record.read_bytes())
            if isinstance(content, dict):
                return content
        return {}

    def _write(self) -> None:
        if self._remember and self._files:
            with suppress(OSError), atomic_file(self._record) as stream:  # a record is no reason not to go on
                stream.write(json.dumps(self._checked, indent=1).encode())

"""CRC-32 checksums of a checkpoint's files: written into manifest.json by a save, compared before the files are used.

Small files are checked wherever a checkpoint is looked for, those with tensors before a run loads them: in threads, and each
rank a share.
"""

from __future__ import annotations

import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_cpt.utils.errors import InputError, brief

CHUNK_BYTES = 4 << 20
MANIFEST = "manifest.json"
FIELD = "crc32"  # {file: checksum, as 8 hexadecimal digits}; that of manifest.json itself is of all else in it
TENSORS = ".distcp"
MOST_THREADS = 8  # of one process: that is more than most disks deliver (a thread reads 1 to 3 GB/s from memory)


class CancelledError(Exception):
    """Nobody wants the checksum any more."""


def file_checksum(path: str, cancelled: Callable[[], bool] = lambda: False) -> str:
    """Checksum of a file as long as it is now, read piece by piece; a disk that fails is an OSError.

    Raises:
        CancelledError: `cancelled()` is true
    """
    value = 0
    with open(path, "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size  # what grows meanwhile, such as a log, is not followed
        while piece := file.read(min(left, CHUNK_BYTES)):
            left -= len(piece)
            if cancelled():
                raise CancelledError
            value = zlib.crc32(piece, value)  # other threads run meanwhile
    return f"{value:08x}"


def checksums_of(folder: str, names: Iterable[str], threads: int) -> dict[str, str]:
    """Checksums of files in a folder, several read at a time."""
    names = list(names)
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(names, pool.map(lambda name: file_checksum(os.path.join(folder, name)), names), strict=True))


def sealed(manifest: Mapping[str, Any], checksums: Mapping[str, str]) -> dict[str, Any]:
    """A manifest with the checksums of the files beside it, and its own."""
    content = json.loads(json.dumps(dict(manifest) | {FIELD: dict(sorted(checksums.items()))}))  # as it will be read
    content[FIELD][MANIFEST] = _own_checksum(content)
    return dict(content)


def _own_checksum(manifest: Mapping[str, Any]) -> str:
    files = {name: value for name, value in manifest[FIELD].items() if name != MANIFEST}
    text = json.dumps(dict(manifest) | {FIELD: files}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def checksums_in(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Checksums by file name; empty for a checkpoint that was written before there were any.

    Raises:
        InputError: they are something else
    """
    found = manifest.get(FIELD, {})
    if not isinstance(found, dict):
        raise InputError(f"manifest.json: {FIELD} is {brief(found)}; expected {{file: checksum}}")
    for name, value in found.items():
        if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value)):
            raise InputError(f"manifest.json: {FIELD} of {brief(name)} is {brief(value)}; expected 8 hexadecimal digits")
    return found


def check_seal(manifest: Mapping[str, Any], path: str) -> None:
    """Raise InputError if a manifest is not as it was written."""
    wanted = checksums_in(manifest).get(MANIFEST)
    if wanted is not None and wanted != (found := _own_checksum(manifest)):
        raise InputError(f"{path} is damaged: the checksum of its content is {found}; expected {wanted}")


def check_small_files(folder: str, manifest: Mapping[str, Any]) -> None:
    """Raise InputError, naming the file, if one without tensors is not as it was written: some MB are read."""
    for name, wanted in checksums_in(manifest).items():
        if name != MANIFEST and not name.endswith(TENSORS):
            check_file(folder, name, wanted)


def check_file(folder: str, name: str, wanted: str, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Raise InputError if a file cannot be read, or is not as it was written."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):  # nor a device, which may have no end
        raise InputError(f"checkpoint {folder} is damaged: {name} is missing")
    try:
        found = file_checksum(path, cancelled)
    except OSError as error:
        raise InputError(f"checkpoint {folder} is damaged: {name} cannot be read ({error.strerror})") from error
    if found != wanted:
        raise InputError(f"checkpoint {folder} is damaged: {name} has the checksum {found}; manifest.json says {wanted}")


def share_of(files: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """Files that one of several ranks checks, of {name: bytes}: about as many bytes as each other has, the largest first."""
    shares: list[tuple[int, int, list[str]]] = [(0, number, []) for number in range(world_size)]
    for name, size in sorted(files.items(), key=lambda item: (-item[1], item[0])):
        taken, number, names = min(shares, key=lambda share: share[:2])
        shares[number] = (taken + size, number, [*names, name])
    return shares[rank][2]


class TensorCheck:
    """This rank's share of the files with tensors, compared with their checksums in the background.

    Attributes:
        folder: the checkpoint
        unchecked: the checkpoint has no checksums: it was written by an earlier version
    """

    def __init__(self, folder: str, manifest: Mapping[str, Any], rank: int, world_size: int, threads: int) -> None:
        """Begin.

        Args:
            folder: the checkpoint
            manifest: its manifest.json
            rank: number of this process among those that share the work
            world_size: number of those processes
            threads: how many files this process reads at a time
        """
        self.folder = folder
        checksums = {name: value for name, value in checksums_in(manifest).items() if name.endswith(TENSORS)}
        self.unchecked = not checksums_in(manifest)
        sizes = {name: manifest.get("files", {}).get(name, 0) for name in checksums}
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._damage: str | None = None
        self._error: BaseException | None = None
        share = [(name, checksums[name]) for name in share_of(sizes, rank, world_size)]
        arguments = (share, max(1, min(threads, MOST_THREADS)))
        self._thread = threading.Thread(target=self._run, args=arguments, name="check-tensors", daemon=True)
        self._thread.start()

    def _run(self, share: Iterable[tuple[str, str]], threads: int) -> None:
        def check(item: tuple[str, str]) -> None:
            check_file(self.folder, *item, self._cancelled.is_set)

        try:
            with ThreadPoolExecutor(threads, "check-tensors") as pool:
                for result in [pool.submit(check, item) for item in share]:
                    result.result()
        except InputError as error:
            self._damage = str(error)
        except CancelledError:
            pass
        except BaseException as error:  # raised again where the result is asked for
            self._error = error
        finally:
            self._done.set()

    def wait(self, stopping: Callable[[], bool]) -> None:
        """Wait until all is read, or somebody asks to stop."""
        while not self._done.wait(0.05) and not stopping():
            pass

    def damage(self) -> str | None:
        """Which file of the share is damaged, in a sentence; None: none is. Waits for the end.

        Raises:
            BaseException: what went wrong by itself
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._damage

    def cancel(self) -> None:
        """Read no further."""
        self._cancelled.set()

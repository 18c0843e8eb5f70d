"""Files that only one process holds at a time. The system lets go of a lock however its process ends.

Not the filelock library: its locks are flock's, which forked workers inherit and keep after a killed run, and which many
cluster file systems do not pass on to other machines. `locked` takes POSIX locks, which are a process's own. `try_inherited`
is for the few that a child has to keep.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from megatron_cpt.utils.errors import InputError


def open_lock(path: str | Path) -> BinaryIO:
    """A lock file, made if it is not there, opened for reading and writing; what is in it stays.

    Its name can be guessed, so that others may have put something there: what a symbolic link points to is not opened.

    Raises:
        InputError: it is a symbolic link or no plain file, or cannot be made
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"lock file {path} is a symbolic link; expected a plain file, or none") from None
        raise InputError(f"lock file {path} cannot be opened: {error.strerror}; expected a folder to write to") from error
    file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 (for the caller to close)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise InputError(f"lock file {path} is no plain file; expected one, or none")
    return file


@contextmanager
def locked(path: str | Path, busy: str) -> Iterator[BinaryIO]:
    """Hold a lock file, which is yielded, for this process and not for those that it forks.

    Raises:
        InputError: `busy`, another process holds it; or as `open_lock`
    """
    with open_lock(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(busy) from error
        yield file


def share(file: BinaryIO) -> None:
    """Let others share a lock from now on, or wait until it can be shared: nobody can have it alone while one does."""
    fcntl.lockf(file, fcntl.LOCK_SH)


def try_inherited(file: IO[Any]) -> bool:
    """Take a lock that goes on to children who inherit the open file; False: another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def wait_for(file: BinaryIO) -> None:
    """Take a lock as `try_inherited` does, as soon as nobody else holds it."""
    fcntl.flock(file, fcntl.LOCK_EX)


def is_named(file: IO[Any], path: str | Path) -> bool:
    """Whether an open lock file is the one of this name still: its owner may have removed it before we had the lock."""
    return os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))

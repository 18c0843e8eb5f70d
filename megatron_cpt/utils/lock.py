"""Files that only one process holds at a time."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

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

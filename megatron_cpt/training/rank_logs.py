"""Where the output of a rank other than the first goes: a file of its own, down to what C libraries write."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TextIO

from megatron_cpt.utils.logs import beside_screen


def rank_file(folder: str, rank: int) -> str:
    """The log of one rank in the folder of a run."""
    return os.path.join(folder, "logs", f"rank_{rank:05d}.log")


@contextlib.contextmanager
def output_to_file(path: str, rank: int) -> Iterator[tuple[TextIO, TextIO]]:
    """Append stdout and stderr of this process to a file for the length of the block; gives that file and the real stderr.

    An exception that leaves the block is written to the file too; whoever catches it further out has the real stderr again.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    with (
        open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace") as file,
        os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as real_stderr,
    ):
        for number in saved:
            os.dup2(file.fileno(), number)  # C libraries, and Python's logging handlers that hold the old sys.stderr
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), beside_screen(real_stderr):
                now = time.strftime("%Y-%m-%d %H:%M:%S %z")
                print(f"--- {now} rank {rank} on {socket.gethostname()}, process {os.getpid()}", file=file)
                try:
                    yield file, real_stderr
                except BaseException:
                    traceback.print_exc(file=file)
                    raise
        finally:
            for number, real in saved.items():
                os.dup2(real, number)
                os.close(real)

"""Where the messages of a tool go: to stderr, and to a file if one is wanted.

Modules speak through `logging.getLogger(__name__)`. What they say is heard once `start_logs` was called, as every tool does
(config/cli.py); importing the package sets up nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

from megatron_cpt.utils.errors import InputError, Refusals
from megatron_cpt.utils.input_files import shown

PACKAGE = "megatron_cpt"
LEVELS = ("debug", "info", "warning", "error")
PREFIXES = {logging.WARNING: "WARNING: ", logging.ERROR: "error: "}
ON_SCREEN = "on_screen"
"""Name in `extra` of what the screen shows instead of the message: the same in colour, or "" where it is there already."""
FILE_FORMAT = "%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s"
FILE_TIME = "%Y-%m-%dT%H:%M:%S%z"


def start_logs(level: str = "info", path: str | None = None) -> None:
    """From now on messages of this level and above are on stderr and, appended, in a file. A later call takes its place.

    Raises:
        InputError: there is no such level, or the file cannot be opened
    """
    refusals, rank = Refusals(), rank_of(os.environ)
    handlers: list[logging.Handler] = [ScreenHandler(rank)]
    if level.lower() not in LEVELS:
        refusals.add(InputError(f"log_level is {shown(level)}; expected one of {', '.join(LEVELS)}"))
    with refusals.noted():
        if path is not None:
            handlers.append(LogFileHandler(path, rank))
    refusals.raise_any()
    logger = logging.getLogger(PACKAGE)
    for old in list(logger.handlers):
        if isinstance(old, ScreenHandler | LogFileHandler):  # and none that somebody else has set
            logger.removeHandler(old)
            old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False  # libraries give the root logger a handler, which would say everything again


def rank_of(environment: Mapping[str, str]) -> int:
    """The rank of this process among those of torchrun (or of srun with its variables); 0 where there are no others."""
    rank, world_size = (environment.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not all(re.fullmatch(r"\d{1,9}", value, re.ASCII) for value in (rank, world_size)):
        return 0
    return int(rank) if int(rank) < int(world_size) else 0  # what cannot be is named in config/cli.py


class ScreenHandler(logging.Handler):
    """Writes to what is stderr at the time, be it that of a test or of a live progress line.

    Of the first rank everything; of another what is at least a warning, with its number, and everything into the file that
    it writes stderr to meanwhile (see `beside_screen`).

    Attributes:
        screen: the real stderr, where `sys.stderr` is a file of this rank
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.screen: TextIO | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; what goes wrong (a broken pipe) is for the caller, as with `print`."""
        text = PREFIXES.get(record.levelno, "") + record.getMessage()
        text = getattr(record, ON_SCREEN, text)
        if not text:
            return
        if self.rank == 0 or self.screen is not None:
            write_line(sys.stderr, text)
        if self.rank > 0 and record.levelno >= logging.WARNING:
            write_line(self.screen or sys.stderr, f"[rank {self.rank}] {text}")


def write_line(stream: TextIO, text: str) -> None:
    """At once: of several processes with one stream each has lines of its own, and a live line is redrawn once."""
    stream.write(f"{text}\n")
    stream.flush()


class LogFileHandler(logging.FileHandler):
    """Appends records to a file, with time, level, rank and where they come from; of rank N > 0 to FILE.rankN.

    Raises:
        InputError: it cannot be opened
    """

    def __init__(self, path: str, rank: int) -> None:
        self.path = f"{os.path.expanduser(path)}.rank{rank}" if rank else os.path.expanduser(path)
        self.failed = False
        try:
            super().__init__(self.path, encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"log_file is {shown(self.path)}: {reason}; expected a file to append to") from error
        self.setFormatter(logging.Formatter(FILE_FORMAT.format(rank=rank), FILE_TIME))

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk ends no tool for its log's sake: say so once, and go on."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        if not self.failed:
            self.failed = True
            print(f"WARNING: log_file {self.path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """What could not be written is lost, as was said."""
        with contextlib.suppress(OSError):
            super().close()


def record_traceback(logger: logging.Logger) -> None:
    """Have the exception that is handled in the log file; on the screen somebody else shows it."""
    logger.critical("ended by an error", exc_info=True, extra={ON_SCREEN: ""})


@contextlib.contextmanager
def beside_screen(screen: TextIO) -> Iterator[None]:
    """For the length of the block `sys.stderr` is a file of this rank, and `screen` the real one, which has warnings too."""
    handlers = [handler for handler in logging.getLogger(PACKAGE).handlers if isinstance(handler, ScreenHandler)]
    for handler in handlers:
        handler.screen = screen
    try:
        yield
    finally:
        for handler in handlers:
            handler.screen = None

"""Work in a forked copy of this process, which sees the memory as it was at the fork whatever happens here afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import torch

Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# What a job's scheduler, a launcher or Ctrl-C sends to a whole group of processes. The run decides what that means; a
# checkpoint that is being written is finished in the meantime.
SIGNALS_OF_THE_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WorkerError(Exception):
    """The work failed; the text says why."""


class ForkedWork(Generic[Result]):
    """One piece of work in a forked process; its result, or its error's text, comes back through a pipe.

    The child has the parent's memory as it was (copy on write, nothing is copied before either of them writes), but none of
    its threads and open files: it must stay away from process groups and devices. It dies with its parent.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        """Fork. Raises OSError when no process can be started."""
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # before the fork: loading takes locks
        parent = os.getpid()
        self._pipe, write_end = os.pipe()
        # A signal between the fork and the child's own settings would run the parent's handlers in the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_RUN)
        try:
            self._pid = os.fork()
            if self._pid == 0:
                _run_in_child(work, write_end, parent, libc, before)
        except OSError:
            os.close(self._pipe)
            raise
        finally:
            os.close(write_end)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._received = bytearray()
        self._exit_code: int | None = None

    def running(self) -> bool:
        """Whether the work goes on; takes what has come back so far."""
        self._receive(wait=False)
        return self._exit_code is None

    def result(self) -> Result:
        """Wait for the end of the work.

        Raises:
            WorkerError: the work raised an error, or the process was killed
        """
        self._receive(wait=True)
        if self._exit_code != 0:
            raise WorkerError(f"the writing process ended with exit code {self._exit_code}")
        result, error = pickle.loads(self._received)
        if error is not None:
            raise WorkerError(error)
        return result

    def kill(self) -> None:
        """End the work at once."""
        if self._exit_code is None:
            os.kill(self._pid, signal.SIGKILL)
            self._receive(wait=True)

    def _receive(self, wait: bool) -> None:
        if self._exit_code is not None:
            return
        os.set_blocking(self._pipe, wait)
        try:
            while chunk := os.read(self._pipe, 1 << 20):
                self._received += chunk
        except BlockingIOError:
            return
        os.close(self._pipe)
        self._exit_code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def error_text(error: BaseException) -> str:
    """One line about an error; the operating system's own words where a library wraps them in its own (torch.save)."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return str(cause)
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _run_in_child(
    work: Callable[[], Any], write_end: int, parent: int, libc: ctypes.CDLL | None, mask: set[int | signal.Signals]
) -> NoReturn:
    """Everything the child does. It never returns: what the parent has on its stack must not run twice."""
    exit_code = 1
    try:
        gc.disable()  # destructors of the parent's objects (process groups, device memory) must not run here
        _leave_the_run(write_end, parent, libc, mask)
        outcome: tuple[Any, str | None]
        try:
            outcome = (work(), None)
        except Exception as error:  # whatever it is, the parent has to hear of it
            outcome = (None, error_text(error))
        with open(write_end, "wb") as pipe:
            pickle.dump(outcome, pipe)
        exit_code = 0
    finally:
        os._exit(exit_code)


def _leave_the_run(keep: int, parent: int, libc: ctypes.CDLL | None, mask: set[int | signal.Signals]) -> None:
    """Cut what ties the child to the run, except the pipe `keep`, standard output and standard error."""
    for number in SIGNALS_OF_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if libc is not None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    # A connection is only seen to close when nobody holds it any more: with copies here, the death of the parent would
    # stay hidden from the other ranks for as long as the child lives.
    for descriptor in map(int, os.listdir("/dev/fd")):
        if descriptor > 2 and descriptor != keep:
            with contextlib.suppress(OSError):  # the one that listed the folder
                os.close(descriptor)
    torch.set_num_threads(1)  # the threads of the parent's pool do not exist here, and waiting for them never ends

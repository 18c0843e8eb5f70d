"""A forked writer brings back results and errors, outlives the signals of the run, and dies with its parent."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint.background import ForkedWork, WorkerError, error_text


def test_a_result_larger_than_a_pipe_comes_back() -> None:
    worker = ForkedWork(lambda: b"x" * 10_000_000)
    while worker.running():
        time.sleep(0.001)
    assert worker.result() == b"x" * 10_000_000


def test_it_sees_memory_as_it_was() -> None:
    tensor = torch.ones(1000)
    started = time.monotonic()
    worker = ForkedWork(lambda: (time.sleep(0.3), tensor.sum().item())[1])
    tensor.zero_()
    assert worker.running()
    assert worker.result() == 1000
    assert time.monotonic() - started > 0.3


def test_errors_come_back_in_the_words_of_the_system() -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    with pytest.raises(WorkerError, match=r"No space left on device: 'somewhere'"):
        ForkedWork(full).result()
    with pytest.raises(WorkerError, match="ZeroDivisionError: "):
        ForkedWork(lambda: 1 // 0).result()

    class FullDisk(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises((OSError, RuntimeError)) as caught:
        torch.save(torch.ones(10), FullDisk())
    assert "No space left on device" in error_text(caught.value)


def test_a_killed_worker_is_an_error() -> None:
    worker = ForkedWork(lambda: time.sleep(60))
    worker.kill()
    with pytest.raises(WorkerError, match="exit code -9"):
        worker.result()


def test_the_signals_of_the_run_do_not_reach_it(tmp_path: Path) -> None:
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        ready = tmp_path / "ready"
        worker = ForkedWork(lambda: (ready.touch(), time.sleep(0.3), "written")[2])
        while not ready.exists():
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(worker._pid, number)
        assert worker.result() == "written"
        assert not calls
        os.kill(os.getpid(), signal.SIGTERM)  # the run still has its own handler
        assert calls == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def parent_of_a_worker(path: str) -> None:
    ForkedWork(lambda: (Path(path).write_text(str(os.getpid())), time.sleep(60)))
    time.sleep(60)


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    parent = multiprocessing.get_context("fork").Process(target=parent_of_a_worker, args=(str(path),))
    parent.start()
    while not (path.exists() and path.read_text()):
        time.sleep(0.01)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{path.read_text()}/stat").exists():
        if Path(f"/proc/{path.read_text()}/stat").read_text().split()[2] == "Z":
            break  # dead; whoever inherits it collects it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_connection_closes_though_a_worker_runs(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ready = tmp_path / "ready"
    worker = ForkedWork(lambda: (ready.touch(), time.sleep(60)))
    while not ready.exists():
        time.sleep(0.01)
    ours.close()
    theirs.settimeout(2)
    assert theirs.recv(1) == b""  # the end, at once
    theirs.close()
    worker.kill()

"""StopRequests to save or to stop (signals, a time limit, files in the run's folder) and processes that are gone.

A request that reaches one rank reaches all of them within a second, through the store that the process groups were made
with: no collective is needed, so it arrives whatever the ranks are doing. A thread of each process watches.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from megatron_cpt.utils.errors import ProcessDiedError, StopRequestedError

logger = logging.getLogger(__name__)

__all__ = ["ProcessDiedError", "StopController", "StopRequestedError", "StopRequests"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE, SAVE_FILE = "stop_now", "save_now"
POLL_SECONDS = 0.5


@dataclass
class StopRequests:
    """What was asked for so far: written by signal handlers and the watching thread, read by the loop."""

    stop: str | None = None
    """Why to save and stop; None: nobody asked."""
    save: bool = False
    """Save after this step and go on."""

    def stopping(self) -> bool:
        """Whether to stop."""
        return self.stop is not None


class StopController:
    """Listens for requests, and for dead processes, for the length of the block.

    Until `working` is called there is nothing to save: in a run of one process a request then raises StopRequestedError in
    the main thread. Among several it waits until they can agree: one that left by itself would be waited for.
    """

    def __init__(self, folder: str, seconds: float | None, world_size: int) -> None:
        self.requests = StopRequests()
        self._alone = world_size == 1
        self._folder = folder
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._starting = True
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._peers: Peers | None = None
        self._answered = 0.0  # when the store last did
        self._handlers: dict[signal.Signals, object] = {}
        self._on_death: Callable[[str], None] = lambda reason: None
        self._complained: set[str] = set()

    def __enter__(self) -> StopController:
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requests.stop = self.requests.stop or signal.Signals(number).name
        if self._starting and self._alone:
            self._starting = False  # one exception is enough
            raise StopRequestedError

    def share(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        heartbeat_seconds: float,
        on_death: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """From now on requests reach all ranks, and a rank that shows no sign of life ends the run.

        `on_death`: called with the reason before this process ends for another one's sake.
        """
        self._on_death = on_death
        self._peers = Peers(
            store.clone(),  # type: ignore[attr-defined]  # missing in torch's stub
            rank,
            world_size,
            heartbeat_seconds,
        )
        self._thread = threading.Thread(target=self._watch, args=(self._peers,), name="watch", daemon=True)
        self._thread.start()
        if heartbeat_seconds:
            self._answered = time.monotonic()
            threading.Thread(target=self._watch_store, args=(heartbeat_seconds,), name="watch-store", daemon=True).start()

    def _watch_store(self, seconds: float) -> None:
        """A store whose process hangs does not answer, and asking it has no time limit."""
        while not self._closing.wait(POLL_SECONDS):
            silent = time.monotonic() - self._answered
            if silent > seconds + 2 * POLL_SECONDS:
                self._give_up(f"the store of the job has not answered for {silent:.0f} s (loss_spikes.heartbeat_seconds)")

    def _give_up(self, reason: object) -> None:
        """The main thread may be in a collective that never ends: there is nothing to wait for."""
        rank = self._peers.rank if self._peers is not None else 0
        logger.error(f"rank {rank} stops: {reason}")
        self._on_death(str(reason))
        os._exit(1)

    def working(self) -> None:
        """The start is over: from now on requests wait to be looked at."""
        self._starting = False

    def reason(self) -> str:
        """Why the run stops. A rank that knows from a collective that it does waits until it hears why.

        A rank that was asked says so here, too: it may leave before its thread has come to it, and others would wait.
        """
        if self._peers is not None:
            if self.requests.stop is None:
                self.requests.stop = self._peers.reason()
            else:
                self._peers.tell_stop(self.requests.stop)
        return self.requests.stop or ""

    def drop_requests(self) -> None:
        """Remove files that came while the run did its last step: they would stop the next start before its first."""
        if self._peers is None or self._peers.rank == 0:
            for name in (STOP_FILE, SAVE_FILE):
                if self._took(name):
                    logger.info(f"{name} came when there was nothing left to do, and is removed")

    def close(self) -> None:
        """Listen no more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks that this one cannot go on, and give them the time to hear it.

        If it ended at once, they would fail in their collectives with errors of their own that bury the first.
        """
        if self._peers is not None:
            self._closing.set()
            self._peers.tell_failure(f"{type(error).__name__}: {error}")
            time.sleep(3 * POLL_SECONDS)

    def _watch(self, peers: Peers) -> None:
        while not self._closing.wait(POLL_SECONDS):
            if peers.rank == 0:
                self._look_around()
            asked_before = self.requests.stop is not None
            try:
                peers.exchange(self.requests)
            except ProcessDiedError as error:
                if self._closing.is_set():
                    return
                self._give_up(error)
            self._answered = time.monotonic()
            if self._starting and self._alone and self.requests.stop is not None and not asked_before:
                signal.raise_signal(signal.SIGUSR1)  # handled by the main thread

    def _look_around(self) -> None:
        """Files and the time limit: one rank looks, and tells."""
        if self._took(SAVE_FILE):
            self.requests.save = True
        if self._took(STOP_FILE):
            self.requests.stop = self.requests.stop or f"the file {STOP_FILE}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.requests.stop = self.requests.stop or "the time limit (training.exit_duration_in_mins)"

    def _took(self, name: str) -> bool:
        """Whether a file was there; it is not any more: one request, one answer.

        What cannot be removed (no permission, a folder, a file system that is away for a moment) is no request.
        """
        try:
            os.unlink(os.path.join(self._folder, name))
        except FileNotFoundError:
            return False
        except OSError as error:
            if str(error) not in self._complained:
                self._complained.add(str(error))
                logger.warning(f"{name} is not obeyed, as it cannot be removed: {error}")
            return False
        return True

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class Peers:
    """What the ranks tell each other through the store.

    Keys: `stop` and `failed` hold the first reason; `beats/RANK` counts up while the rank lives. Rank 0 watches the
    counts of the others, they watch its; everybody looks at `failed`.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, heartbeat_seconds: float) -> None:
        self.store = dist.PrefixStore("megatron_cpt", store)
        self.rank, self.world_size, self.heartbeat_seconds = rank, world_size, heartbeat_seconds
        self._beats: dict[int, tuple[bytes, float]] = {}

    def exchange(self, requests: StopRequests) -> None:
        """Tell and hear.

        Raises:
            ProcessDiedError: a rank has failed or shows no sign of life, or the store is gone
        """
        try:
            if self.store.check(["failed"]):
                raise ProcessDiedError(self.store.get("failed").decode())
            if requests.stop is not None:
                self.tell_stop(requests.stop)
            elif self.store.check(["stop"]):
                requests.stop = self.store.get("stop").decode()
            if self.heartbeat_seconds and self.world_size > 1:
                self.store.add(f"beats/{self.rank}", 1)
                self._compare_beats()
        except dist.DistError as error:
            raise ProcessDiedError(f"the store of the job is gone ({str(error).splitlines()[0]})") from error

    def tell_stop(self, reason: str) -> None:
        """So that all ranks stop."""
        self.store.set("stop", reason)

    def reason(self) -> str:
        """What the rank that was asked to stop says; it does within a moment."""
        return self.store.get("stop").decode()

    def tell_failure(self, message: str) -> None:
        """So that the others need not wait for this rank."""
        with contextlib.suppress(dist.DistError):  # the job is ending anyway
            self.store.compare_set("failed", "", f"rank {self.rank} failed: {message}")  # the first counts

    def _compare_beats(self) -> None:
        now = time.monotonic()
        for rank in range(1, self.world_size) if self.rank == 0 else (0,):
            beats = self.store.get(f"beats/{rank}") if self.store.check([f"beats/{rank}"]) else b""
            last, since = self._beats.setdefault(rank, (b"", now))  # one that never showed a sign is silent from here on
            if beats != last:
                self._beats[rank] = (beats, now)
            elif now - since > self.heartbeat_seconds:
                message = f"rank {rank} has shown no sign of life for {now - since:.0f} s (loss_spikes.heartbeat_seconds)"
                self.store.set("failed", message)
                raise ProcessDiedError(message)

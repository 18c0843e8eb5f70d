"""A pool of worker processes whose results come back in order, in bounded memory.

Not `concurrent.futures`: its pool cannot replace a worker that has grown too large when workers are forked, leaves its
workers behind when the main process is killed, and forks from a process with threads. Here the main process has none. And
large arrays do not go through a pipe, which would take longer than to make them: they are left in memory that all share.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from megatron_cpt.utils.errors import InputError, ProcessDiedError, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

PREFETCH = 2  # items a worker has at once: the one it works on and the next
SHELF_BYTES = 8 << 20
LEAST_BYTES_ON_SHELF = 64 << 10


class Shelf:
    """Memory shared with the workers forked after it was made, for the large arrays of one result at a time.

    Those that find no room go through the pipe, as does everything small.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SHELF_BYTES)

    def put(self, result: Any) -> tuple[bytes, list[tuple[int, int]]]:
        """Leave the arrays here; returns the rest, pickled, and where the arrays begin and end."""
        places: list[tuple[int, int]] = []

        def leave(buffer: pickle.PickleBuffer) -> bool:
            data = buffer.raw()
            begin = -(-places[-1][1] // 64) * 64 if places else 0
            end = begin + data.nbytes
            if data.nbytes < LEAST_BYTES_ON_SHELF or end > SHELF_BYTES:
                return True  # into the pickle
            self._memory[begin:end] = data
            places.append((begin, end))
            return False

        return pickle.dumps(result, protocol=5, buffer_callback=leave), places

    def take(self, rest: bytes, places: list[tuple[int, int]]) -> Any:
        """The result; its large arrays are this memory, until something else is put here."""
        view = memoryview(self._memory)
        return pickle.loads(rest, buffers=[view[begin:end] for begin, end in places])


class _OntoShelves(Generic[Item, Result]):
    """`function` as a worker of `ordered_map` calls it: (number of a shelf, item) -> what `Shelf.put` returns."""

    def __init__(self, function: Callable[[Item], Result], shelves: list[Shelf]) -> None:
        self._function, self._shelves = function, shelves

    def __call__(self, request: tuple[int, Item]) -> tuple[bytes, list[tuple[int, int]]]:
        shelf, item = request
        return self._shelves[shelf].put(self._function(item))

    def is_worn_out(self) -> bool:
        """What `function` says of itself."""
        return bool(getattr(self._function, "is_worn_out", bool)())


@dataclass
class Worker(Generic[Item, Result]):
    """A process that applies a function to what comes through its connection."""

    process: BaseProcess
    connection: Connection
    items: deque[int] = field(default_factory=deque)
    """Numbers of the items it has been given and not yet answered."""
    retiring: bool = False


def start_worker(function: Callable[[Item], Result], others: Iterable[Worker[Any, Any]] = ()) -> Worker[Item, Result]:
    """Start a process that answers each item sent with (error or None, result, whether it retires).

    The process is forked: it shares, at no cost, what `function` has loaded. `others`: workers that run already; the new
    one must not keep their connections open, or they would not notice the end of the main process.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=True)
    inherited = [ours, *(other.connection for other in others)]
    process = context.Process(target=_work, args=(function, theirs, inherited), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def stop_workers(workers: Iterable[Worker[Any, Any]]) -> None:
    """End workers at once, whatever they are doing."""
    workers = list(workers)
    for worker in workers:
        worker.process.kill()
        worker.connection.close()
    for worker in workers:
        worker.process.join()


def _work(function: Callable[[Any], Any], connection: Connection, inherited: list[Connection]) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread takes items in, so that the main process is never kept waiting while this one waits to answer.
    threading.Thread(target=_take_in, args=(connection, inbox), daemon=True).start()
    while True:
        item = inbox.get()
        try:
            result, error = function(item), None
        except (InputError, RunError) as refusal:
            result, error = None, refusal
        connection.send((error, result, getattr(function, "is_worn_out", bool)()))


def _take_in(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Put what arrives into `inbox`; end the process when the other side is gone."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result]:
    """`map(function, items)` by `workers` processes (0: by this one), in order, few results waiting for their turn.

    When `function` has a method `is_worn_out` that says yes, the worker is replaced by a fresh one. An InputError or a
    RunError of `function` is raised in its turn. Large arrays in a result are overwritten after the next result was asked
    for: use or copy them before. Close the generator to end the workers. ProcessDiedError: one was killed.
    """
    if workers == 0:
        yield from map(function, items)
        return
    todo = enumerate(items)
    most = 2 * PREFETCH * workers  # items given out whose results were not taken yet
    shelves = [Shelf() for _ in range(most)]
    free, shelf_of = list(range(most)), dict[int, int]()
    work = _OntoShelves(function, shelves)
    crew: list[Worker[tuple[int, Item], Any]] = []
    finished: dict[int, tuple[BaseException | None, Any]] = {}
    turn = given = 0
    more = True
    try:
        for _ in range(workers):
            crew.append(start_worker(work, crew))
        while more or turn < given:
            for worker in [w for _ in range(PREFETCH) for w in crew]:  # everyone one item before anyone the second
                if more and not worker.retiring and len(worker.items) < PREFETCH and free:
                    number, item = next(todo, (-1, None))
                    if number < 0:
                        more = False
                        break
                    worker.items.append(number)
                    given = number + 1
                    shelf_of[number] = free.pop()
                    _send(worker, (shelf_of[number], item))
            while turn in finished:
                error, result = finished.pop(turn)
                if error is not None:
                    raise error
                shelf = shelf_of.pop(turn)
                turn += 1
                yield shelves[shelf].take(*result)
                free.append(shelf)
            busy = [worker for worker in crew if worker.items]
            ready = wait([worker.connection for worker in busy]) if busy else []
            for i, worker in enumerate(crew):
                if worker.connection in ready:
                    error, result, worn_out = _receive(worker)
                    finished[worker.items.popleft()] = error, result
                    worker.retiring = worker.retiring or worn_out
                    if worker.retiring and not worker.items:
                        stop_workers([worker])
                        crew[i] = start_worker(work, [other for other in crew if other is not worker])
    finally:
        stop_workers(crew)


def _send(worker: Worker[Any, Any], item: Any) -> None:
    try:
        worker.connection.send(item)
    except OSError:
        raise _death(worker) from None


def _receive(worker: Worker[Any, Any]) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        raise _death(worker) from None


def _death(worker: Worker[Any, Any]) -> ProcessDiedError:
    worker.process.join(1)
    code = worker.process.exitcode
    how = f"was killed by signal {-code} (out of memory?)" if code is not None and code < 0 else f"ended with status {code}"
    return ProcessDiedError(f"a worker process (pid {worker.process.pid}) {how}")

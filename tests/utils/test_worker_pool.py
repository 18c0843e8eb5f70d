"""Results in order from processes that are slow, die, are replaced, or are no longer wanted."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import psutil
import pytest
from own_children import own_children
from tiny_corpora import still_alive

from megatron_cpt.utils.errors import InputError, ProcessDiedError
from megatron_cpt.utils.worker_pool import LEAST_BYTES_ON_SHELF, PREFETCH, SHELF_BYTES, Shelf, ordered_map

SECONDS_UNTIL_HUNG = 30


@pytest.fixture(autouse=True)
def _no_hang_and_no_child_left() -> Iterator[None]:
    def hung(number: int, frame: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS_UNTIL_HUNG)
    children = {child.pid for child in own_children()}
    try:
        yield
        assert {child.pid for child in own_children()} <= children
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def slow_square(number: int) -> int:
    time.sleep(0.0007 * (number * 7919 % 13))
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_order_whatever_the_delays(workers: int) -> None:
    for count in (0, 1, 5, 60):
        assert list(ordered_map(slow_square, range(count), workers)) == [n * n for n in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_in_its_turn(workers: int) -> None:
    def refuse(number: int) -> int:
        if number >= 9:
            raise InputError(f"item {number}")
        time.sleep(0.02)  # the error is ready long before what comes first
        return number

    results = ordered_map(refuse, range(30), workers)
    found: list[int] = []
    with pytest.raises(InputError, match="item 9"):
        found.extend(results)
    assert found == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_items_is_raised_and_ends_the_workers(workers: int) -> None:
    def items() -> Iterator[int]:
        yield from range(10)
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        list(ordered_map(slow_square, items(), workers))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_killed_worker_is_an_error(workers: int) -> None:
    def die(number: int) -> int:
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    found: list[int] = []
    with pytest.raises(ProcessDiedError, match="was killed by signal 9"):
        found.extend(ordered_map(die, range(100), workers))
    assert found == list(range(len(found)))


def test_a_worker_killed_while_it_sends() -> None:
    """Half a result is no result."""

    def big(number: int) -> bytes:
        return bytes(64 << 20)

    results = ordered_map(big, range(4), 1)
    next(results)
    (worker,) = own_children()
    time.sleep(0.5)  # it is in the middle of sending the second: the pipe holds less
    worker.send_signal(signal.SIGKILL)
    with pytest.raises(ProcessDiedError):
        list(results)


def test_idle_workers_that_are_killed() -> None:
    results = ordered_map(slow_square, itertools.count(), 2)
    for _ in range(5):
        next(results)
    for worker in own_children():
        worker.kill()
    with pytest.raises(ProcessDiedError):
        list(itertools.islice(results, 1000))


@pytest.mark.filterwarnings("ignore")
def test_a_bug_in_a_worker_is_not_taken_for_a_result(capfd: pytest.CaptureFixture[str]) -> None:
    def bug(number: int) -> int:
        return number // (number - 3)

    with pytest.raises(ProcessDiedError, match="ended with status 1"):
        list(ordered_map(bug, range(10), 2))
    assert "ZeroDivisionError" in capfd.readouterr().err  # it says where


class Wearing:
    """Worn out after some items."""

    def __init__(self, items: int) -> None:
        self.items, self.done = items, 0

    def __call__(self, number: int) -> tuple[int, int]:
        self.done += 1
        time.sleep(0.001)
        return number, os.getpid()

    def is_worn_out(self) -> bool:
        return self.done >= self.items


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("items", [1, 4])
def test_worn_out_workers_are_replaced(items: int, workers: int) -> None:
    results = list(ordered_map(Wearing(items), range(40), workers))
    assert [number for number, _ in results] == list(range(40))
    done = [sum(pid == other for _, other in results) for pid in {pid for _, pid in results}]
    assert os.getpid() not in {pid for _, pid in results}
    assert max(done) <= items + PREFETCH - 1  # what it had been given already it still does
    assert len(done) >= 40 // (items + PREFETCH - 1)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_leaves_no_process(taken: int) -> None:
    with closing(ordered_map(slow_square, itertools.count(), 3)) as results:
        assert list(itertools.islice(results, taken)) == [n * n for n in range(taken)]
        assert len(own_children()) == (3 if taken else 0)
    assert own_children() == []


def test_closing_while_workers_are_stuck() -> None:
    def forever(number: int) -> int:
        if number:
            time.sleep(1000)
        return number

    began = time.monotonic()
    with closing(ordered_map(forever, itertools.count(), 2)) as results:
        assert next(results) == 0
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("workers", [1, 2])
def test_large_items_both_ways(workers: int) -> None:
    """Neither side may wait for the other while it sends: pipes hold 64 kB."""

    def turn(data: bytes) -> bytes:
        return data[::-1]

    items = [bytes([n]) * 3_000_000 + b"end" for n in range(10)]
    for item, result in zip(items, ordered_map(turn, items, workers), strict=True):
        assert result == item[::-1]


def test_few_items_are_taken_ahead_of_a_slow_one() -> None:
    """Bounded memory: neither the input nor the results pile up while one item takes long."""
    taken = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    def first_is_slow(number: int) -> int:
        time.sleep(0.5 if number == 0 else 0)
        return number

    with closing(ordered_map(first_is_slow, items(), 2)) as results:
        assert next(results) == 0
        assert len(taken) <= 8 * PREFETCH


def test_all_workers_work() -> None:
    def who(number: int) -> int:
        time.sleep(0.01)
        return os.getpid()

    assert len(set(ordered_map(who, range(40), 4))) == 4


class Work:
    """Takes some time, answers with some bytes, and may be worn out at once."""

    def __init__(self, seconds: float, size: int, worn: bool) -> None:
        self.seconds, self.size, self.worn = seconds, size, worn

    def __call__(self, number: int) -> bytes:
        time.sleep(self.seconds)
        return bytes(self.size)

    def is_worn_out(self) -> bool:
        return self.worn


@pytest.mark.parametrize("work", [Work(0.01, 0, False), Work(1000, 0, False), Work(0.01, 0, True), Work(0, 1 << 21, False)])
def test_workers_end_when_the_main_process_is_killed(work: Work) -> None:
    read, write = os.pipe()
    main = os.fork()
    if main == 0:
        try:
            for _ in ordered_map(work, itertools.count(), 3):
                os.write(write, b".")
        finally:
            os._exit(1)
    workers: list[psutil.Process] = []
    try:
        while len(workers) < 3:
            time.sleep(0.01)
            workers = psutil.Process(main).children()
        for _ in range(20 if work.seconds < 1 else 0):
            os.read(read, 1)
        workers = psutil.Process(main).children(recursive=True)
    finally:
        os.kill(main, signal.SIGKILL)
        os.waitpid(main, 0)
        os.close(read)
        os.close(write)
    alive = still_alive(workers)
    for worker in alive:
        worker.kill()
    assert len(workers) >= 2
    assert alive == []


def arrays_of(number: int) -> dict[str, object]:
    """Arrays below, at and above the limits of a shelf, one of them empty, one not in one piece."""
    slow_square(number)
    random = np.random.default_rng(number)
    sizes = [LEAST_BYTES_ON_SHELF // 4, 3, 40_000 + number, 0, SHELF_BYTES // 4 if number % 5 == 0 else 100_001, 50_003]
    arrays = [random.integers(0, 1 << 31, size, np.int32) for size in sizes]
    return {"number": number, "arrays": [*arrays, arrays[2][::2]]}


def same(found: dict[str, object], wanted: dict[str, object]) -> bool:
    pairs = zip(found["arrays"], wanted["arrays"], strict=True)  # type: ignore[call-overload]
    return found["number"] == wanted["number"] and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_large_arrays_arrive_as_they_were_sent(workers: int) -> None:
    """More results than there are shelves, in use until the next is asked for."""
    with closing(ordered_map(arrays_of, range(90), workers)) as results:
        assert all(same(found, arrays_of(number)) for number, found in enumerate(results))


def test_what_finds_no_room_on_a_shelf_is_in_the_pickle() -> None:
    shelf = Shelf()
    wanted = {"number": 1, "arrays": [np.arange(SHELF_BYTES // 8), np.arange(100_000), np.arange(3)]}
    rest, places = shelf.put(wanted)
    assert places == [(0, SHELF_BYTES)]
    assert len(rest) > 800_000
    assert same(shelf.take(rest, places), wanted)
    assert shelf.put(np.arange(3))[1] == []

"""The folder a corpus is made in: what a checkpoint keeps, what is cut off again, and who may work there."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.corpus.documents import Problem
from megatron_cpt.corpus.encoding import EncodedUnit, PartCounts
from megatron_cpt.corpus.partial import STREAMS, PartialCorpus, lock, open_partial, partial_folder, read_state
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.worker_pool import start_worker

RUN = {"tokenizer": "ab", "input": [["/a.jsonl", 10]]}


def unit(number: int) -> EncodedUnit:
    """A unit of two documents, 3 and 4 tokens long, and one that was skipped."""
    return EncodedUnit(
        tokens=np.arange(7, dtype=np.uint16) + 10 * number,
        lengths=np.array([3, 4], np.int32),
        parts=[PartCounts(0, 3, 2, [Problem(1, "empty", "no text")])],
        text_bytes=20,
        characters=15,
        metadata=b"%d\n%d\n" % (number, number),
        languages=Counter({"en": 20}),
        audit=[],
        read_bytes=30,
        documents=bytes(48),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return partial_folder(str(tmp_path / "c"))


def opened(folder: Path, run: dict[str, Any] = RUN) -> Any:
    return open_partial(folder, run, "reference", 1)


class Killed(BaseException):
    """Stands for kill -9: nothing may be done about it any more."""


def die_after(folder: Path, checkpointed: int, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a folder as a killed process does: some units behind the last checkpoint, all of them on the disk."""
    with suppress(Killed), monkeypatch.context() as patch, opened(folder) as partial:
        for number in range(checkpointed):
            partial.add(unit(number), b"error %d\n" % number)
        partial.checkpoint()
        for number in range(more):
            partial.add(unit(90 + number), b"wrong\n")
        patch.setattr(PartialCorpus, "last_checkpoint", lambda self: None, raising=False)
        raise Killed


def test_what_comes_after_the_checkpoint_is_cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_after(folder, checkpointed=2, more=3, monkeypatch=monkeypatch)
    assert (folder / "tokens.bin").stat().st_size == 5 * 14
    with opened(folder) as partial:
        assert partial.units == 2
        assert (partial.counts.tokens, partial.counts.skipped, partial.counts.languages) == (14, {"empty": 2}, {"en": 40})
        assert (partial.counts.records, partial.counts.documents, partial.counts.read_bytes) == ([6], [4], 60)
        partial.add(unit(2), b"error 2\n")
        partial.checkpoint()
        digest = partial.digest.hexdigest()
    with opened(folder.with_name("whole.partial")) as partial:
        for number in range(3):
            partial.add(unit(number), b"error %d\n" % number)
        partial.checkpoint()
        assert partial.digest.hexdigest() == digest
    for name in STREAMS:
        assert (folder / name).read_bytes() == (folder.with_name("whole.partial") / name).read_bytes()
    resumed, whole = (read_state(path) or {} for path in (folder, folder.with_name("whole.partial")))
    for state in (resumed, whole):
        state["counts"].pop("seconds")
    assert resumed == whole


def test_seconds_are_those_of_all_runs(folder: Path) -> None:
    with opened(folder) as partial:
        partial.add(unit(0), b"")
        partial._began -= 100
        partial.checkpoint()
    with opened(folder) as partial:
        partial.checkpoint()
        assert 100 <= partial.counts.seconds < 110


def test_nothing_is_kept_when_nothing_is_complete(folder: Path) -> None:
    with pytest.raises(Killed), opened(folder):
        raise Killed
    assert not folder.exists()


def test_rubbish_without_a_state_is_not_gone_on_with(folder: Path) -> None:
    folder.mkdir()
    for name in STREAMS:
        (folder / name).write_bytes(b"rubbish")
    with opened(folder) as partial:
        assert partial.units == 0
        partial.add(unit(0), b"")
        partial.checkpoint()
    assert (folder / "tokens.bin").read_bytes() == unit(0).tokens.tobytes()


def test_another_run_is_refused_and_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_after(folder, checkpointed=1, more=0, monkeypatch=monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = RUN | {"input": [["/a.jsonl", 11]]}
    with pytest.raises(InputError, match=r"another run: input\[0\]\[1\] is 10 there and 11 now"), opened(folder, other):
        pass
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", STREAMS)
def test_a_file_that_lost_its_end_is_refused(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_after(folder, checkpointed=2, more=0, monkeypatch=monkeypatch)
    os.truncate(folder / name, 5)
    with pytest.raises(InputError, match=rf"{name}: found 5 bytes; expected at least"), opened(folder):
        pass
    assert read_state(folder)  # it is for the user to throw it away


@pytest.mark.parametrize("state", [b"", b"{", b"\0" * 100, b'{"run": {}}'])
def test_a_damaged_state_is_refused(state: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_after(folder, checkpointed=2, more=0, monkeypatch=monkeypatch)
    (folder / "state.json").write_bytes(state)
    with pytest.raises(InputError, match=r"c\.partial"), opened(folder):
        pass


def test_state_is_replaced_in_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with opened(folder) as partial:
        partial.add(unit(0), b"")
        partial.checkpoint()
        state = (folder / "state.json").read_bytes()
        partial.add(unit(1), b"")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="No space"):
                partial.checkpoint()
    assert (folder / "state.json").read_bytes() == state
    assert {path.name for path in folder.iterdir()} == {*STREAMS, "state.json"}


def test_announced_files_are_in_the_state(folder: Path) -> None:
    with opened(folder) as partial:
        partial.announce({"index": ".idx"})
    assert (read_state(folder) or {})["publish"] == {"index": ".idx"}
    assert folder.exists()  # also without a single unit: an empty partition


# --- the lock ---


def hold(folder: Path) -> int:
    """A process that holds the lock until it is killed; its id."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with lock(folder):
            os.write(write, b".")
            signal.pause()
        os._exit(0)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    return child


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_one_process_at_a_time(folder: Path) -> None:
    holder = hold(folder)
    try:
        for _ in range(2):  # the one that was refused did not free it
            with pytest.raises(InputError, match=r"c\.partial: another process is writing this corpus"), lock(folder):
                pass
    finally:
        kill(holder)
    with lock(folder):  # it goes with its process, however that ends
        pass
    assert list(folder.parent.iterdir()) == []


def test_helpers_that_live_on_do_not_hold_the_lock(folder: Path) -> None:
    """kill -9 of the main process: its children may take some time to notice, the next run need not wait for them."""
    read, write = os.pipe()
    main = os.fork()
    if main == 0:
        with lock(folder):
            worker = start_worker(time.sleep)
            worker.connection.send(1000)
            os.write(write, b"%d" % (worker.process.pid or 0))
            worker.connection.close()
            signal.pause()
        os._exit(0)
    helper = int(os.read(read, 20))
    os.kill(helper, signal.SIGSTOP)
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    try:
        with lock(folder):
            pass
    finally:
        os.kill(helper, signal.SIGKILL)
    for end in (read, write):
        os.close(end)

"""Saves in the background and failing saves: what is committed is whole, what was committed stays."""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Layout, build, fake_step, fill, run_ranks, tensors_of

from megatron_cpt.checkpoint import save_operation, writing
from megatron_cpt.checkpoint.layout import newest_complete, read_hf_files
from megatron_cpt.checkpoint.save_operation import CheckpointError
from megatron_cpt.checkpoint.saver import Saver
from megatron_cpt.checkpoint.state import Progress
from megatron_cpt.config.run import CheckpointConfig

PP2, DP2 = Layout(pipeline=2), Layout(data=2)


def make_saver(root: str, said: list[str], **settings: Any) -> Saver:
    hear(said.append)
    return Saver(CheckpointConfig(load="elsewhere", save=root, **settings))


def hear(listen: Callable[[str], object]) -> None:
    """Have what a saver says, in this process."""
    handler = logging.Handler()
    handler.emit = lambda record: listen(record.getMessage())  # type: ignore[assignment,method-assign]
    logger = logging.getLogger("megatron_cpt.checkpoint.saver")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]


def wait(saver: Saver) -> None:
    while saver._operation is not None:
        saver.poll()
        time.sleep(0.005)


def slow_writers(seconds: float) -> None:
    """Writers of this process take at least so long from now on."""
    check = writing.check_archives
    writing.check_archives = lambda *arguments: (time.sleep(seconds), check(*arguments))[1]


def save_and_change_at_once(rank: int, hf: str, layout: Layout, root: str) -> None:
    trained = build(hf, layout)
    saver = make_saver(f"{root}/async", [], async_save=True)
    saver.prepare(trained.chunks, trained.optimizer)
    slow_writers(0.2)
    for iteration in range(1, 4):
        trained.save(f"{root}/sync", iteration)
        saver.save(trained.chunks, trained.optimizer, read_hf_files(hf), {}, Progress(iteration))
        assert saver._operation is not None
        fill(trained, 0.5)
        fake_step(trained, seed=iteration, weights=True)
        assert saver.committed == (iteration - 1 or None)
        wait(saver)
        assert saver.committed == iteration


@pytest.mark.parametrize("layout", [PP2, DP2], ids=str)
def test_what_training_writes_does_not_reach_a_save_under_way(layout: Layout, tied_hf: str, tmp_path: Path) -> None:
    run_ranks(layout, save_and_change_at_once, tied_hf, layout, str(tmp_path))
    for iteration in range(1, 4):
        name = f"iter_{iteration:07d}"
        expected, found = tensors_of(str(tmp_path / "sync" / name)), tensors_of(str(tmp_path / "async" / name))
        assert expected.keys() == found.keys()
        for key in expected:
            assert torch.equal(expected[key], found[key]), key
    assert (tmp_path / "async" / "latest_checkpointed_iteration.txt").read_text() == "3"
    manifest = json.loads((tmp_path / "async" / "iter_0000003" / "manifest.json").read_text())
    assert (manifest["iteration"], manifest["optimizer"]) == (3, True)
    files = [path for path in (tmp_path / "async" / "iter_0000003").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "async" / "iter_0000003")) for path in files} == {
        *manifest["files"],
        "manifest.json",
    }


def save_many(rank: int, hf: str, layout: Layout, root: str, async_save: bool) -> list[str]:
    trained, said = build(hf, layout), []
    saver = make_saver(root, said, async_save=async_save, keep_last=2, keep_every=4)
    for iteration in range(1, 8):
        saver.save(trained.chunks, trained.optimizer, read_hf_files(hf), {}, Progress(iteration))  # waits for the one before
        if not async_save:
            assert saver.committed == iteration
        assert not saver.retry_due()
    saver.finish()
    assert saver.committed == 7
    assert 0 < saver.seconds_blocked < 60
    return said


@pytest.mark.parametrize("async_save", [False, True])
def test_old_checkpoints_are_deleted(async_save: bool, tiny_hf: str, tmp_path: Path) -> None:
    said = run_ranks(PP2, save_many, tiny_hf, PP2, str(tmp_path), async_save)
    assert len(said[0]) == 7
    assert said[1] == []  # the first rank speaks
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000004",
        "iter_0000006",
        "iter_0000007",
        "latest_checkpointed_iteration.txt",
    ]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def break_disk(where: str, rank: int) -> Any:
    """Make one step of a save fail in this rank; returns what repairs it."""
    patch = pytest.MonkeyPatch()
    first_only = {
        "folder": (os, "makedirs"),
        "common": (writing, "write_hf_files"),
        "rename": (save_operation, "publish_folder"),
    }
    if where in first_only and rank == 0:
        patch.setattr(*first_only[where], no_space)
    elif where == "metadata" and rank == 0:
        patch.setattr(save_operation.FileSystemWriterAsync, "finish", no_space)
    elif where == "tensors" and rank == 1:
        patch.setattr(writing, "fsync", no_space)
        patch.setattr(writing, "check_archives", no_space)
    elif where == "fork" and rank == 1:
        patch.setattr(save_operation, "ForkedWork", no_space)
    elif where == "killed" and rank == 1:
        patch.setattr(writing, "check_archives", lambda *_: os.kill(os.getpid(), 9))
    return patch.undo


def fail_and_recover(rank: int, hf: str, layout: Layout, root: str, where: str, async_save: bool) -> list[str]:
    trained, said = build(hf, layout), []
    saver = make_saver(root, said, async_save=async_save, save_retries=2, save_retry_seconds=0.2)
    save = lambda iteration: saver.save(trained.chunks, trained.optimizer, read_hf_files(hf), {}, Progress(iteration))  # noqa: E731
    save(1)
    wait(saver)
    repair = break_disk(where, rank)
    save(2)
    wait(saver)
    assert saver.committed == 1
    if rank == 0:
        assert not [name for name in os.listdir(root) if ".tmp" in name]  # the space is free again
    assert not saver.retry_due()
    time.sleep(0.3)
    assert saver.retry_due()
    save(3)
    wait(saver)
    repair()
    time.sleep(0.3)
    assert saver.retry_due()
    save(4)
    saver.finish()
    assert saver.committed == 4
    assert not saver.retry_due()
    return said


@pytest.mark.parametrize("where", ["folder", "common", "rename", "metadata", "tensors", "fork", "killed"])
@pytest.mark.parametrize("async_save", [False, True])
def test_the_run_survives_a_failed_save(where: str, async_save: bool, tiny_hf: str, tmp_path: Path) -> None:
    said = run_ranks(PP2, fail_and_recover, tiny_hf, PP2, str(tmp_path), where, async_save)[0]
    reason = "exit code -9" if where == "killed" else "No space left on device"
    assert [reason in line for line in said] == [False, True, True, False]
    assert "the checkpoint of iteration 2 was not written" in said[1]
    assert "trying again in 0.2 s (2 left)" in said[1]
    assert newest_complete(str(tmp_path)) == (str(tmp_path / "iter_0000004"), [])
    assert sorted(os.listdir(tmp_path)) == ["iter_0000001", "iter_0000004", "latest_checkpointed_iteration.txt"]


def give_up(rank: int, hf: str, layout: Layout, root: str) -> list[str]:
    trained, said, errors = build(hf, layout), [], []
    saver = make_saver(root, said, async_save=True, save_retries=1, save_retry_seconds=0.1)
    arguments = (trained.chunks, trained.optimizer, read_hf_files(hf), {})
    break_disk("tensors", rank)
    saver.save(*arguments, Progress(1))
    wait(saver)
    time.sleep(0.2)
    assert saver.retry_due()
    saver.save(*arguments, Progress(2))
    wait(saver)
    with pytest.raises(CheckpointError) as caught:
        saver.retry_due()
    errors.append(str(caught.value))
    saver = make_saver(root, said, save_retries=2, save_retry_seconds=0.1)
    with pytest.raises(CheckpointError) as caught:
        saver.save(*arguments, Progress(3), last=True)
    errors.append(str(caught.value))
    return errors


def test_it_gives_up_after_the_retries_with_one_voice(tiny_hf: str, tmp_path: Path) -> None:
    errors = run_ranks(PP2, give_up, tiny_hf, PP2, str(tmp_path))
    assert errors[0] == errors[1]
    start = f"no checkpoint could be written to {tmp_path} in"
    assert errors[0] == [f"{start} {n} attempts: [Errno 28] No space left on device" for n in (2, 3)]
    assert os.listdir(tmp_path) == []


def fill_a_small_disk(rank: int, hf: str, root: str) -> list[str] | str:
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, ms_private = 0x20000, 0x44000  # with MS_REC
    if libc.unshare(clone_newns) or libc.mount(b"none", b"/", None, ms_private, None):
        return f"no mount namespace here: {os.strerror(ctypes.get_errno())}"
    if libc.mount(b"tmpfs", root.encode(), b"tmpfs", 0, b"size=10m"):
        return f"tmpfs cannot be mounted: {os.strerror(ctypes.get_errno())}"
    trained, said = build(hf, Layout()), []
    saver = make_saver(root, said, async_save=True, save_retries=1, save_retry_seconds=0)
    for iteration in range(1, 5):
        saver.save(trained.chunks, trained.optimizer, read_hf_files(hf), {}, Progress(iteration))
        saver.finish()
    assert saver.committed in (1, 2)
    newest = f"{root}/iter_{saver.committed:07d}"
    assert newest_complete(root) == (newest, [])
    assert len(os.listdir(root)) == saver.committed + 1  # and the tracker
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.retry_due()
    shutil.rmtree(f"{root}/iter_0000001")
    if saver.committed == 1:
        shutil.rmtree(newest, ignore_errors=True)
    saver.save(trained.chunks, trained.optimizer, read_hf_files(hf), {}, Progress(9), last=True)
    assert saver.committed == 9
    return said


def test_a_full_disk(tiny_hf: str, tmp_path: Path) -> None:
    said = run_ranks(Layout(), fill_a_small_disk, tiny_hf, str(tmp_path))[0]
    if isinstance(said, str):
        pytest.skip(said)
    assert any("No space left on device" in line for line in said)


def save_slowly(rank: int, hf: str, layout: Layout, root: str) -> float | None:
    """Rank 1 is killed during a background save; how long until rank 0 notices."""
    trained = build(hf, layout)
    saver = make_saver(root, [], async_save=True)
    slow_writers(60)
    saver.save(trained.chunks, trained.optimizer, read_hf_files(hf), {}, Progress(1))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), 9)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        dist.barrier()
    return time.monotonic() - start


def test_the_death_of_a_rank_shows_though_its_writer_was_at_work(tiny_hf: str, tmp_path: Path) -> None:
    seconds, _ = run_ranks(PP2, save_slowly, tiny_hf, PP2, str(tmp_path), check=False)
    assert seconds is not None
    assert seconds < 10
    assert newest_complete(str(tmp_path)) == (None, [])


def save_until_killed(rank: int, hf: str, layout: Layout, root: str, log: str, async_save: bool) -> None:
    """Every step saves a state that is one number throughout: the iteration."""
    Path(f"{log}.pid{rank}").write_text(str(os.getpid()))
    trained = build(hf, layout)

    def say(line: str) -> None:
        with open(log, "a") as file:
            file.write(line + "\n")

    hear(say)
    saver = Saver(CheckpointConfig("elsewhere", root, async_save=async_save, keep_last=2))
    newest, _ = newest_complete(root)
    iteration = int(newest[-7:]) if newest else 0
    dist.barrier()
    while True:
        iteration += 1
        fill(trained, float(iteration))
        saver.save(trained.chunks, trained.optimizer, read_hf_files(hf), {}, Progress(iteration))
        fill(trained, -1.0)
        saver.poll()


@pytest.mark.parametrize("async_save", [False, True])
def test_kill_9_at_any_moment_loses_no_published_checkpoint(async_save: bool, tiny_hf: str, tmp_path: Path) -> None:
    root, log = tmp_path / "run", tmp_path / "log"
    root.mkdir()
    log.touch()
    moments = random.Random(5)
    for _ in range(6):
        before = len(log.read_text().splitlines())
        arguments = (PP2, save_until_killed, tiny_hf, PP2, str(root), str(log), async_save)
        ranks = threading.Thread(target=run_ranks, args=arguments, kwargs={"check": False})
        ranks.start()
        deadline = time.monotonic() + 60
        while len(log.read_text().splitlines()) < before + 2:  # it has started to save
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        for rank in moments.sample(range(2), 2):
            os.kill(int(Path(f"{log}.pid{rank}").read_text()), 9)
        ranks.join()
        committed = [int(line.split("/iter_")[1][:7]) for line in log.read_text().splitlines()]
        folder, passed_over = newest_complete(str(root))
        assert not passed_over
        iteration = int(folder[-7:])
        assert iteration >= committed[-1]
        for name, tensor in tensors_of(folder).items():
            assert (tensor == iteration).all(), name

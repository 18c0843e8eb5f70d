"""The file system that checkpoints go to, as all ranks see it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any

from megatron_cpt.cluster.check import Check, CheckFailedError, Figures
from megatron_cpt.cluster.job import ClusterJob
from megatron_cpt.utils.errors import InputError
from megatron_cpt.utils.lock import locked

SIZE = 64 << 20  # bytes that each rank writes
VISIBLE_SECONDS = 10.0  # after which what one machine has written has to be seen by others
ADVICE = (
    "expected a parallel or network file system that all machines mount with coherent caches (Lustre, GPFS, NFS 4, BeeGFS)"
)


def use(job: ClusterJob) -> dict[str, Any]:
    """Write, read another rank's file, rename over an older one, and lock, all ranks at once."""
    folder = job.folder / "files"
    if job.is_rank_zero:
        folder.mkdir(parents=True, exist_ok=True)
    job.gather("files/folder", True)
    content = os.urandom(1 << 20) * (SIZE >> 20)
    path = folder / f"{job.rank}.bin"
    begin = time.monotonic()
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    written = time.monotonic() - begin
    heads = job.gather("files/written", content[:64])
    other = (job.rank + job.devices_per_node) % job.world_size  # of another machine, where there are several
    begin = time.monotonic()
    theirs = read_when_there(folder / f"{other}.bin", SIZE)
    read = time.monotonic() - begin
    if theirs[:64] != heads[other]:
        raise CheckFailedError(f"rank {job.rank} reads something else in {other}.bin than rank {other} has written", ADVICE)
    found = {
        "write_gb_per_s": SIZE / written / 1e9,
        "read_gb_per_s": SIZE / read / 1e9,
        "rename_seconds": seconds_to_see_rename(job, folder / "latest"),
        "locks": kept_out(job, folder / "lock"),
    }
    job.gather("files/done", True)
    path.unlink()
    return found


def read_when_there(path: os.PathLike[str], size: int) -> bytes:
    """A file that another machine has just written.

    Raises:
        FailedError: it is not to be seen here
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            content = b""
        if len(content) == size:
            return content
        if time.monotonic() > deadline:
            raise CheckFailedError(
                f"{path} is not to be seen {VISIBLE_SECONDS:g} s after another rank has written it", ADVICE
            )
        time.sleep(0.05)


def seconds_to_see_rename(job: ClusterJob, path: os.PathLike[str]) -> float:
    """Seconds until this rank sees the first one's new file in the place of an old one."""
    if job.is_rank_zero:
        with open(path, "w", encoding="utf-8") as file:
            file.write("old")
    job.gather("files/old", True)
    with open(path, encoding="utf-8") as file:
        file.read()  # so that it is in this machine's cache
    job.gather("files/read", True)
    if job.is_rank_zero:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write("new")
        os.replace(f"{path}.new", path)
    job.gather("files/renamed", True)
    begin = time.monotonic()
    while time.monotonic() - begin < VISIBLE_SECONDS:
        with open(path, encoding="utf-8") as file:
            if file.read() == "new":
                return time.monotonic() - begin
        time.sleep(0.05)
    raise CheckFailedError(
        f"rank {job.rank} still sees the old {path} {VISIBLE_SECONDS:g} s after it was renamed over", ADVICE
    )


def kept_out(job: ClusterJob, path: os.PathLike[str]) -> bool:
    """Whether a lock that the first rank holds keeps this one out (true for the first)."""
    with contextlib.ExitStack() as stack:
        if job.is_rank_zero:
            stack.enter_context(locked(os.fspath(path), "busy"))
        job.gather("files/locked", True)
        out = job.is_rank_zero
        if not job.is_rank_zero:
            try:
                stack.enter_context(locked(os.fspath(path), "busy"))
            except InputError:
                out = True
        job.gather("files/tried", True)
        return out


def judge_file_system(found: Sequence[dict[str, Any]]) -> tuple[str, Figures]:
    total = {name: sum(one[name] for one in found) for name in ("write_gb_per_s", "read_gb_per_s")}
    slowest = max(one["rename_seconds"] for one in found)
    figures = {**total, "rename_seconds": slowest, "ranks": list(found)}
    for rank, one in enumerate(found):
        if not one["locks"]:
            raise CheckFailedError(
                f"a lock of rank 0 does not keep rank {rank} out: two jobs could write to one run",
                "mount with locks (Lustre: -o flock), or never start a run twice",
                figures,
            )
    said = f"all ranks at once write {total['write_gb_per_s']:.2g} GB/s, read {total['read_gb_per_s']:.2g} GB/s (cached)"
    return f"{said}; renames and locks are seen", figures


CHECKS = (Check("file system", use, judge_file_system),)

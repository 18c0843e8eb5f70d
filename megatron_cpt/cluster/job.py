"""The processes of the job, which talk through its store alone: a check must not depend on what it checks."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cpt.platforms.process_groups import bound_store, launched_world_size

PATIENCE = 120.0  # seconds that processes wait for each other outside of what a check is given
GRACE = 20.0  # seconds for processes that wait for one that has ended with an error
POLL = 0.1
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


@dataclass(frozen=True)
class Ended:
    """How a process ended that a check has started.

    Attributes:
        status: exit status; None: it was killed since time was up
        seconds: how long it took
        log: the file that holds what it wrote
    """

    status: int | None
    seconds: float
    log: str

    def said(self, lines: int = 3) -> str:
        """The end of what it wrote."""
        with contextlib.suppress(OSError):
            text = Path(self.log).read_text(encoding="utf-8", errors="replace")
            return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])
        return ""


@dataclass(frozen=True)
class ClusterJob:
    """Where this process stands among those of the job.

    Attributes:
        hosts: name of the machine of each rank
        folder: what all of them write to
    """

    rank: int
    world_size: int
    hosts: tuple[str, ...]
    folder: Path
    store: dist.Store

    @property
    def is_rank_zero(self) -> bool:
        """Speaks for the job."""
        return self.rank == 0

    @property
    def nodes(self) -> list[str]:
        """Names of the machines, in the order of ranks."""
        return list(dict.fromkeys(self.hosts))

    @property
    def devices_per_node(self) -> int:
        """Processes on the first machine."""
        return self.hosts.count(self.hosts[0])

    def tell(self, key: str, thing: Any) -> None:
        """Leave something for those who ask for `key`."""
        self.store.set(key, pickle.dumps(thing).hex())

    def ask(self, key: str, seconds: float = PATIENCE) -> Any:
        """What somebody tells under `key`.

        Raises:
            TimeoutError: nobody has within so many seconds
        """
        try:
            self.store.wait([key], datetime.timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            raise TimeoutError(f"nobody has told {key} within {seconds:g} s") from error
        return pickle.loads(bytes.fromhex(self.store.get(key).decode()))

    def gather(self, key: str, thing: Any, seconds: float = PATIENCE) -> list[Any]:
        """What each rank passed, in the order of ranks; all ranks call this."""
        self.tell(f"{key}/{self.rank}", thing)
        return [self.ask(f"{key}/{rank}", seconds) for rank in range(self.world_size)]

    def run(
        self,
        name: str,
        command: Sequence[str],
        processes: int,
        seconds: float,
        meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> Ended | None:
        """Run a command on the first `processes` ranks, joined as by torchrun; None on other ranks. All ranks call this.

        Args:
            seconds: after which what still runs is killed
            meanwhile: called again and again with the process of this rank
        """
        if self.is_rank_zero:
            self.tell(f"{name}/port", free_port())
        if self.rank >= processes:
            return None
        log = self.folder / "logs" / f"{name}.{self.rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        surroundings = self.surroundings(processes, self.ask(f"{name}/port"))
        begin = time.monotonic()
        with log.open("wb") as file:
            child = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=surroundings,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )
            status = self.wait(name, child, begin + seconds, meanwhile)
        return Ended(status, time.monotonic() - begin, str(log))

    def wait(
        self,
        name: str,
        child: subprocess.Popen[bytes],
        deadline: float,
        meanwhile: Callable[[subprocess.Popen[bytes]], None] | None,
    ) -> int | None:
        """Its exit status; None if it had to be killed."""
        others_failed = False
        try:
            while child.poll() is None and time.monotonic() < deadline:
                if not others_failed and self.store.check([f"{name}/failed"]):
                    others_failed, deadline = True, min(deadline, time.monotonic() + GRACE)
                if meanwhile is not None:
                    meanwhile(child)
                time.sleep(POLL)
            status = child.poll()
            if status:
                self.store.set(f"{name}/failed", str(self.rank))
            return status
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def surroundings(self, processes: int, port: int) -> dict[str, str]:
        """The environment of a process that joins the first `processes` ranks."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_A_LAUNCHER and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
        }
        kept.setdefault("OMP_NUM_THREADS", "1")
        here = self.hosts[self.rank]
        local = self.hosts[: self.rank].count(here)
        kept["LOCAL_RANK"] = str(local)
        if processes == 1:
            return kept
        joined = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(self.hosts[:processes].count(here)),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
            "MASTER_PORT": str(port),
        }
        return kept | joined


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def join(folder: Path) -> ClusterJob:
    """Find the other processes of the job, as torchrun's environment describes it."""
    rank, world_size = int(os.environ.get("RANK", "0")), launched_world_size()
    store: dist.Store = dist.HashStore()
    if world_size > 1:
        store = bound_store(os.environ) or dist.PrefixStore("default_pg", tcp_store(rank, world_size))
    store = dist.PrefixStore("check_cluster", store)
    alone = ClusterJob(rank, world_size, ("",) * world_size, folder, store)
    return ClusterJob(rank, world_size, tuple(alone.gather("hosts", socket.gethostname())), folder, store)


def tcp_store(rank: int, world_size: int) -> dist.TCPStore:
    """The store that torch itself would find, or make."""
    makes_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, world_size, makes_it, dist.default_pg_timeout, multi_tenant=True)

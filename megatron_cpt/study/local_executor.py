"""The runs of a study on this machine, some at a time; what is over is never done again, what was killed goes on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.platforms.devices import visible_gpus
from megatron_cpt.study.config import StudyConfig
from megatron_cpt.study.grid import Base, GridPoint, run_folder, write_configuration
from megatron_cpt.study.inputs import check_inputs, record_start
from megatron_cpt.study.records import of_kind, read_record_file, read_run_metrics
from megatron_cpt.study.run_status import RunOutcome, StoppedError, divergence, read_outcome, write_outcome
from megatron_cpt.study.scores import measure_run
from megatron_cpt.training.stopping import STOP_FILE
from megatron_cpt.utils.errors import InputError, RunError
from megatron_cpt.utils.files import write_text
from megatron_cpt.utils.lock import open_lock, try_inherited
from megatron_cpt.utils.signals import handling

TOOL = Path(__file__).parent.parent.parent / "tools" / "pretrain_cpt.py"
POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between looks at a run's losses


def run_locally(study: StudyConfig, base: Base, todo: Sequence[GridPoint], say: Callable[[str], None]) -> None:
    """Do these runs, and measure them.

    Raises:
        InputError: a run refused its configuration; no further one was begun
        RunError: some runs ended with errors, after all others were done
        KeyboardInterrupt: SIGINT or SIGTERM; the runs have saved
    """
    stop, failed = threading.Event(), []
    shares: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for devices in device_shares(study):
        shares.put(devices)
    with stopping_on_signals(stop), concurrent.futures.ThreadPoolExecutor(study.parallel_runs) as pool:
        waiting = {pool.submit(run_one, study, base, point, stop, shares): point for point in todo}
        refused: InputError | None = None
        for number, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            point = waiting[future]
            try:
                outcome = future.result()
                say(f"[{number}/{len(todo)}] {point.name}: {sentence(outcome)}")
            except StoppedError:
                continue
            except RunError as error:
                failed.append(point.name)
                say(f"[{number}/{len(todo)}] {point.name}: {error}")
            except InputError as error:
                refused = refused or error
                stop.set()
    if refused is not None:
        raise refused
    if stop.is_set() and not failed:
        raise KeyboardInterrupt("the runs have saved; the same command goes on")
    if failed:
        rest = "the others have saved" if stop.is_set() else "the rest is done"
        raise RunError(f"{len(failed)} of {len(todo)} runs failed, the first is {failed[0]} (see above); {rest}")


@contextlib.contextmanager
def stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` instead of ending this process."""
    with handling(lambda *_: stop.set(), signal.SIGINT, signal.SIGTERM):
        yield


def sentence(outcome: RunOutcome) -> str:
    """An outcome in words."""
    return f"finished in {outcome.seconds:.0f} s" if outcome.kind == "finished" else f"diverged ({outcome.reason})"


def device_shares(study: StudyConfig) -> list[str | None]:
    """GPUs of each of the runs that go on at a time, for CUDA_VISIBLE_DEVICES; None: there are none, runs share the cores.

    Raises:
        InputError: there are GPUs, but too few
    """
    visible = visible_gpus()
    if not visible:
        return [None] * study.parallel_runs
    wanted = study.parallel_runs * study.processes
    if len(visible) < wanted:
        raise InputError(
            f"parallel_runs {study.parallel_runs} x processes {study.processes} = {wanted} GPUs; this machine shows "
            f"{len(visible)}. Use fewer, or executor slurm, where each run has a node"
        )
    return [",".join(visible[i : i + study.processes]) for i in range(0, wanted, study.processes)]


def run_one(
    study: StudyConfig, base: Base, point: GridPoint, stop: threading.Event, shares: queue.SimpleQueue[str | None]
) -> RunOutcome:
    """Do one run, or what is left of it, and measure its checkpoints.

    `shares`: devices that are free; one is taken meanwhile.

    Raises:
        StoppedError: `stop` is set
        InputError: the tool refused the configuration
        RunError: the run ended with an error
    """
    folder = run_folder(study.folder, point)
    os.makedirs(folder, exist_ok=True)
    with alone_in(study, point.name, stop) as lock, taken(shares) as devices:
        begun = time.monotonic()
        outcome = read_outcome(folder)
        if outcome is None:
            is_new = state_of(folder) is None
            outcome = train_watched(study, base, point, stop, lock, run_environment(study, devices))
            write_outcome(folder, outcome)
            if study.scores is not None and outcome.kind == "finished":
                measure_run(study, point, run_environment(study, devices), stop)
            outcome = dataclasses.replace(outcome, wall_seconds=time.monotonic() - begun if is_new else None)
            write_outcome(folder, outcome)
        elif study.scores is not None and outcome.kind == "finished":
            measure_run(study, point, run_environment(study, devices), stop)
        if not study.keep_checkpoints:
            for checkpoint in Path(folder).glob("iter_*"):
                shutil.rmtree(checkpoint)
    return outcome


@contextlib.contextmanager
def taken(shares: queue.SimpleQueue[str | None]) -> Iterator[str | None]:
    """One of the shares, given back afterwards."""
    share = shares.get()
    try:
        yield share
    finally:
        shares.put(share)


@contextlib.contextmanager
def alone_in(study: StudyConfig, name: str, stop: threading.Event) -> Iterator[int]:
    """Wait until nobody else does this run (or measures this start): the training that a killed study has left behind holds
    the lock, too.

    Yields the lock's file descriptor, for training to inherit.
    """
    path = os.path.join(study.folder, "runs", f".{name}.lock")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open_lock(path) as file:
        while True:
            if stop.is_set():
                raise StoppedError
            if try_inherited(file):
                break
            time.sleep(POLL_SECONDS)
        os.set_inheritable(file.fileno(), True)
        yield file.fileno()


def train_watched(
    study: StudyConfig, base: Base, point: GridPoint, stop: threading.Event, lock: int, environment: dict[str, str]
) -> RunOutcome:
    """The run itself, watched."""
    folder, log = run_folder(study.folder, point), log_path(study.folder, point)
    check_inputs(study, base)  # again: hours may have gone by since the study was started
    config = write_configuration(study, base, point)
    record_start(study, base, point.name)
    diverged(study, base, folder)  # what is there can be read, before a process is started
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, STOP_FILE))  # of a study that was killed after it had found a divergence
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command(study, config),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C is for the study, which tells its runs
        )
        reason = watch(study, base, folder, process, stop)
    if reason is not None:
        return RunOutcome("diverged", reason, training_seconds(folder))
    if state_of(folder) == "finished":
        return RunOutcome("finished", None, training_seconds(folder))
    if stop.is_set() and state_of(folder) in (None, "stopped"):
        raise StoppedError
    problem = f"{last_error(log) or f'ended with status {process.returncode}'} (log: {log})"
    raise InputError(f"{point.name}: {problem}") if process.returncode == 2 else RunError(problem)


def watch(
    study: StudyConfig, base: Base, folder: str, process: subprocess.Popen[bytes], stop: threading.Event
) -> str | None:
    """Wait for a run, tell it to stop where the study stops or its loss has run away; returns the reason of the latter."""
    looked, told, reason = time.monotonic(), False, None
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if stop.is_set() and not told:
            process.send_signal(signal.SIGTERM)
            told = True
        if reason is None and time.monotonic() - looked > LOOK_SECONDS:
            looked, reason = time.monotonic(), diverged(study, base, folder)
            if reason is not None:
                write_text(os.path.join(folder, STOP_FILE), reason)
    return reason or diverged(study, base, folder)


def diverged(study: StudyConfig, base: Base, folder: str) -> str | None:
    """Why the run in this folder has diverged, None if it has not."""
    train_iters = read_status(folder).get("train_iters")
    return divergence(
        read_run_metrics(folder), study.divergence_factor, base.config.loss_spikes.max_skipped_steps, train_iters
    )


def training_seconds(folder: str) -> float:
    """Of all steps."""
    return sum(row["seconds"] for row in read_run_metrics(folder) if "loss" in row)


def read_status(folder: str) -> dict[str, Any]:
    """status.json; empty: it has not begun."""
    path = os.path.join(folder, "status.json")
    if not os.path.exists(path):
        return {}
    status: dict[str, Any] = read_record_file(path, dict, "the status of a run; remove the file to start the run again")
    if status.get("train_iters") is not None:
        of_kind(status["train_iters"], int, f"{path}: train_iters", "a whole number or null")
    return status


def state_of(folder: str) -> str | None:
    """Of status.json."""
    return read_status(folder).get("state")


def command(study: StudyConfig, config: str) -> list[str]:
    """One process by itself, several under torchrun."""
    launcher = []
    if study.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(study.processes)]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]  # any free port
    return [sys.executable, *launcher, str(TOOL), "--config", config]


def run_environment(study: StudyConfig, devices: str | None) -> dict[str, str]:
    """The cores shared out to all processes, unless somebody has said otherwise; the GPUs to the runs."""
    threads = max(1, (os.cpu_count() or 1) // (study.processes * study.parallel_runs))
    own = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    return {"OMP_NUM_THREADS": str(threads)} | os.environ | own


def log_path(folder: str, point: GridPoint) -> str:
    """What the run's processes print."""
    return os.path.join(folder, "logs", f"{point.name}.log")


def last_error(path: str) -> str | None:
    """The last line of a log that begins with "error: "."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else None

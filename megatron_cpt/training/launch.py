"""Around a run: what keeps other runs out of its folder, and how its ranks start and leave together."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

import torch

from megatron_cpt.config.run import RunConfig, TrainingConfig
from megatron_cpt.training.run_files import find_start
from megatron_cpt.training.stopping import StopController, StopRequestedError
from megatron_cpt.utils.errors import InputError, RunError, SharedInputError
from megatron_cpt.utils.lock import locked
from megatron_cpt.utils.logs import record_traceback

logger = logging.getLogger(__name__)


def shutdown_barrier(stop_controller: StopController) -> None:
    """The store that ranks talk through goes with the first of them that leaves: by then none may listen any more."""
    stop_controller.close()
    torch.distributed.barrier()


def run_seconds(training: TrainingConfig) -> float | None:
    """Seconds after which the run stops by itself."""
    minutes = training.exit_duration_in_mins
    return None if minutes is None else 60.0 * minutes


@contextlib.contextmanager
def locked_run_folder(config: RunConfig, start_from: str) -> Iterator[None]:
    """Keep other runs out of the run's folder while the block runs.

    Raises:
        InputError: another one is under way in it, or has just saved a newer checkpoint than `start_from`
    """
    folder = config.checkpoint.save
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "run.lock")
    with locked(path, f"another run is under way in {folder} (it holds {path}); use another checkpoint.save"):
        if find_start(config)[0] != start_from:
            raise InputError(f"another run has just saved a checkpoint in {folder}; start again to go on from it")
        yield


@contextlib.contextmanager
def propagate_failure(
    stop_controller: StopController, world_size: int, error_stream: TextIO, failed: Callable[[str], None]
) -> Iterator[None]:
    """If this rank fails alone, say so at once: the others would wait for it in a collective until that times out.

    `failed` notes the reason of any end that is not one of a run's own.
    """
    try:
        yield
    except (RunError, StopRequestedError):
        raise  # all ranks know
    except SharedInputError as error:
        failed(str(error))
        raise
    except BaseException as error:
        failed(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))
        if world_size == 1 or isinstance(error, KeyboardInterrupt):
            raise
        for stream in {error_stream, sys.stderr}:  # the latter is a file on ranks other than the first
            traceback.print_exc(file=stream)
        record_traceback(logger)
        stop_controller.failed(error)
        os._exit(1)  # process groups cannot be left in good order while others wait in them


def set_numerics(training: TrainingConfig) -> None:
    """Settings of torch that hold for the whole process."""
    torch.set_float32_matmul_precision(training.float32_matmul_precision)
    torch.manual_seed(training.seed)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")  # the order of a sum depends on the algorithm
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # Transformer Engine reads it when it is built
        torch.use_deterministic_algorithms(True)

"""From which checkpoint a run goes on: one whose tensors are those that were saved, else the one before it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from megatron_cpt.checkpoint.checksums import TensorCheck
from megatron_cpt.checkpoint.folders import set_aside_damaged
from megatron_cpt.checkpoint.layout import read_manifest
from megatron_cpt.platforms.process_groups import RankInfo
from megatron_cpt.training.run_files import is_own
from megatron_cpt.training.state import RunContext
from megatron_cpt.training.stopping import StopRequestedError
from megatron_cpt.training.validate_config import CheckedRun, check_run
from megatron_cpt.utils.errors import InputError, RunError, SharedInputError


@contextlib.contextmanager
def checking_tensors(run: CheckedRun, ranks: RankInfo) -> Iterator[TensorCheck]:
    """The files with tensors are read and compared with their checksums, while the block does something else."""
    path = os.path.join(run.start_from, "manifest.json")
    manifest = read_manifest(path) if os.path.exists(path) else {}
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check = TensorCheck(run.start_from, manifest, ranks.rank, ranks.world_size, (os.cpu_count() or 1) // neighbours)
    try:
        yield check
    finally:
        check.cancel()


def intact_run(context: RunContext, check: TensorCheck) -> CheckedRun:
    """The run as it goes on from the newest of its checkpoints that is not damaged. All ranks call this.

    A damaged checkpoint that is passed over gets another name, under which it no longer counts.

    Args:
        context: with the run as it was checked, whose checkpoint is compared by `check`
        check: this rank's share of that

    Raises:
        SharedInputError: there is none, or checkpoint.load itself is damaged
        StopRequestedError: somebody asked to stop
    """
    run, log, damaged = context.run, context.log, {}
    if check.unchecked:
        log.say(
            f"{run.start_from} was saved without checksums, by an earlier version: its tensors are not compared with any"
        )
    while (sentence := damage_found(context, check)) is not None:
        damaged[run.start_from] = sentence
        run = run_without(context, damaged)
        log.say(f"{'resuming' if run.resumed else 'starting'} from {run.start_from}")
        with checking_tensors(run, context.ranks) as check:
            check.wait(context.stop_controller.requests.stopping)
    if context.ranks.rank == 0 and is_own(run.config, run.start_from):
        for name in set_aside_damaged(run.config.checkpoint.save, run.length.iteration if run.resumed else -1):
            log.warn(f"a damaged checkpoint is now {name}")
    return run


def damage_found(context: RunContext, check: TensorCheck) -> str | None:
    """What is damaged, in the words of the first rank that found something; the same on all ranks.

    Raises:
        RunError: the ranks do not see the same checkpoint
        StopRequestedError: somebody asked to stop
    """
    check.wait(context.stop_controller.requests.stopping)
    stop_if_asked(context)
    found: list[tuple[str, str | None]] = context.ranks.all_gather_object((os.path.realpath(check.folder), check.damage()))
    folders = sorted({folder for folder, _ in found})
    if len(folders) > 1:
        raise RunError(f"processes see different checkpoints as the one to start from: {', '.join(folders)}")
    return next((sentence for _, sentence in found if sentence), None)


def run_without(context: RunContext, damaged: dict[str, str]) -> CheckedRun:
    """The run as it goes on from a checkpoint that is not known to be damaged.

    Raises:
        SharedInputError: there is none
    """
    config = context.config
    newest = list(damaged)[-1]
    if not is_own(config, newest):
        raise SharedInputError(f"{damaged[newest]}; copy or convert it again, or use another checkpoint.load")
    context.log.warn(f"passed over: {damaged[newest]}")  # now: why else is the one before compared with the configuration?
    try:
        return check_run(config, context.ranks.world_size, damaged)
    except InputError as error:
        raise SharedInputError(str(error)) from error


def stop_if_asked(context: RunContext) -> None:
    """All ranks together: StopRequestedError if any was asked to stop during the start."""
    if context.ranks.any(context.stop_controller.requests.stopping()):
        raise StopRequestedError

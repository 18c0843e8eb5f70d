"""Continual pre-training: setup -> main -> fit -> evaluate -> save."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from contextlib import closing

import torch

from megatron_cpt.checkpoint.layout import read_hf_files
from megatron_cpt.checkpoint.save_load import Progress, load_checkpoint
from megatron_cpt.checkpoint.saver import Saver
from megatron_cpt.config.cli import launched_world_size
from megatron_cpt.config.run import RunConfig
from megatron_cpt.mixture.corpus_changes import ExpectedFile, FileChecks, expected_files
from megatron_cpt.mixture.inspection import ledger_table
from megatron_cpt.mixture.loader import BatchShape, TrainingData, Waited, prefetch, run_microbatches, validation_samples
from megatron_cpt.platforms import current_platform
from megatron_cpt.platforms.process_groups import job_store, process_groups
from megatron_cpt.training.baseline import extend_baselines, incomparable, measurements
from megatron_cpt.training.launch import locked_run_folder, propagate_failure, run_seconds, set_numerics, shutdown_barrier
from megatron_cpt.training.log import RunLog
from megatron_cpt.training.loss_spikes import check_replicas, is_spike
from megatron_cpt.training.model_setup import build, gathered_parameters, unwrap
from megatron_cpt.training.profiling import profiling
from megatron_cpt.training.records import layout, metrics_of_step, peak_memory, run_description, run_ledger, run_manifest
from megatron_cpt.training.rerun import rerunning
from megatron_cpt.training.resuming import checking_tensors, intact_run, stop_if_asked
from megatron_cpt.training.run_files import world_size_of
from megatron_cpt.training.run_metadata import run_facts
from megatron_cpt.training.schedule import learning_rate_table
from megatron_cpt.training.state import RunContext, TrainState
from megatron_cpt.training.step import StepResult, StepShape, train_step
from megatron_cpt.training.stopping import StopController, StopRequestedError
from megatron_cpt.training.validate_config import CheckedRun, check_run
from megatron_cpt.training.validation import validate
from megatron_cpt.utils.errors import RunError, SharedInputError

logger = logging.getLogger(__name__)

SECONDS_FOR_LAST_CHECKS = 10.0  # before the last checkpoint, where the run was shorter than reading its files takes


def setup(config: RunConfig) -> str | None:
    """Check everything, then start the process groups and run; returns the folder of the run (on the first rank)."""
    folder, first = config.checkpoint.save, os.environ.get("RANK", "0") == "0"
    if config.check_only:
        run = check_run(config, world_size_of(config))
        log = RunLog(folder, config.logging, 0)
        for note in run.notes:
            log.say(note)
        log.say(ledger_table(run.data.ledger(run.mixture)))
        return None
    with StopController(folder, run_seconds(config.training), launched_world_size()) as stop_controller:
        try:
            run = check_run(config, launched_world_size())
            if not run.complete:
                with locked_run_folder(config, run.start_from) if first else contextlib.nullcontext():
                    start(run, stop_controller)
            elif first:
                log = RunLog(folder, config.logging, 0)
                log.say(
                    f"{run.start_from} is the last checkpoint of this run: nothing to do (training.extend_to trains longer)"
                )
                log.ended_before(run.length.iteration, run.length.train_iters)
        except StopRequestedError:
            if first:
                logger.info(f"stopped before the first step: {stop_controller.requests.stop}")
                RunLog(folder, config.logging, 0).stopped_early(stop_controller.requests.stop)
    return folder if first else None


def start(run: CheckedRun, stop_controller: StopController) -> None:
    """Start the process groups and run."""
    config = run.config
    set_numerics(config.training)
    with (
        process_groups(config.parallel, config.training.seed) as ranks,
        RunLog(config.checkpoint.save, config.logging, ranks.rank) as log,
    ):
        heartbeat = config.loss_spikes.heartbeat_seconds
        stop_controller.share(job_store(), ranks.rank, ranks.world_size, heartbeat, log.failed)
        with propagate_failure(stop_controller, ranks.world_size, log.error_stream, log.failed):
            try:
                main(RunContext(run, ranks, log, stop_controller, Saver(config.checkpoint)))
            except StopRequestedError:
                stop_controller.reason()
                shutdown_barrier(stop_controller)
                raise
            except SharedInputError:
                shutdown_barrier(stop_controller)
                raise
            shutdown_barrier(stop_controller)


def main(context: RunContext) -> None:
    """Build, load, and run to the last iteration."""
    run, ranks, log = context.run, context.ranks, context.log
    for note in run.notes:
        log.say(note)
    log.say(f"{'resuming' if run.resumed else 'starting'} from {run.start_from}; {layout(ranks)}")
    with checking_tensors(run, ranks) as check:
        chunks, optimizer = build(run.config, run.llama, run.mixture.seq_length, ranks)
        state = TrainState(chunks, optimizer)
        context.saver.prepare(unwrap(chunks), optimizer if run.config.checkpoint.save_optim else None)
        run = intact_run(context, check)
    hf_files = read_hf_files(run.hf_folder) if ranks.rank == 0 else {}
    context = dataclasses.replace(context, run=run, hf_files=hf_files)
    stop_if_asked(context)
    if run.resumed is not None:
        state.progress = load_checkpoint(run.start_from, unwrap(chunks), optimizer)
        state.history, state.baselines, state.evaluated = run.resumed.history, run.resumed.baselines, run.resumed.evaluated
    else:
        load_checkpoint(run.start_from, unwrap(chunks))
        optimizer.reload_model_params()
    if config_is_extended(run):
        log.say(extension_note(run))
    rates = learning_rate_table(run.schedule, run.length, run.config.training.global_batch_size)
    log.start(
        run_description(context) | run_facts(ranks.all_gather_object),
        run_ledger(run, state.progress),
        run.data.ledger(run.mixture),
        run.length.iteration,
        rates,
        resumed=run.resumed is not None,
    )
    if run.resumed is not None:
        measure_anew_if_needed(context, state)
    log.status("running", run.length.iteration, run.length.train_iters)
    context.stop_controller.working()
    stop_if_asked(context)
    try:
        fit(context, state)
    except StopRequestedError:
        stop_run(context, state, context.stop_controller.reason())
    except RunError as error:
        log.status("failed", state.progress.iteration, run.length.train_iters, str(error))
        log.finish()
        raise
    else:
        context.saver.finish()
        log.status("finished", state.progress.iteration, run.length.train_iters)
        context.stop_controller.drop_requests()
    log.finish()


def config_is_extended(run: CheckedRun) -> bool:
    """Whether the run goes on with a length that is not the planned one."""
    return run.resumed is not None and run.config.training.extend_to is not None


def extension_note(run: CheckedRun) -> str:
    """What becomes of the learning rate of a run that is longer than planned."""
    name, planned = run.config.training.planned_length()
    restarted = run.schedule.start == run.length.consumed_samples
    constant = run.config.lr.decay_style == "constant"
    again, decays = ("warms up again", "and decays from here") if restarted else ("goes on as scheduled", "and decays")
    rate = f"{again} and stays constant" if constant else f"{again} {decays}"
    return (
        f"{name} was planned as {planned:,} and is extended to {run.config.training.extend_to:,}: the learning rate {rate} "
        f"to the new end, step {run.length.train_iters:,}"
    )


def measure_anew_if_needed(context: RunContext, state: TrainState) -> None:
    """Have a resumed run evaluate at once if a set was not measured so before: later figures have something to compare."""
    wanted = measurements(context.run.mixture, context.config)
    missing = incomparable(state.baselines, wanted, state.progress.iteration)
    for note in missing:
        context.log.say(note)
    state.evaluated = state.evaluated and not missing


def fit(context: RunContext, state: TrainState) -> None:
    """Train to the last iteration, evaluating and saving on the way and at the end.

    Raises:
        StopRequestedError: the run was asked to stop; `state` is as after its last whole step
        RunError: it cannot go on
    """
    run, config, log, ranks = context.run, context.config, context.log, context.ranks
    training, requests = config.training, context.stop_controller.requests
    batch = BatchShape(training.micro_batch_size, training.global_batch_size, ranks.data_rank, ranks.data_size)
    shape = StepShape(
        batch.num_microbatches, training.micro_batch_size, run.mixture.seq_length, config.data.reset_attention_mask
    )
    if not state.evaluated:
        validate_all(context, state, shape)
        if state.progress.iteration == run.length.train_iters:  # it was stopped in its last evaluation
            save_run(context, state, last=True)
    order = run.data.state.order(run.mixture, run.data.schedule)
    vocab_size = run.mixture.manifest.tokenizer.vocab_size
    reader = TrainingData(
        [corpus.data for corpus in run.mixture.corpora], order, config.data, ranks.reads_tokens, vocab_size
    )
    steps = run.length.train_iters - state.progress.iteration
    reads = run_microbatches(reader, state.progress.consumed_samples, batch, steps, current_platform().page_locked)
    with (
        closing(prefetch(reads, config.data.num_workers, config.data.prefetch, requests.stopping)) as read,
        profiling(config.logging, ranks.rank, config.checkpoint.save, state.progress.iteration) as profiler,
        current_platform().monitored() as alive,
        rerunning(config.loss_spikes.rerun_skipped_steps, batches := Waited(read)) as reruns,
        FileChecks(files_to_check(context), config.checkpoint.save, remember=ranks.rank == 0) as files,
    ):
        while state.progress.iteration < run.length.train_iters:
            start, waited = time.perf_counter(), batches.seconds
            after = Progress(state.progress.iteration + 1, state.progress.consumed_samples + training.global_batch_size)
            lr = run.schedule.at(after.consumed_samples)
            result = train_step(
                state.chunks,
                state.optimizer,
                batches if reruns is None else reruns.batches,
                shape,
                lr,
                config.optimizer,
                ranks,
                requests,
                reruns,
                lambda loss, grad_norm: is_spike(state.history, config.loss_spikes, loss, grad_norm),
            )
            record_step(context, state, result, after)
            seconds = time.perf_counter() - start
            log.step(metrics_of_step(context, state, result, lr, seconds, batches.seconds - waited), run.length.train_iters)
            files.poll()
            last = state.progress.iteration == run.length.train_iters
            if last and (left := files.finish(SECONDS_FOR_LAST_CHECKS)):
                more = f" and {len(left) - 1} more" if len(left) > 1 else ""
                log.say(f"not compared with the checksums within {SECONDS_FOR_LAST_CHECKS:g} s: {left[0]}{more}")
            give_up_if_too_many(context, state, result)
            finish_step(context, state, shape, result)
            profiler.step(state.progress.iteration)
            alive()
    log.metrics({"iteration": state.progress.iteration, "peak_memory_bytes": peak_memory(ranks)})


def files_to_check(context: RunContext) -> list[ExpectedFile]:
    """Those whose checksums this process compares: the first process of every host looks at all of them."""
    mixture = context.run.mixture
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    return expected_files(mixture.corpora + mixture.validation) if context.config.data.check_files and is_first else []


def record_step(context: RunContext, state: TrainState, result: StepResult, after: Progress) -> None:
    """Record the outcome of a step: its loss, or that it was skipped."""
    if result.skip_reason is None:
        state.history = state.history.accepted(result.loss, context.config.loss_spikes)
    else:
        state.history = state.history.with_skipped_step(state.progress)
    state.progress = after


def give_up_if_too_many(context: RunContext, state: TrainState, result: StepResult) -> None:
    """Go on unless too many steps in a row did not change the weights.

    Raises:
        RunError: they did not; the newest checkpoint is as of before the first of them
    """
    most, skipped, before = context.config.loss_spikes.max_skipped_steps, state.history.skipped, state.history.before
    if before is None or skipped <= most:
        return
    iteration = state.progress.iteration
    state.progress, state.history = before, dataclasses.replace(state.history, skipped=0, before=None)
    save_run(context, state, last=True)
    raise RunError(
        f"{skipped} steps in a row did not change the weights (loss_spikes.max_skipped_steps {most}); at step {iteration} "
        f"{result.skip_reason}. The checkpoint of step {before.iteration} is from before"
    )


def finish_step(context: RunContext, state: TrainState, shape: StepShape, result: StepResult) -> None:
    """Check, evaluate and save where the configuration or somebody asks for it, and always after the last step.

    Raises:
        StopRequestedError: somebody asked to stop
    """
    config, iteration = context.config, state.progress.iteration
    last = iteration == context.run.length.train_iters
    if due(iteration, config.loss_spikes.check_weight_hash_across_dp_replicas_interval):
        with gathered_parameters(state.chunks):
            check_replicas(state.chunks, iteration, context.ranks)
    context.saver.poll()
    state.evaluated = not (last or due(iteration, config.validation.eval_interval))
    if result.stop and not last:
        raise StopRequestedError
    if not state.evaluated:
        validate_all(context, state, shape)
        context.log.status("running", iteration, context.run.length.train_iters)
    if context.saver.retry_pending():  # at its own time
        asked = context.saver.retry_due()
    else:
        asked = due(iteration, config.checkpoint.save_interval) or result.save
    # While steps are being skipped the newest checkpoint stays that of before them.
    if last or (asked and not state.history.skipped):
        save_run(context, state, last)
    if result.save:
        context.stop_controller.requests.save = False
        if state.history.skipped or context.saver.retry_pending():
            context.log.warn(
                "save_now is not obeyed: steps are being skipped, or an earlier save is to be tried again first"
            )


def due(iteration: int, interval: int) -> bool:
    """Whether something done every `interval` steps (0: never) is to be done now."""
    return interval > 0 and iteration % interval == 0


def stop_run(context: RunContext, state: TrainState, reason: str) -> None:
    """Save what has not been saved, and say why the run ends here."""
    run, iteration = context.run, state.progress.iteration
    context.log.say(f"stopping at step {iteration}/{run.length.train_iters}: {reason}")
    context.saver.finish()
    if iteration > run.length.iteration and context.saver.committed != iteration:
        save_run(context, state, last=True)
    context.log.status("stopped", iteration, run.length.train_iters, reason)


def save_run(context: RunContext, state: TrainState, last: bool = False) -> None:
    """Write a checkpoint, in the background if the configuration says so and it is not the last."""
    run, config = context.run, context.config
    if context.saver.committed == state.progress.iteration:
        return
    with gathered_parameters(state.chunks):
        optimizer = state.optimizer if config.checkpoint.save_optim else None
        context.saver.save(
            unwrap(state.chunks), optimizer, context.hf_files, run_manifest(context, state), state.progress, last
        )
    context.log.ledger(run_ledger(run, state.progress))
    context.log.status("running", state.progress.iteration, run.length.train_iters)


def validate_all(context: RunContext, state: TrainState, shape: StepShape) -> None:
    """Validate on every set of the mixture, if it has any.

    Raises:
        StopRequestedError: somebody asked to stop; the evaluation is still due
    """
    mixture, config, log = context.run.mixture, context.config, context.log
    if mixture.validation:
        token_bytes = torch.from_numpy(context.run.token_bytes).to(context.ranks.device)
        wanted = config.validation.eval_samples
        samples = sum(validation_samples(corpus, mixture.seq_length, wanted) for corpus in mixture.validation)
        task = log.progress.add_task("validation", total=samples, note="")
        with gathered_parameters(state.chunks):
            results = validate(
                state.chunks,
                mixture.validation,
                token_bytes,
                shape,
                wanted,
                context.ranks,
                config.data,
                on_samples=lambda samples: log.progress.advance(task, samples),
                stopping=context.stop_controller.requests.stopping,
            )
        log.progress.remove_task(task)
        measured = measurements(mixture, config)
        state.baselines = extend_baselines(state.baselines, measured, results, state.progress.iteration)
        log.validation(state.progress.iteration, results, measured, state.baselines)
    state.evaluated = True

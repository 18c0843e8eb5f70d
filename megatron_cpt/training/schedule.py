"""The learning rate, a pure function of how much text was consumed: what was asked for is what is used.

Everything is counted in samples, so a run may change its batch size and keep its curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_cpt.config.run import RunConfig, TrainingConfig
from megatron_cpt.utils.errors import InputError, RefusedValueError

TABLE_POINTS = 10  # between the first and the last step


@dataclass(frozen=True)
class LearningRate:
    """One schedule. Positions are in samples of the run.

    Attributes:
        start: where the schedule begins
        end: where it has decayed to `min_lr`
        warmup: samples of warm-up
        decay: samples of decay at the end (WSD only)
        first_step: samples of the first step, which already has the full rate if there is no longer warm-up
    """

    decay_style: str
    lr: float
    min_lr: float
    warmup: int
    wsd_decay_style: str | None
    decay: int | None
    start: int
    end: int
    first_step: int

    def at(self, consumed_samples: int) -> float:
        """The rate of the step that brings the run to `consumed_samples`.

        Linear warm-up: consumed / warmup of the rate. The decay's progress p runs from 0, at the end of the warm-up (WSD:
        `decay` samples before the end), to 1 at the end: rate = min_lr + (lr - min_lr) f(p), with f = 1 - p (linear),
        (1 + cos pi p) / 2 (cosine), 1 - sqrt p (minus_sqrt), 2^(1-p) - 1 (exponential, as in Megatron-LM).
        """
        position, length = consumed_samples - self.start, self.end - self.start
        if position < self.warmup:
            return self.lr * position / self.warmup
        peak = max(self.warmup, self.first_step)
        style, begin = self.decay_style, peak
        if style == "WSD":
            assert self.decay is not None
            assert self.wsd_decay_style is not None
            style, begin = self.wsd_decay_style, max(length - self.decay, peak)
        if style == "constant" or position <= begin:
            return self.lr
        progress = min((position - begin) / (length - begin), 1.0) if length > begin else 1.0
        return self.min_lr + (self.lr - self.min_lr) * remaining(style, progress)

    def settings(self) -> dict[str, Any]:
        """What makes it another schedule if it differs."""
        return {name: value for name, value in asdict(self).items() if name not in ("start", "first_step")}


def remaining(style: str, progress: float) -> float:
    """The part of the way from min_lr to lr that is left: 1 at progress 0, 0 at progress 1."""
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(progress)
    if style == "exponential":
        return 2.0 * 0.5**progress - 1.0
    raise ValueError(f"decay style {style!r}")


@dataclass(frozen=True)
class RunLength:
    """Where a run is and where it ends.

    Attributes:
        iteration, consumed_samples: as of the checkpoint it resumes from; 0 at the beginning
        train_iters: number of its last step
        run_samples: samples after that
        end: samples that were asked for; the last step may go a little beyond
    """

    iteration: int
    consumed_samples: int
    train_iters: int
    run_samples: int
    end: int


def run_length(training: TrainingConfig, seq_length: int, iteration: int = 0, consumed_samples: int = 0) -> RunLength:
    """The end of a run that is at `iteration`, from what the configuration gives: steps, samples or tokens."""
    batch, training = training.global_batch_size, training.extended()
    if training.train_iters is not None:
        steps = max(training.train_iters - iteration, 0)
        end = consumed_samples + steps * batch
    else:
        samples, tokens = training.train_samples, training.train_tokens
        if samples is None and tokens is None:  # `TrainingConfig` names it
            raise RefusedValueError
        end = samples if samples is not None else math.ceil((tokens or 0) / seq_length)
        steps = max(math.ceil((end - consumed_samples) / batch), 0)
    return RunLength(iteration, consumed_samples, iteration + steps, consumed_samples + steps * batch, end)


def make_schedule(config: RunConfig, seq_length: int, length: RunLength, start: int = 0) -> LearningRate:
    """The configuration's schedule over `start` to the end of the run.

    Raises:
        InputError: warm-up and decay do not fit into it
    """
    batch, lr = config.training.global_batch_size, config.lr
    warmup = _in_samples(lr.warmup_iters, lr.warmup_samples, lr.warmup_tokens, batch, seq_length) or 0
    decay = None
    available = length.end - start
    if lr.decay_style == "WSD":
        decay = _in_samples(lr.wsd_decay_iters, lr.wsd_decay_samples, lr.wsd_decay_tokens, batch, seq_length)
        decay = math.ceil(available / 10) if decay is None else decay
    if warmup and warmup >= available + (lr.decay_style == "constant"):
        anew = (
            f"; the schedule warms up and decays anew from sample {start:,}, where it had ended: expected a later end "
            "(training.extend_to), a shorter warm-up, or lr.on_continue continue"
        )
        raise InputError(
            f"lr.warmup_{_unit(config)} leaves nothing to decay in: warm-up takes {warmup} samples, the schedule "
            f"{available} (global_batch_size {batch}){anew if start else ''}"
        )
    if decay and warmup + decay > available:
        raise InputError(
            f"lr: the warm-up takes {warmup} samples and the decay {decay}; expected at most {available} together, as the "
            "schedule has"
        )
    return LearningRate(
        decay_style=lr.decay_style,
        lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        warmup=warmup,
        wsd_decay_style=lr.wsd_decay_style if decay is not None else None,
        decay=decay,
        start=start,
        end=length.end,
        first_step=batch,
    )


def continue_schedule(saved: Mapping[str, Any], config: RunConfig, seq_length: int, length: RunLength) -> LearningRate:
    """The schedule of a run that goes on after a checkpoint whose schedule was `saved` (`asdict` of a LearningRate).

    Raises:
        InputError: the configuration's is another one and does not say how to go on
    """
    before = LearningRate(**saved)
    same_origin = make_schedule(config, seq_length, length, before.start)
    if same_origin.settings() == before.settings():
        return before
    now = same_origin.settings()
    different = {name: old for name, old in before.settings().items() if old != now[name]}
    on_continue = config.lr.on_continue
    if on_continue is None and config.training.extend_to is not None and set(different) <= follow_from_length(config):
        on_continue = (
            "continue" if before.at(length.consumed_samples) == same_origin.at(length.consumed_samples) else "restart"
        )
    if on_continue == "continue":
        return same_origin
    if on_continue == "restart":
        return make_schedule(config, seq_length, length, length.consumed_samples)
    changed = [f"{name} was {old} and is {now[name]}" for name, old in different.items()]
    raise InputError(
        f"{config.checkpoint.save}: the learning-rate schedule is not the one of the run's checkpoint (in samples: "
        f"{'; '.join(changed)}); lr.on_continue restart warms up and decays anew from here, continue goes on where the new "
        f"schedule would be by now; training.extend_to trains longer than planned"
    )


def follow_from_length(config: RunConfig) -> set[str]:
    """Settings of a schedule that are others as soon as the run is longer."""
    lr = config.lr
    given = any(value is not None for value in (lr.wsd_decay_iters, lr.wsd_decay_samples, lr.wsd_decay_tokens))
    return {"end"} if given else {"end", "decay"}


def learning_rate_table(schedule: LearningRate, length: RunLength, batch: int) -> list[dict[str, float]]:
    """First and last step of what is left of the run, 10 points between, and where warm-up ends and WSD's decay begins."""
    first, last = length.iteration + 1, length.train_iters
    corners = [schedule.start + schedule.warmup] if schedule.warmup else []
    corners += [schedule.end - schedule.decay] if schedule.decay else []
    turns = {length.iteration + math.ceil((corner - length.consumed_samples) / batch) for corner in corners}
    steps = sorted(
        {first + (last - first) * i // (TABLE_POINTS + 1) for i in range(TABLE_POINTS + 2)}
        | {step for step in turns if first <= step <= last}
    )
    consumed = {step: length.consumed_samples + (step - length.iteration) * batch for step in steps if step <= last}
    return [{"iteration": step, "consumed_samples": n, "lr": schedule.at(n)} for step, n in consumed.items()]


def _in_samples(iters: int | None, samples: int | None, tokens: int | None, batch: int, seq_length: int) -> int | None:
    if iters is not None:
        return iters * batch
    if tokens is not None:
        return math.ceil(tokens / seq_length)
    return samples


def _unit(config: RunConfig) -> str:
    return next(unit for unit in ("iters", "samples", "tokens") if getattr(config.lr, f"warmup_{unit}") is not None)

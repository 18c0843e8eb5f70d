"""What a run gives to its log: ledgers, rows of steps, validation results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.mixture.ledger import Ledger, LedgerRow, StageTotal
from megatron_cpt.training.baseline import Baseline, Measurement, extend_baselines
from megatron_cpt.training.log import RunLog
from megatron_cpt.training.validation_result import ValidationResult


def make_ledger() -> Ledger:
    corpora = (("en_wiki", "general", "en"), ("zh_web", "additional", "zh"))
    rows = tuple(LedgerRow("main", name, group, None, language, 100, 6400, 0.5, 1.0) for name, group, language in corpora)
    return Ledger(0, 200, 64, 0.5, 0.5, (StageTotal("main", 0, 200, 0.5, 0.5),), rows, {"en": 0.5, "zh": 0.5})


def step_row(iteration: int, **changed: Any) -> dict[str, Any]:
    """A training row as the training loop makes it."""
    row = {
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "loss": 4.0 - 0.01 * iteration,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "seconds": 2.0,
        "data_seconds": 0.1,
        "tokens_per_second": 1234.5,
        "tokens_per_second_per_device": 617.25,
        "mfu": 0.412,
        "mfu_causal": 0.389,
        "skipped": None,
        "consumed_tokens": 512 * iteration,
        "corpus_tokens": {"en_wiki": 256 * iteration, "zh_web": 256 * iteration},
        "almr_realised": 0.5,
    }
    return row | changed


def results(factor: float = 1.0) -> list[ValidationResult]:
    """zh at `factor` of the baseline, en at the baseline divided by it."""
    return [
        ValidationResult("zh", "zh", 4.0 * factor, 2.0 * factor, 100, 400),
        ValidationResult("en", "en", 2.0 / factor, 1.0 / factor, 100, 400),
    ]


def measured(name: str, samples: int = 100) -> Measurement:
    """How a set is measured."""
    return Measurement(name, "b" * 64, "1" * 64, "t" * 64, 64, samples, False, False)


def validated(log: RunLog, iteration: int, found: list[ValidationResult], samples: int = 100) -> None:
    """Record an evaluation of a run that has evaluated zh and en, 100 samples each, before its first step."""
    before = [Baseline(measured(r.name), 0, r.loss, r.bits_per_byte) for r in results()] if iteration else []
    how = [measured(result.name, samples) for result in found]
    log.validation(iteration, found, how, extend_baselines(before, how, found, iteration))


def start(log: RunLog, iteration: int = 0, **run: Any) -> None:
    """Begin, or go on after `iteration` steps."""
    rates = [
        {"iteration": 1.0, "consumed_samples": 8.0, "lr": 1e-4},
        {"iteration": 20.0, "consumed_samples": 160.0, "lr": 1e-5},
    ]
    planned = {"almr_asked": 0.5, "almr_realised": 0.5, "rows": [vars(row) for row in make_ledger().rows]}
    log.start({"config": {"seed": 1}} | run, {"planned": planned}, make_ledger(), iteration, rates)


def record(folder: Path, first: int, last: int, config: LoggingConfig | None = None, **changed: Any) -> None:
    """Run the steps `first` to `last` of a run of 20, validating before the first of all and after the last."""
    with RunLog(str(folder), config or LoggingConfig(), 0) as log:
        start(log, first - 1)
        if first == 1:
            validated(log, 0, results())
        for iteration in range(first, last + 1):
            log.step(step_row(iteration, **changed), 20)
        validated(log, last, results(0.9))

"""Results of studies that nobody ran: losses and scores by formulas, with noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_cpt.study.results import MEAN_METRIC, Results

ALMRS = (0.0, 0.25, 0.5, 0.75, 1.0)
RATES = (1e-4, 3.162e-4, 1e-3, 3.162e-3, 1e-2)
START = {"general": 3.0, "additional": 5.0}


def general_loss(almr: float, lr: float, tokens: float) -> float:
    """Rises with the learning rate and the ALMR, more so late."""
    return 3.0 + tokens * (0.4 * almr * (np.log10(lr) + 4.2) / 2 - 0.02)


def additional_loss(almr: float, lr: float, tokens: float) -> float:
    """Falls with both."""
    return 5.0 - tokens * (0.2 + 1.2 * almr) * (0.4 + 0.3 * (np.log10(lr) + 4))


def tilted_metric(almr: float, lr: float) -> float:
    """Best at ALMR 0.5 and a learning rate of 1e-3."""
    return float(50 - 8 * (almr - 0.5 - 0.3 * (np.log10(lr) + 3)) ** 2 - 1.5 * (np.log10(lr) + 3) ** 2)


def make_results(
    metric: Callable[[float, float], float] | None = None,
    noise: float = 0.002,
    seeds: int = 3,
    seed: int = 0,
    almrs: tuple[float, ...] = ALMRS,
    rates: tuple[float, ...] = RATES,
    general: Callable[[float, float, float], float] = general_loss,
    additional: Callable[[float, float, float], float] = additional_loss,
    evaluations: int = 5,
    metric_noise: float = 0.15,
) -> Results:
    """A row for each run and evaluation, at evenly spaced tokens up to one (million)."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(1, seeds + 1):
        for almr in almrs:
            for lr in rates:
                for step in range(evaluations):
                    part = step / (evaluations - 1)
                    losses = {"general": general(almr, lr, part), "additional": additional(almr, lr, part)}
                    if step:
                        losses = {name: loss * (1 + noise * random.standard_normal()) for name, loss in losses.items()}
                    change = [losses[name] / START[name] - 1 for name in losses]
                    last = step == evaluations - 1
                    score = metric(almr, lr) + metric_noise * random.standard_normal() if metric and last else None
                    rows.append(
                        {"run": f"almr{almr:g}_lr{lr:g}_seed{number}", "almr": almr, "lr": lr, "seed": number}
                        | {"outcome": "finished", "iteration": 10 * step, "tokens": round(1e6 * part), "last": last}
                        | losses
                        | {
                            "mixed": (1 - almr) * losses["general"] + almr * losses["additional"],
                            "balanced": sum(change) / 2,
                        }
                        | {"score": score, MEAN_METRIC: score}
                    )
    return Results(rows, ["score"] if metric else [])

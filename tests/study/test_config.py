"""Studies that cannot be, and choices that are none."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.errors import InputError
from megatron_cpt.study.commands import choose_command, fit_command
from megatron_cpt.study.config import LimitsConfig, LogRange, ScoresConfig, StudyConfig
from megatron_cpt.study.settings import Choose, FitOptions

FIELDS: dict[str, Any] = {"base": "base.yaml", "folder": "study", "almr": [0.5], "lr": [1e-3], "train_tokens": 1000}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"almr": [0.2, 1.5]}, "almr is 1.5; use numbers from 0 to 1"),
        ({"almr": []}, r"almr is \[\]; use one or more different values"),
        ({"lr": [0.1, 0.1]}, r"lr is \[0.1, 0.1\]; use one or more different values"),
        ({"lr": LogRange(1e-4, float("inf"), 3)}, "lr.max is inf; use a number above 0"),
        ({"lr": LogRange(float("nan"), 1.0, 3)}, "lr.min is nan; use a number above 0 and below lr.max 1.0"),
        ({"lr": LogRange(1e-4, float("nan"), 3)}, "lr.max is nan; use a number above 0"),
        ({"lr": LogRange(1e-3, 1.001e-3, 5)}, "lr.number is 5; so many learning rates from 0.001 to 0.001001 are not all"),
        ({"almr": [0.0, 0.5, 1.0], "lr": [1e-4, 1e-3], "starting_pairs": 3}, "starting_pairs is 3; use 4 to 6, the grid"),
        ({"almr": [0.0, 0.5, 1.0], "lr": [1e-4, 1e-3], "starting_pairs": 7}, "starting_pairs is 7; use 4 to 6, the grid"),
        ({"lr": [0.0]}, "lr is 0.0; use numbers above 0"),
        ({"lr": [0.0], "starting_pairs": 4}, "lr is 0.0; use numbers above 0"),
        ({"seeds": [-1]}, "seeds is -1; use 0 to"),
        ({"folder": ""}, "folder is ''; use a path"),
        ({"limits": LimitsConfig(hours=-1)}, "limits.hours is -1; use 0 or more"),
        ({"scores": ScoresConfig(["python", "{hf}"])}, "words with {output} in them"),
        ({"divergence_factor": 1.0}, "divergence_factor is 1.0; use a number above 1"),
        ({"parallel_runs": 0}, "parallel_runs is 0; use 1 or more"),
    ],
)
def test_wrong_studies(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        StudyConfig(**FIELDS | changes)


def test_limits_that_are_none() -> None:
    with pytest.raises(InputError, match=r"confidence is 2; use 0\.5 or more, below 1"):
        choose_command(Choose(**FIELDS, confidence=2))
    with pytest.raises(InputError, match="max_general_rise is -1; use a number above -1"):
        choose_command(Choose(**FIELDS, max_general_rise=-1))
    with pytest.raises(InputError, match=r"tolerance is -0\.1; use 0 or more"):
        fit_command(FitOptions(**FIELDS, tolerance=-0.1))

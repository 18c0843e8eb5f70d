"""Studies that cannot be, and choices that are none."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.study.commands import choose_command, fit_command
from megatron_cpt.study.config import LimitsConfig, LogRange, ScoresConfig, StudyConfig
from megatron_cpt.study.settings import ChooseOptions, FitOptions
from megatron_cpt.utils.errors import InputError

FIELDS: dict[str, Any] = {"base": "base.yaml", "folder": "study", "almr": [0.5], "lr": [1e-3], "train_tokens": 1000}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"almr": [0.2, 1.5]}, "almr is 1.5; expected numbers from 0 to 1"),
        ({"almr": []}, r"almr is \[\]; expected one or more different values"),
        ({"lr": [0.1, 0.1]}, r"lr is \[0.1, 0.1\]; expected one or more different values"),
        ({"lr": lambda: LogRange(1e-4, float("inf"), 3)}, "max is inf; expected a number above 0"),
        ({"lr": lambda: LogRange(float("nan"), 1.0, 3)}, "min is nan; expected a number above 0"),
        ({"lr": lambda: LogRange(1e-4, float("nan"), 3)}, "max is nan; expected a number above 0"),
        (
            {"lr": lambda: LogRange(1e-3, 1.001e-3, 5)},
            "number is 5; so many learning rates from 0.001 to 0.001001 are not all",
        ),
        (
            {"almr": [0.0, 0.5, 1.0], "lr": [1e-4, 1e-3], "starting_pairs": 3},
            "starting_pairs is 3; expected 4 to 6, the grid",
        ),
        (
            {"almr": [0.0, 0.5, 1.0], "lr": [1e-4, 1e-3], "starting_pairs": 7},
            "starting_pairs is 7; expected 4 to 6, the grid",
        ),
        ({"lr": [0.0]}, "lr is 0.0; expected numbers above 0"),
        ({"lr": [0.0], "starting_pairs": 4}, "lr is 0.0; expected numbers above 0"),
        ({"seeds": [-1]}, "seeds is -1; expected 0 to"),
        ({"folder": ""}, "folder is ''; expected a path"),
        ({"limits": lambda: LimitsConfig(hours=-1)}, "hours is -1; expected 0 or more"),
        ({"scores": lambda: ScoresConfig(["python", "{hf}"])}, "words with {output} in them"),
        ({"divergence_factor": 1.0}, "divergence_factor is 1.0; expected a number above 1"),
        ({"parallel_runs": 0}, "parallel_runs is 0; expected 1 or more"),
    ],
)
def test_wrong_studies(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        StudyConfig(**FIELDS | {name: value() if callable(value) else value for name, value in changes.items()})


def test_limits_that_are_none() -> None:
    with pytest.raises(InputError, match=r"confidence is 2; expected 0\.5 or more, below 1"):
        choose_command(ChooseOptions(**FIELDS, confidence=2))
    with pytest.raises(InputError, match="max_general_rise is -1; expected a number above -1"):
        choose_command(ChooseOptions(**FIELDS, max_general_rise=-1))
    with pytest.raises(InputError, match=r"tolerance is -0\.1; expected 0 or more"):
        fit_command(FitOptions(**FIELDS, tolerance=-0.1))

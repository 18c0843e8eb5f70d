"""The settings of the commands of tools/almr_study.py, beside those of the study itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_cpt.config.require import Requirements
from megatron_cpt.study.config import StudyConfig

Axis = Literal["almr", "lr"]


@dataclass(frozen=True)
class PlanOptions(StudyConfig):
    """The grid with what it takes; with --adaptive N also the next N points."""

    adaptive: int = 0
    """Add so many pairs of ALMR and learning rate, where they tell most (Optuna); `run` runs them too."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, adaptive=0)
            with need.noted():
                super().__post_init__()


@dataclass(frozen=True)
class RunOptions(StudyConfig):
    """Do the runs that are not done yet, here or as a SLURM job array, and collect what they found."""

    only: str | None = None
    """Name of the one run to do."""


@dataclass(frozen=True)
class FitOptions(StudyConfig):
    """Fit surfaces, the frontier, the loss line and the mixture laws to what the runs found."""

    frontier_axis: Axis = "almr"
    """Along which peaks are looked for: the best ALMR for each learning rate, or the best learning rate for each ALMR."""
    tolerance: float = 0.01
    """Relative rise of the general loss, for critical mixture ratios."""
    token_budget: int | None = None
    """Predict the critical mixture ratio of a run of so many tokens."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, tolerance=0, token_budget=1)
            with need.noted():
                super().__post_init__()


@dataclass(frozen=True)
class PlotOptions(FitOptions):
    """Draw the figures and write report.html."""


@dataclass(frozen=True)
class ChooseOptions(StudyConfig):
    """Choose ALMR and learning rate, and write the configuration of the run to start."""

    max_general_rise: float = 0.01
    """Of the general languages' loss (so of their bits per byte), relative to the start: 0.01 is one per cent."""
    confidence: float = 0.9
    """Probability with which this must hold, where surfaces give one."""
    goal: Literal["mean_metric", "additional"] | None = None
    """The highest mean metric or the lowest additional loss. Default: the former where there are scores."""
    target: str | None = None
    """Configuration of the run to start, perhaps of a larger model. Default: the study's base."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "confidence", lambda share: 0.5 <= share < 1, "0.5 or more, below 1")
            need.field(self, "max_general_rise", lambda rise: -1 < rise < math.inf, "a number above -1")
            with need.noted():
                super().__post_init__()

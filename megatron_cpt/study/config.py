"""study.yaml: what is varied, for how long, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_cpt.config.require import Requirements, require
from megatron_cpt.config.values import Text
from megatron_cpt.utils.errors import InputError

MOST_RATES = 1000
MOST_RUNS = 100_000  # of a grid
STARTING_PAIRS = 4  # at least: the corners of the ranges


@dataclass(frozen=True)
class LogRange:
    """Learning rates at equal distances on a log scale."""

    min: float
    """The lowest."""
    max: float
    """The highest."""
    number: int
    """How many, with these two."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "max", lambda lr: 0 < lr < math.inf, "a number above 0")
            need.field(self, "min", lambda lr: 0 < lr < math.inf, "a number above 0")
            need.field(self, "number", lambda number: 2 <= number <= MOST_RATES, f"2 to {MOST_RATES}")
            with need.noted():
                require(not 0 < self.max <= self.min, "min", self.min, f"a number above 0 and below lr.max {self.max}")
            if not need.errors:
                with need.noted():
                    self._check_different()

    def _check_different(self) -> None:
        if len(set(self.values())) < self.number:
            raise InputError(
                f"number is {self.number}; so many learning rates from {self.min:g} to {self.max:g} are not all "
                "different in four digits: use fewer, or a wider range"
            )

    def values(self) -> list[float]:
        """To four significant digits, so that names of runs stay short."""
        ratio = math.log(self.max / self.min) / (self.number - 1)
        return [float(f"{self.min * math.exp(i * ratio):.4g}") for i in range(self.number)]


@dataclass(frozen=True)
class ScoresConfig:
    """Benchmark scores of checkpoints, beside validation losses."""

    command: list[str]
    """What measures a model, for example lm-eval: {hf} becomes its Hugging Face folder, {output} the folder for the results,
    a JSON file as lm-eval writes it, or {"name": number}, where higher is better."""
    mean_of: list[str] | None = None
    """Scores whose mean is the mean metric. Default: all."""

    def __post_init__(self) -> None:
        for part in ("{hf}", "{output}"):
            require(any(part in word for word in self.command), "command", self.command, f"words with {part} in them")


@dataclass(frozen=True)
class LimitsConfig:
    """What the study may cost. A plan above it is refused."""

    runs: int | None = None
    """Runs in all."""
    tokens: float | None = None
    """Tokens in all."""
    disk_gb: float | None = None
    """Checkpoints in all, 1e9 bytes."""
    hours: float | None = None
    """Time in all, where it can be estimated."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            for name in ("runs", "tokens", "disk_gb", "hours"):
                need.field(self, name, lambda value: value >= 0, "0 or more")


@dataclass(frozen=True)
class StudySlurmConfig:
    """The job array of `run --executor slurm`, one task for each run."""

    sbatch: list[Text] = field(default_factory=list)
    """Options of sbatch, such as --partition=gpu --gpus-per-node=8 --time=4:00:00."""
    setup: list[Text] = field(default_factory=list)
    """Shell lines before a run, such as source .venv/bin/activate."""
    dry_run: bool = False
    """Write the script, submit nothing."""


@dataclass(frozen=True)
class StudyConfig:
    """A study over ALMR and learning rate."""

    base: str
    """Configuration of tools/pretrain_cpt.py that every run follows. Its ALMR, learning rate, length, seeds and folder are
    the study's; min_lr keeps its ratio to lr. Paths in it are relative to where the tool is started, as ever."""
    folder: str
    """Where runs and results go."""
    almr: list[float]
    """Values of the additional-language mixture ratio."""
    lr: list[float] | LogRange
    """Learning rates: a list, or min, max and number on a log scale."""
    train_tokens: int
    """Tokens of a run."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Of the order of the data, and of all else that is random; runs of one seed read the same text in the same order."""
    starting_pairs: int | None = None
    """Begin with so many pairs of ALMR and learning rate, spread over the grid of all, instead of all of them; `plan
    --adaptive` then adds pairs. Default: the whole grid."""
    processes: int = 1
    """Processes of a run, under torchrun."""
    parallel_runs: int = 1
    """Runs at the same time on this machine, or in the job array."""
    divergence_factor: float = 1.5
    """A run whose mean training loss of ten steps is above this many times that of its first step is stopped: it has
    diverged. So has one that skips too many steps (loss_spikes.max_skipped_steps)."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of runs that are finished and measured."""
    scores: ScoresConfig | None = None
    """See ScoresConfig."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """See LimitsConfig."""
    executor: Literal["local", "slurm"] = "local"
    """Where `run` runs."""
    slurm: StudySlurmConfig = field(default_factory=StudySlurmConfig)
    """See SlurmConfig."""
    device: str | None = None
    """Device type for estimates of time, as plan_run.py knows it (a100-80g, h100). Default: they come from finished runs."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.at_least(self, train_tokens=1, processes=1, parallel_runs=1)
            need.field(self, "base", bool, "a configuration of tools/pretrain_cpt.py")
            need.field(self, "folder", bool, "a path")
            need.field(self, "divergence_factor", lambda factor: factor > 1, "a number above 1")
            with need.noted():
                check_values("almr", self.almr, lambda share: 0 <= share <= 1, "numbers from 0 to 1")
            with need.noted():
                check_values("lr", self.rates, lambda rate: 0 < rate < math.inf, "numbers above 0")
            with need.noted():
                check_values("seeds", self.seeds, lambda seed: 0 <= seed < 2**63, "0 to 2**63 - 1")
            with need.noted():
                runs = len(self.almr) * len(self.rates) * len(self.seeds)
                require(runs <= MOST_RUNS, "almr x lr x seeds", f"a grid of {runs} runs", f"at most {MOST_RUNS}")
            with need.noted():
                self._check_starting_pairs()

    def _check_starting_pairs(self) -> None:
        whole = len(self.almr) * len(self.rates)
        least = min(STARTING_PAIRS, whole)
        if self.starting_pairs is not None:
            require(
                least <= self.starting_pairs <= whole, "starting_pairs", self.starting_pairs, f"{least} to {whole}, the grid"
            )

    @property
    def rates(self) -> list[float]:
        """The learning rates."""
        return self.lr if isinstance(self.lr, list) else self.lr.values()

    def covers(self, pair: tuple[float, float]) -> bool:
        """Whether an (ALMR, LR) is within the studied ranges."""
        (almr, lr), rates = pair, self.rates
        return min(self.almr) <= almr <= max(self.almr) and min(rates) <= lr <= max(rates)


def check_values(name: str, values: Sequence[float], is_right: Callable[[float], bool], wanted: str) -> None:
    """Raise InputError unless there are values, all different and right."""
    with Requirements() as need:
        for value in values:
            with need.noted():
                require(is_right(value), name, value, wanted)
        with need.noted():
            different = bool(values) and len(set(values)) == len(values)
            require(different, name, list(values), "one or more different values")

"""One check, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_cpt.cluster.job import ClusterJob, Ended

State = Literal["passed", "failed", "skipped"]
Figures = Mapping[str, Any]


class CheckFailedError(Exception):
    """A check has failed.

    Attributes:
        found: what is not as it should be
        advice: what to try
        waited: this rank only waited for another, which has more to say
    """

    def __init__(self, found: str, advice: str, figures: Figures | None = None, waited: bool = False) -> None:
        super().__init__(found, advice, figures, waited)  # all of it, so that it can be sent from rank to rank
        self.found, self.advice, self.figures, self.waited = found, advice, figures or {}, waited

    def __str__(self) -> str:
        return self.found


def succeeded(ended: Ended | None, rank: int, advice: str = "see its log") -> None:
    """Raise FailedError unless a process (None: this rank has none) has ended well."""
    if ended is not None and ended.status != 0:
        state = "was killed, since time was up" if ended.status is None else f"ended with status {ended.status}"
        found = f"rank {rank} {state}: {ended.said()}"
        raise CheckFailedError(found, f"{advice} ({ended.log})", waited=ended.status is None)


@dataclass(frozen=True)
class CheckOutcome:
    """A row of the table.

    Attributes:
        said: what was found, in a few words
        advice: what to try, where it failed
        figures: what was measured, for programs
    """

    name: str
    state: State
    said: str
    seconds: float = 0.0
    advice: str = ""
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Something to find out.

    Attributes:
        measure: what every rank does; ranks talk through the job alone, so that one may fail while others go on
        judge: what the first rank makes of what all ranks have measured, in the order of ranks: what to say of it, and its
            figures. It raises FailedError where it is not as it should be
        needs: names of checks without which it cannot be made
        here: why it cannot be made on this job, or None
    """

    name: str
    measure: Callable[[ClusterJob], Any]
    judge: Callable[[Sequence[Any]], tuple[str, Figures]]
    needs: Sequence[str] = ()
    here: Callable[[ClusterJob], str | None] = lambda job: None

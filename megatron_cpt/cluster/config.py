"""What a check of a cluster can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_cpt.config.require import Requirements


@dataclass(frozen=True)
class CheckConfig:
    """A check of the machines that the job runs on."""

    folder: str
    """Folder on the file system that checkpoints will go to. Results and logs of the check are left there."""
    minutes: float = 10.0
    """Checks that would begin later than this are skipped."""
    only: list[str] | None = None
    """Only checks of these names, or whose names contain such a word, and what they need."""
    report: str | None = None
    """Where the results go. Default: check_cluster.json in `folder`."""

    def __post_init__(self) -> None:
        with Requirements() as need:
            need.field(self, "folder", bool, "a path")
            need.field(self, "minutes", lambda minutes: 0 < minutes < math.inf, "a number above 0")
            need.field(self, "only", bool, "one word or more")

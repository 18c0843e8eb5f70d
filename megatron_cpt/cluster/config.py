"""What a check of a cluster can be told."""

from __future__ import annotations

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
            need(0 < self.minutes < float("inf"), "minutes", self.minutes, "a number above 0")
            need(self.only is None or bool(self.only), "only", self.only, "one word or more")

"""What a run shows and records: the progress line, metrics.jsonl, run.json, ledger.json, status.json, the report at the end.

The first rank shows and records; what the others print goes to files of their own. docs/watching.md says what lies where.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, TextIO

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.mixture.inspection import ledger_table
from megatron_cpt.mixture.ledger import Ledger
from megatron_cpt.training.baseline import Baseline, Measurement
from megatron_cpt.training.metrics_file import MetricsFile, finite, read_metrics
from megatron_cpt.training.progress_line import RunProgress, TimeLeft, plain_line, step_parts
from megatron_cpt.training.rank_logs import output_to_file, rank_file
from megatron_cpt.training.trackers import Start, Trackers
from megatron_cpt.training.validation_result import ValidationResult
from megatron_cpt.training.validation_table import figures, new_languages, validation_lines
from megatron_cpt.utils.console import wide_console
from megatron_cpt.utils.files import write_json
from megatron_cpt.utils.tables import PlainTable, log_table, number_column

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_STATUS = 30.0
State = Literal["running", "stopped", "finished", "failed"]


class RunLog:
    """Writes to the run's folder and to the terminal, on the first rank; on the others only to their log files.

    On a terminal one line is redrawn in place; elsewhere there is a line every `log_interval` steps. A full disk does not
    end a run here: rows of metrics wait until there is room.

    Attributes:
        live: a line is redrawn in place
        error_stream: the real stderr, also where this rank's own goes to a file
        progress: for tasks beside the training steps (add_task, advance, remove_task)
    """

    def __init__(self, folder: str, config: LoggingConfig, rank: int) -> None:
        self.folder = folder
        self.config = config
        self.rank = rank
        self.is_rank_zero = rank == 0
        self.console = wide_console(markup=False, highlight=False, soft_wrap=True, quiet=not self.is_rank_zero)
        self.error_stream: TextIO = sys.stderr
        self.live = self.is_rank_zero and self.console.is_terminal and not self.console.is_dumb_terminal
        self.progress = RunProgress(self.console, self.live)
        self.file = MetricsFile(folder)
        self.time_left = TimeLeft()
        self.trackers: Trackers | None = None
        self.new: frozenset[str] = frozenset()
        self.stack = ExitStack()
        self._position: tuple[int, int | None] | None = None  # (iteration, train_iters) while the run is under way
        self._said_status = 0.0

    def __enter__(self) -> RunLog:
        if not self.is_rank_zero:
            path = rank_file(self.folder, self.rank)
            file, self.error_stream = self.stack.enter_context(output_to_file(path, self.rank))
            self.console = wide_console(file, markup=False, highlight=False, soft_wrap=True)
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.progress.stop()  # first: it gives the terminal its cursor back
            if self.trackers is not None:
                self.trackers.close(failed=kind is not None)
        finally:
            self.stack.__exit__(kind, error, trace)
            self.error_stream = sys.stderr

    def say(self, message: str | PlainTable) -> None:
        """Tell the person watching. A message goes above a line that is redrawn, as Live replaces stderr meanwhile."""
        if isinstance(message, str):
            logger.info(message)
        else:
            log_table(logger, message)

    def warn(self, message: str) -> None:
        """Say what all ranks see, and one shows."""
        logger.log(logging.WARNING if self.is_rank_zero else logging.INFO, message)

    def start(
        self,
        run: dict[str, Any],
        ledger_json: dict[str, Any],
        ledger: Ledger,
        iteration: int,
        rates: list[dict[str, float]],
        resumed: bool | None = None,
    ) -> None:
        """Record and show what is about to run, after `iteration` steps; forget metrics of steps that will be done again.

        `resumed`: whether it goes on from a checkpoint of a run, by default if there were any steps.
        """
        self.new = new_languages(ledger)
        if not self.is_rank_zero:
            return
        os.makedirs(self.folder, exist_ok=True)
        starts = self._starts(iteration)
        write_json(self._path("run.json"), run | {"starts": [*starts, this_start(iteration, run)]})
        write_json(self._path("ledger.json"), ledger_json)
        write_json(self._path("learning_rate.json"), rates)
        last_recorded = max((row["iteration"] for row in read_metrics(self.folder)), default=-1)
        for problem in self.file.keep_until(iteration if (iteration if resumed is None else resumed) else -1):
            logger.warning(problem)
        self.trackers = Trackers(self.config, Start(self.folder, iteration, last_recorded, run))
        self.say(ledger_table(ledger))
        self.say(learning_rate_lines(rates))

    def _starts(self, iteration: int) -> list[dict[str, Any]]:
        """The earlier starts that led to this one."""
        path = self._path("run.json")
        if not iteration or not os.path.exists(path):
            return []
        try:
            with open(path, encoding="utf-8") as file:
                return [start for start in json.load(file)["starts"] if start["iteration"] <= iteration]
        except (ValueError, KeyError, TypeError) as error:  # a record is no reason not to go on
            logger.warning(f"{path} cannot be read, earlier starts are forgotten: {error}")
            return []

    def step(self, row: dict[str, Any], train_iters: int) -> None:
        """Record and show one training step."""
        if not self.is_rank_zero:
            return
        self.metrics(row)
        self._position = (row["iteration"], train_iters)
        if time.monotonic() - self._said_status > SECONDS_BETWEEN_STATUS:
            self.status("running", *self._position)
        if self.trackers is not None:
            self.trackers.training(row)
        self.time_left.step(row["seconds"])
        left = self.time_left.seconds(train_iters - row["iteration"])
        if row.get("skipped"):
            logger.warning(f"step {row['iteration']:,} is skipped: {row['skipped']}")
        if self.live:
            self.progress.show(row, train_iters, left)
        elif row["iteration"] % self.config.log_interval == 0 or row["iteration"] == train_iters:
            self.say(plain_line(step_parts(row, train_iters, left)))

    def validation(
        self,
        iteration: int,
        results: list[ValidationResult],
        measured: Sequence[Measurement],
        baselines: Sequence[Baseline],
    ) -> None:
        """Record and show an evaluation, compared with the baselines of these measurements (see `figures`)."""
        if not self.is_rank_zero:
            return
        sets = figures(results, measured, baselines)
        self.metrics({"iteration": iteration, "validation": sets})
        if self.trackers is not None:
            self.trackers.validation(iteration, finite(sets))
        width = self.console.width if self.live else None
        self.say("\n".join(validation_lines(iteration, sets, self.new, width)))

    def metrics(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        if not self.is_rank_zero:
            return
        waited = bool(self.file.waiting)
        try:
            self.file.append(row)
        except OSError as error:
            if not waited:
                logger.warning(f"{self.file.path} cannot be written, rows wait for a later step: {error}")

    def ledger(self, ledger_json: dict[str, Any]) -> None:
        """Replace ledger.json."""
        self._replace("ledger.json", ledger_json)

    def status(self, state: State, iteration: int, train_iters: int | None, reason: str | None = None) -> None:
        """Replace status.json, by which a launcher knows what to do with this run; train_iters None: not known yet."""
        self._position, self._said_status = (iteration, train_iters) if state == "running" else None, time.monotonic()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        status = {"state": state, "iteration": iteration, "train_iters": train_iters, "reason": reason, "time": now}
        self._replace("status.json", status)

    def failed(self, reason: str) -> None:
        """The process is about to end with an error: say so in status.json, if it says that the run is under way.

        It does, too, where an earlier start was killed and this one has not come to its first step.
        """
        earlier = self._status()
        if self._position is not None:
            self.status("failed", *self._position, reason)
        elif earlier is not None and earlier["state"] == "running":
            self.status("failed", earlier["iteration"], earlier["train_iters"], reason)

    def stopped_early(self, reason: str | None) -> None:
        """The run was asked to stop before it did anything: status.json says so, with the steps that it had."""
        os.makedirs(self._path(""), exist_ok=True)
        earlier = self._status() or {"iteration": 0, "train_iters": None}
        self.status("stopped", earlier["iteration"], earlier["train_iters"], reason)

    def ended_before(self, iteration: int, train_iters: int) -> None:
        """The run has nothing left to do: what a kill after its last checkpoint has left out is made up for."""
        earlier = self._status()
        if earlier is not None and earlier["state"] != "finished":
            self.status("finished", iteration, train_iters)
            self.finish()

    def _status(self) -> dict[str, Any] | None:
        """status.json, None if there is none that can be read."""
        try:
            with open(self._path("status.json"), encoding="utf-8") as file:
                status = json.load(file)
        except (OSError, ValueError):
            return None
        return status if isinstance(status, dict) and {"state", "iteration", "train_iters"} <= set(status) else None

    def finish(self) -> None:
        """Write what waits of the metrics, and the report of the run so far if it is wanted."""
        if not self.is_rank_zero or not os.path.exists(self._path("run.json")):
            return
        try:
            self.file.flush()
            if self.config.report:
                from megatron_cpt.training.report import write_run_report  # imports matplotlib, which no step needs

                self.say(f"report: {write_run_report(self.folder)}")
        except OSError as error:  # the run's results are safe in its checkpoints
            logger.warning(f"the report could not be written: {error}")

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _replace(self, name: str, content: dict[str, Any]) -> None:
        if not self.is_rank_zero:
            return
        try:
            write_json(self._path(name), content)
        except OSError as error:
            logger.warning(f"{self._path(name)} could not be written: {error}")


def this_start(iteration: int, run: dict[str, Any]) -> dict[str, Any]:
    """An entry of `starts` in run.json: what it went on from, and how; the newest is also what the whole file describes."""
    now = {"iteration": iteration, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return now | {name: run[name] for name in ("start_from", "layout", "config") if name in run}


def learning_rate_lines(rates: list[dict[str, float]]) -> PlainTable:
    """The learning rate of the first step, of the last and of some between."""
    table = PlainTable(*map(number_column, ("step", "samples", "learning rate")), title="learning rate")
    for rate in rates:
        table.add_row(f"{rate['iteration']:,.0f}", f"{rate['consumed_samples']:,.0f}", f"{rate['lr']:.4e}")
    return table

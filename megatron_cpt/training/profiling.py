"""A window of steps under torch's profiler: a trace for chrome://tracing or Perfetto, and the top operators as text."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch.profiler import ProfilerAction, profile

from megatron_cpt.config.run import LoggingConfig
from megatron_cpt.utils.files import replacing, write_text

WARMUP_STEPS = 1  # traced and thrown away: the profiler's own start would be in them
TOP_OPERATORS = 40


class Window:
    """Profiles the steps `first` to `last`; before and after there is no profiler at all."""

    def __init__(self, folder: str, rank: int, first: int, last: int) -> None:
        self.folder, self.rank = folder, rank
        self.first, self.last = first, last
        self.begin = first
        self.profiler: profile | None = None

    def step(self, iteration: int) -> None:
        """To be called at the end of each step, and once before the first with the number of steps done before it."""
        following = iteration + 1
        if self.profiler is not None:
            self.profiler.step()
            if following > self.last:
                self.close()
        elif self.first - WARMUP_STEPS <= following <= self.last:
            self.begin = following
            self.profiler = profile(schedule=self.action, on_trace_ready=self.save, record_shapes=True)
            self.profiler.start()

    def action(self, number: int) -> ProfilerAction:
        """What the profiler does in its step `number`, counted from 0 when it starts."""
        iteration = self.begin + number
        if iteration < self.first:
            return ProfilerAction.WARMUP
        if iteration < self.last:
            return ProfilerAction.RECORD
        return ProfilerAction.RECORD_AND_SAVE if iteration == self.last else ProfilerAction.NONE

    def save(self, profiler: profile) -> None:
        """Write the trace and the table."""
        os.makedirs(self.folder, exist_ok=True)
        first = max(self.first, self.begin)
        last = max(first, min(self.last, self.begin + profiler.step_num - 1))
        name = os.path.join(self.folder, f"rank_{self.rank:05d}_steps_{first}-{last}")
        with replacing(name + ".json.gz", ".json.gz") as temporary:
            profiler.export_chrome_trace(temporary)
        averages = profiler.key_averages()
        on_device = any(event.self_device_time_total for event in averages)
        by = "self_device_time_total" if on_device else "self_cpu_time_total"
        write_text(name + ".txt", averages.table(sort_by=by, row_limit=TOP_OPERATORS, max_name_column_width=70) + "\n")

    def close(self) -> None:
        """Stop; a window that is cut short is written as far as it got."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None


class NoWindow:
    """Nothing is profiled."""

    def step(self, iteration: int) -> None:
        """Do nothing."""


@contextlib.contextmanager
def profiling(config: LoggingConfig, rank: int, folder: str, first_iteration: int) -> Iterator[Window | NoWindow]:
    """Profile the configured steps on the configured ranks, into `folder`/profile; `step` is called after each step.

    Args:
        first_iteration: steps done before this start; a window that lies before is not looked at again
    """
    first = config.profile_step_start
    last = first if config.profile_step_end is None else config.profile_step_end
    if first is None or last is None or rank not in config.profile_ranks or first_iteration >= last:
        yield NoWindow()
        return
    window = Window(os.path.join(folder, "profile"), rank, first, last)
    window.step(first_iteration)
    try:
        yield window
    finally:
        window.close()

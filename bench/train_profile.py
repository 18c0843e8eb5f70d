"""Where a training step on CPU goes: python -m bench.train_profile CONTENDER MODEL, e.g. ours "SmolLM2-135M".

Runs one contender of bench/train.py under torch's profiler for three steps and prints the share of each part. Nothing else
should run on the machine. The profiler itself costs most where operations are many and small.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench.preprocess import WORK
from bench.train import BATCH, FOLDERS, TINY, WARM_UP, prepare
from bench.train_contender import CONTENDERS, Task

STEPS = 3
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
# What an event outside of any other of these contains belongs to the part; matrix products are counted wherever they are.
PARTS = {
    "attention": ("aten::scaled_dot_product_attention", "ScaledDotProduct"),
    "loss": ("_VocabParallelCrossEntropy", "aten::cross_entropy_loss", "NllLoss", "LogSoftmax"),
    "optimizer": ("Optimizer.step", "aten::_foreach", "aten::_fused_adam", "aten::linalg_vector_norm"),
}


class ProfilingGate:
    """Stands where bench.train_contender.Gate does; profiles some steps, prints and ends the process."""

    def __init__(self) -> None:
        self.calls = 0
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.since = 0.0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == WARM_UP:
            self.profiler.start()
            self.since = time.perf_counter()
        if self.calls == WARM_UP + STEPS:
            seconds = (time.perf_counter() - self.since) / STEPS
            self.profiler.stop()
            show(self.profiler.events(), seconds)
            sys.exit()


def show(events: Any, seconds: float) -> None:
    """A table: share of the step of each part, and the operations that take most of the rest."""
    parts: dict[str, float] = dict.fromkeys(("matrix products", *PARTS), 0.0)
    rest: dict[str, float] = {}
    for event in events:
        taken = event.self_cpu_time_total / 1e6 / STEPS
        name = part_of(event)
        parts[name] = parts.get(name, 0.0) + taken
        if name == "the rest":
            rest[event.name] = rest.get(event.name, 0.0) + taken
    parts["outside of operations"] = seconds - sum(parts.values())
    table = Table("part", "share", box=None)
    for name, taken in parts.items():
        table.add_row(name, f"{taken / seconds:.1%}")
    for name, taken in sorted(rest.items(), key=lambda item: -item[1])[:15]:
        table.add_row(f"  {name}", f"{taken / seconds:.1%}")
    Console().print(f"{seconds:.2f} s a step")
    Console().print(table)


def part_of(event: Any) -> str:
    """The part that an event's own time belongs to."""
    if event.name in MATRIX_PRODUCTS:
        return "matrix products"
    while event is not None:
        for part, names in PARTS.items():
            if any(name in event.name for name in names):
                return part
        event = event.cpu_parent
    return "the rest"


if __name__ == "__main__":
    kind, model = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else TINY
    prepare(WORK / "train")
    task = Task(WORK / "train" / FOLDERS[model], *BATCH[model], dtype="fp32", packed=False)
    CONTENDERS[kind](task, ProfilingGate())  # type: ignore[arg-type]

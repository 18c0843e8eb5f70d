"""Doing a suspicious step again, with megatron-core's own machinery, to tell a faulty device from a real NaN.

What it finds it logs: the same result again means the data or the model, another one a fault on the way. Whether the weights
change is decided afterwards as ever (`train_step`); megatron-core's further stage, a restart on other nodes, is not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import megatron_cpt.platforms.imported_megatron  # noqa: F401  isort: skip  (before megatron is imported)
import torch
from megatron.core import rerun_state_machine as machinery

from megatron_cpt.mixture.loader import Batch


class Reruns:
    """Runs a step's forward and backward pass once, and again where its result is not finite.

    `batches` remembers a step's micro-batches for that: pass it to `train_step`.
    """

    def __init__(self, machine: machinery.RerunStateMachine, batches: Iterator[Batch | None]) -> None:
        self._machine = machine
        self.batches = machinery.RerunDataIterator(batches)

    def attempts(self) -> Iterator[int]:
        """0 for the first attempt, 1 if a second one is wanted; all ranks get the same."""
        number = 0
        while self._machine.should_run_forward_backward(self.batches):
            yield number
            number += 1
        self._machine.should_checkpoint_and_exit()  # never: no result is fatal; but it has to be asked

    def check(self, loss_sum: torch.Tensor) -> None:
        """Show the machinery the summed loss of this rank's micro-batches: one that is not finite is tried again."""
        self._machine.validate_result(
            result=loss_sum,
            rejection_func=lambda value: not torch.isfinite(value).item(),
            message="the loss is not finite",
            fatal=False,
        )


@contextlib.contextmanager
def rerunning(wanted: bool, batches: Iterator[Batch | None]) -> Iterator[Reruns | None]:
    """The machinery for the length of the block, None if it is not wanted. megatron-core keeps one for each process."""
    if not wanted:
        yield None
        return
    machinery.destroy_rerun_state_machine()  # one that is switched off comes into being with the optimizer
    machinery.initialize_rerun_state_machine(mode=machinery.RerunMode.VALIDATE_RESULTS)
    try:
        yield Reruns(machinery.get_rerun_state_machine(), batches)
    finally:
        machinery.destroy_rerun_state_machine()

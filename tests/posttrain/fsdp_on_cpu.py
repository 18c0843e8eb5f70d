"""Runs a tool with FSDP on CPU: accelerate shards on accelerators only, so it is told that these processes have some.

accelerate launch --config_file FSDP.yaml tests/posttrain/fsdp_on_cpu.py TOOL ARGUMENTS

With STOP_AT=N in the environment, the last process gets a SIGTERM after N steps.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from megatron_cpt.posttrain.runner import Stop


def call_processes_accelerators() -> None:
    """transformers makes the state anew, so it is its constructor that says so."""
    original = PartialState.__init__

    def init(self: PartialState, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def signal_last_process_after(steps: int) -> None:
    original = Stop.on_step_end

    def on_step_end(self: Stop, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        if state.global_step == steps and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **rest)

    Stop.on_step_end = on_step_end  # type: ignore[method-assign]


if __name__ == "__main__":
    call_processes_accelerators()
    if "STOP_AT" in os.environ:
        signal_last_process_after(int(os.environ["STOP_AT"]))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

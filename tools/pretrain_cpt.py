"""Continue the pre-training of a Llama model on a mixture of general and additional-language corpora.

torchrun --nproc_per_node 2 tools/pretrain_cpt.py --config run.yaml --optimizer.lr 1e-5
"""

import os
import signal
import sys


def stop_at_once(number: int, frame: object) -> None:
    """A signal that comes while the libraries are imported: there is nothing to save, and no process waits for this one."""
    print(f"stopped before the first step: {signal.Signals(number).name}", file=sys.stderr, flush=True)
    os._exit(0)


if __name__ == "__main__":  # the checkpoint writer starts processes: an unguarded main would run again in each
    if os.environ.get("WORLD_SIZE", "1") == "1":  # among several, the launcher ends them all
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, stop_at_once)

    os.environ.setdefault("KINETO_LOG_LEVEL", "4")  # errors: torch's profiler writes its stages across the progress line

    from megatron_cpt.config.cli import run_tool

    run_tool(
        "megatron_cpt.training.pretrain:setup",
        "megatron_cpt.config.run:RunConfig",
        "Continue the pre-training of a Llama model on a mixture of corpora.",
        joins=True,
        check="megatron_cpt.training.run_files:check_pretrain_files",
    )

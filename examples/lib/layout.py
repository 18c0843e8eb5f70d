"""Can a run be spread over so many ranks, what does it read, and does it fit: what `launch.sh` asks before it submits.

    python examples/lib/layout.py --ranks 32 --device a100-80g --config run.yaml --checkpoint.save runs/x

takes the options of tools/pretrain_cpt.py beside its own. Neither corpora nor checkpoints have to be there, unless the
memory is asked for and --model is not given.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

from megatron_cpt.config.cli import exit_on_input_error, normalise, read_arguments
from megatron_cpt.config.run import RunConfig
from megatron_cpt.mixture.file import read_seq_length
from megatron_cpt.model.layout import check_batch
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.one_run import plan_one, run_tokens, spread_run
from megatron_cpt.planning.report import show_plan
from megatron_cpt.utils.console import wide_console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--device", help="as tools/plan_run.py knows them; empty: the memory is not estimated")
    parser.add_argument("--model", help="as tools/plan_run.py takes it; default: checkpoint.load")
    parser.add_argument("--devices_per_node", type=int)
    own, options = parser.parse_known_args()
    run = read_arguments(RunConfig, options)

    replicas = check_batch(run, own.ranks)
    parallel, training, seq_length = run.parallel, run.training, read_seq_length(run.mixture)
    batch = training.global_batch_size
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": replicas,
    }
    micro_batches = batch // (training.micro_batch_size * replicas)
    print(
        f"layout: {own.ranks} ranks = {' x '.join(f'{name} {size}' for name, size in sizes.items())}; a global batch of "
        f"{batch} samples is {micro_batches} micro-batches of {training.micro_batch_size} on each replica"
    )
    step = batch * seq_length
    steps = math.ceil(run_tokens(training, seq_length) / step)
    print(f"token budget: {steps * step:,} tokens = {steps:,} steps of {step:,}")
    if own.device:
        model = own.model or run.checkpoint.load
        files = [word.partition("=")[2] for word in normalise(options) if word.startswith("--config=")]
        name = files[-1] if files else "the run"
        config = PlanConfig(model, own.ranks, own.device, run=name, devices_per_node=own.devices_per_node)
        show_plan(plan_one(spread_run(config, run)), wide_console(sys.stdout))


if __name__ == "__main__":
    # Whatever the shell that asks is part of, this is one process.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    sys.stdout.reconfigure(line_buffering=True)  # so that a refusal comes last
    exit_on_input_error(main)

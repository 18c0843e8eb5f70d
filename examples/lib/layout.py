"""Can a run be spread over so many ranks, what does it read, and does it fit: what `launch.sh` asks before it submits.

    python examples/lib/layout.py --ranks 32 --device a100-80g --config run.yaml --checkpoint.save runs/x

takes the options of tools/pretrain_cpt.py beside its own. Neither corpora nor checkpoints have to be there, unless the
memory is asked for and --model is not given.
"""

from __future__ import annotations

import argparse
import os
import sys

import yaml
from rich.console import Console

from megatron_cpt.config.cli import build, exit_on_input_error, make_parser, normalise, switches_of
from megatron_cpt.config.run import RunConfig
from megatron_cpt.errors import InputError
from megatron_cpt.planning.config import PlanConfig
from megatron_cpt.planning.report import show
from megatron_cpt.planning.search import plan
from megatron_cpt.training.checks import check_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--device", help="as tools/plan_run.py knows them; empty: the memory is not estimated")
    parser.add_argument("--model", help="as tools/plan_run.py takes it; default: checkpoint.load")
    parser.add_argument("--devices_per_node", type=int)
    own, options = parser.parse_known_args()
    run_parser = make_parser(RunConfig, "A run.")
    run = build(run_parser, RunConfig, run_parser.parse_args(normalise(options, switches_of(RunConfig))))

    replicas = check_batch(run, own.ranks)
    parallel, training, seq_length = run.parallel, run.training, sequence_length(run.mixture)
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
    samples = training.train_samples or (training.train_iters or 0) * batch or -(-(training.train_tokens or 0) // seq_length)
    steps = -(-samples // batch)
    print(f"token budget: {steps * batch * seq_length:,} tokens = {steps:,} steps of {batch * seq_length:,}")
    if own.device:
        estimate(run, own, seq_length, steps * batch * seq_length)


def sequence_length(mixture: str) -> int:
    """Of a mixture file, whose corpora need not be there."""
    with open(mixture, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    if not (isinstance(content, dict) and isinstance(content.get("seq_length"), int)):
        raise InputError(f"{mixture} has no seq_length; wanted a mixture file")
    return int(content["seq_length"])


def estimate(run: RunConfig, own: argparse.Namespace, seq_length: int, tokens: float) -> None:
    """The plan of this one layout.

    Raises:
        InputError: it does not fit
    """
    parallel, training = run.parallel, run.training
    result = plan(
        PlanConfig(
            model=own.model or run.checkpoint.load,
            devices=own.ranks // parallel.context_parallel_size,  # each holds its part of a sequence
            device=own.device,
            devices_per_node=own.devices_per_node,
            seq_length=seq_length // parallel.context_parallel_size,
            global_batch_size=training.global_batch_size,
            tokens=tokens,
            params_dtype=training.params_dtype,
            fp8=training.fp8 is not None,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size or 1,
            micro_batch_size=training.micro_batch_size,
            sequence_parallel=parallel.sequence_parallel,
            recompute_granularity=parallel.recompute_granularity or "none",
            recompute_modules=parallel.recompute_modules,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            tp_comm_overlap=parallel.tp_comm_overlap,
        )
    )
    show(result, Console(width=120 if not sys.stdout.isatty() else None))
    if not result.feasible:
        reasons = "; ".join(f"{layouts}: {reason}" for layouts, reason in result.infeasible)
        raise InputError(f"this layout does not do on {own.ranks} {own.device}: {reasons}")


if __name__ == "__main__":
    # Whatever the shell that asks is part of, this is one process.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    exit_on_input_error(main)

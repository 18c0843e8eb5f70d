"""Can SFT or DPO be spread over so many ranks, and does it fit: what `finetune.sh` asks before it submits.

    python examples/lib/finetune_layout.py --tool tools/finetune_sft.py --ranks 8 --base 8B --device a100-80g \
        --accelerate examples/posttrain/accelerate/fsdp_8gpu.yaml --inputs all --config sft.yaml

takes the options of the tool beside its own. `--inputs given`: the model need not be there yet; none: nor need data.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

import yaml

from megatron_cpt.config.cli import exit_on_input_error, read_arguments
from megatron_cpt.planning.hardware import find_device
from megatron_cpt.planning.memory import GIB
from megatron_cpt.planning.presets import find_model
from megatron_cpt.planning.weights import number_of_parameters
from megatron_cpt.posttrain.run_files import accumulation, check_tuning, data_files
from megatron_cpt.posttrain.settings import DpoConfig, SftConfig
from megatron_cpt.utils.errors import InputError, Refusals

WEIGHTS, TRAINED = 4, 16  # bytes of a parameter: in fp32; with its gradient and AdamW's moments, in fp32 too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--base", help="the model, as tools/plan_run.py takes it; default: the tool's --model")
    parser.add_argument("--device", help="as tools/plan_run.py knows them; empty: the memory is not estimated")
    parser.add_argument("--accelerate", default="", help="accelerate's configuration: says whether the model is sharded")
    parser.add_argument("--inputs", choices=("all", "given", "none"), required=True)
    own, options = parser.parse_known_args()
    kind = DpoConfig if "dpo" in os.path.basename(own.tool) else SftConfig
    run: Any = read_arguments(kind, options)

    training, accumulated = run.training, accumulation(run.training, own.ranks)
    print(
        f"layout: {own.ranks} ranks; a global batch of {training.global_batch_size} examples is {accumulated} micro-batches "
        f"of {training.micro_batch_size} on each"
    )
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.epochs:g} passes over the data"
    pair = 2 if kind is DpoConfig else 1
    most = training.global_batch_size * run.data.max_length * pair
    print(f"token budget: {length}, of at most {most:,} tokens in a step")
    if own.device:
        check_memory(run, own)
    refusals = Refusals()
    if own.inputs != "none":
        with refusals.noted():
            data_files(run.data)
    if own.inputs == "all":
        with refusals.noted():
            check_tuning(run)
    refusals.raise_any()


def is_sharded(accelerate: str) -> bool:
    """Whether weights, gradients and optimizer are divided among the ranks."""
    if not accelerate:
        return False
    with open(accelerate, encoding="utf-8") as file:
        fields = yaml.safe_load(file)
    zero = (fields.get("deepspeed_config") or {}).get("zero_stage")
    return fields.get("distributed_type") == "FSDP" or zero == 3


def check_memory(run: SftConfig | DpoConfig, own: argparse.Namespace) -> None:
    """Print what a rank holds from step to step; of adapters and activations nothing is estimated.

    Raises:
        InputError: that alone is more than a device has
    """
    device, base = find_device(own.device), own.base or run.model
    sharded = is_sharded(own.accelerate)
    trained = WEIGHTS if run.lora else TRAINED
    reference = WEIGHTS if isinstance(run, DpoConfig) and not run.lora and sharded else 0
    ranks = own.ranks if sharded else 1
    needed = number_of_parameters(find_model(base)) * (trained + reference) / ranks / GIB
    facts = (
        f"{'weights' if run.lora else 'weights, gradients and AdamW'}{' and the reference' if reference else ''} of {base}"
    )
    facts += f" take {needed:.1f} GiB"
    facts += f" of {device.memory_gib:.1f} GiB of each {device.name}"
    if needed > device.memory_gib:
        wanted = "expected more GPUs, or adapters (lora)" if sharded else "shard it: FSDP or ZeRO-3, through accelerate"
        raise InputError(f"{facts}; {wanted}")
    print(f"memory: {facts}; activations and logits come on top and are not estimated")


if __name__ == "__main__":
    # Whatever the shell that asks is part of, this is one process.
    for name in [name for name in os.environ if re.fullmatch("RANK|LOCAL_RANK|WORLD_SIZE|ACCELERATE_.*", name)]:
        os.environ.pop(name)
    sys.stdout.reconfigure(line_buffering=True)  # so that a refusal comes last
    exit_on_input_error(main)

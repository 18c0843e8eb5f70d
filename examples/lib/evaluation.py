"""Does a model fit into the GPUs that evaluate it, and is there what it is measured on: what `evaluate.sh` asks.

    python examples/lib/evaluation.py --model 70B --gpus 4 --device a100-80g --inputs all --config evaluate.yaml OPTION...

OPTION...: as tools/evaluate.py takes them. `--inputs given`: the models need not be there yet; none: nor need files.
"""

from __future__ import annotations

import argparse
import sys

import yaml

from megatron_cpt.config.cli import collect_arguments, exit_on_input_error, normalise, read_arguments
from megatron_cpt.evaluation.config import EvaluateConfig
from megatron_cpt.evaluation.run_files import check_evaluation, check_given
from megatron_cpt.planning.hardware import find_device
from megatron_cpt.planning.memory import GIB
from megatron_cpt.planning.presets import find_model
from megatron_cpt.planning.weights import number_of_parameters
from megatron_cpt.utils.errors import InputError

BF16 = 2  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as tools/plan_run.py takes it")
    parser.add_argument("--gpus", type=int, required=True, help="of the one process; 0: it runs on CPU")
    parser.add_argument("--device", help="as tools/plan_run.py knows them; empty: the memory is not checked")
    parser.add_argument("--inputs", choices=("all", "given", "none"), required=True)
    parser.add_argument("--config", required=True)
    own, options = parser.parse_known_args()
    words = ["--config", own.config, *options]
    if own.inputs == "none":
        collect_arguments(EvaluateConfig, normalise(words)).refusals.raise_any()
    else:
        read_arguments(EvaluateConfig, words, check=check_evaluation if own.inputs == "all" else check_given)
    with open(own.config, encoding="utf-8") as file:
        spread = yaml.safe_load(file).get("device_map") is not None
    if own.device and own.gpus:
        check_memory(own.model, own.gpus if spread else 1, own.device)


def check_memory(model: str, gpus: int, device_name: str) -> None:
    """Print what the weights take.

    Raises:
        InputError: that is more than there is
    """
    device = find_device(device_name)
    needed, there = number_of_parameters(find_model(model)) * BF16 / GIB, gpus * device.memory_gib
    facts = f"the weights of {model} in bf16 take {needed:.1f} GiB of the {there:.1f} GiB of {gpus} x {device.name}"
    if needed > there:
        raise InputError(f"{facts}; expected device_map: auto, and more GPUs (GPUS_PER_NODE)")
    print(f"memory: {facts}; what the answers need comes on top")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a refusal comes last
    exit_on_input_error(main)

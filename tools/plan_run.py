"""Plan a training run: memory, step time and days of every layout on a cluster, or one rank of it simulated.

python tools/plan_run.py 70B --devices 128 --device a100-80g --seq_length 2048 --global_batch_size 256
"""

import os

os.environ["MEGATRON_CPT_PLATFORM"] = "cpu"  # a simulation takes the same code and gives the same numbers beside a GPU

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.planning.run:run_plan",
        "megatron_cpt.planning.config:PlanConfig",
        "Plan a training run on a cluster.",
        positional="model",
        check="megatron_cpt.planning.run_files:check_plan_files",
    )

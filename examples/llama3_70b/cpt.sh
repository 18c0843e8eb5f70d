#!/usr/bin/env bash
# Continued pre-training of Llama-3 70B on 16 nodes of 8 GPUs:
#     examples/llama3_70b/cpt.sh                submits it, after checks; prints the job's number
#     DRY_RUN=1 examples/llama3_70b/cpt.sh      says what would be submitted
#     RECIPE=cpt_8k DEVICE=h100 examples/llama3_70b/cpt.sh
# Variables: below, and in examples/lib/launch.sh. `sbatch examples/llama3_70b/cpt.sh`, from the repository's folder, takes the
# lines that follow instead, and checks nothing first.
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

RECIPE=${RECIPE:-cpt}                # cpt: the paper's; cpt_8k, cpt_8k_fp8: as one would set it up today
CONFIG=${CONFIG:-examples/llama3_70b/$RECIPE.yaml}
RUN=${RUN:-runs/llama3-70b/${RECIPE//_/-}}   # the other stages write beside it: $RUN-hf, $RUN-sft, ...
SAVE=${SAVE:-$RUN}
NODES=${NODES:-16}
RANKS_PER_NODE=${RANKS_PER_NODE:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_RANK=${CPUS_PER_RANK:-8}
TIME=${TIME:-24:00:00}               # then it is queued again, and goes on
SIGNAL_SECONDS=${SIGNAL_SECONDS:-600}
DEVICE=${DEVICE-a100-80g}            # the memory is checked for; empty: it is not
MODEL=${MODEL:-70B}
TOOL=${TOOL:-tools/pretrain_cpt.py}

source examples/lib/launch.sh
launch "$TOOL" --config "$CONFIG" --checkpoint.save "$SAVE"

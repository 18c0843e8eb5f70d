#!/usr/bin/env bash
# Direct preference optimization of Llama-3 70B on 16 nodes of 8 GPUs, sharded by FSDP2 or DeepSpeed through accelerate:
#     examples/llama3_70b/dpo.sh                submits it, after checks; prints the job's number
#     DRY_RUN=1 examples/llama3_70b/dpo.sh      says what would be submitted
# Variables: below, and in examples/lib/launch.sh. `sbatch examples/llama3_70b/dpo.sh`, from the repository's folder, takes the
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

RECIPE=${RECIPE:-cpt}                # as for cpt.sh
RUN=${RUN:-runs/llama3-70b/${RECIPE//_/-}}
CONFIG=${CONFIG:-examples/llama3_70b/dpo.yaml}
FROM=${FROM:-${RUN%/}-sft/hf}
SAVE=${SAVE:-${RUN%/}-dpo}
LAUNCHER=${LAUNCHER:-accelerate}
ACCELERATE=${ACCELERATE:-examples/posttrain/accelerate/fsdp_128gpu.yaml}   # or deepspeed_128gpu.yaml
NODES=${NODES:-16}
RANKS_PER_NODE=${RANKS_PER_NODE:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
CPUS_PER_RANK=${CPUS_PER_RANK:-8}
TIME=${TIME:-24:00:00}               # then it is queued again, and goes on
SIGNAL_SECONDS=${SIGNAL_SECONDS:-600}
DEVICE=${DEVICE-a100-80g}            # the memory is checked for; empty: it is not
MODEL=${MODEL:-70B}
TOOL=${TOOL:-tools/finetune_dpo.py}

source examples/lib/finetune.sh
launch "$TOOL" --config "$CONFIG" --model "$FROM" --save "$SAVE"

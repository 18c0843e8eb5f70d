#!/usr/bin/env bash
# The quickstart's continued pre-training on 2 nodes with 2 processes each, on CPU:
#     examples/slurm_quickstart/cpt.sh                submits it, after checks; prints the job's number
#     DRY_RUN=1 examples/slurm_quickstart/cpt.sh      says what would be submitted
# Variables: below, and in examples/lib/launch.sh. `sbatch examples/slurm_quickstart/cpt.sh`, from the repository's folder,
# takes the lines that follow instead, and checks nothing first.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

NODES=${NODES:-2}
RANKS_PER_NODE=${RANKS_PER_NODE:-2}
JOB_NAME=${JOB_NAME:-quickstart-cpt}
CONFIG=${CONFIG:-examples/slurm_quickstart/cpt.yaml}
SAVE=${SAVE:-runs/slurm_quickstart/checkpoints}
TOOL=${TOOL:-tools/pretrain_cpt.py}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}   # fewer page faults on CPU

source examples/lib/launch.sh
launch "$TOOL" --config "$CONFIG" --checkpoint.save "$SAVE"

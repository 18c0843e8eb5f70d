#!/usr/bin/env bash
# tools/check_cluster.py on 2 nodes with 2 processes each, on CPU; on GPUs, as in
#     NODES=2 RANKS_PER_NODE=8 GPUS_PER_NODE=8 FOLDER=/scratch/me/check examples/slurm_quickstart/check_cluster.sh
# FOLDER lies where your checkpoints will be; the table is in its check_cluster.json. ONLY names checks, in one word or several.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --no-requeue
#SBATCH --open-mode=append
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

NODES=${NODES:-2}
RANKS_PER_NODE=${RANKS_PER_NODE:-2}
JOB_NAME=${JOB_NAME:-check-cluster}
FOLDER=${FOLDER:-runs/check_cluster}
ONLY=${ONLY:-}
SAVE=$FOLDER REQUEUE=0

source examples/lib/launch.sh
check_run() { python "$@" --print_config >/dev/null || exit; }
read -ra only <<<"$ONLY"
launch tools/check_cluster.py --folder "$FOLDER" ${ONLY:+--only "${only[@]}"}

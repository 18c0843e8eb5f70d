#!/usr/bin/env bash
# Benchmarks of Llama-3 8B before and after CPT; with CONFIG=examples/llama3_8b/evaluate_chat.yaml, after SFT and DPO.
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
cd "${SLURM_SUBMIT_DIR:-$(dirname "$SCRIPT")/../..}"

CONFIG=${CONFIG:-examples/llama3_8b/evaluate.yaml}
JOB_NAME=${JOB_NAME:-$(basename "$CONFIG" .yaml)}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}     # one process, and its GPU
CPUS_PER_RANK=${CPUS_PER_RANK:-8}
TIME=${TIME:-24:00:00}               # what is measured already is not measured again
DEVICE=${DEVICE-a100-80g}            # the memory is checked for; empty: it is not
MODEL=${MODEL:-8B}

source examples/lib/evaluate.sh

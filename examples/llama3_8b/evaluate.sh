#!/usr/bin/env bash
# Benchmarks of Llama-3 8B before and after CPT.
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

RECIPE=${RECIPE:-cpt}                # as for cpt.sh
RUN=${RUN:-runs/llama3-8b/${RECIPE//_/-}}
CONFIG=${CONFIG:-examples/llama3_8b/evaluate.yaml}
MODELS=${MODELS:-"{Llama-3-8B: models/Meta-Llama-3-8B, CPT: '${RUN%/}-hf'}"}
OUTPUT=${OUTPUT:-${RUN%/}-evaluation}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}     # one process, and its GPU
CPUS_PER_RANK=${CPUS_PER_RANK:-8}
TIME=${TIME:-24:00:00}               # what is measured already is not measured again
DEVICE=${DEVICE-a100-80g}            # the memory is checked for; empty: it is not
MODEL=${MODEL:-8B}

source examples/lib/evaluate.sh

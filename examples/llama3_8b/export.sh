#!/usr/bin/env bash
# The newest checkpoint of CPT in Hugging Face's format, for fine-tuning and evaluation; one process, without a GPU.
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

RECIPE=${RECIPE:-cpt}                # as for cpt.sh
RUN=${RUN:-runs/llama3-8b/${RECIPE//_/-}}
CONFIG=${CONFIG:-examples/llama3_8b/export.yaml}
MEGATRON=${MEGATRON:-$RUN}
HF=${HF:-${RUN%/}-hf}
CPUS_PER_RANK=${CPUS_PER_RANK:-16}
TIME=${TIME:-4:00:00}

source examples/lib/launch.sh
conversion megatron-to-hf --config "$CONFIG" --megatron "$MEGATRON" --hf "$HF"

#!/usr/bin/env bash
# Llama-3 70B from Hugging Face's format to Megatron's, for CPT; one process, without a GPU.
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

CONFIG=${CONFIG:-examples/llama3_70b/convert.yaml}
CPUS_PER_RANK=${CPUS_PER_RANK:-16}
TIME=${TIME:-4:00:00}

source examples/lib/launch.sh
conversion hf-to-megatron --config "$CONFIG"

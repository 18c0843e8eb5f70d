#!/usr/bin/env bash
# Benchmarks of Llama-3 70B as a chat model, after SFT and after DPO.
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

RECIPE=${RECIPE:-cpt}                # as for cpt.sh
RUN=${RUN:-runs/llama3-70b/${RECIPE//_/-}}
CONFIG=${CONFIG:-examples/llama3_70b/evaluate_chat.yaml}
MODELS=${MODELS:-"{C-SFT: '${RUN%/}-sft/hf', C-DPO: '${RUN%/}-dpo/hf'}"}
OUTPUT=${OUTPUT:-${RUN%/}-evaluation-chat}
GPUS_PER_NODE=${GPUS_PER_NODE:-4}     # one process; the model is spread over its GPUs
CPUS_PER_RANK=${CPUS_PER_RANK:-8}
TIME=${TIME:-24:00:00}               # what is measured already is not measured again
DEVICE=${DEVICE-a100-80g}            # the memory is checked for; empty: it is not
MODEL=${MODEL:-70B}

source examples/lib/evaluate.sh

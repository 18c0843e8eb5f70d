#!/usr/bin/env bash
# Between Hugging Face and Megatron, as one process: DIRECTION=hf-to-megatron before training, megatron-to-hf after it.
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
[[ $0 == */slurm_script ]] || cd "$(dirname "$SCRIPT")/../.."   # a job begins there

DIRECTION=${DIRECTION:-hf-to-megatron}
RUN=${RUN:-runs/slurm_quickstart}
JOB_NAME=${JOB_NAME:-$DIRECTION}
if [ "$DIRECTION" = hf-to-megatron ]; then
  HF=${HF:-$RUN/inputs/hf} MEGATRON=${MEGATRON:-$RUN/megatron}
else
  HF=${HF:-$RUN/hf-cpt} MEGATRON=${MEGATRON:-$RUN/checkpoints}
fi

source examples/lib/launch.sh
[[ $DIRECTION == hf-to-megatron || $DIRECTION == megatron-to-hf ]] ||
  refuse "DIRECTION is '$DIRECTION'; expected hf-to-megatron or megatron-to-hf"
conversion "$DIRECTION" --hf "$HF" --megatron "$MEGATRON"

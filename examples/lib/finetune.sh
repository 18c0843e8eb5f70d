# shellcheck shell=bash
# As launch.sh, for SFT and DPO: other checks before a job is queued, and other checkpoints.

# CUDA's own default: several queues let sharded weights arrive while others are used. launch.sh has 1, for tensor parallelism.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-8}
source examples/lib/launch.sh

# check_run TOOL OPTION...
check_run() {
  local sharding=''
  [ "$LAUNCHER" != accelerate ] || sharding=$ACCELERATE
  python examples/lib/finetune_layout.py --tool "$1" --ranks $((NODES * RANKS_PER_NODE)) ${DEVICE:+--device "$DEVICE"} \
    ${MODEL:+--base "$MODEL"} --accelerate "$sharding" --inputs "$(inputs)" "${@:2}" >&2 || exit
}

# The trainer writes trainer_state.json last.
newest_step() {
  local file step newest=0
  for file in "$SAVE"/checkpoint-*/trainer_state.json; do
    step=${file%/*} step=${step##*-}
    if [[ -e $file && $step =~ ^[0-9]+$ ]] && ((step > newest)); then newest=$step; fi
  done
  echo "$newest"
}

# shellcheck shell=bash
# tools/evaluate.py as a job of one process. A script that sources this has set CONFIG, MODELS (as in "{name: folder}") and
# OUTPUT, and MODEL and DEVICE for the check.
source examples/lib/launch.sh

options=(--config "$CONFIG" --models "$MODELS" --output "$OUTPUT")
if ! in_job; then
  check_settings
  python examples/lib/evaluation.py --model "$MODEL" --gpus "$GPUS_PER_NODE" ${DEVICE:+--device "$DEVICE"} \
    --inputs "$(inputs)" "${options[@]}" >&2
fi
job python tools/evaluate.py "${options[@]}"

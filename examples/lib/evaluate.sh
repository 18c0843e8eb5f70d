# shellcheck shell=bash
# tools/evaluate.py as a job of one process. A script that sources this has set CONFIG, and MODEL and DEVICE for the check.
source examples/lib/launch.sh

if ! in_job; then
  check_settings
  python examples/lib/evaluation.py --model "$MODEL" --gpus "$GPUS_PER_NODE" ${DEVICE:+--device "$DEVICE"} \
    --inputs "$CHECK" --config "$CONFIG" >&2
fi
job python tools/evaluate.py --config "$CONFIG"

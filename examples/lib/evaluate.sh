# shellcheck shell=bash
# tools/evaluate.py as a job of one process. A script that sources this has set CONFIG, and MODEL and DEVICE for the check.
source examples/lib/launch.sh

in_job || python examples/lib/evaluation.py --model "$MODEL" --gpus "$GPUS_PER_NODE" ${DEVICE:+--device "$DEVICE"} \
  --inputs "$CHECK" --config "$CONFIG" >&2
job python tools/evaluate.py --config "$CONFIG"

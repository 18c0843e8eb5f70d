#!/usr/bin/env bash
# One GPU for a quarter of an hour: tools/check_cluster.py, the speed of Llama-3.2-1B's shape, and the quickstart's training of
# SmolLM2-135M in bf16, where its inputs are (`make quickstart` makes them). Results: gpu_session.json, and tables on stdout.
#
#   bench/gpu_session.sh FOLDER [MINUTES_OF_THE_CHECK]
#
# PYTHON: the interpreter. Without a GPU it goes through the same steps with small layers and two steps of training (a dry run).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
folder=${1:?expected a folder for the results}
minutes=${2:-8}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"
status=0
"$python" tools/check_cluster.py --folder "$folder" --minutes "$minutes" || status=$?

# speed NAME JSON: train such layers; a step's seconds are in speed_NAME.json
speed() {
  "$python" -m megatron_cpt.cluster.measure_steps "$folder/speed_$1.json" "$2" >"$folder/speed_$1.log" 2>&1 ||
    { status=1; echo "failed: speed $1: $(tail -n 1 "$folder/speed_$1.log")" >&2; }
}
# quickstart OPTION...: its training on one device
quickstart() {
  rm -rf "$folder/quickstart"
  [ -d runs/quickstart/megatron ] || { echo "skipped: quickstart: runs/quickstart is not there" >&2; return; }
  "$python" tools/pretrain_cpt.py --config examples/quickstart/pretrain.yaml --checkpoint.save "$folder/quickstart" \
    --parallel.pipeline_model_parallel_size 1 --parallel.num_layers_in_first_pipeline_stage null "$@" >"$folder/quickstart.log" 2>&1 ||
    { status=1; echo "failed: quickstart: $(tail -n 1 "$folder/quickstart.log")" >&2; }
}
batch='"seq_length": 4096, "micro_batch_size": 2, "microbatches": 8, "params_dtype": "bf16"'
if nvidia-smi >/dev/null 2>&1; then
  speed 1b_local "{\"model\": \"1B\", \"layers\": 16, $batch, \"transformer_impl\": \"local\"}"
  if "$python" -c 'import transformer_engine.pytorch' >/dev/null 2>&1; then
    speed 1b_te "{\"model\": \"1B\", \"layers\": 16, $batch}"
    speed 1b_fp8 "{\"model\": \"1B\", \"layers\": 16, $batch, \"fp8\": \"hybrid\"}"
  fi
  quickstart --training.params_dtype bf16
else
  speed dry_run "{\"model\": \"$folder/check_cluster/hf\", \"layers\": 2, ${batch//4096/64}}"
  quickstart --training.train_iters 2 --lr.warmup_iters 0 --validation.eval_samples 2
fi
"$python" -m bench.gpu_session "$folder" || status=1
exit "$status"

#!/usr/bin/env bash
# Text -> token ids: an array with a task for each part of each corpus, then a job that joins the parts.
#     examples/slurm_quickstart/preprocess.sh         submits both; prints the number of the second
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
cd "${SLURM_SUBMIT_DIR:-$(dirname "$SCRIPT")/../..}"

INPUTS=${INPUTS:-runs/slurm_quickstart/inputs}                       # CORPUS.jsonl
OUTPUT=${OUTPUT:-runs/slurm_quickstart/data}                         # CORPUS.bin, .idx, .json
CORPORA=${CORPORA:-en_train en_valid zh_train zh_valid}              # the language is what stands before _
PARTS=${PARTS:-2}
TOKENIZER=${TOKENIZER:-$INPUTS/hf}
EOS_TOKEN=${EOS_TOKEN:-'<|endoftext|>'}
TASKS_AT_ONCE=${TASKS_AT_ONCE:-100}
STEP=${STEP:-parts}                                                  # what a job of this script does: parts, or merge

source examples/lib/launch.sh
read -ra corpora <<<"$CORPORA"

if ! in_job; then
  check_settings
  [[ $PARTS =~ ^[1-9][0-9]*$ ]] || refuse "PARTS is '$PARTS'; wanted a whole number above 0"
  for corpus in "${corpora[@]}"; do
    [ -e "$INPUTS/$corpus.jsonl" ] || [ "$CHECK" = 0 ] || refuse "$INPUTS/$corpus.jsonl is not there; wanted it, or CHECK=0"
  done
  tasks=$((${#corpora[@]} * PARTS))
  parts=$(JOB_NAME=preprocess STEP=parts submit --ntasks=1 --array="0-$((tasks - 1))%$TASKS_AT_ONCE")
  JOB_NAME=merge DEPENDENCY=afterok:$parts STEP=merge submit --ntasks=1
elif [ "$STEP" = parts ]; then
  corpus=${corpora[SLURM_ARRAY_TASK_ID / PARTS]}
  single python tools/preprocess_data.py --input "$INPUTS/$corpus.jsonl" --output_prefix "$OUTPUT/$corpus" \
    --partition "$((SLURM_ARRAY_TASK_ID % PARTS))/$PARTS" --tokenizer "$TOKENIZER" --eos_token "$EOS_TOKEN" \
    --language "${corpus%%_*}" --workers "$CPUS_PER_RANK"
else
  for corpus in "${corpora[@]}"; do
    single python tools/merge_datasets.py --input "$OUTPUT/$corpus" --output_prefix "$OUTPUT/$corpus"
  done
fi

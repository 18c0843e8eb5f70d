#!/usr/bin/env bash
# Text -> token ids: an array with a task for each part of each corpus, then a job that joins the parts.
#     examples/slurm_quickstart/preprocess.sh         submits both; prints the number of the second
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
cd "${SLURM_SUBMIT_DIR:-$(dirname "$SCRIPT")/../..}"

INPUTS=${INPUTS:-runs/slurm_quickstart/inputs}
FILES=${FILES:-.jsonl}                                               # of a corpus: INPUTS/CORPUS.jsonl
OUTPUT=${OUTPUT:-runs/slurm_quickstart/data}                         # CORPUS.bin, .idx, .json
CORPORA=${CORPORA:-en_train en_valid zh_train zh_valid}              # the language is what stands before _
PARTS=${PARTS:-2}
TASKS_AT_ONCE=${TASKS_AT_ONCE:-100}
TOKENIZER=${TOKENIZER:-$INPUTS/hf}
EOS_TOKEN=${EOS_TOKEN:-'<|endoftext|>'}

# shellcheck disable=SC2034  # of examples/lib/preprocess.sh
options=(--tokenizer "$TOKENIZER" --eos_token "$EOS_TOKEN") merge_options=()
source examples/lib/preprocess.sh

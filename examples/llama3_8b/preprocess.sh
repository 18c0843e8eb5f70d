#!/usr/bin/env bash
# Text -> token ids for Llama-3 8B: an array with a task for each part of each corpus, then a job that joins and shuffles the
# parts. Both models have one tokenizer, so the corpora are the 70B's too.
#     examples/llama3_8b/preprocess.sh         submits both; prints the number of the second
# Variables: below, and in examples/lib/launch.sh.
set -euo pipefail
SCRIPT=$(realpath "$0")
cd "${SLURM_SUBMIT_DIR:-$(dirname "$SCRIPT")/../..}"

INPUTS=${INPUTS:-raw}
FILES=${FILES:-/*}                # of a corpus: INPUTS/CORPUS/*
OUTPUT=${OUTPUT:-data/llama3}     # CORPUS.bin, .idx, .json
# Of mixture.yaml, without what you do not have; the language is what stands before _.
CORPORA=${CORPORA:-en_dolma en_automathtext en_openwebmath en_amps en_stackoverflow en_starcoderdata zh_wanjuan zh_zhihu
  en_valid zh_valid}
PARTS=${PARTS:-16}
TASKS_AT_ONCE=${TASKS_AT_ONCE:-100}
CONFIG=${CONFIG:-examples/llama3_8b/preprocess.yaml}
CPUS_PER_RANK=${CPUS_PER_RANK:-16}
TIME=${TIME:-12:00:00}

# shellcheck disable=SC2034  # of examples/lib/preprocess.sh
options=(--config "$CONFIG") merge_options=(--shuffle_documents 1)
source examples/lib/preprocess.sh

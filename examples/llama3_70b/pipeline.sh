#!/usr/bin/env bash
# Llama-3 70B from raw text to a chat model: submits all stages, each of which waits for those that it needs.
#     examples/llama3_70b/pipeline.sh                                  prints the jobs
#     DRY_RUN=1 examples/llama3_70b/pipeline.sh                        says what would be submitted
#     STAGES="sft dpo" examples/llama3_70b/pipeline.sh                 a part; what it needs is there already
# Variables: below, and those of the stages' scripts and examples/lib/launch.sh, which hold for all stages.
set -euo pipefail
cd "$(dirname "$0")/../.."

HERE=examples/llama3_70b
STAGES=${STAGES:-preprocess convert cpt export evaluate sft dpo evaluate_chat}

source examples/lib/pipeline.sh

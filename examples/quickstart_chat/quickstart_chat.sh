#!/usr/bin/env bash
# From the quickstart's CPT result to a chat model: SFT, DPO, evaluation of all stages. `make quickstart-chat` runs this
# after the quickstart; run it again to do it all again.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=runs/quickstart-chat
PATH="${VENV:-$PWD/.venv}/bin:$PATH"
START=$SECONDS
export OMP_NUM_THREADS=2
export OMP_WAIT_POLICY=passive                      # threads that wait leave the core to other programs
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1        # fewer page faults
export HF_HUB_OFFLINE=1                             # nothing comes from the hub
export HF_DATASETS_CACHE=$PWD/$RUN/cache

step() { printf '\n\033[1m[%ds] %s\033[0m\n' $((SECONDS - START)) "$1" >&2; }

rm -rf $RUN/sft $RUN/dpo $RUN/evaluation

step "inputs: instructions and preferences in Chinese and English"
python examples/quickstart_chat/fetch.py $RUN/inputs
START=$SECONDS                                      # downloads do not count

step "SFT on the CPT checkpoint"
python tools/finetune_sft.py --config examples/quickstart_chat/sft.yaml

step "DPO on the result"
python tools/finetune_dpo.py --config examples/quickstart_chat/dpo.yaml

step "evaluation of base, CPT, C-SFT and C-DPO"
python tools/evaluate.py --config examples/quickstart_chat/evaluate.yaml
cp $RUN/evaluation/report.json $RUN/report.json
printf '\n%ds in all; %s\n' $((SECONDS - START)) "$RUN/report.json, $RUN/evaluation/report.md" >&2

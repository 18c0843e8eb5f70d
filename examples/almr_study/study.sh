#!/usr/bin/env bash
# The study of docs/almr_study.md, whole: a small Llama learns English, then continues on Chinese and English in 75 ways.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=runs/almr_study
PATH="${VENV:-$PWD/.venv}/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$PWD/$RUN/cache

if [ ! -e $RUN/english/latest_checkpointed_iteration.txt ]; then
  python examples/almr_study/inputs.py $RUN
  for language in en zh; do
    for part in train valid; do
      python tools/preprocess_data.py --input $RUN/${language}_$part.jsonl --output-prefix $RUN/data/${language}_$part \
        --tokenizer $RUN/hf --eos_token '<|endoftext|>' --language $language --overwrite
    done
  done
  python tools/convert_checkpoint.py hf-to-megatron --hf $RUN/hf --megatron $RUN/random --overwrite
  torchrun --nproc_per_node 2 tools/pretrain_cpt.py --config examples/almr_study/pretrain.yaml
fi
python tools/almr_study.py plan --config examples/almr_study/study.yaml
python tools/almr_study.py run --config examples/almr_study/study.yaml
python tools/almr_study.py fit --config examples/almr_study/study.yaml
python tools/almr_study.py choose --config examples/almr_study/study.yaml --max_general_rise 0.02
python tools/almr_study.py plot --config examples/almr_study/study.yaml
# Scores along the tokens, at one learning rate
python tools/almr_study.py run --config examples/almr_study/trajectories_study.yaml
python tools/almr_study.py plot --config examples/almr_study/trajectories_study.yaml

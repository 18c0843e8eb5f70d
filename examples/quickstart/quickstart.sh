#!/usr/bin/env bash
# The whole pipeline on a real, small model, on CPU, in minutes: fetch, preprocess, convert, continue the pre-training on
# two processes, convert back, report. `make quickstart` runs this after installing; run it again to do it all again.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=runs/quickstart
PATH="${VENV:-$PWD/.venv}/bin:$PATH"
START=$SECONDS
export OMP_NUM_THREADS=1                            # one thread for each of the two processes
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1        # fewer page faults: a few per cent faster (see docs/quickstart.md)

step() { printf '\n\033[1m[%ds] %s\033[0m\n' $((SECONDS - START)) "$1" >&2; }

rm -rf $RUN/data $RUN/megatron $RUN/checkpoints $RUN/hf-cpt

step "inputs: SmolLM2-135M, Chinese news, English C4 and Wikipedia"
python examples/quickstart/fetch.py $RUN/inputs
START=$SECONDS                                      # downloads do not count

step "preprocess: text -> token ids"
for language in en zh; do
  for part in train valid; do
    python tools/preprocess_data.py --input $RUN/inputs/${language}_$part.jsonl --output-prefix $RUN/data/${language}_$part \
      --tokenizer $RUN/inputs/hf --eos_token '<|endoftext|>' --language $language
  done
done

step "convert: Hugging Face -> Megatron"
python tools/convert_checkpoint.py hf-to-megatron --hf $RUN/inputs/hf --megatron $RUN/megatron

step "continue the pre-training on 2 processes"
torchrun --nproc_per_node 2 tools/pretrain_cpt.py --config examples/quickstart/pretrain.yaml

step "convert: Megatron -> Hugging Face"
python tools/convert_checkpoint.py megatron-to-hf --megatron $RUN/checkpoints --hf $RUN/hf-cpt

step "report: before and after"
OMP_NUM_THREADS=2 python examples/quickstart/report.py $RUN --wall_seconds $((SECONDS - START))

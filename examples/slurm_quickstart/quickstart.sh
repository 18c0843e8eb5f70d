#!/usr/bin/env bash
# The quickstart on SLURM: fetches the inputs here, then submits a chain of jobs, each of which waits for those it needs.
#     examples/slurm_quickstart/quickstart.sh
# Variables: those of examples/lib/launch.sh. The result is runs/slurm_quickstart/hf-cpt.
set -euo pipefail
cd "$(dirname "$0")/../.."
HERE=examples/slurm_quickstart
RUN=runs/slurm_quickstart
DRY_RUN=${DRY_RUN:-0}
[[ $DRY_RUN == [01] ]] || { echo "error: DRY_RUN is '$DRY_RUN'; expected 0 or 1" >&2; exit 2; }
export PATH=${VENV:-$PWD/.venv}/bin:$PATH

[ "$DRY_RUN" = 1 ] || python examples/quickstart/fetch.py $RUN/inputs
merge=$(CHECK=$((1 - DRY_RUN)) $HERE/preprocess.sh)
megatron=$(CHECK=$((1 - DRY_RUN)) $HERE/convert.sh)
cpt=$(CHECK=0 DEPENDENCY=afterok:$merge:$megatron $HERE/cpt.sh)
hf=$(CHECK=0 DIRECTION=megatron-to-hf DEPENDENCY=afterok:$cpt $HERE/convert.sh)
cat >&2 <<END
preprocess -> merge $merge -------+
hf-to-megatron $megatron ---------+-> cpt $cpt -> megatron-to-hf $hf
logs: ${LOGS:-runs/slurm}
END
echo "$hf"

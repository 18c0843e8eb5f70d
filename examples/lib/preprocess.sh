# shellcheck shell=bash disable=SC2153,SC2154  # variables of whoever sources this
# Text -> token ids: an array with a task for each part of each corpus, then a job that joins the parts. A script that sources
# this has set INPUTS, FILES, OUTPUT, CORPORA, PARTS, TASKS_AT_ONCE and the arrays `options` of tools/preprocess_data.py
# and `merge_options` of tools/merge_datasets.py.
source examples/lib/launch.sh

STEP=${STEP:-parts}                       # what a job of this script does: parts, or merge
read -rd '' -a corpora <<<"$CORPORA" || true  # also of several lines

# part CORPUS NUMBER: sets the array of this name to the command; the language is what stands before _ in the name
part() {
  part=(python tools/preprocess_data.py "${options[@]}" --input "$INPUTS/$1$FILES" --output_prefix "$OUTPUT/$1"
    --partition "$2/$PARTS" --language "${1%%_*}" --workers "$CPUS_PER_RANK")
}

# made PREFIX: whether a corpus is complete, of which the manifest is written last: a script that is started again goes on
made() { [ -f "$1.json" ] && say "$1 is there, and is not made again (remove $1.* to do so)"; }

# join CORPUS: likewise, its parts' output into one
join() {
  join=(python tools/merge_datasets.py --input "$OUTPUT/$1" --output_prefix "$OUTPUT/$1" "${merge_options[@]}")
}

check_corpora() {
  local corpus name
  for name in PARTS TASKS_AT_ONCE; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || refuse "$name is '${!name}'; expected a whole number above 0"
  done
  ((${#corpora[@]} > 0)) || refuse "CORPORA is empty; expected names, as in en_train"
  [ "$CHECK" = 1 ] || return 0
  for corpus in "${corpora[@]}"; do
    [ -f "$OUTPUT/$corpus.json" ] || compgen -G "$INPUTS/$corpus$FILES" >/dev/null ||
      refuse "$INPUTS/$corpus$FILES is not there; expected it, CORPORA without $corpus, or CHECK=0"
  done
}

submit_corpora() {
  local parts tasks=$((${#corpora[@]} * PARTS))
  if [ "$DRY_RUN" = 1 ]; then
    echo "${#corpora[@]} corpora in $PARTS parts each: $tasks tasks; the first and the last:" >&2
    part "${corpora[0]}" 0
    show_single "${part[@]}"
    part "${corpora[-1]}" $((PARTS - 1))
    show_single "${part[@]}"
    echo "then, for each corpus:" >&2
    join "${corpora[0]}"
    show_single "${join[@]}"
  fi
  parts=$(JOB_NAME=preprocess STEP=parts submit --ntasks=1 --array="0-$((tasks - 1))%$TASKS_AT_ONCE")
  JOB_NAME=merge DEPENDENCY=afterok:$parts STEP=merge submit --ntasks=1
}

if ! in_job; then
  check_settings
  check_corpora
  submit_corpora
elif [ "$STEP" = parts ]; then
  corpus=${corpora[SLURM_ARRAY_TASK_ID / PARTS]} number=$((SLURM_ARRAY_TASK_ID % PARTS))
  part "$corpus" "$number"
  made "$OUTPUT/$corpus" || made "$(printf '%s/%s-%05d-of-%05d' "$OUTPUT" "$corpus" "$number" "$PARTS")" || single "${part[@]}"
else
  for corpus in "${corpora[@]}"; do
    join "$corpus"
    made "$OUTPUT/$corpus" || single "${join[@]}"
  done
fi

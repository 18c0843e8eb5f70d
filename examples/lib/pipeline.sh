# shellcheck shell=bash
# All stages of a recipe as jobs. A script that sources this has set HERE, the recipe's folder, and STAGES.
DRY_RUN=${DRY_RUN:-0}
CHECK=${CHECK:-1}
ALL=(preprocess convert cpt export evaluate sft dpo evaluate_chat)

refuse() { printf 'error: %s\n' "$*" >&2; exit 2; }

(($# == 0)) || refuse "the arguments are '$*'; expected none: settings are variables, as in STAGES='sft dpo' $0"
for name in CONFIG SAVE FROM MEGATRON HF MODELS OUTPUT TOOL JOB_NAME SCRIPT LAUNCHER; do
  [ -z "${!name:-}" ] || refuse "$name is '${!name}', which is of one stage; start the stage's own script with it"
done
read -rd '' -a wanted <<<"$STAGES" || true  # also of several lines
STAGES="${wanted[*]}"
[ -n "$STAGES" ] || refuse "STAGES is empty; expected some of ${ALL[*]}"
for name in "${wanted[@]}"; do
  [[ " ${ALL[*]} " == *" $name "* ]] || refuse "STAGES has '$name'; expected some of ${ALL[*]}"
done

# stage NAME SCRIPT STAGE...: submits a stage, to start when the others have succeeded. Those that are not in STAGES have been
# done before. What another stage makes is not there yet; all else is looked at now.
stage() {
  local name=$1 after='' waits='' before waiting=0
  [[ " $STAGES " == *" $name "* ]] || return 0
  for before in "${@:3}"; do
    [ -n "${jobs[$before]:-}" ] || continue
    after+=:${jobs[$before]} waits+="${waits:+, }$before ${jobs[$before]}" waiting=1
  done
  [ "$DRY_RUN" = 0 ] || printf '\n--- %s\n' "$name" >&2
  jobs[$name]=$(env WAITING="$waiting" ${after:+DEPENDENCY="afterok$after"} "$HERE/$2") || {
    echo "error: $name is refused$([ "$DRY_RUN" = 1 ] || echo "; submitted before it: ${jobs[*]:-nothing}")" >&2
    exit 2
  }
  graph+=$(printf '%-14s %-13s %s' "$name" "${jobs[$name]}" "${waits:+after $waits}")$'\n'
}

submit_stages() {
  local -A jobs=()
  graph=''
  stage preprocess preprocess.sh
  stage convert convert.sh
  stage cpt cpt.sh preprocess convert
  stage export export.sh cpt
  stage evaluate evaluate.sh export
  stage sft sft.sh export
  stage dpo dpo.sh sft
  stage evaluate_chat evaluate_chat.sh dpo
}

# What one stage would refuse is refused before any is queued. The stage's last words, which may be a traceback's, say why.
if [ "$DRY_RUN" = 0 ]; then
  refusal=$(DRY_RUN=1 submit_stages 2>&1 >/dev/null) || {
    cause=$(tail -n 2 <<<"$refusal" | head -n 1)
    refuse "${cause#error: }"
  }
fi
submit_stages
printf 'stage          job\n%s' "$graph"

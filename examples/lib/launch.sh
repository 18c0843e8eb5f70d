# shellcheck shell=bash
# What the SLURM scripts under examples/ share; they source it. docs/slurm.md says how to use them.
#
# A script that calls `launch` or `job` is both the command that submits and the job: started as a program it checks its
# settings and gives itself to sbatch; started by SLURM it runs. Every setting is a variable of the environment.

# A time limit near the start, or a preemption, may ask before there are ranks to tell: USR1 must not end the script.
ASKED=''                                  # the signal by which somebody asked the ranks to save and stop
trap 'ASKED=USR1' USR1

SCRIPT=${SCRIPT:-$(realpath "$0")}        # to be set before the script changes its folder
# --- The job -------------------------------------------------------------------------------------------------------------
JOB_NAME=${JOB_NAME:-$(basename "$0" .sh)}
NODES=${NODES:-1}
RANKS_PER_NODE=${RANKS_PER_NODE:-1}       # processes of training: one for each GPU
GPUS_PER_NODE=${GPUS_PER_NODE:-0}         # 0: on CPU, over gloo
CPUS_PER_RANK=${CPUS_PER_RANK:-1}
TIME=${TIME:-}                            # hours:minutes:seconds, or as sbatch takes it; empty: what the partition gives
PARTITION=${PARTITION:-}
ACCOUNT=${ACCOUNT:-}
DEPENDENCY=${DEPENDENCY:-}                # as in afterok:1234
SBATCH_OPTIONS=${SBATCH_OPTIONS:-}        # any others, as in "--exclusive --qos=long"
LOGS=${LOGS:-runs/slurm}                  # in a file system that all nodes share
VENV=${VENV:-$PWD/.venv}                  # Python's; not used if it is not there, as in a container
DRY_RUN=${DRY_RUN:-0}                     # 1: print what would be submitted, and submit nothing

# --- Training ------------------------------------------------------------------------------------------------------------
LAUNCHER=${LAUNCHER:-srun}                # srun: a task for each rank; torchrun, accelerate: one for each node
ACCELERATE=${ACCELERATE:-}                # with LAUNCHER=accelerate, its configuration (YAML)
SAVE=${SAVE:-}                            # the run's folder, checkpoint.save: tells how far the run is
SIGNAL_SECONDS=${SIGNAL_SECONDS:-300}     # before the time limit the ranks are told to save; a save has to fit in
REQUEUE=${REQUEUE:-1}                     # 0: the job is never queued again, by nobody
REQUEUE_ON_FAILURE=${REQUEUE_ON_FAILURE:-0}       # 1: one that failed is, too, as where devices break often
MAX_STALLED_RESTARTS=${MAX_STALLED_RESTARTS:-2}   # restarts in a row that bring no new checkpoint; then the job ends
CHECK=${CHECK:-1}                         # 0: check the layout only, as where another job makes the inputs
WAITING=${WAITING:-0}                     # 1: another job makes what this one begins with; set by pipelines
DEVICE=${DEVICE:-}                        # as in a100-80g, h100: does the run fit its memory (tools/plan_run.py)
MODEL=${MODEL:-}                          # with DEVICE, 8B or 70B; empty: the checkpoint that the run starts from

ANSWER_SECONDS=${ANSWER_SECONDS:-30}              # after a failure: a node that does not start a command for so long is gone
NODE_FAILURE_SECONDS=${NODE_FAILURE_SECONDS:-600} # then SLURM has so long to see it itself (its SlurmdTimeout, usually 300)

# --- Container: off unless an image is named -----------------------------------------------------------------------------
CONTAINER_IMAGE=${CONTAINER_IMAGE:-}      # as in nvcr.io#nvidia/pytorch:25.03-py3 (pyxis), /images/pytorch.sif (apptainer)
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-pyxis}     # pyxis (enroot) or apptainer
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-$PWD:$PWD}   # from:to,from:to; data and checkpoints too, where they lie elsewhere

# --- NCCL and threads ----------------------------------------------------------------------------------------------------
# NCCL finds fast paths by itself on most clusters. Where it does not, these say which to take; set them in the environment.
#   NCCL_SOCKET_IFNAME=ib0   interface for the first contact, and for all traffic without InfiniBand. "Connection refused" or
#                            "no route to host" at the start mean that it took a wrong one. gloo: GLOO_SOCKET_IFNAME.
#   NCCL_IB_HCA=mlx5         which InfiniBand adapters carry gradients; needed where some are for storage only.
#   NCCL_IB_GID_INDEX=3      RoCE v2 (Ethernet) instead of InfiniBand.
#   NCCL_IB_TIMEOUT=22       for fabrics of more than some hundred nodes, where retries take longer than the default.
#   NCCL_CROSS_NIC=0         for rail-optimised fabrics: a ring stays on its rail.
#   NCCL_NVLS_ENABLE=0       if starting fails in NVLink SHARP on H100 (it costs memory, too).
#   NCCL_DEBUG=INFO          shows what it chose, NCCL_DEBUG_SUBSYS=INIT,NET for that part only.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# For tensor parallelism on GPUs before Blackwell: communication overlaps only where kernels start in the order of launch.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS_PER_RANK}

[ ! -d "$VENV" ] || PATH=$VENV/bin:$PATH

refuse() { printf 'error: %s\n' "$*" >&2; exit 2; }
(($# == 0)) || refuse "the arguments are '$*'; expected none: settings are variables, as in NODES=2 $0"  # of the script

say() { printf '[%s] %s\n' "$(date '+%F %T')" "$*" >&2; }
words() { printf '%q ' "$@"; echo; }

# sbatch runs a copy of the script under this name. SLURM_JOB_ID alone is set in an salloc shell, too.
in_job() { [[ -n ${SLURM_JOB_ID:-} && $0 == */slurm_script ]]; }

check_settings() {
  local name
  for name in NODES RANKS_PER_NODE CPUS_PER_RANK SIGNAL_SECONDS ANSWER_SECONDS NODE_FAILURE_SECONDS; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || refuse "$name is '${!name}'; expected a whole number above 0"
  done
  for name in GPUS_PER_NODE MAX_STALLED_RESTARTS; do
    [[ ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || refuse "$name is '${!name}'; expected a whole number, 0 or more"
  done
  for name in DRY_RUN CHECK WAITING REQUEUE REQUEUE_ON_FAILURE; do
    [[ ${!name} == [01] ]] || refuse "$name is '${!name}'; expected 0 or 1"
  done
  [[ $LAUNCHER == srun || $LAUNCHER == torchrun || $LAUNCHER == accelerate ]] ||
    refuse "LAUNCHER is '$LAUNCHER'; expected srun, torchrun or accelerate"
  [[ $LAUNCHER != accelerate || -f $ACCELERATE ]] || refuse "ACCELERATE is '$ACCELERATE'; expected accelerate's configuration"
  [[ $CONTAINER_RUNTIME == pyxis || $CONTAINER_RUNTIME == apptainer ]] ||
    refuse "CONTAINER_RUNTIME is '$CONTAINER_RUNTIME'; expected pyxis or apptainer"
  [ -z "${CONFIG:-}" ] || [ -f "$CONFIG" ] ||
    refuse "CONFIG is '$CONFIG'${RECIPE:+ of RECIPE $RECIPE}; expected a YAML file"
  [[ $JOB_NAME != */* ]] || refuse "JOB_NAME is '$JOB_NAME'; expected a name without /, since logs are called by it"
  [[ -z $TIME || ${TIME,,} =~ ^(unlimited|infinite|([0-9]+-)?[0-9]+(:[0-9]+){0,2})$ ]] ||
    refuse "TIME is '$TIME'; expected hours:minutes:seconds, or as sbatch takes it"
}

# seconds_of LIMIT: in seconds what sbatch takes as a limit: [days-]hours[:minutes[:seconds]], minutes[:seconds] without days and
# with less than two colons; 0 if there is none
seconds_of() {
  local days=0 clock=${1##*-} hours minutes seconds
  [[ $1 =~ ^[0-9] ]] || { echo 0; return; }
  [[ $1 != *-* ]] || days=${1%-*}
  [[ $1 == *-* || $clock == *:*:* ]] || clock=0:$clock
  IFS=: read -r hours minutes seconds <<<"$clock"
  echo $((((10#$days * 24 + 10#$hours) * 60 + 10#${minutes:-0}) * 60 + 10#${seconds:-0}))
}

# --- Submitting ----------------------------------------------------------------------------------------------------------

# submit OPTION...: this script as a job; prints its number
submit() {
  local log=%x_%j extra option job
  for option in "$@"; do [[ $option != --array=* ]] || log=%x_%A_%a; done
  read -ra extra <<<"$SBATCH_OPTIONS"
  local command=(sbatch --parsable --job-name="$JOB_NAME" --chdir="$PWD" --output="$LOGS/$log.log" --open-mode=append
    --cpus-per-task="$CPUS_PER_RANK" ${TIME:+--time="$TIME"} ${PARTITION:+--partition="$PARTITION"}
    ${ACCOUNT:+--account="$ACCOUNT"} ${DEPENDENCY:+--dependency="$DEPENDENCY" --kill-on-invalid-dep=yes}
    "$@" "${extra[@]}" "$SCRIPT")
  if [ "$DRY_RUN" = 1 ]; then
    words "${command[@]}" >&2
    echo "$JOB_NAME"  # stands for the job's number in what depends on it
    return
  fi
  command -v sbatch >/dev/null || refuse "sbatch is not there; expected a machine that submits to SLURM, or DRY_RUN=1"
  mkdir -p "$LOGS"
  job=$("${command[@]}")
  echo "${job%%;*}"  # the cluster's name follows where there are several
}

# inputs: which are looked at before a job is queued: all, those that are given (no other job makes them), none
inputs() {
  if [ "$CHECK" = 0 ]; then echo none; elif [ "$WAITING" = 1 ]; then echo given; else echo all; fi
}

# check_run WORD...: whether the configuration can run on so many ranks, before anybody waits for them
check_run() {
  local ranks=$((NODES * RANKS_PER_NODE))
  python examples/lib/layout.py --ranks "$ranks" ${DEVICE:+--device "$DEVICE"} ${MODEL:+--model "$MODEL"} \
    --devices_per_node "$RANKS_PER_NODE" "${@:2}" >&2 || exit
  if [ "$(inputs)" = all ]; then
    python "$@" --check_only --world_size "$ranks" >&2 || exit
  fi
}

# launch TOOL OPTION...: a tool on all ranks
launch() {
  local limit
  check_settings
  [ -n "$SAVE" ] || refuse "SAVE is empty; expected the run's folder"
  if ((GPUS_PER_NODE > 0 && GPUS_PER_NODE != RANKS_PER_NODE)); then
    refuse "GPUS_PER_NODE is $GPUS_PER_NODE and RANKS_PER_NODE $RANKS_PER_NODE; expected the same number, or GPUS_PER_NODE 0"
  fi
  limit=$(seconds_of "$TIME")
  ((limit == 0 || SIGNAL_SECONDS + 60 < limit)) ||  # SLURM may signal a minute early
    refuse "SIGNAL_SECONDS is $SIGNAL_SECONDS and TIME $TIME; expected less than that by more than a minute"
  if in_job; then run_ranks "$@"; else submit_ranks "$@"; fi
}

submit_ranks() {
  local requeue=--requeue
  check_run "$@"
  if [ "$DRY_RUN" = 1 ]; then
    MASTER_ADDR=FIRST_NODE MASTER_PORT=PORT SLURM_NNODES=$NODES
    rank_command "$@"
    words "${rank_command[@]}" >&2
  fi
  [ "$REQUEUE" = 1 ] || requeue=--no-requeue  # nor by SLURM itself
  # All of the script's #SBATCH lines, which would hold where nothing is said; also --gpus-per-node=0.
  submit --nodes="$NODES" --ntasks-per-node="$RANKS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE" "$requeue" \
    --signal="B:USR1@$SIGNAL_SECONDS"
}

# job COMMAND...: a command as one process, as a job of its own
job() {
  local gpus=()
  if in_job; then
    single "$@"
    return
  fi
  check_settings
  ((GPUS_PER_NODE == 0)) || gpus=(--gpus-per-node="$GPUS_PER_NODE")
  [ "$DRY_RUN" = 0 ] || show_single "$@"
  submit --ntasks=1 "${gpus[@]}"
}

# conversion DIRECTION OPTION...: tools/convert_checkpoint.py as a job, of which is known beforehand what can be
conversion() {
  local command=(python tools/convert_checkpoint.py "$@") GPUS_PER_NODE=0  # whatever other stages of a pipeline take
  if ! in_job; then
    check_settings
    [ "$(inputs)" != all ] || "${command[@]}" --check_only true >/dev/null || exit
  fi
  job "${command[@]}"
}

# single COMMAND...: within a job, a command as one process, in the container if there is one
single() {
  single_command "$@"
  "${single_command[@]}"
}

show_single() {
  single_command "$@"
  words "${single_command[@]}" >&2
}

# single_command COMMAND...: sets the array of this name
single_command() {
  local options=() prefix=()
  container
  single_command=(srun --nodes=1 --ntasks=1 --cpus-per-task="$CPUS_PER_RANK" --kill-on-bad-exit=1 "${options[@]}"
    "${prefix[@]}" "$@")
}

# Adds to the caller's `options` (of srun) and `prefix` (of the command).
container() {
  [ -n "$CONTAINER_IMAGE" ] || return 0
  if [ "$CONTAINER_RUNTIME" = pyxis ]; then
    options+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS" --container-workdir="$PWD")
  else
    prefix=(apptainer exec --bind "$CONTAINER_MOUNTS" --pwd "$PWD")
    ((GPUS_PER_NODE == 0)) || prefix+=(--nv)
    prefix+=("$CONTAINER_IMAGE")
  fi
}

# --- Running -------------------------------------------------------------------------------------------------------------

# The launchers' own processes ignore USR1, which is for the ranks (these set a handler of their own once they can save).
# shellcheck disable=SC2016  # expanded in the tasks
RANK_FROM_SLURM='trap "" USR1
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
exec "$@"'
# Ranks are numbered in the order of nodes, not of arrival: the sum of gradients, and so the last bits, depend on it.
# shellcheck disable=SC2016  # expanded in the tasks
NODE_FROM_SLURM='trap "" USR1
exec torchrun --node-rank="$SLURM_NODEID" "$@"'
# shellcheck disable=SC2016  # expanded in the tasks
ACCELERATE_FROM_SLURM='trap "" USR1
exec accelerate launch --machine_rank="$SLURM_NODEID" "$@"'

# rank_command TOOL OPTION...: sets the array of this name to the srun command that starts all ranks
rank_command() {
  local options=(--nodes="$SLURM_NNODES" --distribution=block --kill-on-bad-exit=1 --open-mode=append --export=ALL
    --output="${RANK_LOGS:-$LOGS}/%N.log")
  local prefix=()
  container
  if [ "$LAUNCHER" = srun ]; then
    options+=(--ntasks=$((SLURM_NNODES * RANKS_PER_NODE)) --ntasks-per-node="$RANKS_PER_NODE"
      --cpus-per-task="$CPUS_PER_RANK" --label)
    rank_command=(srun "${options[@]}" "${prefix[@]}" bash -c "$RANK_FROM_SLURM" rank python "$@")
  else
    options+=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=$((RANKS_PER_NODE * CPUS_PER_RANK)))
    rank_command=(srun "${options[@]}" "${prefix[@]}" bash -c)
    if [ "$LAUNCHER" = torchrun ]; then
      rank_command+=("$NODE_FROM_SLURM" node --nnodes="$SLURM_NNODES" --nproc-per-node="$RANKS_PER_NODE"
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0
        --log-dir="${RANK_LOGS:-$LOGS}/torchrun" --tee=3 "$@")
    else
      rank_command+=("$ACCELERATE_FROM_SLURM" node --config_file="$ACCELERATE" --num_machines="$SLURM_NNODES"
        --num_processes=$((SLURM_NNODES * RANKS_PER_NODE)) --main_process_ip="$MASTER_ADDR"
        --main_process_port="$MASTER_PORT" --rdzv_backend=static --max_restarts=0
        --log_dir="${RANK_LOGS:-$LOGS}/torchrun" --tee=3 "$@")
    fi
  fi
}

# run_ranks TOOL OPTION...: in the job: start the ranks, tell them to save when SLURM asks, and queue the job again
run_ranks() {
  local hosts pid status=0
  trap 'ASKED=TERM' TERM
  NODES=$SLURM_NNODES
  JOB_LOGS=$LOGS/${SLURM_JOB_NAME}_$SLURM_JOB_ID
  RANK_LOGS=$JOB_LOGS/start_${SLURM_RESTART_COUNT:-0}
  mkdir -p "$RANK_LOGS"
  count_stalled_restarts
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Below 32768, where the kernel takes ports for connections.
  export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) RANKS_PER_NODE
  # shellcheck disable=SC2016  # expanded by torchrun; srun --label writes the same
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='${rank}: '
  rank_command "$@"
  say "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on ${hosts[*]}, from step $FIRST_STEP; logs: $RANK_LOGS"

  "${rank_command[@]}" 2>"$RANK_LOGS/srun.log" &  # in the background: bash runs no trap before its command has ended
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if [ -n "$ASKED" ]; then
      # Again and again: ranks that are still starting do not hear it. Not to the batch step, whose srun would end them.
      say "$ASKED: the ranks are told to save"
      scancel --signal=USR1 "$SLURM_JOB_ID.0" 2>/dev/null || true  # it may have just ended
    fi
    sleep 5 &
    wait -n "$pid" $! || true  # a trap ends it
  done
  wait "$pid" || status=$?
  cat "$RANK_LOGS/srun.log" >&2
  settle "$status" "$ASKED"
}

# What the run says of itself; nothing if it never came so far in this start.
run_says() {
  [ "$SAVE/status.json" -nt "$JOB_LOGS/progress" ] || return 0  # which is written at the start
  sed -n "s/.*\"$1\": \"\([^\"]*\)\".*/\1/p" "$SAVE/status.json"
}

newest_step() { cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }

# FIRST_STEP: where this start begins. STALLED: how many restarts in a row began there. Counted at the start, since SLURM
# requeues by itself, too, when a node fails.
count_stalled_restarts() {
  local file=$JOB_LOGS/progress before=0 stalled=0
  FIRST_STEP=$(newest_step) STALLED=0
  if ((${SLURM_RESTART_COUNT:-0} > 0)) && read -r before stalled 2>/dev/null <"$file" && [ "$before" = "$FIRST_STEP" ]; then
    STALLED=$((stalled + 1))
  fi
  echo "$FIRST_STEP $STALLED" >"$file"
  ((STALLED <= MAX_STALLED_RESTARTS)) || give_up
}

give_up() {
  say "not queued again: the run is still at step $FIRST_STEP after $STALLED restarts (MAX_STALLED_RESTARTS" \
    "$MAX_STALLED_RESTARTS)"
  exit 1
}

# insist COMMAND...: up to five times; SLURM's controller may be busy, or start anew
insist() {
  local try
  for try in 1 2 3 4 5; do
    "$@" && return
    say "try $try of 5 failed: $*"
    sleep 5
  done
  return 1
}

requeue() {
  local state
  if [ "$REQUEUE" = 0 ]; then
    say "not queued again (REQUEUE 0), and not finished: status 1, or what waits for it would start"
    exit 1
  fi
  # A job that somebody has cancelled would come back to life; one whose node has failed is queued again already.
  state=$(insist squeue --noheader --job "$SLURM_JOB_ID" --format=%T) || true
  [ "${state:-RUNNING}" = RUNNING ] || {
    say "SLURM ends this job itself: not queued again from here"
    exit 1
  }
  if [ "$(newest_step)" = "$FIRST_STEP" ] && ((STALLED >= MAX_STALLED_RESTARTS)); then give_up; fi
  say "queued again, to go on from step $(newest_step)"
  insist scontrol requeue "$SLURM_JOB_ID" || { say "SLURM does not queue it again: submit it anew"; exit 1; }
  exit 0
}

# settle STATUS ASKED: what becomes of the job when its ranks have ended
settle() {
  local status=$1 asked=$2 state reason
  trap '' USR1  # there is nobody left to tell
  state=$(run_says state)
  reason=$(run_says reason)
  if [ -z "$asked" ] && preempted; then asked=preemption; fi
  if ((status != 0)) && [ -z "$asked" ]; then
    if [ "$REQUEUE" = 1 ] && ! nodes_answer; then
      say "a node does not answer: waiting for SLURM to see it, take it out and queue the job again"
      sleep "$NODE_FAILURE_SECONDS" &
      wait $! || true
      requeue
    fi
    summary "$status"
    ((REQUEUE_ON_FAILURE == 0)) || requeue
    exit "$status"
  fi
  if [ "$state" = finished ] || [[ -z $asked && $state != stopped ]]; then
    say "finished at step $(newest_step)"
    exit 0
  fi
  ((status == 0)) || [ "$state" = stopped ] || summary "$status"  # torchrun is not content with ranks that have saved
  say "stopped at step $(newest_step): ${reason:-$asked}"
  if [[ -z $asked && $reason == *stop_now* ]]; then exit 0; fi
  requeue
}

# With a grace time SLURM tells the ranks alone, by SIGTERM: they end though nobody asked here, by the signal if they could not
# save yet, and under a launcher with a status of its own.
preempted() { [[ $(timeout "$ANSWER_SECONDS" scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]; }

# A dead node's tasks end no differently from any others at first.
nodes_answer() {
  timeout "$ANSWER_SECONDS" srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --input=none true 2>/dev/null
}

# summary STATUS: the first error of the rank that failed first. Others fail in its wake, and bury it.
summary() {
  local first rank
  # srun knows which task ended first. If it was killed, that is it. Else the ranks, who have told each other, know better.
  first=$(grep -m1 -oE 'error: [^ ]+: tasks? [0-9]+.*' "$RANK_LOGS/srun.log" || true)
  if [ -z "$first" ] || [[ $first == *"Exited with exit code"* ]]; then
    first=$(grep -hm1 -oE 'rank [0-9]+ failed: .*' "$RANK_LOGS"/*.log | head -n1 || echo "$first")
  fi
  rank=$(sed -nE 's/^(rank|.*: tasks?) ([0-9]+).*/\2/p' <<<"$first")
  {
    echo "--- job $SLURM_JOB_ID failed with status $1 at step $(newest_step)"
    echo "${first:-neither srun nor a rank says why}"
    first_error "${rank:-0}"
    echo "--- whole logs: $RANK_LOGS; of each rank but the first also $SAVE/logs"
  } >&2
}

# first_error RANK: from its first traceback, or line with an error, what it wrote; of any rank if that one wrote none
first_error() {
  local lines
  lines=$(grep -hE "^ *0*$1: " "$RANK_LOGS"/*.log |
    awk '/Traceback|[Ee]rror/ { found = 1 } found && count++ < 40' || true)
  [ -n "$lines" ] || lines=$(grep -hm1 -A39 -E 'Traceback|[Ee]rror' "$RANK_LOGS"/*.log | head -n 40 || true)
  echo "$lines"
}

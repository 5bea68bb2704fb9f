# Main program of a batch job; a job script sources this file and calls
# `run_job RUN_FILE ARGUMENT...`.
#
# Settings, from the environment of sbatch:
#   TRAIN_NODES           nodes that train (default: all of the job); the others are spares
#   RANKS_PER_NODE        (default: the GPUs of a node)
#   MAX_STALLED_LAUNCHES  launches in a row without a new checkpoint before giving up (default: 3)
#   FABRIC                a file of launchers/lib/fabric, without .sh (default: NCCL's own choice)
#   HEALTH_CHECK          a site-specific program that fails on a node that must not train
#   HEALTH_TIMEOUT        seconds that the health check may take, after which nodes that have not
#                         answered are left out, and as many for the doctor (default: 300)
#   CONTAINER_IMAGE, CONTAINER_MOUNTS   as for pyxis (default: no container)
#   KEEP_ENV              names of additional variables that ranks inherit, separated by commas
#   PYTHON                the interpreter (default: .venv/bin/python if there is one, else python)
#
# The outcome of a launch is read from files in the run directory and not from exit codes, which
# torchrun reduces to 0 and 1: the trainer writes DONE (trained to the end) and REQUEUE (saved on
# request), the user writes STOP.

set -uo pipefail  # not -e: most commands here may fail, and their status decides how to continue
umask 027
ROOT=${MANYFORMER_ROOT:-$SLURM_SUBMIT_DIR}
LIB=$ROOT/launchers/lib
LAUNCH=${SLURM_RESTART_COUNT:-0}
. "$LIB/environment.sh"
. "$LIB/nodes.sh"
. "$LIB/requeue.sh"

readonly EXIT_GAVE_UP=93 EXIT_STOPPED=75

run_job() {
  local config=$1
  shift
  cd "$ROOT" || exit
  check_size
  prepare_environment
  prepare_run --config-name "$config" "$@"
  refuse_finished_run
  refuse_stalled_run
  choose_nodes
  examine --config-name "$config" "$@"
  train --config-name "$config" "$@"
  requeue_or_end
}

say() { printf '[%(%F %T)T launch %s] %s\n' -1 "$LAUNCH" "$*"; }

give_up() {  # exit code, reason
  local code=$1
  shift
  say "$*" >&2
  exit "$code"
}

# Bash evaluates the contents of a variable in arithmetic, including commands.
check_count() {  # name of a variable
  [[ ${!1} =~ ^[1-9][0-9]{0,8}$ ]] || give_up 2 "$1=${!1} must be a positive integer"
}

check_size() {
  TRAIN_NODES=${TRAIN_NODES:-$SLURM_NNODES}
  check_count TRAIN_NODES
  (( TRAIN_NODES <= SLURM_NNODES )) ||
    give_up 2 "TRAIN_NODES=$TRAIN_NODES exceeds the $SLURM_NNODES nodes of the job; lower it or" \
      "raise --nodes"
  RANKS_PER_NODE=${RANKS_PER_NODE:-$SLURM_GPUS_ON_NODE}
  check_count RANKS_PER_NODE
}

# Check all settings for the number of ranks before a GPU is used, determine the run directory, and
# print the configuration of the run.
prepare_run() {
  export TRAIN_NODES RANKS_PER_NODE LAUNCH PYTHON
  # The dot protects a newline at the end of a path, which $(...) would strip.
  RUN_DIR=$(
    srun --nodes=1 --ntasks=1 --export="$(visible)" ${CONTAINER[@]+"${CONTAINER[@]}"} \
      bash "$LIB/prepare.sh" "$@" && printf .
  ) || give_up "$?" "nothing was started"
  RUN_DIR=${RUN_DIR%.}
  LOG_DIR=$RUN_DIR/logs/job_$SLURM_JOB_ID/launch_$LAUNCH
  export RUN_DIR LOG_DIR
  say "run directory $RUN_DIR"
  cat "$LOG_DIR/start.txt"
}

# Examine every node that trains: data, disk, packages, network, clocks, and that all nodes see the
# run directory.
examine() {
  local code
  export MASTER_ADDR=${NODES[0]}
  # Below the kernel's ephemeral ports; different for every job and launch.
  export MASTER_PORT=$((10000 + (SLURM_JOB_ID + LAUNCH) % 20000))
  timeout --kill-after=10 "$HEALTH_TIMEOUT" srun --nodes="$TRAIN_NODES" --ntasks="$TRAIN_NODES" \
    --ntasks-per-node=1 --nodelist="$(IFS=,; echo "${NODES[*]}")" --kill-on-bad-exit=0 \
    --export="$(visible)" ${CONTAINER[@]+"${CONTAINER[@]}"} bash "$LIB/doctor.sh" "$@" \
    > "$LOG_DIR/doctor.txt" 2>&1
  code=$?
  cat "$LOG_DIR/doctor.txt"
  (( code != 2 )) || give_up 2 "nothing was started: see the errors above, also in $LOG_DIR/doctor.txt"
  (( code == 0 )) || say "the examination ended with code $(explain "$code"); training anyway"
}

# Start one launcher per node, which starts the ranks of that node.
train() {
  local tick
  say "training on ${NODES[*]}, rendezvous $MASTER_ADDR:$MASTER_PORT"
  rm -f "$RUN_DIR/REQUEUE"
  srun --nodes="$TRAIN_NODES" --ntasks="$TRAIN_NODES" --ntasks-per-node=1 \
    --nodelist="$(IFS=,; echo "${NODES[*]}")" --kill-on-bad-exit=1 --wait=60 --cpu-bind=none \
    --label --export="$(visible)" ${CONTAINER[@]+"${CONTAINER[@]}"} bash "$LIB/node.sh" "$@" &
  STEP=$!
  ASKED=
  trap 'ask_to_save "the end of the time limit is near"' USR1
  while kill -0 "$STEP" 2> /dev/null; do
    [[ ! -e $RUN_DIR/STOP ]] || ask_to_save "$RUN_DIR/STOP exists"
    # Repeat the signal: ranks that are still starting up do not handle it yet.
    [[ -z $ASKED ]] || kill -USR1 "$STEP"
    sleep 5 &
    tick=$!
    wait -n "$STEP" "$tick"  # or until the end of the time limit is near
    kill "$tick" 2> /dev/null
  done
  wait "$STEP"
  say "the step ended with code $(explain "$?")"
}

explain() {  # exit code
  case $1 in
    137) echo "137: signal 9, likely out of memory (sacct -j $SLURM_JOB_ID --format=State,MaxRSS says more)" ;;
    13[0-9] | 14[0-9]) echo "$1: signal $(($1 - 128))" ;;
    *) echo "$1" ;;
  esac
}

ask_to_save() {  # reason
  [[ -n $ASKED ]] || say "asking the ranks to save and stop: $1"
  ASKED=$1
}

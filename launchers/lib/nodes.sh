# Selection of the nodes that train: the first TRAIN_NODES that pass the health check.

choose_nodes() {
  local node log
  local -a unhealthy=()
  NODES=()
  mkdir -p "$LOG_DIR/health"
  HEALTH_TIMEOUT=${HEALTH_TIMEOUT:-300}
  check_count HEALTH_TIMEOUT
  export HEALTH_CHECK=${HEALTH_CHECK:-}
  # A hanging node must not block the selection of the others.
  timeout --kill-after=10 "$HEALTH_TIMEOUT" srun --nodes="$SLURM_NNODES" \
    --ntasks-per-node=1 --kill-on-bad-exit=0 --export="$(visible)" bash "$LIB/health.sh"
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    log=$LOG_DIR/health/$node
    if [[ ! -s $log ]]; then
      unhealthy+=("$node (no answer)")
    elif [[ $(tail -n 1 "$log") != OK ]]; then
      unhealthy+=("$node ($(tail -n 1 "$log"))")
    elif (( ${#NODES[@]} < TRAIN_NODES )); then
      NODES+=("$node")
    fi
  done
  (( ${#unhealthy[@]} == 0 )) || say "left out: ${unhealthy[*]}"
  (( ${#NODES[@]} == TRAIN_NODES )) ||
    give_up 1 "${#NODES[@]} healthy nodes of $TRAIN_NODES; ask for spares with" \
      "TRAIN_NODES=$TRAIN_NODES sbatch --nodes=$((TRAIN_NODES + 1)) ..., or --exclude bad ones"
}

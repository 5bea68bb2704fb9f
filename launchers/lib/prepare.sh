# Run on one node before each launch; prints only the run directory to standard output.

run_dir=$(WORLD_SIZE=$((TRAIN_NODES * RANKS_PER_NODE)) \
  "$PYTHON" -m pretrain.train "$@" --print-run-dir && printf .) || exit
run_dir=${run_dir%$'\n.'}
log_dir=$run_dir/logs/job_$SLURM_JOB_ID/launch_$LAUNCH
mkdir -p "$log_dir" || exit
{
  printf 'command: python -m pretrain.train'
  printf ' %q' "$@"
  printf '\n'
  "$PYTHON" launchers/versions.py
  "$PYTHON" -m pretrain.train "$@" --print-config
} > "$log_dir/start.txt" || exit
printf %s "$run_dir"

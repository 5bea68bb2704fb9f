# Decision to continue a run: its marker files, and a limit on launches without progress.

refuse_finished_run() {
  [[ ! -e $RUN_DIR/DONE ]] || { say "$RUN_DIR/DONE exists: trained to the end"; exit 0; }
  [[ ! -e $RUN_DIR/STOP ]] ||
    give_up "$EXIT_STOPPED" "$RUN_DIR/STOP exists: remove it and submit again to continue"
}

# Counted at the start of a launch, so that it does not matter how the previous one ended.
refuse_stalled_run() {
  local file=$RUN_DIR/logs/job_$SLURM_JOB_ID/progress
  local step last=-1 stalled=0
  MAX_STALLED_LAUNCHES=${MAX_STALLED_LAUNCHES:-3}
  check_count MAX_STALLED_LAUNCHES
  step=$(newest_step)
  if [[ $(cat "$file" 2> /dev/null) =~ ^([0-9]+)\ ([0-9]+)$ ]]; then
    last=${BASH_REMATCH[1]} stalled=${BASH_REMATCH[2]}
  fi
  if (( step > last )); then stalled=0; else stalled=$((stalled + 1)); fi
  echo "$step $stalled" > "$file.new" && mv "$file.new" "$file"
  (( stalled < MAX_STALLED_LAUNCHES )) ||
    give_up "$EXIT_GAVE_UP" "launches in a row without a checkpoint after step $step: $stalled;" \
      "see $RUN_DIR/logs/job_$SLURM_JOB_ID"
}

newest_step() {
  local path step newest=0
  for path in "$RUN_DIR"/checkpoints/step_*; do
    step=${path##*/step_}
    if [[ $step =~ ^[0-9]{1,15}$ ]] && (( 10#$step > newest )); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

# Not reached after scancel, which kills this script at once.
requeue_or_end() {
  if [[ -e $RUN_DIR/DONE ]]; then
    say "trained to the end"
    exit 0
  fi
  [[ ! -e $RUN_DIR/STOP ]] || give_up "$EXIT_STOPPED" "stopped at step $(newest_step) as requested"
  if [[ -e $RUN_DIR/REQUEUE ]]; then
    say "saved step $(newest_step) and stopped as requested; requeueing"
  else
    say "failed after step $(newest_step); requeueing"
  fi
  scontrol requeue "$SLURM_JOB_ID" || give_up 1 "the job cannot be requeued; submit it again"
  sleep 600  # Slurm ends this script
}

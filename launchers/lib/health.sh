# Health check, run on every node before each launch: writes the problem, or OK, as the last line of
# the node's file.

exec > "$LOG_DIR/health/$SLURMD_NODENAME" 2>&1

fail() {
  echo "$*"
  exit 1
}

if command -v nvidia-smi > /dev/null; then
  found=$(nvidia-smi --list-gpus | wc -l)
  (( found >= RANKS_PER_NODE )) || fail "$found GPUs of $RANKS_PER_NODE"
  errors=$(nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader,nounits)
  ! grep -q '[1-9]' <<< "$errors" || fail "uncorrected memory errors: $(paste -sd ' ' <<< "$errors")"
fi
free_kib=$(df --output=avail "${TMPDIR:-/tmp}" | tail -n 1)
(( free_kib >= 1048576 )) || fail "less than 1 GiB free in ${TMPDIR:-/tmp}"
if [[ -n ${HEALTH_CHECK:-} ]]; then
  "$HEALTH_CHECK" || fail "$HEALTH_CHECK failed with code $?"
fi
echo OK

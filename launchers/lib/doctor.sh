# Examination of one node before each launch.

exec "$PYTHON" -m pretrain.doctor --ranks "$((TRAIN_NODES * RANKS_PER_NODE))" \
  --ranks-per-node "$RANKS_PER_NODE" "$@"

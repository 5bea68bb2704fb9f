# One node of the training step: torchrun, which starts one rank per GPU and keeps a log of each.

# Slurm sends signals to every process of a step. The ranks save on USR1 and TERM; torchrun would be
# killed by the first and on the second give the ranks only 30 seconds, so it ignores both. Ignored
# signals are inherited until the ranks set their own handlers.
trap "" USR1 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT
export MANYFORMER_READS_MARKERS=1  # the outcome of a run is read from its directory
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$SLURM_JOB_ID}
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE=$LOG_DIR/nccl_trace_rank_

exec "$PYTHON" -m torch.distributed.run \
  --nnodes="$TRAIN_NODES" --nproc-per-node="$RANKS_PER_NODE" --node-rank="$SLURM_PROCID" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
  --log-dir="$LOG_DIR/$SLURMD_NODENAME" --redirects=3 --tee=3 \
  -m pretrain.train "$@"

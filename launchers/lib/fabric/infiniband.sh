# InfiniBand: longer time-outs than NCCL's own, for the recovery of a link under load.
: "${NCCL_IB_TIMEOUT:=22}" "${NCCL_IB_RETRY_CNT:=10}"

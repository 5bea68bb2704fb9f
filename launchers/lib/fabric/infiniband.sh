# InfiniBand: longer timeouts than NCCL's defaults, so that links can recover under load.
: "${NCCL_IB_TIMEOUT:=22}" "${NCCL_IB_RETRY_CNT:=10}"

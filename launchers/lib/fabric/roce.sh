# RDMA over Ethernet: the GID index of RoCE v2 in most drivers, and the timeouts of InfiniBand.
: "${NCCL_IB_GID_INDEX:=3}" "${NCCL_IB_TIMEOUT:=22}" "${NCCL_IB_RETRY_CNT:=10}"

# Plain TCP: no RDMA, and no interface that leads nowhere.
: "${NCCL_IB_DISABLE:=1}" "${NCCL_SOCKET_IFNAME:=^lo,docker,virbr}"

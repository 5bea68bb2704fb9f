# Plain TCP: no RDMA, and no loopback, Docker or virtual bridge interface.
: "${NCCL_IB_DISABLE:=1}" "${NCCL_SOCKET_IFNAME:=^lo,docker,virbr}"

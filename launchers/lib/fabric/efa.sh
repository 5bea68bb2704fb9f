# Elastic Fabric Adapter, through the libfabric plug-in of NCCL.
: "${FI_PROVIDER:=efa}" "${FI_EFA_USE_DEVICE_RDMA:=1}" "${FI_EFA_FORK_SAFE:=1}"

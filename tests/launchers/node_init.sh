#!/usr/bin/env bash
# Process 1 of a node of the test cluster, in namespaces of its own: node_init.sh DIR NAME ADDRESS
set -euo pipefail
directory=$1 name=$2 address=$3

mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount --bind "$directory/hosts" /etc/hosts
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf > /run/nsswitch.conf  # no name server in here
mount --bind /run/nsswitch.conf /etc/nsswitch.conf
hostname "$name"

# The network device appears once the test has moved it into this namespace.
for _ in {1..500}; do
  ip link show eth0 > /dev/null 2>&1 && break
  sleep 0.02
done
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up

if [[ -f $directory/ssh/sshd_config ]]; then
  mkdir -p /run/sshd /run/dotssh ~/.ssh
  cp "$directory/ssh/config" /run/dotssh/config
  mount --bind /run/dotssh ~/.ssh
  "$(command -v sshd)" -f "$directory/ssh/sshd_config"
fi
slurmd -D -f "$directory/slurm.conf" -N "$name" &
slurmd=$!
while kill -0 "$slurmd" 2> /dev/null; do
  wait -n || true  # process 1 also reaps what others leave behind
done

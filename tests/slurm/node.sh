#!/usr/bin/env bash
# Start node NODE (1, 2, ...) of the cluster in FOLDER: see up.sh. All it runs ends with the process in run/node.NODE.pid.
set -euo pipefail
: "${FOLDER:?}" "${NODE:?}"
setsid nsenter "--net=/run/netns/cpt-n$NODE" unshare --mount --uts --pid --fork --kill-child --mount-proc bash -c "
  mount --bind '$FOLDER/hosts' /etc/hosts
  mount -t tmpfs tmpfs /dev/shm
  hostname n$NODE
  slurmd -D -N n$NODE -f '$FOLDER/slurm.conf' & wait" </dev/null >>"$FOLDER/log/slurmd.n$NODE.log" 2>&1 &
echo $! >"$FOLDER/run/node.$NODE.pid"

#!/usr/bin/env bash
# Stop the cluster in FOLDER that up.sh started, and all it runs.
set -uo pipefail
FOLDER=$(realpath -m "${FOLDER:?wanted the folder of the cluster}")

stop() { # SIGNAL PIDFILE COMMAND: only if that process still runs COMMAND; waits until it is gone, or a zombie
  local pid
  [ -s "$2" ] || return 0
  pid=$(cat "$2")
  if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$3" ]; then
    kill "-$1" "$pid"
    for _ in $(seq 150); do
      [ -n "$(tr -d '\0' <"/proc/$pid/cmdline" 2>/dev/null)" ] || break
      sleep 0.1
    done
  fi
  rm -f "$2"
}

stop TERM "$FOLDER/run/slurmctld.pid" slurmctld  # first: it would wait for the nodes
for file in "$FOLDER"/run/node.*.pid; do stop KILL "$file" unshare; done
stop TERM "$FOLDER/run/munged.pid" munged
for folder in "$FOLDER"/spool/n*; do
  i=${folder##*/n}
  ip link del "cptv$i" 2>/dev/null
  ip netns del "cpt-n$i" 2>/dev/null
done
ip link del cptbr 2>/dev/null
exit 0

#!/usr/bin/env bash
# A real SLURM on one host, for tests: several nodes, each with a network namespace and an address of its own, so that what
# works on the loopback interface only fails here as it does on a cluster. Needs root and Debian's packages, not systemd:
#     apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
#     FOLDER=/tmp/cluster tests/slurm/up.sh       then: export SLURM_CONF=/tmp/cluster/slurm.conf; down.sh stops it
set -euo pipefail
HERE=$(dirname "$(realpath "$0")")
FOLDER=$(realpath -m "${FOLDER:?wanted the folder for the cluster}")
NODES=${NODES:-3}
CPUS=${CPUS:-4}              # of a node; may be more than the host has
MEMORY=${MEMORY:-16000}      # MB
PORT=${PORT:-17800}
NET=${NET:-10.78.0}          # nodes are .1, .2 and so on, the controller .254

[ ! -e "$FOLDER/run/slurmctld.pid" ] || { echo "error: $FOLDER is up already; stop it with down.sh" >&2; exit 2; }
mkdir -p "$FOLDER"/{state,spool,log,run}
chmod 755 "$FOLDER" "$FOLDER"/{log,run}
cp /etc/hosts "$FOLDER/hosts"
for i in $(seq "$NODES"); do
  echo "$NET.$i n$i" >>"$FOLDER/hosts"
  mkdir -p "$FOLDER/spool/n$i"
done
# cred_expire: a job that is queued again waits for so long. SlurmdTimeout: a node that is silent for so long is down.
# Jobs in main take nodes from those in the others, which are queued again.
cat >"$FOLDER/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$(hostname -s)($NET.254)
SlurmUser=root
AuthInfo=socket=$FOLDER/run/munge.sock,cred_expire=10
SlurmctldPort=$PORT
SlurmctldPidFile=$FOLDER/run/slurmctld.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
StateSaveLocation=$FOLDER/state
SlurmdPidFile=$FOLDER/spool/%n/slurmd.pid
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmdParameters=config_overrides
SlurmdTimeout=60
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=86400
KillWait=5
NodeName=n[1-$NODES] NodeHostname=$(hostname -s) NodeAddr=$NET.[1-$NODES] \
  Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP GraceTime=120
PartitionName=spare_at_once Nodes=ALL MaxTime=INFINITE State=UP GraceTime=0
END
(umask 077; head -c 128 /dev/urandom >"$FOLDER/munge.key")
munged --key-file="$FOLDER/munge.key" --socket="$FOLDER/run/munge.sock" --pid-file="$FOLDER/run/munged.pid" \
  --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/run/munged.seed"
ip link add cptbr type bridge
ip addr add "$NET.254/24" dev cptbr
ip link set cptbr up
for i in $(seq "$NODES"); do
  ip netns add "cpt-n$i"
  ip link add "cptv$i" type veth peer name eth0 netns "cpt-n$i"
  ip link set "cptv$i" master cptbr up
  ip -n "cpt-n$i" link set lo up
  ip -n "cpt-n$i" addr add "$NET.$i/24" dev eth0
  ip -n "cpt-n$i" link set eth0 up
done
slurmctld -f "$FOLDER/slurm.conf" -c  # forget old jobs
for i in $(seq "$NODES"); do FOLDER=$FOLDER NODE=$i "$HERE/node.sh"; done
export SLURM_CONF=$FOLDER/slurm.conf
while [ "$SECONDS" -lt 60 ]; do
  [ "$(timeout 3 sinfo --noheader --states=idle --format=%D 2>/dev/null)" != "$NODES" ] || exit 0
  sleep 0.2
done
tail -n 5 "$FOLDER"/log/slurm*.log >&2
exit 1

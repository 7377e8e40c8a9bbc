#!/usr/bin/env bash
# A real Slurm on this machine alone, for the tests of engine=slurm: packages of Debian or Ubuntu, as root.
# It is left running; nothing is done where a Slurm answers already. Not for a machine that belongs to a cluster.
set -euo pipefail
sinfo --noheader >/dev/null 2>&1 && exit 0
if ! command -v slurmctld >/dev/null; then
  apt-get update -q && apt-get install -y -q slurm-wlm munge
fi
place=${1:-/var/tmp/one-node-slurm}
host=$(hostname -s)
mkdir -p "$place/state" "$place/spool" /run/munge /etc/slurm
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ReturnToService=2
MpiDefault=none
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
[ -f /etc/munge/munge.key ] || mungekey --create
chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
munge --no-input >/dev/null 2>&1 || setpriv --reuid=munge --regid=munge --clear-groups munged
pgrep -x slurmctld >/dev/null || slurmctld -c # without the jobs of an earlier one
pgrep -x slurmd >/dev/null || slurmd
for _ in $(seq 30); do
  if sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed|alloc'; then exit 0; fi
  sleep 1
done
echo "Slurm was started and its node does not become idle, see $place/*.log" >&2
exit 1

#!/usr/bin/env bash
# A SLURM of two nodes on this machine, in a directory, for as long as a command takes:
#   bash tests/slurm/cluster.sh DIRECTORY COMMAND ...
# Jobs of partition `urgent` take the nodes from those of `normal`, which have a minute to save. Installs
# Debian's slurm-wlm and munge where they are missing. Exits with 77 where it cannot, and says why.
set -euo pipefail

cannot() {
    echo "$*"
    exit 77
}
[[ $EUID == 0 ]] || cannot "SLURM's daemons need root."
if ! command -v slurmctld slurmd munged > /dev/null; then
    command -v apt-get > /dev/null || cannot "SLURM is not installed, and there is no apt-get."
    { timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install \
        -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 slurm-wlm munge; } > /dev/null 2>&1 ||
        cannot "SLURM is not installed, and apt-get could not install slurm-wlm and munge."
fi

directory=$(mkdir -p "$1" && cd "$1" && pwd)
shift
port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
end() {
    # Ends daemons by their ids: other clusters may run here.
    for file in "$directory"/slurm{d-*,ctld}.pid "$directory/munged.pid"; do
        if [[ -f $file ]]; then kill "$(< "$file")" 2> /dev/null || true; fi
    done
    for ((i = 0; i < 50; i++)); do
        compgen -G "$directory/*.pid" > /dev/null || return 0
        sleep 0.1
    done
}
trap end EXIT
trap 'exit 143' TERM INT

mkdir -p "$directory"/{state,spool-node0,spool-node1}
dd if=/dev/urandom of="$directory/munge.key" bs=64 count=1 2> /dev/null
chmod 600 "$directory/munge.key"
chmod 755 "$directory"
munged --force --key-file "$directory/munge.key" --socket "$directory/munge.socket" \
    --pid-file "$directory/munged.pid" --log-file "$directory/munged.log" \
    --seed-file "$directory/munged.seed"

host=$(hostname -s)
cat > "$directory/slurm.conf" << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool-%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
BatchStartTimeout=20
NodeName=node0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port)
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(port)
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
CONF
export SLURM_CONF=$directory/slurm.conf
slurmctld
slurmd -N node0
slurmd -N node1
for ((i = 0; i < 100; i++)); do
    [[ $(sinfo --noheader --format %T:%D 2> /dev/null | sort -u) == idle:2 ]] && break
    sleep 0.2
done
"$@" & # in the foreground, a signal would wait for its end
wait $!

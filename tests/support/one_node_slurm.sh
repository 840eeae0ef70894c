#!/bin/sh
# A Slurm of one node, this machine, for tests: munged, slurmctld and slurmd of this user in one folder.
#   one_node_slurm.sh start FOLDER    prints the SLURM_CONF that sbatch, squeue and scancel then need
#   one_node_slurm.sh stop FOLDER
# Needs slurm-wlm (22.05) and munge: apt-get install slurm-wlm. No service of the system is used or changed.
set -eu
export PATH="$PATH:/usr/sbin:/sbin"
folder=$(cd "$2" && pwd)

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

write_conf() {
    host=$(hostname -s)
    user=$(id -un)
    cat > "$folder/slurm.conf" <<CONF
ClusterName=clplat
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=300
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    # With cgroups of version 2 slurmd would else ask systemd for a scope.
    echo "IgnoreSystemd=yes" > "$folder/cgroup.conf"
}

start() {
    mkdir -p "$folder/state" "$folder/spool"
    chmod 700 "$folder"
    write_conf
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 2>/dev/null
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" >&2
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -c >&2
    slurmd -c >&2
    tries=0
    until sinfo --noheader --format=%T 2>/dev/null | grep -q idle; do
        tries=$((tries + 1))
        [ $tries -lt 120 ] || { tail -n 20 "$folder"/*.log >&2; stop; exit 1; }
        sleep 0.5
    done
    echo "SLURM_CONF=$folder/slurm.conf"
}

stop() {
    for name in slurmd slurmctld munged; do
        if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
}

"$1"

# Sourced by the .sbatch files: what they have in common. `train MACHINES CONFIG [options]` runs node.sh on so many
# machines of the job, the first ones; when SLURM says that time is up it stops the run, which saves, and puts the job in
# the queue again.
set -euo pipefail
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")   # names of the job's machines, one a line
export RUN_ID=$SLURM_JOB_ID PORT=$((20000 + SLURM_JOB_ID % 10000))        # jobs that share a machine do not meet

train() {
    local count=$1 status=0 step
    shift
    export HEAD=${machines[0]} NODES=$count
    # One task a machine, torchrun; it starts the ranks. A task that fails does not make SLURM kill the others: they end
    # by themselves, and say first which rank it was. --label: each line with the number of its machine. A step gets one
    # CPU unless it asks for more.
    srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --nodelist="$(hosts 0 "$count")" \
        --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --cpu-bind=none \
        --kill-on-bad-exit=0 --label bash configs/launch/node.sh "$@" &
    step=$!
    again=
    trap 'again=yes; kill -TERM "$step"' USR1      # srun passes it on to torchrun, and that to the ranks
    while kill -0 "$step" 2>/dev/null; do          # a signal ends a wait, not what it waits for
        wait "$step" && status=0 || status=$?
    done
    trap - USR1
    if [[ -n $again && $status != 0 ]]; then       # stopped before it was finished
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}

hosts() {                                          # names from place $1 on, $2 of them, with commas between
    local IFS=,
    echo "${machines[*]:$1:$2}"
}

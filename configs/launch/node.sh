#!/usr/bin/env bash
# One machine's part of a run on several. Start it on each of them, in any order, with the same arguments:
#   HEAD=node0 NODES=4 bash configs/launch/node.sh configs/sft_8b.yaml [options of tulu fit]
# HEAD: name or address of one of them, as the others reach it. NODES: how many they are.
# GPUS: ranks on each (8). PORT: free on HEAD (29500). JOIN: seconds to wait for the others (900).
# IFACE: network interface between them, e.g. ib0, where the system would choose another one.
set -euo pipefail
: "${HEAD:?name or address of one of the machines}" "${NODES:?number of machines}"
GPUS=${GPUS:-8} PORT=${PORT:-29500} JOIN=${JOIN:-900}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}       # CPU threads of a rank; torchrun's own choice is 1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}              # NCCL says what it complains of, and nothing else
if [[ -n ${IFACE:-} ]]; then                       # NCCL's first contact and gloo's traffic go there
    export NCCL_SOCKET_IFNAME=$IFACE GLOO_SOCKET_IFNAME=$IFACE
fi

# torchrun finds out by the machine's name whether it is HEAD; with several networks it has to be told.
rendezvous=join_timeout=$JOIN
if [[ " $(hostname -I 2>/dev/null || true) " == *" $HEAD "* ]]; then
    rendezvous+=,is_host=true
fi

echo "$(hostname): $GPUS of $((NODES * GPUS)) ranks; waits $JOIN s at most for $NODES machines to come to $HEAD:$PORT" >&2
# max-restarts 0: a rank that fails ends the run; the same command goes on from the checkpoint.
# shutdown-timeout: SIGTERM is passed on to the ranks, which finish their step and save; so many seconds they have.
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 0 --shutdown-timeout "${SAVE:-840}" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "${RUN_ID:-tulu}" --rdzv-conf "$rendezvous" \
    -m tulu_lightning fit --config "$@" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS"

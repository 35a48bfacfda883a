#!/usr/bin/env bash
# Tülu 3 405B started by hand, on each machine (HEAD: one of them):  HEAD=node0 bash configs/launch/torchrun_405b.sh sft
# Further arguments are options of `tulu fit`. Weights, data and the run folder lie on a disk that all of them see.
set -euo pipefail
cd "$(dirname "$0")/../.."           # the repository: paths in configs start there
stage=${1:?sft or dpo}
shift
case $stage in                       # machines of 8 GPUs, as in the configs; any other number gives the same steps
    sft | dpo) machines=32 ;;        # 256 GPUs
    *) echo "no such stage here: $stage (RLVR: slurm_rlvr_405b.sbatch)" >&2; exit 2 ;;
esac
export NODES=${NODES:-$machines} HEAD
export TORCH_NCCL_ENABLE_MONITORING=0  # as the paper: NCCL's own watch took slow saves for hangs; ours tells them apart
exec bash configs/launch/node.sh "configs/${stage}_405b.yaml" "$@"

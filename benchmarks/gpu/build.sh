#!/usr/bin/env bash
# Makes everything that run.sh needs, on any machine with ptxas; no GPU.
#   bash benchmarks/gpu/build.sh [BUILD_FOLDER [MODELS_FOLDER [OUT_FOLDER]]]
# Result: benchmarks/gpu/out, some MB: it travels to the machine with the GPU as it is. For every
# model its code for GPUs (DIR), for the CPU, which checks it (cpu/DIR), and the dense network of as
# many active weights (dense-DIR). GPUS, CPU: what to make machine code for.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=${1:-$root/build}
models=${2:-$here/models}
out=${3:-$here/out}
gpus=${GPUS:-sm_80,sm_90}
rm -rf "$out"
mkdir -p "$out/lib" "$out/cpu" "$out/models"
cp -L "$build/lib/libmoec.so.1" "$out/lib/"
ln -s libmoec.so.1 "$out/lib/libmoec.so"
cc -std=gnu11 -O2 -I "$root/include" "$here/layer.c" -o "$out/gpu_layer" \
  -L "$out/lib" -lmoec -lm -ldl '-Wl,-rpath,$ORIGIN/lib'
make_one() { # MODEL.json DIR OPTIONS...: compiled without weights, which are made on the spot
  local model=$1 dir=$2
  shift 2
  if ! "$build/bin/moec" compile "$model" --layers 0 --checkpoint none --quiet -o "$dir" "$@" \
    2>"$dir.refused"; then
    echo "refused: $(basename "$dir"): $(head -1 "$dir.refused")"
    return
  fi
  rm "$dir.refused"
}
for model in "$models"/*.json; do
  name=$(basename "$model" .json)
  cp "$model" "$out/models/"
  make_one "$model" "$out/$name" --target cuda --gpu "$gpus"
  make_one "$model" "$out/cpu/$name" --cpu "${CPU:-multi}"
  python3 - "$model" >"$out/dense.json" <<'PY'
import json, sys

c = json.load(open(sys.argv[1]))
width = c.get("moe_intermediate_size") or c["intermediate_size"]
width = width * c.get("num_experts_per_tok", 1) + c.get("shared_expert_intermediate_size", 0)
print(json.dumps({"model_type": "llama", "hidden_size": c["hidden_size"], "num_hidden_layers": 1,
                  "intermediate_size": width, "torch_dtype": "bfloat16"}))
PY
  make_one "$out/dense.json" "$out/dense-$name" --target cuda --gpu "$gpus" --name dense
done
rm -f "$out/dense.json"
echo "made $out"

#!/usr/bin/env bash
# Makes everything that run.sh needs, on any machine with ptxas; no GPU.
#   bash benchmarks/gpu/build.sh [BUILD_FOLDER]
# Result: benchmarks/gpu/out, some MB: it travels to the machine with the GPU as it is.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=${1:-$root/build}
out=$here/out
rm -rf "$out"
mkdir -p "$out/lib"
cp -L "$build/lib/libmoec.so.1" "$out/lib/"
ln -s libmoec.so.1 "$out/lib/libmoec.so"
cc -std=gnu11 -O2 -I "$root/include" "$here/layer.c" -o "$out/gpu_layer" \
  -L "$out/lib" -lmoec -lm -ldl '-Wl,-rpath,$ORIGIN/lib'
for model in "$here"/models/*.json; do
  name=$(basename "$model" .json)
  # Weights are made on the spot: a function of their place.
  if ! "$build/bin/moec" compile "$model" --layers 0 --target cuda --gpu sm_80,sm_90 \
    --checkpoint none --quiet -o "$out/$name" 2>"$out/$name.refused"; then
    echo "refused: $name: $(head -1 "$out/$name.refused")"
    continue
  fi
  rm "$out/$name.refused"
done
echo "made $out"

#!/usr/bin/env bash
# Checks and times layers on a GPU: no network, less than 10 minutes, nothing to build (build.sh made
# benchmarks/gpu/out elsewhere).
#   bash benchmarks/gpu/run.sh [RESULTS_FOLDER]
# Writes rows.jsonl (every measurement), log.txt and table.md, and exits with 1 if anything failed.
# torch, where it is installed with CUDA, adds the dense matmul and grouped_mm of the same machine.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=$here/out
results=${1:-$here/results}
mkdir -p "$results"
rows=$results/rows.jsonl log=$results/log.txt
: >"$rows"
: >"$log"
failed=0
step() { # SECONDS COMMAND...: its rows, or a row that says what went wrong
  local limit=$1
  shift
  echo "== $*" >>"$log"
  if ! timeout "$limit" "$@" >>"$rows" 2>>"$log"; then
    failed=1
    python3 -c 'import json, sys; print(json.dumps({"failed": sys.argv[1], "why": sys.argv[2]}))' \
      "$*" "$(tail -1 "$log")" >>"$rows"
  fi
}
nvidia-smi >>"$log" 2>&1
# Ladder, first rung: correct, on every number of rows that another tile or tail serves.
for name in tails mixtral-small; do
  [ -d "$out/$name" ] && step 60 "$out/gpu_layer" "$out/$name" --tokens 1,2,7,33,300,1025 \
    --repeats 3 --check 6
done
# The real shapes: each is checked on few rows, then timed.
for dir in "$out"/*/; do
  name=$(basename "$dir")
  case $name in lib | tails | mixtral-small) continue ;; esac
  step 20 "$out/gpu_layer" "$out/$name" --tokens 64 --repeats 5 --check 1
  step 75 "$out/gpu_layer" "$out/$name" --repeats 30
done
for refused in "$out"/*.refused; do
  [ -e "$refused" ] && python3 -c 'import json, sys
print(json.dumps({"refused": sys.argv[1], "why": open(sys.argv[2]).readline().strip()}))' \
    "$(basename "$refused" .refused)" "$refused" >>"$rows"
done
step 150 python3 "$here/peers.py" "$here/models"
python3 "$here/table.py" "$rows" >"$results/table.md" || failed=1
cat "$results/table.md"
exit $failed

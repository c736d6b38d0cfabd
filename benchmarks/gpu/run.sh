#!/usr/bin/env bash
# Checks and times layers on a GPU: no network, less than 10 minutes, nothing to build (build.sh made
# benchmarks/gpu/out elsewhere).
#   bash benchmarks/gpu/run.sh [RESULTS_FOLDER [OUT_FOLDER]]
# Writes rows.jsonl (every measurement), log.txt and table.md, and exits with 1 if anything failed.
# All three are written anew after every step, with the rows of one that is cut off. A step that has
# finished is not run again: call it again after an interruption. torch, transformers
# and triton, where they are installed, add what they need for the same layers.
# SECONDS_LEFT, TOKENS, REPEATS and DEVICE (of the peers) are for trials.
set -u
here=$(cd "$(dirname "$0")" && pwd)
results=${1:-$here/results}
out=${2:-$here/out}
tokens=${TOKENS:-1,8,64,512,2048,8192,16384}
repeats=${REPEATS:-30}
device=${DEVICE:-cuda}
mkdir -p "$results/steps"
log=$results/log.txt
stop=$((SECONDS + ${SECONDS_LEFT:-570}))
collect() { # what is known so far
  cat "$results"/steps/*.jsonl "$results"/steps/*.failed "$results"/steps/*.part 2>/dev/null |
    grep '}$' >"$results/rows.jsonl"
  python3 "$here/table.py" "$results/rows.jsonl" >"$results/table.part" &&
    mv "$results/table.part" "$results/table.md"
}
trap 'collect; exit 143' TERM INT
step() { # NAME SECONDS COMMAND...: its rows, or a row that says what went wrong
  local name=$1 limit=$2 left=$((stop - SECONDS))
  shift 2
  local rows=$results/steps/$name.jsonl
  [ -e "$rows" ] && return
  [ "$left" -lt "$limit" ] && limit=$left
  echo "== $name: $*" >>"$log"
  local code=124
  if [ "$limit" -gt 0 ]; then
    timeout "$limit" "$@" >"$rows.part" 2>>"$log"
    code=$?
  else
    : >"$rows.part"
    echo "no time left" >>"$log"
  fi
  if [ "$code" = 0 ]; then
    mv "$rows.part" "$rows"
    rm -f "$results/steps/$name.failed"
    collect
    return
  fi
  # What it measured before it ended counts; the step is run again by the next call.
  python3 -c 'import json, sys
rows, name, code, why = sys.argv[1:]
kept = [line for line in open(rows) if line.endswith("}\n")]
kept.append(json.dumps({"failed": name, "why": f"exit {code}: {why}"}) + "\n")
sys.stdout.writelines(kept)' "$rows.part" "$name" "$code" "$(tail -1 "$log")" \
    >"$results/steps/$name.failed"
  rm -f "$rows.part"
  collect
}
nvidia-smi >>"$log" 2>&1
# Ladder, first rung: correct, on every number of rows that another tile or tail serves.
for name in tails mixtral-small; do
  [ -d "$out/$name" ] && step "$name" 60 "$out/gpu_layer" "$out/$name" \
    --tokens "${CHECKED:-1,2,7,33,300,1025}" --repeats 3 --check 6
done
step cublas 60 python3 "$here/peers.py" dense "$out/models" --device "$device" ${SIZE:+--size "$SIZE"}
# The real shapes: each checked against the CPU, then timed; and dense networks of as many weights.
for dir in "$out"/*/; do
  name=$(basename "$dir")
  case $name in lib | cpu | models | tails | mixtral-small | dense-*) continue ;; esac
  reference=()
  [ -d "$out/cpu/$name" ] && reference=(--check 4 --reference "$out/cpu/$name")
  step "$name" 75 "$out/gpu_layer" "$out/$name" --tokens "$tokens" --repeats "$repeats" \
    "${reference[@]}"
  [ -d "$out/dense-$name" ] && step "dense-$name" 30 "$out/gpu_layer" "$out/dense-$name" \
    --tokens "$tokens" --repeats "$repeats"
done
for peer in grouped_mm triton transformers; do
  step "$peer" 90 python3 "$here/peers.py" "$peer" "$out/models" --tokens "$tokens" --seconds 80 \
    --device "$device"
done
for refused in "$out"/*.refused "$out"/cpu/*.refused; do
  [ -e "$refused" ] && python3 -c 'import json, sys
print(json.dumps({"refused": sys.argv[1], "why": open(sys.argv[2]).readline().strip()}))' \
    "$(basename "$refused" .refused)" "$refused"
done >"$results/steps/refused.jsonl"
collect || exit 1
cat "$results/table.md"
! ls "$results"/steps/*.failed >/dev/null 2>&1

#!/usr/bin/env bash
# Sets up (scripts/setup.sh) and runs the main job on a real checkpoint: scripts/demo.py.
# Arguments go to demo.py, for example: bash scripts/demo.sh --tokens 1,64 --dtype float32
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
PATH="$PWD/build/bin:$PATH" PYTHONPATH="$PWD/build/python${PYTHONPATH:+:$PYTHONPATH}" \
  exec .venv/bin/python scripts/demo.py "$@"

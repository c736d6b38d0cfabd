#!/usr/bin/env bash
# Sets up (scripts/setup.sh) and runs every test; the last line is "N passed, N failed, N skipped".
# Arguments go to test/run_all.py, for example: bash scripts/test.sh --suites lit,ctest
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python test/run_all.py "$@"

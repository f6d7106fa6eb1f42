#!/usr/bin/env bash
# Installs what is needed and runs the checks and the whole test suite.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The ranks of a test share the cores.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "$@"

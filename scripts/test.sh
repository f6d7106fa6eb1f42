#!/usr/bin/env bash
# Installs what is needed and runs the checks and the whole test suite.
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tests of HTML pages are skipped without a browser; a bare machine gets one while setup.sh runs.
install_browser() {
    local browser
    for browser in chromium-headless-shell chromium google-chrome; do
        command -v "$browser" > /dev/null && return
    done
    [[ $EUID == 0 ]] && command -v apt-get > /dev/null || return 0
    local log
    if ! log=$({ timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 \
        apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 \
        chromium-headless-shell; } 2>&1); then
        echo "No browser for the tests of HTML pages; apt-get says: $(tail -n 3 <<< "$log")"
    fi
}

install_browser &
bash scripts/setup.sh
wait
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The ranks of a test share the cores.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "$@"

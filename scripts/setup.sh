#!/usr/bin/env bash
# Creates .venv with everything installed; done again only when what is to be installed changed.
#   bash scripts/setup.sh
# Python 3.12 is taken from $PYTHON, the PATH, pyenv or uv, whichever has it first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_python312() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        is_python312 "$PYTHON" && command -v "$PYTHON" && return
        echo "PYTHON=$PYTHON is not a Python 3.12 with the venv module." >&2
        return 1
    fi
    local candidate
    for candidate in python3.12 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
        "$(uv python find 3.12 2>/dev/null || true)"; do
        [[ -n $candidate ]] && is_python312 "$candidate" && command -v "$candidate" && return
    done
    cat >&2 <<'MESSAGE'
Python 3.12 (with venv) was not found on the PATH, in pyenv or in uv. Install it with one of
    apt-get install python3.12 python3.12-venv
    pyenv install 3.12
    uv python install 3.12
or name one: PYTHON=/path/to/python3.12 bash scripts/run_local.sh
MESSAGE
    return 1
}

wanted=$(cat pyproject.toml setup.py constraints.txt | sha256sum)
stamp=.venv/.installed
if [[ -f $stamp && $(<"$stamp") == "$wanted $PWD" ]]; then
    exit 0
fi

exec 9> .venv.lock
flock 9
if [[ -f $stamp && $(<"$stamp") == "$wanted $PWD" ]]; then
    exit 0 # another run installed it while this one waited
fi
python=$(find_python)
echo "Installing into .venv with $python: PyTorch and Megatron, about 5 GB, a few minutes ..."
"$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --upgrade "pip>=24" -c constraints.txt
.venv/bin/python -m pip install -c constraints.txt -e '.[test]'
echo "$wanted $PWD" > "$stamp"

#!/usr/bin/env bash
# Lint, type check and the CPU test suite, in their own environment:
#
#   bash scripts/test.sh [ARGUMENT ...]                 everything, cheap layers first; stops after a layer that fails.
#                                                       Two tests run at a time, unless an ARGUMENT chooses tests
#   bash scripts/test.sh --fast [WING ...] [-ARGUMENT ...]
#
#   --fast     lint, types, and the unit tests that are neither slow nor start Ray: under a minute on two cores
#   WING       a folder of tests/recipe, such as monitor: its tests too, under the same condition
#   ARGUMENT   goes to pytest: tests/unit, -k overlay, -x
#
# It prints the time of each layer and the total.
#
# The first run makes .venv-test in the checkout (about 2 GB: torch, verl, ray) and takes some minutes; later runs reuse
# it until pyproject.toml or scripts/constraints-cpu.txt change.
#
#   GAD_TEST_PYTHON=python   use this interpreter and its packages; nothing is installed
#   PYTHON=python3.12        interpreter that makes .venv-test (3.10 to 3.12; default python3)
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pytest_arguments=()
if [[ "${1:-}" == "--fast" ]]; then
    shift
    pytest_arguments=(-m "not slow and not ray" tests/unit tests/recipe/training tests/recipe/test_wings_on_cpu.py)
    while [[ $# -gt 0 && "$1" != -* ]]; do
        if [[ ! -d "tests/recipe/$1" ]]; then
            wings="$(cd tests/recipe && echo */)"
            echo "error: no wing $1 in tests/recipe. Fix: name one of: ${wings//\/}" >&2
            exit 2
        fi
        pytest_arguments+=("tests/recipe/$1")
        shift
    done
elif ! printf '%s\n' "$@" | grep -qvE '^(--.*)?$'; then
    pytest_arguments=(-n 2 --dist loadfile --no-loadscope-reorder) # grouped by tests/conftest.py
fi

# An environment that knows no GPU, no hub and no user settings. Ray's raylet dies of an empty CUDA_VISIBLE_DEVICES.
if [[ -z "${CUDA_VISIBLE_DEVICES-unset}" ]]; then unset CUDA_VISIBLE_DEVICES; fi
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=disabled RAY_USAGE_STATS_ENABLED=0
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [[ -n "${GAD_TEST_PYTHON:-}" ]]; then
    python="$GAD_TEST_PYTHON"
else
    venv="$PWD/.venv-test"
    python="$venv/bin/python"
    stamp="$( (echo "$PWD"; cat pyproject.toml scripts/constraints-cpu.txt) | cksum)"
    if [[ ! -x "$python" || "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]]; then
        base="${PYTHON:-python3}"
        if ! "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))'; then
            echo "$base is $("$base" --version 2>&1); verl 0.9.1 needs Python 3.10 to 3.12. Fix: PYTHON=python3.12 $0" >&2
            exit 1
        fi
        echo "installing into .venv-test ..."
        "$base" -m venv "$venv"
        # torch first: what comes after is satisfied by it and does not fetch a CUDA build
        "$python" -m pip install --quiet --constraint scripts/constraints-cpu.txt torch
        "$python" -m pip install --quiet --constraint scripts/constraints-cpu.txt --editable ".[cpu,dev]"
        echo "$stamp" >"$venv/stamp"
    fi
fi

# layer NAME COMMAND...: run the command and print its time; a failure ends the script with the command's exit code.
layer() {
    local name="$1" start="$EPOCHREALTIME"
    shift
    "$@"
    awk -v "name=$name" -v "start=$start" -v "end=$EPOCHREALTIME" 'BEGIN { printf "%7.1f s  %s\n", end - start, name }'
}

export GAD_TEST_START="$EPOCHREALTIME" # tests/conftest.py prints the times of the test layers, and the total
layer "ruff check" "$python" -m ruff check .
layer "ruff format --check" "$python" -m ruff format --check .
layer "show_delta" "$python" scripts/show_delta.py
layer "mypy" "$python" -m mypy
layer "mypy verl" "$python" -m mypy verl
exec "$python" -m pytest ${pytest_arguments[@]+"${pytest_arguments[@]}"} "$@"

#!/usr/bin/env bash
# Lint, type check and the CPU test-suite, in an environment of its own:
#
#   bash scripts/test.sh                  everything
#   bash scripts/test.sh -k overlay -x    arguments go to pytest
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

"$python" -m ruff check .
"$python" -m mypy
"$python" scripts/show_delta.py
exec "$python" -m pytest "$@"

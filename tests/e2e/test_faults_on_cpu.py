"""A cheap part of the faults of benchmarks/faults.py, injected into real runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHEAP = ("kill-rollout-server-rollout", "shard-truncated", "row-null-parquet")


@pytest.mark.long
def test_a_run_resumes_with_the_same_metrics_after_a_fault_or_says_what_is_wrong(tmp_path):
    command = [sys.executable, f"{ROOT}/benchmarks/faults.py", "--folder", str(tmp_path), *CHEAP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{len(CHEAP)} faults, 0 failed" in done.stdout

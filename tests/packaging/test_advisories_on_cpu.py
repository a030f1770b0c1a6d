"""The versions that the tests run with have no published advisory: bash scripts/test.sh -m long tests/packaging"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP_AUDIT = shutil.which("pip-audit", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.long
@pytest.mark.skipif(PIP_AUDIT is None, reason="pip-audit is not installed (pip install pip-audit)")
def test_no_pinned_version_has_an_advisory():
    options = ["-r", "scripts/constraints-cpu.txt", "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([PIP_AUDIT, *options], cwd=ROOT, capture_output=True, text=True)
    if not done.stdout:
        pytest.skip(f"no advisories within reach: {done.stderr.strip().splitlines()[-1]}")
    packages = json.loads(done.stdout)["dependencies"]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        pytest.skip(f"no advisories within reach: {packages[0]['skip_reason']}")
    advisories = {f"{p['name']} {p['version']}": [v["id"] for v in p["vulns"]] for p in audited if p["vulns"]}
    assert advisories == {}

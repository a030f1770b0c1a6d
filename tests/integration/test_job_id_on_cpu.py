"""The name of a job (recipe/gad/run/job_id.py), which sockets on a machine carry, in two real Ray clusters."""

import subprocess
import sys
import tempfile
from pathlib import Path

import ray

from recipe.gad.run.job_id import unique_job_id

ROOT = Path(__file__).resolve().parents[2]
OTHER_CLUSTER = """
import ray, sys
from recipe.gad.run.job_id import unique_job_id
ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], log_to_driver=False)
print(unique_job_id())
ray.shutdown()
"""


def test_a_job_has_one_name_in_all_processes_and_no_other_cluster_of_the_machine_has_it(ray_cluster):
    driver, worker = unique_job_id(), ray.get(ray.remote(unique_job_id).remote())
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # a short path: it holds Ray's sockets
        command = [sys.executable, "-c", OTHER_CLUSTER, folder]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    other = done.stdout.strip()
    assert driver == worker
    assert driver != other
    assert driver.startswith("01000000-") and other.startswith("01000000-")
    assert len(f"/tmp/rl-colocate-zmq-{driver}-replica-100-rank-7.sock") < 108  # longest path of a Unix socket

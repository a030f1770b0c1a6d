"""recipe/gad/run/after_ray.py in processes with Ray clusters of their own."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

PROGRAM = """
import json, sys, threading
import ray
from omegaconf import OmegaConf
from recipe.gad.run.after_ray import StartQueue

mode, sampler, folder = sys.argv[1:]
units = {"num_data_storage_units": 1, "total_storage_size": 64}
queue = {"enable": False, "controller": {"sampler": sampler}, "backend": {"SimpleStorage": units}}
StartQueue().on_job_start(OmegaConf.create({"trainer": {"v1": {"trainer_mode": mode}}, "transfer_queue": queue}))
ray.init(num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
for thread in threading.enumerate():
    if "start_queue" in thread.name:
        thread.join()

@ray.remote
def trainer():
    import transfer_queue as tq
    try:
        controller = ray.get_actor("TransferQueueController", namespace="transfer_queue")
    except ValueError:
        return None
    tq.init(OmegaConf.create({}))  # takes the queue that it finds
    tq.kv_put(key="a", partition_id="train", tag={"status": "running"})
    answer = [ray.get(controller.get_config.remote()).enable, list(tq.kv_list("train")["train"])]
    tq.close()
    return answer

print(json.dumps(ray.get(trainer.remote())), flush=True)
"""
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def run(mode: str, sampler: str = "SequentialSampler"):
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        command = [sys.executable, "-c", PROGRAM, mode, sampler, folder]
        environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_the_trainer_finds_the_queue_that_the_first_process_has_started():
    assert run("gad")[0] == [True, ["a"]]


def test_other_trainers_start_their_own():
    assert run("sync")[0] is None


def test_a_queue_that_cannot_start_leaves_nothing_that_the_trainer_would_wait_for():
    found, text = run("gad", "NoSuchSampler")
    assert found is None and "Could not find sampler NoSuchSampler" in text

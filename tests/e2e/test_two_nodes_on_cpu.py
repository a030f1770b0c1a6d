"""Warmup and GAD with a training worker on each of two Ray nodes; one node is killed in GAD, and the run resumes."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
NODE = {"num_cpus": 8, "num_gpus": 1}  # one slot for a training worker, so that two workers need both nodes
STEPS, SAVE_FREQ = 5, 2


@pytest.fixture
def cluster(monkeypatch):
    """Two raylets on this machine, and what makes them a third."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)  # else every run on this machine would join the cluster
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


def steps_of(out: Path) -> list[int]:
    log = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.is_file() else []


@pytest.mark.long
def test_a_killed_node_ends_the_run_and_the_same_command_resumes(cluster, tiny_problem, tiny_overrides, tmp_path):
    def start(stage: str, *flags: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / f"examples/gad/run_{stage}.sh"), *flags, "--device", "cpu", "--nnodes", "2"]
        command += ["--train_files", f"{tiny_problem}/train.parquet", "--val_files", f"{tiny_problem}/val.parquet"]
        command += ["--output_dir", str(tmp_path / stage), "--skip-doctor", *tiny_overrides]
        command += [f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={SAVE_FREQ}"]
        command += ["trainer.test_freq=-1", "ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null"]
        environment = {**os.environ, "PYTHON": sys.executable, "RAY_ADDRESS": cluster.address}
        with (tmp_path / f"{stage}.log").open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def finish(process: subprocess.Popen, stage: str) -> tuple[int, str]:
        try:
            code = process.wait(timeout=300)
        finally:
            process.kill()
        return code, (tmp_path / f"{stage}.log").read_text()

    code, log = finish(start("warmup", "--model", f"{tiny_problem}/model"), "warmup")
    assert code == 0, log[-3000:]
    assert (tmp_path / f"warmup/global_step_{STEPS}/actor/model_world_size_2_rank_1.pt").is_file()
    warmup = ["--warmup_dir", str(tmp_path / "warmup")]
    process = start("gad", *warmup)
    while process.poll() is None and SAVE_FREQ + 1 not in steps_of(tmp_path / "gad"):
        time.sleep(0.05)
    (other,) = cluster.worker_nodes
    cluster.remove_node(other, allow_graceful=False)
    code, log = finish(process, "gad")
    assert code == 1 and "Traceback" not in log and "error: " in log, log[-3000:]
    assert STEPS not in steps_of(tmp_path / "gad")
    cluster.add_node(**NODE)
    code, log = finish(start("gad", *warmup), "gad")
    assert code == 0, log[-3000:]
    assert sorted(steps_of(tmp_path / "gad")) == list(range(STEPS + 1)), "every step is logged once"

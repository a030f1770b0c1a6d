"""recipe/gad/run/stop.py with real processes and signals; tests/e2e stops whole runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipe.gad.run.stop import FILE, StopOnSignal, take_request

PROGRAM = """
import signal, sys, time, types
ray = types.ModuleType("ray")
ray.init = lambda: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does
sys.modules["ray"] = ray
from omegaconf import OmegaConf
from recipe.gad.run.stop import StopOnSignal
StopOnSignal().on_job_start(OmegaConf.create(
    {"trainer": {"default_local_dir": sys.argv[1], "v1": {"trainer_mode": sys.argv[2]}}}
))
ray.init()
print("ready", flush=True)
time.sleep(60)
"""


def start(folder: Path, mode: str = "gad", shell: str = 'exec "$@"') -> subprocess.Popen:
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", PROGRAM, str(folder), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_ends_the_process(tmp_path, number):
    process = start(tmp_path / "run")
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # a wrapper passes the same Ctrl-C on
    time.sleep(1.2)
    assert process.poll() is None
    assert take_request(tmp_path / "run") == number.name
    assert take_request(tmp_path / "run") is None
    process.send_signal(number)
    _, text = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert text == f"{number.name}: the run stops after this step and saves; a second signal ends it at once\n"


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path):
    process = start(tmp_path, shell="""trap '' INT; exec "$@" """)  # as a shell starts a job in the background
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None and take_request(tmp_path) is None
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert take_request(tmp_path) == "SIGTERM"
    process.kill()
    process.communicate()


def test_other_trainers_keep_the_handlers_of_ray(tmp_path):
    process = start(tmp_path, mode="sync")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 15


def test_a_request_to_an_earlier_run_is_forgotten(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda: None)
    (tmp_path / FILE).write_text("SIGTERM")
    trainer = {"default_local_dir": str(tmp_path), "v1": {"trainer_mode": "gad"}}
    StopOnSignal().on_job_start(OmegaConf.create({"trainer": trainer}))
    assert take_request(tmp_path) is None

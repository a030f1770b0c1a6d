"""The short console and the lock of a run's folder: real processes and Hydra, with a job in the place of verl's."""

import os
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from recipe.gad.doctor.checks import check_unused
from recipe.gad.run.findings import InputError

JOB = r"""
import json, os, subprocess, sys, time
from pathlib import Path
import hydra
from recipe.gad.run.findings import ConfigError, error

@hydra.main(version_base=None, config_path=None, config_name="run")
def main(config):
    out = Path(config.trainer.default_local_dir)
    for i in range(1000):
        print("noise", i)
    subprocess.run(["sh", "-c", "echo from a child; echo its errors >&2"], check=True)
    for step in range(config.first, config.first + 3):
        with open(out / "metrics.jsonl", "a") as log:
            row = {"training/global_step": step, "critic/d_acc": 0.5, "timing_s/step": 2.0}
            log.write(json.dumps({"step": step, "data": row}) + "\n")
    print("\x1b[36m(TaskRunner pid=1)\x1b[0m SIGTERM: the run stopped after step 3 of 9", flush=True)
    if config.action == "fail":
        raise RuntimeError("broken \x1b[2J thing")
    if config.action == "chained":
        raise RuntimeError("Error in call to target 'x':\nOSError('no such model')\nfull_key: y")
    if config.action == "actor dies":
        raise RuntimeError("The actor died.\n\tclass_name: TaskRunnerV1\n\tactor_id: 0f1e\n\tip: 192.0.2.2")
    if config.action == "node dies":
        raise RuntimeError("The actor died.\n\tclass_name: A\n\tip: 192.0.2.2\nIt died because its node has died.")
    if config.action == "disk":
        raise OSError(28, "No space left on device")
    if config.action == "refuse":
        raise ConfigError([error("gad.stage=x", fix="gad.stage=gad")])
    if config.action == "exit":
        sys.exit(143)
    if config.action == "wait":
        time.sleep(60)
    if config.action == "late":
        subprocess.Popen(["sh", "-c", "sleep 0.5; echo '(TaskRunner pid=1) skipped a row'"])

main()
"""
CONFIG = """
hydra:
  run: {{dir: "{out}/hydra"}}
  callbacks:
    hold_folder: {{_target_: recipe.gad.run.hold.HoldFolder}}
    short_console: {{_target_: recipe.gad.monitor.console.ShortConsole, raw_log: "{out}/train.log"}}
trainer: {{default_local_dir: "{out}", total_training_steps: 9, v1: {{trainer_mode: gad}}}}
gad: {{stage: warmup}}
action: ok
first: 1
"""


@pytest.fixture
def start(tmp_path):
    """Function that starts the job with overrides; the run's folder is tmp_path/out."""
    (tmp_path / "run.yaml").write_text(CONFIG.format(out=tmp_path / "out"))
    (tmp_path / "job.py").write_text(JOB)
    started = []

    def start(*overrides):
        command = [sys.executable, str(tmp_path / "job.py"), "--config-dir", str(tmp_path), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, "COLUMNS": "100"}, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output.splitlines(), errors


def test_a_run_prints_a_screenful_and_keeps_the_rest_in_a_file(start, tmp_path):
    out = tmp_path / "out"
    code, lines, errors = end(start())
    assert (code, errors) == (0, "")
    first, where, watch, *steps, last = lines
    assert first == f"warmup: training in {out}" and where.endswith(f"{out}/train.log")
    assert watch == f"follow it with: gad watch {out}" and last.endswith(f"gad report {out}")
    assert "SIGTERM: the run stopped after step 3 of 9" in steps
    assert any(step.startswith("out  step 3/9  2 s per step") and "critic/d_acc 0.5" in step for step in steps)
    assert all(len(step) <= 100 for step in steps)
    log = (out / "train.log").read_text()
    for text in ("noise 0\n", "noise 999\n", "from a child\n", "its errors\n", "(TaskRunner pid=1)"):
        assert text in log
    code, lines, _ = end(start("first=4"))  # the same command again resumes
    assert code == 0 and not any("step 3/9" in line for line in lines) and any("step 6/9" in line for line in lines)
    assert (out / "train.log").read_text().startswith(log), "the log of the first run stays"
    assert not (out / ".gad.lock").exists()


def test_the_console_waits_for_what_ray_hands_on_late(start):
    code, lines, _ = end(start("action=late"))
    assert code == 0 and "skipped a row" in lines


def test_of_a_failed_run_the_console_shows_the_end_of_the_log(start, tmp_path):
    code, lines, _ = end(start("action=fail"))
    assert code == 1 and len(lines) < 35
    assert "  noise 999" in lines and lines[-1] == f"the whole log: {tmp_path}/out/train.log"
    assert lines[-2] == "error: the run failed: RuntimeError: broken \\x1b[2J thing"
    assert "Traceback" in (tmp_path / "out/train.log").read_text()


def test_a_message_that_announces_its_cause_is_shown_with_it(start):
    _, lines, _ = end(start("action=chained"))
    assert lines[-2] == "error: the run failed: RuntimeError: Error in call to target 'x': OSError('no such model')"


def test_a_run_whose_actor_dies_names_it(start):
    _, lines, _ = end(start("action='actor dies'"))
    assert lines[-2] == "error: the run failed: RuntimeError: The actor died. class_name: TaskRunnerV1"
    _, lines, _ = end(start("action='node dies'"))
    said = "error: the run failed: RuntimeError: The actor died. class_name: A Ray has lost node 192.0.2.2"
    assert lines[-2] == said


def test_a_run_on_a_full_disk_names_the_disk(start, tmp_path):
    _, lines, _ = end(start("action=disk"))
    assert lines[-2].startswith(f"error: the disk of {tmp_path}/out is full (")
    assert lines[-2].endswith("are free). Fix: free space there, and rerun the same command to resume")


def test_a_run_that_is_refused_says_why_and_no_more(start):
    code, lines, _ = end(start("action=refuse"))
    assert code == 1 and not any("noise" in line for line in lines)
    assert lines[-3:-1] == ["error: this GAD run cannot start:", "- gad.stage=x. Fix: gad.stage=gad"]


def test_exit_codes_stay(start):
    code, lines, _ = end(start("action=exit"))
    assert code == 143 and lines[-2] == "error: the run ended early"


def test_a_second_run_in_the_folder_is_refused_by_name(start, tmp_path):
    out = tmp_path / "out"
    config = OmegaConf.create({"trainer": {"default_local_dir": str(out)}})
    first = start("action=wait")
    assert any("the run stopped" in line for line in iter(first.stdout.readline, ""))
    record = {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file() and file.name != ".gad.lock"}
    assert any(file.name == "overrides.yaml" for file in record)
    code, lines, errors = end(start("first=100"))
    owner = (
        rf"another training run uses {out}. Fix: wait for it (process {first.pid} on {os.uname().nodename}, since 20"
    )
    assert (code, lines) == (2, []) and errors.startswith(f"error: {owner}")
    with pytest.raises(InputError, match=f"process {first.pid} on"):
        list(check_unused(config))
    assert {file: file.read_bytes() for file in record} == record, "the second run left no trace"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (out / ".gad.lock").exists() and list(check_unused(config)) == []
    code, lines, _ = end(start("first=4"))
    assert code == 0 and any("step 6/9" in line for line in lines)

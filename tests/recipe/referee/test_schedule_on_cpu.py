"""Scheduling with real processes: order, slots, failures, signals, and a referee that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.gad.referee.schedule import Job, Running, Scheduler, State, error_of, start_time
from recipe.gad.run.log import MetricLog

WORK = """
import json, os, sys, time
from pathlib import Path
folder, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as starts:
    starts.write(f"{time.time()}\\n")
saved = folder / "saved"
first = int(saved.read_text()) + 1 if saved.exists() else 1
for step in range(first, steps + 1):
    time.sleep(seconds)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "data": {"timing_s/step": seconds}}) + "\\n")
    (folder / "new").write_text(str(step))
    os.replace(folder / "new", saved)  # a signal may come at any moment
(folder / "ends").write_text(str(time.time()))
"""
"""A training that logs and saves every step, and resumes after the last one saved."""

REFEREE = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_schedule_on_cpu import training
from recipe.gad.referee.schedule import Scheduler, State
base = Path({base!r})
jobs = [training(base, "a", 2, 0.05), training(base, "b", 40, 0.05, "a"), training(base, "c", 2, 0.05, "b")]
sys.exit(128 + (Scheduler(jobs, State(base / "state.json"), 2, patience=5).run() or -128))
"""


def training(base: Path, name: str, steps: int = 2, seconds: float = 0.01, *needs: str, code: str = WORK) -> Job:
    folder = base / name

    def is_finished() -> bool:
        return (folder / "saved").exists() and (folder / "saved").read_text() == str(steps)

    return Job(
        name=name,
        command=(sys.executable, "-c", code, str(folder), str(steps), str(seconds)),
        log=base / f"{name}.log",
        is_finished=is_finished,
        needs=needs,
        on_success=lambda: (folder / "cleaned").touch(),
        metrics=folder / "metrics.jsonl",
        steps=steps,
        scratch=base / f"{name}-scratch",
    )


def starts(base: Path, name: str) -> list[float]:
    return [float(line) for line in (base / name / "starts").read_text().split()]


def run(base: Path, jobs: list[Job], slots: int = 2, **options) -> Scheduler:
    scheduler = Scheduler(jobs, State(base / "state.json"), slots, patience=5, **options)
    assert scheduler.run() is None
    return scheduler


def test_jobs_wait_for_their_needs_and_finished_ones_are_skipped(tmp_path, capsys):
    jobs = [training(tmp_path, "b", 2, 0.01, "a"), training(tmp_path, "a")]
    scheduler = run(tmp_path, jobs)
    assert scheduler.finished == {"a", "b"} and not scheduler.failed
    assert starts(tmp_path, "b")[0] > float((tmp_path / "a/ends").read_text())
    assert (tmp_path / "a/cleaned").exists() and not (tmp_path / "a-scratch").exists()
    state = json.loads((tmp_path / "state.json").read_text())["jobs"]
    assert {name: entry["status"] for name, entry in state.items()} == {"a": "finished", "b": "finished"}
    assert "pid" not in state["a"] and state["a"]["seconds"] > 0
    assert "0 of 2 jobs finished, 1 running\n  a: step 0/2, 0 min" in capsys.readouterr().err
    run(tmp_path, jobs)
    assert len(starts(tmp_path, "a")) == len(starts(tmp_path, "b")) == 1


def test_as_many_jobs_run_at_a_time_as_there_are_slots(tmp_path):
    run(tmp_path, [training(tmp_path, name, 4, 0.1) for name in "abcd"], slots=2)
    spans = sorted((starts(tmp_path, name)[0], float((tmp_path / name / "ends").read_text())) for name in "abcd")
    together = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(together) == 2


def test_slots_share_the_gpus_in_turn(tmp_path):
    code = WORK + "import os; (folder / 'gpu').write_text(os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['MORE'])\n"
    jobs = [training(tmp_path, name, 1, 0.5, code=code) for name in "abc"]
    run(tmp_path, jobs, slots=3, gpus=("4", "7"), environment={"MORE": "!"})
    assert sorted((tmp_path / name / "gpu").read_text() for name in "abc") == ["4!", "4!", "7!"]


def test_a_failure_stops_only_what_needs_it(tmp_path, capsys):
    broken = "import sys\nprint('working')\nprint('error: no memory. Fix: less')\nprint('bye')\nsys.exit(3)"
    jobs = [training(tmp_path, "a", code=broken), training(tmp_path, "b", 2, 0.01, "a"), training(tmp_path, "c")]
    scheduler = run(tmp_path, jobs)
    assert (scheduler.finished, scheduler.failed) == ({"c"}, {"a", "b"})
    state = scheduler.state
    assert [state.status(name) for name in "abcd"] == ["failed", "left out", "finished", "waiting"]
    assert state.jobs["a"]["exit"] == 3
    assert f"a: failed (error: no memory. Fix: less); log: {tmp_path}/a.log" in capsys.readouterr().err
    # a rerun tries it again
    scheduler = run(tmp_path, [training(tmp_path, "a"), *jobs[1:]])
    assert scheduler.finished == {"a", "b", "c"} and len(starts(tmp_path, "c")) == 1


def test_an_exit_code_of_0_without_the_result_is_a_failure(tmp_path):
    scheduler = run(tmp_path, [training(tmp_path, "a", code="print('nothing done')")])
    assert scheduler.failed == {"a"} and error_of(tmp_path / "a.log") == "nothing done"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x\nerror: first\ny\nerror: second\nz\n", "error: second"),
        ("ValueError: bad\n\n", "ValueError: bad"),
        ("ray.exceptions.RayTaskError: bad\n  at line 3\n", "ray.exceptions.RayTaskError: bad"),
        ("done\n\n", "done"),
        ("error: \x1b[2Jno memory\n", "error: \\x1b[2Jno memory"),
        ("", "the log is empty"),
    ],
)
def test_the_error_of_a_log(tmp_path, text, error):
    (tmp_path / "log").write_text(text)
    assert error_of(tmp_path / "log") == error
    assert error_of(tmp_path / "none") == "the log is empty"


def test_what_a_job_leaves_running_ends_with_it(tmp_path):
    code = (
        f"{WORK}import subprocess; p = subprocess.Popen(['sleep', '60']); (folder / 'child').write_text(str(p.pid))\n"
    )
    run(tmp_path, [training(tmp_path, "a", code=code)])
    assert wait(lambda: start_time(int((tmp_path / "a/child").read_text())) is None)


def test_progress_reads_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "data": {}}\n{"step": 3, "data": {"x": 1}}\n')
    job = training(tmp_path, "a", 10)
    running = Running(job, None, 0, time.monotonic() - 200, MetricLog(tmp_path / "metrics.jsonl"))  # type: ignore[arg-type]
    assert running.line() == "a: step 3/10, 3 min"


# ---------------------------------------------------------------------- stopped and killed


def wait(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def referee(base: Path) -> subprocess.Popen:
    code = REFEREE.format(tests=str(Path(__file__).parent), base=str(base))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def running_pid(base: Path, name: str) -> int:
    return json.loads((base / "state.json").read_text())["jobs"][name]["pid"]


def has_started(base: Path, name: str) -> bool:
    return (base / name / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_jobs_and_a_rerun_resumes(tmp_path, number):
    process = referee(tmp_path)
    assert wait(lambda: has_started(tmp_path, "b"))
    pid = running_pid(tmp_path, "b")
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert start_time(pid) is None
    assert "stopping 1 jobs" in process.stderr.read()
    state = State(tmp_path / "state.json")
    assert [state.status(name) for name in "abc"] == ["finished", "stopped", "waiting"]
    assert not (tmp_path / "b-scratch").exists()
    check_resumed(tmp_path)


def test_after_kill_9_no_finished_job_is_repeated_and_the_orphan_is_stopped(tmp_path):
    process = referee(tmp_path)
    assert wait(lambda: has_started(tmp_path, "b"))
    pid = running_pid(tmp_path, "b")
    process.kill()
    process.wait()
    assert start_time(pid) is not None  # the training goes on alone
    check_resumed(tmp_path)
    assert start_time(pid) is None


def check_resumed(base: Path) -> None:
    process = referee(base)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert [len(starts(base, name)) for name in "abc"] == [1, 2, 1]
    steps = [json.loads(line)["step"] for line in (base / "b/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 40 and len(steps) <= 41  # at most the step at which it was stopped is repeated
    assert {entry["status"] for entry in State(base / "state.json").jobs.values()} == {"finished"}


def test_a_process_is_known_by_its_start_and_remains_are_none():
    assert start_time(os.getpid()) == start_time(os.getpid()) is not None
    child = subprocess.Popen(["true"])
    assert wait(lambda: start_time(child.pid) is None)  # not collected yet
    child.wait()


def test_another_process_with_the_same_id_is_left_alone(tmp_path):
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    state = State(tmp_path / "state.json")
    state.record("a", status="running", pid=bystander.pid, born="1")
    run(tmp_path, [training(tmp_path, "a")])
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()

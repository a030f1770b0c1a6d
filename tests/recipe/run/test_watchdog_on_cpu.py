"""recipe/gad/run/watchdog.py: limits, and a real Ray actor that is stopped while a real process waits for it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from recipe.gad.run import watchdog
from recipe.gad.run.watchdog import Watchdog, phase_of

PROGRAM = """
import os, sys, time, ray
from recipe.gad.run import watchdog
from recipe.gad.run.watchdog import Watchdog
ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[2])

@ray.remote(num_cpus=0)
class Server:
    def pid(self):
        return os.getpid()

@ray.remote(num_cpus=0)
class Trainer:
    def run(self, folder, server, other):
        print("server", ray.get(server.pid.remote()), "other", ray.get(other.pid.remote()), flush=True)
        watchdog.ANSWER = 2.0
        with Watchdog(3.0, folder) as dog:
            dog.beat(7)
            self._update_actor(server)

    def _update_actor(self, server):
        while True:
            ray.get(server.pid.remote())
            time.sleep(0.1)

server, other = (Server.options(name=name).remote() for name in ("hf_server_0", "other"))
ray.get(Trainer.remote().run.remote(sys.argv[1], server, other))
"""


def test_the_limit_is_the_given_one_or_many_median_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog, given = Watchdog(None, "."), Watchdog(5.0, ".")
    for step, at in enumerate((0, 500, 800, 1000, 1400, 1500), start=1):  # steps of 500, 300, 200, 400, 100 s
        assert dog.limit() == 7200
        clock[0] = at
        dog.beat(step), given.beat(step)
    assert dog.limit() == 20 * 300 and given.limit() == 5
    dog._seconds = [1.0] * 9
    assert dog.limit() == 1800


def test_the_phase_is_the_innermost_known_function():
    def _update_actor():
        return phase_of(sys._getframe())

    def _validate():
        return _update_actor()

    assert _validate() == "the update of the actor"
    assert phase_of(sys._getframe()) == "no phase that it knows"


def test_every_phase_is_a_function_of_the_trainer_or_of_what_it_calls():
    from verl.checkpoint_engine import CheckpointEngineManager
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.trainer.ppo.v1.trainer_gad import PPOTrainerGAD

    owners = (PPOTrainerGAD, ReplayBuffer, CheckpointEngineManager)
    assert [name for name in watchdog.PHASES if not any(hasattr(owner, name) for owner in owners)] == []


@pytest.mark.parametrize("timeout", [0.5, 0])
def test_a_step_in_time_and_a_watchdog_that_is_off_do_nothing(tmp_path, timeout):
    text = (
        "import sys, time; from recipe.gad.run.watchdog import Watchdog\n"
        f"with Watchdog({timeout}, sys.argv[1]) as dog:\n    for step in range(1, 6): dog.beat(step); time.sleep(0.2)\n"
        f"    time.sleep({0 if timeout else 1})\ntime.sleep(1)"
    )
    done = subprocess.run([sys.executable, "-c", text, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dies", [True, False])
def test_a_failed_run_names_the_processes_that_have_died(tmp_path, monkeypatch, capsys, dies):
    living = {"worker", "hf_server_0"}
    monkeypatch.setattr(watchdog, "live_actors", lambda: set(living))
    with pytest.raises(RuntimeError), Watchdog(0, tmp_path) as dog:
        dog.beat(3)
        if dies:
            living.remove("hf_server_0")
        raise RuntimeError("no answers")
    said = "error: step 3 has failed because processes of the run have died: hf_server_0. Fix: look for"
    printed = capsys.readouterr().out
    assert printed.startswith(said) if dies else printed == ""


def test_a_lost_node_is_named_with_the_processes_that_died_there(tmp_path, monkeypatch):
    actors, nodes = {"worker", "hf_server_0"}, {("a1", "192.0.2.1"), ("b2", "192.0.2.2"), ("c3", "192.0.2.3")}
    monkeypatch.setattr(watchdog, "live_actors", actors.copy)
    monkeypatch.setattr(watchdog, "live_nodes", nodes.copy)
    dog = Watchdog(0, tmp_path)
    dog.beat(1)
    nodes.discard(("b2", "192.0.2.2"))
    assert dog._dead() == "", "a node that held nothing of the run may go"
    actors.discard("hf_server_0")
    assert dog._dead() == "hf_server_0; Ray has lost node 192.0.2.2"


def test_a_run_that_waits_for_a_dead_process_is_ended(tmp_path):
    text = (
        "import sys, time; from recipe.gad.run import watchdog\n"
        "watchdog.LOOK, watchdog.DEAD_FOR, living = 0.1, 0.5, {'worker', 'storage'}\n"
        "watchdog.live_actors, watchdog.silent_processes, watchdog.write_stacks = living.copy, list, print\n"
        "with watchdog.Watchdog(None, sys.argv[1]) as dog:\n    dog.beat(1); living.remove('storage'); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", text, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "error: step 1 cannot end, because processes of the run have died: storage; the trainer" in done.stdout
    assert "error: the run ends. Fix: look for their last words" in done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_a_stopped_server_is_named_with_the_phase_and_all_stacks(tmp_path):
    ray_dir = f"/tmp/gad-dog-{os.getpid()}"
    command = [sys.executable, "-u", "-c", PROGRAM, str(tmp_path), ray_dir]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "server " in line:
            words = line.split()
            pid = int(words[words.index("server") + 1])
            os.kill(pid, signal.SIGSTOP)
    assert process.wait(timeout=60) == 1
    text = "".join(lines)
    assert "step 7 has taken more than 3 s; the trainer waits in the update of the actor" in text
    assert "hf_server_0 (no answer in 2 s)" in text and "other (no answer" not in text
    assert f"process {pid} ray::Server" in text and "(stopped)" in text
    stacks = (tmp_path / "stacks_step_7.txt").read_text()
    assert "_update_actor" in stacks and f"== {pid} ray::Server" in stacks
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not psutil.pid_exists(pid), "the stopped server outlives the run"

"""Ends a run that hangs: says which phase and which processes are silent, writes down all stacks, and exits.

A process that dies makes the run fail, or wait without end if nobody asks it again: the watchdog names it either way.

verl waits without a limit for rollout servers, workers and queues. If one of them stops without dying, so does the run.
"""

import faulthandler
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from recipe.gad.run.findings import error

PHASES = {
    "_validate": "validation",
    "_save_checkpoint": "the save of a checkpoint",
    "_load_checkpoint": "loading a checkpoint",
    "update_weights": "sending weights to the rollout",
    "sleep_replicas": "the end of the rollout",
    "sample": "the rollout",
    "_compute_old_log_prob": "the old log-probabilities",
    "_compute_ref_log_prob": "the reference's log-probabilities",
    "_compute_values": "the discriminator's scores",
    "_update_discriminator": "the update of the discriminator",
    "_compute_advantage": "the advantages",
    "_update_actor": "the update of the actor",
}
"""Function of the trainer or of what it calls -> the phase of a step that it is."""

ENOUGH_STEPS = 5
FIRST_STEPS = 7200.0
"""Seconds without a step until ENOUGH_STEPS are done: the first ones compile and warm up."""
TIMES_MEDIAN, AT_LEAST = 20.0, 1800.0
"""After that, this many median steps, but never fewer seconds: a step with a validation and a save takes longer."""
ANSWER = 10.0
"""Seconds in which an actor that is alive answers."""
LOOK, DEAD_FOR = 10.0, 60.0
"""Seconds between two looks for dead processes, and until the run ends because of one: it may end without our help."""
EXIT_CODE = 1
AFTER_A_DEATH = "look for their last words in the run's log, and rerun the same command to resume"


def phase_of(frame: FrameType | None) -> str:
    """Phase in which a thread is, from its innermost function that :data:`PHASES` names."""
    while frame is not None:
        if frame.f_code.co_name in PHASES:
            return PHASES[frame.f_code.co_name]
        frame = frame.f_back
    return "no phase that it knows"


def silent_processes() -> list[str]:
    """Named Ray actors that do not answer, and processes of this node's Ray that are stopped or dead.

    A training worker does not answer either while it computes.
    """
    import psutil
    import ray

    silent = []
    questions: dict[Any, str] = {}
    for name in ray.util.list_named_actors():
        try:
            questions[ray.get_actor(name).__ray_ready__.remote()] = name
        except ValueError:  # it died after it was listed
            silent.append(f"{name} (dead)")
    if questions:
        answered, waiting = ray.wait(list(questions), num_returns=len(questions), timeout=ANSWER)
        silent += [f"{questions[question]} (no answer in {ANSWER:.0f} s)" for question in waiting]
        for question in answered:
            try:
                ray.get(question)
            except ray.exceptions.RayError:
                silent.append(f"{questions[question]} (dead)")
    for process in psutil.Process(os.getppid()).children():  # the raylet's
        if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            silent.append(f"process {process.pid} {' '.join(process.cmdline()[:1])} ({process.status()})")
    return silent


def live_actors() -> set[str]:
    """Ray's actors of this job that are not dead, by name or class; none without Ray."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return set()
    from ray._private.state import actors  # the public list needs Ray's dashboard

    job = ray.get_runtime_context().get_job_id()
    ours = {key: actor for key, actor in actors().items() if actor["JobID"] == job and actor["State"] != "DEAD"}
    return {actor["Name"] or f"{actor['ActorClassName']} {key[:8]}" for key, actor in ours.items()}


def live_nodes() -> set[tuple[str, str]]:
    """(id, address) of the nodes of Ray's cluster that are not dead; none without Ray."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return set()
    return {(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}


def write_stacks(file: Path) -> None:
    """Stacks of this process, and with py-spy those of the other Ray processes on this node."""
    import subprocess

    import psutil

    file.parent.mkdir(parents=True, exist_ok=True)
    spy = shutil.which("py-spy", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    with file.open("w") as stream:
        stream.write(f"== {os.getpid()}, the trainer\n")
        stream.flush()
        faulthandler.dump_traceback(stream)
        if spy is None:
            stream.write("\n(pip install py-spy for the stacks of the other processes)\n")
            return
        for process in psutil.Process(os.getppid()).children():
            if process.pid != os.getpid():
                stream.write(f"\n== {process.pid} {' '.join(process.cmdline()[:1])} ({process.status()})\n")
                command = [spy, "dump", "--nonblocking", "--pid", str(process.pid)]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
                    stream.write(done.stdout or done.stderr)
                except subprocess.TimeoutExpired:
                    stream.write("py-spy got no answer\n")


class Watchdog:
    """A thread that ends the process if :meth:`beat` is not called in time; a context manager.

    Args:
        timeout: ``gad.step_timeout``: seconds; None for 20 times the median step, 30 minutes at least; 0 never ends it.
        folder: the run's output folder, for the stacks.
    """

    def __init__(self, timeout: float | None, folder: str | Path):
        self.timeout = timeout
        self.folder = Path(folder)
        self.step = 0
        self._seconds: list[float] = []
        self._last = 0.0
        self._watched = 0
        self._ended = threading.Event()
        self._actors: set[str] = set()
        self._nodes: set[tuple[str, str]] = set()

    def beat(self, step: int) -> None:
        """A step begins."""
        now = time.monotonic()
        if self.step:
            self._seconds.append(now - self._last)
        self.step, self._last = step, now
        self._actors = self._actors or live_actors()
        self._nodes = self._nodes or live_nodes()

    def limit(self) -> float:
        """Seconds that the step now running may take."""
        if self.timeout is not None:
            return self.timeout
        if len(self._seconds) < ENOUGH_STEPS:
            return FIRST_STEPS
        return max(AT_LEAST, TIMES_MEDIAN * statistics.median(self._seconds))

    def __enter__(self) -> "Watchdog":
        self._last, self._watched = time.monotonic(), threading.get_ident()
        if self.timeout != 0:
            threading.Thread(target=self._watch, name="gad-watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._ended.set()
        if kind is not None and (dead := self._dead()):
            what = f"step {self.step} has failed because processes of the run have died: {dead}"
            print(f"error: {error(what, AFTER_A_DEATH)}", flush=True)

    def _dead(self) -> str:
        """Names of the actors that lived in the first step and are dead, then the nodes of which the same is true."""
        dead = ", ".join(sorted(self._actors - live_actors())) if self._actors else ""
        lost = ", ".join(sorted(address for _, address in self._nodes - live_nodes())) if dead else ""
        return f"{dead}; Ray has lost node {lost}" if lost else dead

    def _watch(self) -> None:
        looked = alive = time.monotonic()
        while not self._ended.wait(min(1.0, self.limit() / 10)):
            now = time.monotonic()
            if now - self._last > self.limit():
                fix = (
                    "rerun the same command to resume from the last checkpoint, or raise gad.step_timeout (seconds; 0 "
                    "waits without end) if a step may take that long"
                )
                self._bark(f"has taken more than {self.limit():.0f} s", fix)
            if now - looked > LOOK:
                looked = now
                if not (dead := self._dead()):
                    alive = now
                elif now - alive > DEAD_FOR:
                    self._bark(f"cannot end, because processes of the run have died: {dead}", AFTER_A_DEATH)

    def _bark(self, what: str, fix: str) -> None:
        phase = phase_of(sys._current_frames().get(self._watched))
        file = self.folder / f"stacks_step_{self.step}.txt"
        where = f"step {self.step}" if self.step else "the time before the first step"
        print(f"error: {where} {what}; the trainer waits in {phase}", flush=True)
        try:
            silent = silent_processes()
            write_stacks(file)
            print(f"error: silent: {', '.join(silent) or 'no process on this node'}. Stacks: {file}", flush=True)
        finally:
            print(f"error: {error('the run ends', fix)}", flush=True)
            time.sleep(2)  # Ray passes these lines on to the log of the run
            os._exit(EXIT_CODE)

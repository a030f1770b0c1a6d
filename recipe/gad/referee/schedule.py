"""Several jobs side by side: started when what they need is there, stopped together, and resumed by a second call.

A job counts as finished by what it left in its folder, so a killed referee loses nothing. ``state.json`` adds what the
folders do not tell: seconds used so far, the exit code of a failure, and the process of a running job. A referee that
was killed may leave jobs running; the next one stops them, by process id and start time, and starts them again.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.gad.run.atomic_io import read_object, write_atomically
from recipe.gad.run.findings import visible
from recipe.gad.run.log import MetricLog

LOOK_SECONDS = 0.2
STOP_SECONDS = 30.0
"""Time that a job has to end after SIGTERM, before its process group is killed."""
LINE_SECONDS = 30.0
"""Seconds between two progress reports without a terminal."""


@dataclass(frozen=True)
class Job:
    """A command, and how to tell that it has done its work.

    The command must resume, when it is run again, from what an interrupted run of it left.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    """Gets the output of every attempt."""
    is_finished: Callable[[], bool]
    needs: tuple[str, ...] = ()
    """Names of jobs that must be finished before."""
    on_success: Callable[[], None] = lambda: None
    metrics: Path | None = None
    """metrics.jsonl of a training."""
    steps: int | None = None
    scratch: Path | None = None
    """Temporary folder of the job, deleted before and after every attempt."""


class State:
    """``state.json``: job name -> status ("running", "finished", "stopped", "failed" or "left out") and more."""

    def __init__(self, path: Path):
        self.path = path
        self.jobs: dict[str, dict[str, Any]] = read_object(path)["jobs"] if path.is_file() else {}

    def record(self, name: str, **values: Any) -> None:
        """Set values of a job; they are on disk when this returns."""
        entry = {**self.jobs.get(name, {}), **values}
        self.jobs[name] = {key: value for key, value in entry.items() if value is not None}
        write_atomically(self.path, json.dumps({"jobs": self.jobs}, indent=2) + "\n")

    def status(self, name: str) -> str:
        return self.jobs.get(name, {}).get("status", "waiting")

    def seconds(self, name: str) -> float:
        """Seconds of all attempts of a job, except those that ended with the referee's own death."""
        return self.jobs.get(name, {}).get("seconds", 0.0)


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks; None if there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def end_group(pid: int, is_running: Callable[[], bool], patience: float = STOP_SECONDS) -> None:
    """Wait for the end of a session leader, then kill everything that is left of its process group."""
    deadline = time.monotonic() + patience
    while is_running() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def error_of(log: Path) -> str:
    """The last line of a log that names an error, else its last line, without control characters."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    named = [line for line in lines if re.match(r"(error: |\w*(\.\w+)*Error\b)", line)]
    return visible(next(iter((named or [line for line in lines if line.strip()])[::-1]), "the log is empty"))


class Progress:
    """One line per running job: redrawn on a terminal, printed every 30 seconds elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._next_print = 0.0

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, lines: Callable[[], list[str]]) -> None:
        """``lines`` is called when there is something to show."""
        from rich.text import Text

        if self._live:
            self._live.update(Text("\n".join(lines())), refresh=True)
        elif time.monotonic() >= self._next_print:
            self._next_print = time.monotonic() + LINE_SECONDS
            print("\n".join(lines()), file=sys.stderr, flush=True)


@dataclass
class Running:
    """A started job."""

    job: Job
    process: subprocess.Popen
    slot: int
    started: float
    log: MetricLog | None

    def line(self) -> str:
        """``NAME: step 3/10, 2 min``."""
        minutes = f"{(time.monotonic() - self.started) / 60:.0f} min"
        if self.log is None:
            return f"{self.job.name}: {minutes}"
        self.log.update()
        step = max(self.log.metrics, default=0)
        return f"{self.job.name}: step {step}/{self.job.steps}, {minutes}"


class Scheduler:
    """Runs jobs, at most ``slots`` at a time, in the order of their list as far as their needs allow.

    Args:
        jobs: names are unique, and every need is among them.
        state: read, and written after every change.
        slots: jobs side by side.
        gpus: CUDA_VISIBLE_DEVICES of the slots, in turn; empty: all jobs see what the referee sees.
        environment: of the jobs, besides the referee's.
        patience: seconds that a job has to end after SIGTERM.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        state: State,
        slots: int = 1,
        gpus: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        patience: float = STOP_SECONDS,
    ):
        self.state, self.slots, self.gpus, self.patience = state, slots, gpus, patience
        self.environment = environment or {}
        self.jobs = jobs
        self.waiting: list[Job] = []
        self.finished: set[str] = set()
        self.failed: set[str] = set()
        self.running: list[Running] = []
        self._signal: int | None = None

    def run(self) -> int | None:
        """Run all jobs that are not finished.

        Returns:
            None at the end, or the number of the signal that stopped the jobs.
        """
        self._stop_orphans()
        self._sort_out()
        with self._signals(), Progress() as progress:
            while self._signal is None:
                self._collect()
                self._start_ready()
                if not self.running:
                    return None
                progress.show(self._lines)
                time.sleep(LOOK_SECONDS)
        self._stop_all()
        return self._signal

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the loop instead of the process."""

        def remember(number: int, frame: object) -> None:
            self._signal = number

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_orphans(self) -> None:
        """Stop jobs that a killed referee left running: nobody would see their end."""
        for name, entry in self.state.jobs.items():
            pid, born = entry.get("pid"), entry.get("born")
            if pid and start_time(pid) == born:
                print(f"{name}: still running from an interrupted referee; stopped, to be resumed", file=sys.stderr)
                os.kill(pid, signal.SIGTERM)
                end_group(pid, lambda pid=pid, born=born: start_time(pid) == born, self.patience)  # type: ignore[misc]
            if pid:
                self.state.record(name, status="stopped", pid=None, born=None)

    def _sort_out(self) -> None:
        """Which jobs are finished, by what is in their folders."""
        for job in self.jobs:
            if job.is_finished():
                job.on_success()  # again: the referee may have been killed before it
                self.finished.add(job.name)
                self.state.record(job.name, status="finished")
            else:
                self.waiting.append(job)

    def _start_ready(self) -> None:
        for job in list(self.waiting):
            if any(need in self.failed for need in job.needs):
                self.waiting.remove(job)
                self.failed.add(job.name)
                self.state.record(job.name, status="left out")
            elif len(self.running) < self.slots and self.finished.issuperset(job.needs):
                self.waiting.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        slot = min(set(range(self.slots)) - {running.slot for running in self.running})
        environment = {**os.environ, **self.environment}
        environment.pop("RAY_ADDRESS", None)  # every training has a Ray cluster of its own
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        _renew(job.scratch)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.state.record(job.name, status="running", pid=process.pid, born=start_time(process.pid), exit=None)
        metrics = MetricLog(job.metrics) if job.metrics else None
        self.running.append(Running(job, process, slot, time.monotonic(), metrics))

    def _collect(self) -> None:
        """Take note of the jobs that have ended."""
        for running in [running for running in self.running if running.process.poll() is not None]:
            job, code = running.job, running.process.returncode
            good = code == 0 and job.is_finished()
            self._end(running, "finished" if good else "failed", code)
            if good:
                job.on_success()
                self.finished.add(job.name)
            else:
                self.failed.add(job.name)
                print(f"{job.name}: failed ({error_of(job.log)}); log: {job.log}", file=sys.stderr)

    def _end(self, running: Running, status: str, code: int | None) -> None:
        self.running.remove(running)
        end_group(running.process.pid, lambda: running.process.poll() is None, self.patience)  # what it left behind
        running.process.wait()
        seconds = self.state.seconds(running.job.name) + time.monotonic() - running.started
        self.state.record(running.job.name, status=status, exit=code, seconds=round(seconds, 1), pid=None, born=None)
        _remove(running.job.scratch)

    def _stop_all(self) -> None:
        print(f"stopping {len(self.running)} jobs", file=sys.stderr)
        for running in self.running:
            if running.process.poll() is None:
                running.process.terminate()  # all at once: their ends are waited for one by one
        for running in list(self.running):
            self._end(running, "stopped", None)

    def _lines(self) -> list[str]:
        counts = f"{len(self.finished)} of {len(self.jobs)} jobs finished, {len(self.running)} running"
        failed = f", {len(self.failed)} failed or left out" if self.failed else ""
        return [counts + failed, *(f"  {running.line()}" for running in self.running)]


def _renew(folder: Path | None) -> None:
    _remove(folder)
    if folder:
        folder.mkdir(parents=True)


def _remove(folder: Path | None) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)

"""A short console for training runs: a line per step. All that verl, Ray and the workers print goes to a file."""

import atexit
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from recipe.gad.monitor.watch import News, RunState
from recipe.gad.run.disk import full_disk, names_full_disk
from recipe.gad.run.findings import ConfigError, InputError, error, visible

SECONDS = 1.0
"""Between two looks at the metrics and the raw log."""

LAST_LOOKS = 5
"""Most looks at the raw log of a run that has ended; the first at which it has not grown is the last."""

LAST_LINES = 20
"""Lines of the raw log that the console shows of a run that failed."""

SHOWN = re.compile(
    r"^(\w+: the run (stops|stopped) after |teacher answers: |skipped |error: )"
    r"|the average of D's weights begins |holds no state of |the chat template ends an assistant turn"
    r"|sampling the start policy's answers"
)
"""Lines of the raw log that the console shows too."""

DECORATION = re.compile(r"\x1b\[[0-9;]*m|^\(\w+ pid=[^)]*\) ?")
"""Colors, and the name of the worker that Ray puts before each line."""


def plain(text: str) -> str:
    """A line of the raw log without colors and the worker's name, and nothing that a terminal obeys."""
    return visible(DECORATION.sub("", DECORATION.sub("", text)))


class ShortConsole(Callback):
    """Hydra callback (``hydra.callbacks`` of gad_trainer.yaml).

    Args:
        raw_log: file to which the output of this process goes from the start of the run, after what it holds already;
            None leaves the console as it is.
    """

    def __init__(self, raw_log: str | None = None):
        self.raw_log = None if raw_log is None else Path(raw_log)
        self._ended = threading.Event()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if self.raw_log is None or config.trainer.v1.trainer_mode != "gad":
            return
        folder = Path(config.trainer.default_local_dir).absolute()
        self.news = News(RunState(folder), shutil.get_terminal_size((120, 24)).columns)
        self._look()  # what an earlier run has logged is no news
        self.raw_log.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.raw_log.open("ab", buffering=0)
        self.log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}\n".encode())
        self.read_to = self.log.tell()
        self.console: IO[str] = os.fdopen(os.dup(1), "w", errors="backslashreplace")
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(self.log.fileno(), number)
        self._say(
            f"{config.gad.stage}: training in {folder}",
            f"all that the run prints: {self.raw_log}",
            f"follow it with: gad watch {folder}",
        )
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()
        atexit.register(self._close, "error: the run ended early")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if self.raw_log is None or config.trainer.v1.trainer_mode != "gad":
            return
        self._wait_for_last_lines()
        if job_return.status == JobStatus.COMPLETED:
            folder = Path(config.trainer.default_local_dir).absolute()
            self._close(f"the run has ended; draw it with: gad report {folder}")
            return
        problem = job_return._return_value
        cause = getattr(problem, "cause", None) or problem  # Ray wraps the exception of another process
        if isinstance(cause, ConfigError | InputError):
            self._close(f"error: {cause}")
        elif isinstance(cause, OSError) and names_full_disk(cause):  # this log may be the file
            where = f", so {cause.filename} could not be written" if cause.filename else ""
            full = full_disk(Path(config.trainer.default_local_dir).absolute())
            self._close(f"error: {error(full + where, 'free space there, and rerun the same command to resume')}")
        else:
            text = [line.strip() for line in str(cause).strip().splitlines()] or [""]
            what = text[: 2 if text[0].endswith(":") else 1]  # after a colon comes what went wrong
            what += [line for line in text if line.startswith("class_name: ")]  # which actor died
            if any("its node has died" in line for line in text):
                what += [f"Ray has lost node {line[4:]}" for line in text if line.startswith("ip: ")]
            self._close(f"error: the run failed: {type(cause).__name__}: {' '.join(what)}", last_lines=True)

    def _wait_for_last_lines(self) -> None:
        """Ray hands on what a worker has printed after the worker's call has returned."""
        assert self.raw_log is not None
        for _ in range(LAST_LOOKS):
            size = self.raw_log.stat().st_size
            time.sleep(SECONDS)
            if self.raw_log.stat().st_size == size:
                return

    def _say(self, *lines: str) -> None:
        for text in lines:
            print(visible(text), file=self.console, flush=True)

    def _follow(self) -> None:
        while not self._ended.wait(SECONDS):
            self._say(*self._notices(), *self._look())

    def _look(self) -> list[str]:
        try:
            return self.news.lines() if self.news.state.update() else []
        except ValueError:  # `gad watch` says what is wrong with a damaged log
            return []

    def _notices(self) -> list[str]:
        """New lines of the raw log that the console shows."""
        assert self.raw_log is not None
        with self.raw_log.open("rb") as file:
            file.seek(self.read_to)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        self.read_to += len(added)
        return [text for raw in added.decode(errors="replace").splitlines() if SHOWN.search(text := plain(raw))]

    def _close(self, text: str, last_lines: bool = False) -> None:
        """Say the last words, once."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        self._say(*self._notices(), *self._look())
        assert self.raw_log is not None
        if last_lines:
            tail = self.raw_log.read_bytes()[-100_000:].decode(errors="replace").splitlines()[-LAST_LINES:]
            self._say(*(f"  {plain(raw)}" for raw in tail))
        self._say(text)
        if text.startswith("error"):
            self._say(f"the whole log: {self.raw_log}")

"""Stopping a run on request: SIGTERM, SIGUSR1 or Ctrl-C lets it finish its step, save and exit with code 0.

Schedulers send these signals to the process that the user started. The trainer runs in another process, perhaps on
another node, so the request is a file in the run's output folder.
"""

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from recipe.gad.run.after_ray import after_ray_starts

FILE = "stop_requested"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_REQUEST = 1.0
"""Seconds in which further signals belong to the first: a terminal and a wrapper may both pass on one Ctrl-C."""


class StopOnSignal(Callback):
    """Hydra callback (``hydra.callbacks`` of gad_trainer.yaml) that turns the first signal into a request to stop.

    A second signal exits at once; Ray's shutdown then makes the exit code 1. Signals that the parent
    process ignores stay ignored.
    """

    def __init__(self) -> None:
        self.requested_at: float | None = None
        self.file = Path()

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Listen from the moment Ray has started, because ``ray.init`` sets a handler for SIGTERM."""
        if config.trainer.v1.trainer_mode != "gad":
            return  # no other trainer looks for the file
        self.file = Path(config.trainer.default_local_dir).absolute() / FILE
        self.file.unlink(missing_ok=True)
        after_ray_starts(self.listen)

    def listen(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.requested_at is None:
            self.requested_at = now
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(name)
            print(f"{name}: the run stops after this step and saves; a second signal ends it at once", file=sys.stderr)
        elif now - self.requested_at > ONE_REQUEST:
            sys.exit(128 + number)


def take_request(folder: str | Path) -> str | None:
    """Name of the signal that asked the run of a folder to stop, None if none did; the request is taken away."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    name = file.read_text()
    file.unlink()
    return name

"""Holding a training run's output folder: two runs in one folder would lose each other's steps."""

import atexit
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from recipe.gad.run.atomic_io import alone_in
from recipe.gad.run.findings import InputError, visible

WRITER = "training run"


class HoldFolder(Callback):
    """Hydra callback (``hydra.callbacks`` of gad_trainer.yaml) that holds the folder as long as the process lives.

    It runs before Hydra writes its record into the folder. If another process holds it, this one ends with exit code 2.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.trainer.v1.trainer_mode != "gad":
            return
        held = ExitStack()
        try:
            held.enter_context(alone_in(Path(config.trainer.default_local_dir).absolute(), WRITER))
        except (InputError, OSError) as problem:  # Hydra turns an exception of a callback into a warning
            print(f"error: {visible(str(problem))}", file=sys.stderr)
            sys.exit(2)
        atexit.register(held.close)

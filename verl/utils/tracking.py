"""Extends stock ``verl.utils.tracking``: a resumed run continues its metric file, which stock verl would empty.

Active with ``VERL_FILE_LOGGER_APPEND=1`` (the launch scripts set it); stock behaviour otherwise.
Goes when: stock verl's file logger can append.
"""

import json
import os
from io import BufferedWriter
from pathlib import Path

from recipe.gad.run.atomic_io import naming
from verl.utils.tracking import FileLogger as _StockFileLogger


class FileLogger(_StockFileLogger):
    """Keeps the lines of the interrupted run up to the step that the resumed run starts with, and appends."""

    def __init__(self, project_name: str, experiment_name: str):
        path = os.getenv("VERL_FILE_LOGGER_PATH")
        self._previous: Path | None = None
        if path is not None and os.getenv("VERL_FILE_LOGGER_APPEND") == "1":
            self._previous = Path(f"{path}.resumed")
            # an empty file: the last attempt stopped before its first line
            if os.path.exists(path) and os.path.getsize(path) > 0:
                os.replace(path, self._previous)
        super().__init__(project_name, experiment_name)
        self.fp = BufferedWriter(self.fp)  # a raw file on a full disk takes a part of a line and raises nothing

    def log(self, data, step):
        if self._previous is None or self._restore(step, is_training_step="training/global_step" in data):
            with naming(self.filepath):
                super().log(data, step)
                self.fp.flush()

    def _restore(self, step: int, is_training_step: bool) -> bool:
        """Put the interrupted run's lines before this first one; False if its own line of ``step`` stands.

        A resumed run starts with a validation at its checkpoint's step, which the interrupted run has logged whole. A
        run that is at step 0 has resumed nothing.
        """
        assert self._previous is not None
        previous, self._previous = self._previous, None
        if not previous.exists():
            return True
        lines = [line for line in previous.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        steps = [json.loads(line)["step"] for line in lines]
        stands = not is_training_step and step > 0 and step in steps
        kept = [line for line, s in zip(lines, steps, strict=True) if s < step or (stands and s == step)]
        restored = Path(f"{self.filepath}.tmp")
        restored.write_bytes(b"".join(kept))
        self.fp.close()
        os.replace(restored, self.filepath)
        self.fp = open(self.filepath, "ab")
        previous.unlink()
        return not stands

"""Extends stock ``verl.utils.tracking``: a resumed run continues its metric file instead of emptying it.

Active with ``VERL_FILE_LOGGER_APPEND=1`` (the launch scripts set it); stock behaviour otherwise.
"""

import json
import os
from pathlib import Path

from verl.utils.tracking import FileLogger as _StockFileLogger


class FileLogger(_StockFileLogger):
    """Keeps the lines of the interrupted run up to the step that the resumed run starts with, and appends."""

    def __init__(self, project_name: str, experiment_name: str):
        path = os.getenv("VERL_FILE_LOGGER_PATH")
        self._previous: Path | None = None
        if path is not None and os.getenv("VERL_FILE_LOGGER_APPEND") == "1":
            self._previous = Path(f"{path}.resumed")
            if (
                os.path.exists(path) and os.path.getsize(path) > 0
            ):  # empty: the last attempt stopped before its first line
                os.replace(path, self._previous)
        super().__init__(project_name, experiment_name)

    def log(self, data, step):
        if self._previous is not None:
            self._restore(step)
            self._previous = None
        super().log(data, step)

    def _restore(self, first_step: int) -> None:
        assert self._previous is not None
        if not self._previous.exists():
            return
        lines = [line for line in self._previous.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        restored = Path(f"{self.filepath}.tmp")
        restored.write_bytes(b"".join(line for line in lines if json.loads(line)["step"] < first_step))
        self.fp.close()
        os.replace(restored, self.filepath)
        self.fp = open(self.filepath, "ab", buffering=0)
        self._previous.unlink()

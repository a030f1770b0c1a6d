"""Extends stock ``verl.utils.tracking``: a resumed run continues its metric file, which stock verl would empty.

Active with ``VERL_FILE_LOGGER_APPEND=1`` (the launch scripts set it); stock behaviour otherwise.
Goes when: stock verl's file logger can append.
"""

import os
from io import BufferedWriter
from pathlib import Path

from recipe.gad.run.atomic_io import naming
from recipe.gad.run.metrics_file import continued
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
        if self._previous is not None:
            data = self._restore(step, data)
        if data is not None:
            with naming(self.filepath):
                super().log(data, step)
                self.fp.flush()

    def _restore(self, step: int, data: dict) -> dict | None:
        """Put the interrupted run's lines before this first one; gives its data, or None if its step has a line."""
        assert self._previous is not None
        previous, self._previous = self._previous, None
        lines = previous.read_bytes().splitlines(keepends=True) if previous.exists() else []
        restored, path = Path(f"{self.filepath}.tmp"), Path(self.filepath)
        kept, own = continued([line for line in lines if line.endswith(b"\n")], step, data, path.parent)
        if kept or lines:
            restored.write_bytes(b"".join(kept))
            self.fp.close()
            os.replace(restored, path)
            self.fp = open(path, "ab")
            previous.unlink(missing_ok=True)
        return own

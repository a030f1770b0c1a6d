"""Progress of slow loops: a bar on a terminal, and a line now and then in a log file."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines where there is no terminal."""


class _Lines(tqdm):
    """Prints the bar's text as a line, once the loop has taken some time, and then every :data:`SECONDS`."""

    def __init__(self, *args: Any, **options: Any):
        self._printed_at = time.monotonic()
        super().__init__(*args, **options, mininterval=0.0, miniters=1, ncols=0)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if (now := time.monotonic()) - self._printed_at >= SECONDS:
            self._printed_at = now
            print(str(self), file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        self.disable = True  # no further line, and no empty one as tqdm's own


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """``tqdm(iterable, **options)``: a bar if stderr is a terminal, else a line every :data:`SECONDS`."""
    return (tqdm if sys.stderr.isatty() else _Lines)(iterable, **options)

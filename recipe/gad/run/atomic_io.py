"""Writing files so that a reader never sees half of one, and reading back what this package wrote."""

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Write a file under a temporary name and rename it; its folder is made if missing.

    Text becomes UTF-8; half a surrogate pair, which is no UTF-8, becomes an escape.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data if isinstance(data, bytes) else data.encode("utf-8", "backslashreplace"))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_object(path: Path, fix: str = "") -> dict[str, Any]:
    """Object of a JSON file; ``fix`` ends the message of the error.

    Raises:
        ValueError: it holds no valid JSON, or another kind of value.
        FileNotFoundError: there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}; cut off?){fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object{fix}")
    return value


class JsonLog:
    """JSON lines to which one process at a time appends, each written through at once: a crash loses no finished line.

    A context manager; the file is made, with its folder, if missing, and goes if it stays empty.

    Args:
        path: file.
        writer: command that writes it, for messages.

    Raises:
        ValueError: another process has it open.
    """

    def __init__(self, path: Path, writer: str):
        self._writer = writer
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another {writer} writes to {path}. Fix: wait for it, or another output") from None

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            Path(self._file.name).unlink(missing_ok=True)
        self._file.close()

    def records(self, *keys: str) -> Iterator[dict[str, Any]]:
        """Objects of earlier runs. A last line without its end was torn by a crash and is cut off: nobody finished it.

        Args:
            keys: what every object has.

        Raises:
            ValueError: a line is no such object.
        """
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file):
            torn, record = not line.endswith(b"\n"), None
            try:
                record = json.loads(line)
            except ValueError:
                if torn:
                    self._file.truncate(end)
                    return
            if not isinstance(record, dict) or not set(keys) <= set(record):
                raise ValueError(
                    f"{self._file.name}, row {number}: not written by {self._writer}. Fix: another output, or delete it"
                )
            if torn:
                self._file.truncate(end)
                return
            end += len(line)
            yield record

    def append(self, record: dict[str, Any]) -> None:
        # half a surrogate pair is no UTF-8: it stays an escape
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

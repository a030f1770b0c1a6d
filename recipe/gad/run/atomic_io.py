"""Writing files so that a reader never sees half of one, and reading back what this package wrote."""

import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from recipe.gad.run.findings import InputError

LOCK = ".gad.lock"
"""File in an output folder that its writer holds locked; it names the writer. Only a living process holds a lock."""


def check_output(path: str | Path, is_ours: Callable[[str], bool]) -> None:
    """Check a file that a user named for output: it must be new, or written by the same command.

    Args:
        path: the file.
        is_ours: whether a text was written by the command; an empty file is always replaced.

    Raises:
        InputError: there is a folder, a link, a device, or a file that another program wrote.
    """
    path = Path(path)
    fix = "name a new file with --output"
    if path.is_symlink():
        raise InputError(f"{path} is a link, expected a file", fix)
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file with --output")
    _check_replaceable(path)
    if path.exists() and (text := path.read_text(encoding="utf-8", errors="replace")) and not is_ours(text):
        raise InputError(f"{path} exists, and another program wrote it", fix)


def _check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe, expected a file", "name a new file")


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError that names no file, such as that of a full disk, the name of ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def write_atomically(path: str | Path, data: str | bytes) -> None:
    """Write a file under a temporary name and rename it; a missing folder is made.

    Text is encoded as UTF-8. Half a surrogate pair cannot be encoded and becomes an escape.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        InputError: ``path`` is a device or a pipe.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file", str(path))
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with naming(path), os.fdopen(handle, "wb") as stream:
            stream.write(data if isinstance(data, bytes) else data.encode("utf-8", "backslashreplace"))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _lock(file: IO[Any]) -> bool:
    """Lock an open file for this process; False if another process holds it.

    Some network file systems have no locks: the file then counts as locked, and a warning says so.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"warning: {file.name} cannot be locked ({error.strerror}): start nothing else here", file=sys.stderr)
    return True


@contextmanager
def alone_in(folder: Path, writer: str) -> Iterator[None]:
    """Hold an output folder for one process; the folder is made, and removed again if it stays empty.

    Args:
        folder: the folder.
        writer: command that writes into it, for messages.

    Raises:
        InputError: another process holds the folder; names it, its host, and since when it runs.
        OSError: the folder cannot be written, for example on a full disk; names the lock file.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        lock = path.open("a+", encoding="utf-8")
        if not _lock(lock):
            lock.seek(0)
            name, _, owner = lock.read().partition(": ")
            lock.close()
            wait = f"wait for it ({owner})" if owner else "wait for it"
            raise InputError(f"another {name or writer} uses {folder}", fix=f"{wait}, or choose another output folder")
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            break
        lock.close()  # the process before has just removed this file
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = f"{writer}: process {os.getpid()} on {socket.gethostname()}, since {since}"
    try:
        with naming(path):
            os.write(lock.fileno(), owner.encode())  # no buffer, which close() would try to write again
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()
        if made and not any(folder.iterdir()):
            folder.rmdir()


def check_free(folder: Path, writer: str) -> None:
    """Check that no process holds an output folder; nothing is made.

    Raises:
        InputError: as of :func:`alone_in`.
    """
    if (folder / LOCK).exists():
        with alone_in(folder, writer):
            pass


def read_object(path: Path, fix: str = "") -> dict[str, Any]:
    """Object of a JSON file; ``fix`` is the remedy that the error names.

    Raises:
        ValueError: the file is not valid JSON, or holds another kind of value.
        FileNotFoundError: there is no such file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(f"{path} is not valid JSON ({error}; cut off?)", fix) from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a JSON object", fix)
    return value


class JsonLog:
    """A file of JSON lines to which one process at a time appends. A crash loses no finished line.

    It is a context manager. It makes a missing file and its folder, and removes the file if it stays empty.

    Args:
        path: the file.
        writer: command that writes the file, for messages.

    Raises:
        ValueError: another process has the file open.
    """

    def __init__(self, path: Path, writer: str):
        self._writer = writer
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        if not _lock(self._file):
            self._file.close()
            raise InputError(f"another {writer} writes to {path}", fix="wait for it, or choose another output")

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:
            Path(self._file.name).unlink(missing_ok=True)
        with naming(self._file.name):  # it writes what a full disk has left in the buffer
            self._file.close()

    def records(self, **types: type) -> Iterator[dict[str, Any]]:
        """Objects that earlier runs wrote. A last line without its newline was torn by a crash and is removed.

        Args:
            types: key -> type of its value, for keys that every object must have; the writer puts the first key first.

        Raises:
            ValueError: a line is not an object with these keys, so another program wrote it.
        """
        start = f'{{"{next(iter(types))}": '.encode()
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file):
            torn, record = not line.endswith(b"\n"), None
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if torn and line[: len(start)] == start[: len(line)]:
                    self._file.truncate(end)
                    return
            if not isinstance(record, dict) or any(type(record.get(key)) is not kind for key, kind in types.items()):
                raise InputError(
                    f"{self._file.name}, row {number}: not written by {self._writer}",
                    fix="choose another output, or delete the file",
                )
            if torn:
                self._file.truncate(end)
                return
            end += len(line)
            yield record

    def append(self, record: dict[str, Any]) -> None:
        """Write one line, and flush it."""
        # half a surrogate pair cannot be encoded as UTF-8: it stays an escape
        with naming(self._file.name):
            self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()

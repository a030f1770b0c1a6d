"""Reads rows of data files and data sets in the usual layouts as chat messages and the teacher's answer.

Every row is recognized by its columns, unless ``prompt_key`` and ``teacher_key`` name them:

====================  ===================================================================================
own layout            ``content`` (messages) + ``teacher_response``
OpenAI chat           ``messages``: [{role, content}, ...]
ShareGPT              ``conversations``: [{from, value}, ...]
Alpaca                ``instruction`` [+ ``input``, after a blank line] [+ ``history``: [[user, assistant], ...]]
prompt and response   one of PROMPT_KEYS + one of TEACHER_KEYS; text, or messages
====================  ===================================================================================

- A ``system`` column goes before the messages, unless they start with a system message.
- A teacher's column may hold a list of answers; all of them are kept.
- If a conversation ends with an assistant turn, that turn is the answer. A column named ``teacher_response``, or named
  by ``teacher_key``, replaces it.
- Otherwise the first of TEACHER_KEYS that the row has is the answer to all of the messages.
- Otherwise the last assistant turn is the answer, and later turns are dropped (``Example.dropped_turns``).

To add a layout, extend PROMPT_KEYS or TEACHER_KEYS; one that needs more columns, such as Alpaca, is converted in
``_messages_of_row``.
"""

import bz2
import csv
import gzip
import json
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.gad.run.data_file import json_rows, prompt_problem, teacher_problem, teacher_text
from recipe.gad.run.findings import InputError, visible
from recipe.gad.run.hub import HUB_ID

PROMPT_KEYS = ("content", "messages", "conversations", "prompt", "instruction", "question", "query")
"""Columns of the prompt; the first one in the row counts. The lists of messages often hold the answer too."""
OWN_TEACHER_KEY = "teacher_response"
TEACHER_KEYS = (OWN_TEACHER_KEY, "response", "answer", "output", "completion")
"""Columns of the teacher's answer; the first one in the row counts."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""Role name in a layout -> role name in the output."""
FILE_ENDINGS = (".parquet", ".json", ".jsonl", ".csv", ".tsv", ".txt")
OTHER_FILE_ENDINGS = (".arrow",)
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSIONS = (*OPENERS, ".zst")
READ_ROWS = 256
"""Rows of a parquet file in memory at a time."""
READ_BYTES = 1 << 20
"""Bytes of a parquet column read at a time."""
SHOWN_REJECTS = 5
"""Number of bad rows that are printed; the rejects file holds all of them."""

Message = dict[str, str]


class Row(NamedTuple):
    """One row of a source. ``problem`` says why ``value`` is no row at all (a line that is not JSON)."""

    file: str
    source: str
    """Name of the file or data set, without folders and ending."""
    number: int
    """Counted from 0; blank lines do not count."""
    value: Any
    problem: str | None = None


class Example(NamedTuple):
    prompt: list[Message]
    """Messages with the keys role and content; the last one is the user's or a tool's."""
    answers: list[str]
    """The teacher's, at least one."""
    dropped_turns: int
    """Turns of the conversation that are in neither prompt nor answer."""


# ---------------------------------------------------------------------------------------------------------- reading


def read_rows(source: str) -> Iterator[Row]:
    """Stream the rows of one source; one batch is in memory at a time.

    Args:
        source: a file (.parquet, .json, .jsonl, .csv, .tsv; .txt has one prompt per line; compressed by gzip, bzip2 or
            xz), or a data set for ``datasets``: a folder or a hub id. ``NAME:SPLIT`` reads one split of a data set;
            ``NAME`` reads all of them.

    Raises:
        ValueError: there is no such source, or it cannot be read (the file is named).
    """
    path = Path(source).expanduser()
    if path.is_file():
        plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
        ending = plain.suffix.lower()
        if ending not in FILE_ENDINGS:
            raise InputError(f"{path}: unknown ending {path.suffix!r}", fix=f"convert it to {', '.join(FILE_ENDINGS)}")
        try:
            with _unpacked(path) as file:
                for number, (value, problem) in enumerate(_FILE_READERS[ending](file)):
                    yield Row(str(path), plain.stem, number, value, problem)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return
    name, _, split = (source, "", "") if path.exists() else source.partition(":")
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_one_kind(folder)
    elif _kind(folder) or os.path.lexists(folder) or not HUB_ID.fullmatch(name):  # a file's name is never a hub id
        raise InputError(f"{source}: no such file or folder", fix="correct the path, or name a data set as owner/name")
    yield from _dataset_rows(str(folder) if folder.is_dir() else name, split or None)


def _kind(path: Path) -> str | None:
    """Ending of a data file without that of its compression; .json and .jsonl are one kind. None: no data file."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    kind = endings[-1] if endings else ""
    return {".jsonl": ".json"}.get(kind, kind) if kind in OTHER_FILE_ENDINGS or kind in FILE_ENDINGS else None


def _check_one_kind(folder: Path) -> None:
    """Raise ValueError if the folder's data files are of several kinds: ``datasets`` would read one of them only."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return  # saved by ``datasets``
    card = folder / "README.md"
    if card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace"):
        return  # the card says what to read
    if not folder.resolve().name:
        raise InputError(f"{folder} is the root of all files", fix="name the folder of the data")
    kinds: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = path.name == "dataset_infos.json" or any(part.startswith((".", "_")) for part in relative.parts)
        if not hidden and (kind := _kind(path)) and path.is_file():
            kinds.setdefault(kind, str(relative))
    if len(kinds) > 1:
        raise InputError(
            f"{folder} holds data files of several kinds ({', '.join(kinds.values())})",
            fix="name the files one by one, or put each kind into a folder",
        )


def _dataset_rows(name: str, split: str | None) -> Iterator[Row]:
    import datasets

    source = Path(name).resolve().name
    saved = (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file()
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, streaming=True)
        splits = found if isinstance(found, dict) else {"train": found}
        if split is not None and split not in splits:
            raise InputError(f"no split {split!r}", fix=f"choose from {', '.join(splits)}")
        for key in [split] if split is not None else list(splits):
            for number, value in enumerate(splits[key]):
                yield Row(f"{name}:{key}", source, number, value)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"the data set {name} cannot be read: {error}") from None


def _parquet_rows(file: Path) -> Iterator[tuple[Any, None]]:
    try:
        # read page by page: a row group can be as large as the file
        with pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(READ_ROWS):
                yield from ((row, None) for row in batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"is not a readable parquet file ({error})", fix="write the file again") from None


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The file itself, or, if it is compressed, a temporary file with its content."""
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="gad-") as file:
        try:
            with opener(path, "rb") as packed:
                shutil.copyfileobj(packed, file)
        except (gzip.BadGzipFile, zlib.error, EOFError, lzma.LZMAError) as error:
            raise InputError(f"cannot be decompressed ({error})", fix="write the file again") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputError(f"cannot be decompressed ({error})", fix="write the file again") from None
        file.flush()
        yield Path(file.name)


def _json_rows(file: Path) -> Iterator[tuple[Any, str | None]]:
    """Rows of JSON lines, of a JSON list, or of the only list of objects in one JSON object, as in {"data": [...]}."""
    if _is_one_object(file):
        try:
            value = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
            if len(lists) == 1 and not set(value) & set(PROMPT_KEYS):
                yield from ((row, None) for row in lists[0])
            else:
                yield value, None
            return
    yield from json_rows(file)


def _is_one_object(file: Path) -> bool:
    """Whether a file begins with an object that is its only line, or that its first line does not close."""
    with file.open("rb") as stream:
        if stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
            return False
        stream.seek(0)
        return not stream.readline().rstrip().endswith(b"}") or not stream.read(1)


def _csv_rows(file: Path) -> Iterator[tuple[Any, str | None]]:
    """Rows of a table whose cells are separated by tabs, semicolons or commas, whichever the header has."""
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is shorter than a long answer
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            header = lines.readline()
            separator = next((mark for mark in ",;\t" if mark in header), ",")
            lines.seek(0)
            for row in csv.DictReader(lines, strict=True, delimiter=separator):
                # DictReader puts superfluous cells under the key None
                cells = row.pop(None, None)  # type: ignore[call-overload]
                problem = None if cells is None else f"has {len(row) + len(cells)} cells, the header has {len(row)}"
                yield row, problem
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"is not a readable CSV file ({error})", fix="write the file again as UTF-8") from None


def _text_rows(file: Path) -> Iterator[tuple[Any, None]]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from (({"prompt": line.strip()}, None) for line in lines if line.strip())


_FILE_READERS: dict[str, Callable[[Path], Iterator[tuple[Any, str | None]]]] = {
    ".parquet": _parquet_rows,
    ".json": _json_rows,
    ".jsonl": json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".txt": _text_rows,
}


# ---------------------------------------------------------------------------------------------------------- layouts


def read_example(row: Row, prompt_key: str | None = None, teacher_key: str | None = None) -> Example:
    """Prompt and teacher's answer of a row, by the rules at the top of this module.

    Raises:
        ValueError: the row cannot be used. The message gives the reason, without file and row number.
    """
    columns, messages = _messages_of_row(row, prompt_key)
    if teacher_key is not None and teacher_key not in columns:
        raise ValueError(f"has no column {teacher_key!r}; it has {_names(columns)}")
    column = teacher_key or next((key for key in TEACHER_KEYS if key in columns), None)
    ends_with_answer = messages[-1]["role"] == "assistant"
    if ends_with_answer and teacher_key is None and column != OWN_TEACHER_KEY:
        column = None
    if column is not None:
        prompt, teacher = messages[:-1] if ends_with_answer else messages, _answers_of_column(column, columns[column])
    else:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError(f"has no teacher's answer: no assistant turn and none of the columns {TEACHER_KEYS}")
        prompt, teacher = messages[: answers[-1]], [_checked_answer("the assistant's turn", messages[answers[-1]])]
    dropped = len(messages) - len(prompt) - (column is None)
    return Example(_checked_prompt(prompt), teacher, dropped)


def read_prompt(row: Row, prompt_key: str | None = None) -> list[Message]:
    """The prompt of a row; an answer is ignored.

    Raises:
        ValueError: as :func:`read_example`.
    """
    _, messages = _messages_of_row(row, prompt_key)
    return _checked_prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def data_source_of(row: Row) -> str:
    """The row's own ``data_source``, else the name of its source."""
    own = row.value.get("data_source")
    return own if isinstance(own, str) and own else row.source


def _messages_of_row(row: Row, prompt_key: str | None) -> tuple[dict[str, Any], list[Message]]:
    if row.problem is not None:
        raise ValueError(row.problem)
    columns = row.value
    if not isinstance(columns, dict):
        raise ValueError(f"is of type {type(columns).__name__}, not an object with named columns")
    key = prompt_key or next((key for key in PROMPT_KEYS if key in columns), None)
    if key is None:
        raise ValueError(f"has none of the prompt's columns {PROMPT_KEYS}; it has {_names(columns)}")
    if key not in columns:
        raise ValueError(f"has no column {key!r}; it has {_names(columns)}")
    messages = _messages(key, columns[key])
    if key == "instruction":
        messages = _alpaca_messages(messages, columns)
    if columns.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text("system", columns["system"])})
    return columns, messages


def _messages(key: str, value: Any) -> list[Message]:
    """Messages of a column that holds text, messages, or (in a CSV file) messages as JSON text."""
    if isinstance(value, str):
        parsed = _json_list(value)
        if parsed is None and key in ("messages", "conversations"):
            raise ValueError(f"column {key!r} is text, not a list of messages")
        if parsed is None:
            return [{"role": "user", "content": _text(f"column {key!r}", value)}]
        value = parsed
    if not isinstance(value, list) or not value:
        found = "is an empty list" if value == [] else f"is of type {type(value).__name__}"
        raise ValueError(f"column {key!r} {found}, not text or a list of messages")
    return [_message(key, position, message) for position, message in enumerate(value)]


def _json_list(text: str) -> list | None:
    if not text.startswith("[{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a prompt that only starts like a list
        return None


def _message(key: str, position: int, message: Any) -> Message:
    where = f"column {key!r}, message {position}"
    if not isinstance(message, dict):
        raise ValueError(f"{where} is of type {type(message).__name__}, not {{role, content}} or {{from, value}}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"{where} calls a tool, which a text prompt cannot hold")
    return {"role": ROLES[role], "content": _text(where, message.get("content", message.get("value")))}


def _text(where: str, value: Any) -> str:
    """Text, given as a string or as OpenAI's list of text parts."""
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where} has content of type {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} is not valid Unicode ({error.reason})") from None
    return value


def _alpaca_messages(messages: list[Message], columns: dict[str, Any]) -> list[Message]:
    if columns.get("input"):
        messages[-1]["content"] += "\n\n" + _text("input", columns["input"])
    turns: list[Message] = []
    history = columns.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"column 'history' is of type {type(history).__name__}, not a list of [user, assistant]")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"column 'history' holds {str(pair)[:80]}, not [user, assistant]")
        turns += [
            {"role": role, "content": _text("history", text)}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns + messages


def _answers_of_column(column: str, value: Any) -> list[str]:
    """Answers in a column that holds text, one message, or a list of texts or messages."""
    where = f"column {column!r}"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list) or not value:
        return [_checked_answer(where, value)]
    for number, message in enumerate(value):
        role = message.get("role", "assistant") if isinstance(message, dict) else "assistant"
        if not isinstance(role, str) or ROLES.get(role) != "assistant":
            raise ValueError(f"{where}, answer {number} has the role {role!r}, not assistant")
    return [_checked_answer(f"{where}, answer {number}", answer) for number, answer in enumerate(value)]


def _checked_answer(where: str, value: Any) -> str:
    if (problem := teacher_problem(value)) is not None:
        raise ValueError(f"{where} {problem}")
    return _text(where, teacher_text(value))


def _checked_prompt(messages: list[Message]) -> list[Message]:
    if (problem := prompt_problem(messages)) is not None:
        raise ValueError(f"the prompt {problem}")
    if not messages[-1]["content"].strip():
        raise ValueError("the prompt's last message is blank")
    return messages


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(map(repr, columns))


# ---------------------------------------------------------------------------------------------------------- rejects


class Rejects:
    """Counts bad rows, prints the first SHOWN_REJECTS to stderr and writes all of them; see :func:`open_rejects`."""

    def __init__(self, out: TextIO, strict: bool):
        self._out, self._strict = out, strict
        self.count = 0

    def add(self, row: Row, reason: str) -> None:
        """Record a bad row.

        Raises:
            ValueError: in strict mode, always.
        """
        where = f"{row.file}, row {row.number}: {reason}"
        if self._strict:
            raise InputError(where, fix="repair or drop the row, or run without --strict")
        self.count += 1
        if self.count <= SHOWN_REJECTS:
            print(f"rejected: {visible(where)}", file=sys.stderr)
        record = {"file": row.file, "row": row.number, "reason": reason, "record": row.value}
        try:
            # default=str: for values that JSON does not know (dates, bytes)
            text = json.dumps(record, ensure_ascii=False, default=str)
        except (ValueError, RecursionError):
            text = json.dumps({**record, "record": "nested too deeply to be written"}, ensure_ascii=False)
        print(text, file=self._out)


@contextmanager
def open_rejects(path: Path, strict: bool = False) -> Iterator[Rejects]:
    """Collect bad rows and write them to ``path`` at the end.

    Each line is a JSON object with file, row (counted from 0), reason and record. Without bad rows, an old ``path`` is
    removed.

    Args:
        path: file to write.
        strict: raise ValueError at the first bad row.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
            yield (rejects := Rejects(out, strict))
        if rejects.count:
            os.replace(temporary, path)
        else:
            path.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)

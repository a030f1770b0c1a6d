"""Data files of a GAD run, checked before training: every row has a prompt (chat messages) and a teacher answer.

Files are streamed: parquet by row group, reading two columns only; .json and .jsonl row by row.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.gad.run.findings import Finding, InputError, error

BATCH_ROWS = 4096
"""Rows held in memory at a time."""
CHUNK_CHARS = 1 << 20
"""Characters of a JSON list read at a time."""
LONGEST_ROW_CHARS = 1 << 26
"""Most characters of one row of a JSON list. The limit keeps a list that is broken early from being read to its end."""
LIST_EMPTY, LIST_START, LIST_NEXT, LIST_END = map(re.compile, (r"\s*\[\s*\]", r"\s*\[\s*", r"\s*,\s*", r"\s*\]"))

NO_SOURCE, UNLABELLED = "gad", "unlabelled"
"""data_source of rows that name none, and of all prompts of ``gad.unlabelled_files``."""
PROMPT_FORM = "a list of chat messages [{role, content}, ...] that ends with the user's (or a tool's) message"
TEACHER_FORM = "the teacher's answer: text, or one chat message {role, content}, or a list of such answers"

DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:\d\d(:\d\d)?)?(Z|[+-]\d\d(:?\d\d)?)?)?")
"""verl's reader of JSON makes points in time of a column in which each text has this form."""
DEEPEST = 63
"""Most levels of lists and objects in a row, the row included, that verl's reader of JSON takes."""

TeacherKey = str | Iterable[str] | None
"""data.teacher_key: the column with the teacher's answers, or one for each teacher; None: answers are not read."""


def teacher_text(value: Any) -> str:
    """Text of a teacher answer, given as text or as one chat message.

    Raises:
        ValueError: the value has another type, or the text is empty.
    """
    problem = teacher_problem(value)
    if problem is not None:
        raise ValueError(f"the teacher's answer {problem}; expected {TEACHER_FORM}")
    return value["content"] if isinstance(value, dict) else value


def teacher_problem(value: Any) -> str | None:
    """What is wrong with a teacher answer ("is null"), or None."""
    if isinstance(value, dict):
        if "content" not in value:
            return f"is a message without content (keys {sorted(value)})"
        value = value["content"]
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is of type {type(value).__name__}, not text"
    if not value.strip():
        return "holds only whitespace" if value else "is empty"
    return None


def teacher_columns(teacher_key: TeacherKey) -> list[str]:
    """Columns that ``data.teacher_key`` names."""
    return [teacher_key] if isinstance(teacher_key, str) else list(teacher_key or ())


def teacher_answers(cells: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(column, text) of every answer in the teachers' cells of a row that has passed :func:`teacher_problems`.

    Args:
        cells: column -> an answer, a list of them, or None where another column has one.
    """
    listed = ((key, cell if isinstance(cell, list) else [cell]) for key, cell in cells.items() if cell is not None)
    return [(key, teacher_text(value)) for key, values in listed for value in values]


def teacher_problems(cells: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with the teachers' cells of a row, as (column, "is null")."""
    filled = {key: cell for key, cell in cells.items() if cell is not None}
    for key, cell in (filled or dict(list(cells.items())[:1])).items():
        if not isinstance(cell, list):
            problem = teacher_problem(cell)
        elif not cell:
            problem = "is an empty list"
        else:
            problems = ((number, teacher_problem(value)) for number, value in enumerate(cell))
            bad = next(((number, problem) for number, problem in problems if problem is not None), None)
            problem = None if bad is None else f"has an answer (number {bad[0]}) that {bad[1]}"
        if problem is not None:
            yield key, problem if filled or len(cells) == 1 else f"{problem}, as are the other teachers' columns"


def prompt_problem(messages: Any) -> str | None:
    """What is wrong with the messages of a prompt, or None."""
    if messages is None:
        return "is null"
    if not isinstance(messages, list):
        return f"is of type {type(messages).__name__}, not a list of messages"
    if not messages:
        return "is an empty list"
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"has a message (number {position}) of type {type(message).__name__}, not {{role, content}}"
        for key, kinds in (("role", str), ("content", str | list)):  # a list holds parts, such as text and images
            if (value := message.get(key)) is None:
                return f"has a message (number {position}) without {key}"
            if not isinstance(value, kinds):
                return f"has a message (number {position}) with {key} of type {type(value).__name__}, not text"
    last = messages[-1]["role"]
    return None if last in ("user", "tool") else f"ends with a message of role {last!r}"


def check_data_file(path: str | Path, prompt_key: str, teacher_key: TeacherKey) -> int:
    """Number of rows of a data file, all of which must be usable.

    Args:
        path: .parquet, .json or .jsonl; ``~`` is the home folder.
        prompt_key: column with the prompt's messages.
        teacher_key: column or columns with the teachers' answers; None: teacher answers are not checked.

    Raises:
        ValueError: a row or the file is not usable; names file, row (counted from 0), value and fix.
    """
    rows, problems = data_file_problems(path, prompt_key, teacher_key)
    if problems:
        raise ValueError("\n".join(map(str, problems)))
    return rows


def find_teacher(paths: Iterable[str | Path], teacher_key: TeacherKey, text: str) -> str:
    """The first row that has the teacher answer ``text``, as "FILE, row N" (counted from 0) for an error message."""
    for file in map(Path, paths):
        for row, answers in enumerate(_answers_by_row(file, teacher_key)):
            if text in (answer for _, answer in answers):
                return f"{file}, row {row}"
    raise AssertionError("the text was read from one of these files")


def most_answers(path: str | Path, teacher_key: TeacherKey) -> int:
    """Most teacher answers of a row of a data file that has passed :func:`check_data_file`."""
    file = Path(path).expanduser()
    status = file.stat()
    return _most_answers(file, tuple(teacher_columns(teacher_key)), status.st_mtime_ns, status.st_size)


@lru_cache  # two checks ask for the same files
def _most_answers(file: Path, teachers: tuple[str, ...], *_version: int) -> int:
    return max(map(len, _answers_by_row(file, teachers)))


def _answers_by_row(file: Path, teacher_key: TeacherKey) -> Iterator[list[tuple[str, str]]]:
    """:func:`teacher_answers` of every row."""
    keys = teacher_columns(teacher_key)
    for columns in _columns(file, keys):
        for cells in zip(*columns, strict=True):
            yield teacher_answers(dict(zip(keys, cells, strict=True)))


def answers_that(path: str | Path, teacher_key: TeacherKey, what: Callable[[str], str | None]) -> list[str]:
    """Which rows of a data file have teacher answers of which ``what`` tells something.

    Returns:
        "row 3: column 'gpt' has an answer that TELLS (2 such rows)" for each different text of ``what``.

    Raises:
        ValueError: the file cannot be read, has no such column, or a row has no answer.
        OSError: the file cannot be opened.
    """
    found = _BadRows()
    for row, answers in enumerate(_answers_by_row(Path(path).expanduser(), teacher_key)):
        for key, told in dict.fromkeys((key, what(text)) for key, text in answers):
            if told is not None:
                found.add(key, f"has an answer that {told}", row)
    return [line for _, line in found.lines()]


def column_values(path: str | Path, key: str) -> set[str]:
    """The different values of a column, as text.

    Raises:
        ValueError: the file cannot be read, or has no such column.
        OSError: the file cannot be opened.
    """
    return {str(value) for (values,) in _columns(Path(path).expanduser(), [key]) for value in values}


def joint_problem(files: Iterable[str | Path]) -> str | None:
    """Why verl cannot join parquet files that have passed :func:`data_file_problems`, or None. It reads a row of each:
    a column needs one type in all files."""
    import datasets

    firsts = (next(pq.ParquetFile(Path(file).expanduser()).iter_batches(1)) for file in files)
    tables = [datasets.Dataset(pa.Table.from_batches([first])) for first in firsts]
    try:
        datasets.concatenate_datasets(tables)
    except ValueError as problem:
        return re.sub(r" of features \{.*\} has", " has", str(problem))
    return None


def data_file_problems(path: str | Path, prompt_key: str, teacher_key: TeacherKey) -> tuple[int, list[Finding]]:
    """Number of rows of a data file, and errors: one about the file, or one for each kind of bad row."""
    file = Path(path).expanduser()
    try:
        return _scan(file, prompt_key, teacher_key)
    except InputError as problem:
        return 0, [problem.finding.about(file)]
    except (ValueError, OSError) as problem:
        return 0, [error(f"{file}: {problem}")]


def _scan(file: Path, prompt_key: str, teacher_key: TeacherKey) -> tuple[int, list[Finding]]:
    teachers = teacher_columns(teacher_key)
    keys = [prompt_key, *teachers]
    if not file.exists():
        raise InputError("no such file", fix="correct the path")
    if not file.is_file():
        raise InputError("is a folder", fix="name the files in it, as a list: '[a.parquet,b.parquet]'")
    if "::" in str(file) or any(character in str(file) for character in "*?["):
        raise InputError(
            "verl's reader takes *, ?, [ and :: in a path as a pattern", fix="rename the file or its folder"
        )
    if file.suffix not in (".parquet", ".json", ".jsonl"):
        raise InputError(f"unknown ending {file.suffix!r}", fix="convert the file to .parquet, .json or .jsonl")
    if file.stat().st_size == 0:
        raise InputError("the file is empty (0 bytes; download or conversion cut off?)", fix="write it again")
    is_json = file.suffix != ".parquet"
    objects = ("extra_info", "reward_model") if teachers else ("extra_info",)  # unlabelled prompts get a reward_model
    rows, found, lists, dates = 0, _BadRows(), dict[str, bool](), defaultdict[str, set[bool]](set)
    for prompts, *answers in _columns(file, keys, objects):
        for row, value in enumerate(prompts, start=rows):
            if (problem := prompt_problem(value)) is not None:
                found.add(prompt_key, problem, row)
        for row, cells in enumerate(zip(*answers, strict=True), start=rows):
            of_row = dict(zip(teachers, cells, strict=True))
            for key, problem in teacher_problems(of_row):
                found.add(key, problem, row)
            for key, cell in of_row.items():
                if cell is not None and lists.setdefault(key, isinstance(cell, list)) != isinstance(cell, list):
                    found.add(key, f"is {'a' if isinstance(cell, list) else 'no'} list, unlike those before it", row)
        for key, column in zip(keys, (prompts, *answers), strict=True) if is_json else ():
            dates[key] |= {DATE.fullmatch(text) is not None for text in _texts(column)}
        rows += len(prompts)
    if rows == 0:
        raise InputError("holds 0 rows, expected at least one", fix="write it again with data")
    forms = {prompt_key: PROMPT_FORM}
    problems = [
        error(
            f"{file}, {line}; expected {forms.get(key, TEACHER_FORM)}",
            fix="repair or drop the row" + ", or let gad prepare write the file" * (key == prompt_key),
        )
        for key, line in found.lines()
    ]
    for key in [key for key in keys if dates[key] == {True}]:
        what = f"{file}: column {key!r} holds only dates, which verl's reader of JSON changes into points in time"
        problems.append(error(what, fix="write the file as .parquet, as gad prepare does"))
    return rows, problems


def _texts(cell: Any) -> Iterator[str]:
    """The texts of a cell with messages or answers."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, dict):
        yield from _texts(cell.get("content", cell.get("text")))
    elif isinstance(cell, list):
        for part in cell:
            yield from _texts(part)


def sample_rows(path: str | Path, prompt_key: str, teacher_key: TeacherKey, size: int) -> tuple[int, list, list]:
    """Evenly spaced rows of a data file that has passed :func:`check_data_file`.

    Args:
        path: .parquet, .json or .jsonl.
        prompt_key: column with the prompt's messages.
        teacher_key: column or columns with the teachers' answers.
        size: rows to take; all rows of a smaller file are taken.

    Returns:
        Number of rows of the file; prompts of the sample; its teacher answers as text. A row with several answers gives
        its prompt as often.
    """
    file, teachers = Path(path).expanduser(), teacher_columns(teacher_key)
    keys = [prompt_key, *teachers]
    if file.suffix == ".parquet":
        with pq.ParquetFile(file, memory_map=True) as parquet:
            total, start = parquet.metadata.num_rows, 0
            wanted = _evenly_spaced(total, size)
            table: list[dict] = []
            for batch in parquet.iter_batches(BATCH_ROWS, columns=keys):
                inside = [row - start for row in wanted if start <= row < start + len(batch)]
                table += batch.take(pa.array(inside, pa.int64())).to_pylist()
                start += len(batch)
    else:
        rows = [row for row, _ in json_rows(file)]
        total, table = len(rows), [rows[row] for row in _evenly_spaced(len(rows), size)]
    pairs = [(row[prompt_key], text) for row in table for _, text in teacher_answers({k: row.get(k) for k in teachers})]
    return total, [prompt for prompt, _ in pairs], [text for _, text in pairs]


def _evenly_spaced(total: int, size: int) -> list[int]:
    return [row * total // min(size, total) for row in range(min(size, total))]


class _BadRows:
    """First row and number of rows for every kind of problem."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, key: str, problem: str, row: int) -> None:
        first, count = self._found.get((key, problem), (row, 0))
        self._found[key, problem] = (first, count + 1)

    def lines(self) -> Iterator[tuple[str, str]]:
        for (key, problem), (row, count) in self._found.items():
            more = f" ({count} such rows)" if count > 1 else ""
            yield key, f"row {row}: column {key!r} {problem}{more}"


def _missing_columns(keys: Iterable[str], columns: Iterable[str]) -> InputError:
    columns = list(columns)
    missing = " and ".join(repr(key) for key in keys if key not in columns)
    return InputError(
        f"has no column {missing}; it has {', '.join(map(repr, columns))}",
        fix="set data.prompt_key and data.teacher_key to the columns that hold the messages and the teacher's answer, "
        "or let gad prepare write the file",
    )


def _no_object(key: str, what: str) -> InputError:
    return InputError(f"column {key!r} {what}; verl reads an object there", fix="write objects, or drop the column")


class _Repeated(dict):
    """An object of JSON that had a key twice; the last value counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(found)


def _number(text: str) -> float:
    """The number with a point or exponent; one too large for a float, such as 1e400, as a large integer."""
    return found if (found := float(text)) - found == 0 else 2**64


def _unreadable(row: dict[str, Any]) -> str | None:
    """What verl's reader of JSON, the package ``datasets``, fails on or changes in silence; None: nothing."""
    level, depth = [row], 0
    while level:  # no recursion: a row may be nested hundreds of levels deep
        below: list[Any] = []
        depth += 1
        for part in level:
            if isinstance(part, str):
                if not _is_unicode(part):
                    return f"text that is not valid Unicode ({part[:40]!a}: half of a surrogate pair)"
            elif isinstance(part, dict | list):
                if depth > DEEPEST:
                    return f"values that are nested more than {DEEPEST} levels deep"
                if isinstance(part, _Repeated):
                    return f"an object with the same key twice (keys: {', '.join(part)})"
                below += [*part, *part.values()] if isinstance(part, dict) else part
            elif isinstance(part, int) and not -(2**63) <= part < 2**64:
                return "a number that does not fit into 64 bits"
        level = below
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _holds_map(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type hold a map, or a list_view, at any level; ``datasets`` takes all other types."""
    is_one = pa.types.is_map(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return is_one or any(_holds_map(kind.field(i).type) for i in range(kind.num_fields))


def _cells(column: pa.Array) -> list:
    """Values of a column; ``datasets`` writes one of mixed types as JSON, and reads it back."""
    values = column.to_pylist()
    return [value and json.loads(value) for value in values] if isinstance(column.type, pa.JsonType) else values


def _columns(file: Path, keys: list[str], objects: Iterable[str] = ()) -> Iterator[list[list]]:
    """The columns ``keys`` of a data file, in batches of rows. Those of ``objects`` may be missing."""
    read = _parquet_columns if file.suffix == ".parquet" else _json_columns
    return read(file, keys, objects)


def _parquet_columns(file: Path, keys: list[str], objects: Iterable[str]) -> Iterator[list[list]]:
    """``BATCH_ROWS`` rows at a time."""
    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            schema, columns = parquet.schema_arrow, parquet.schema_arrow.names
            if not set(keys) <= set(columns):
                raise _missing_columns(keys, columns)
            for field in schema:
                if columns.count(field.name) > 1:
                    raise InputError(f"has two columns {field.name!r}", fix="rename or drop one of them")
                if _holds_map(field.type):
                    what = f"column {field.name!r} holds {field.type}, which verl's reader does not know"
                    raise InputError(what, fix="write structs or lists instead, or drop the column")
                known = isinstance(field.type, pa.StructType | pa.JsonType) or pa.types.is_null(field.type)
                if field.name in objects and not known:
                    raise _no_object(field.name, f"holds {field.type}")
            as_json = [f.name for f in schema if f.name in objects and isinstance(f.type, pa.JsonType)]
            for batch in parquet.iter_batches(BATCH_ROWS, columns=[*keys, *as_json]):
                for key in as_json:
                    if bad := [value for value in _cells(batch.column(key)) if not isinstance(value, dict | None)]:
                        raise _no_object(key, f"holds {type(bad[0]).__name__}")
                yield [_cells(batch.column(key)) for key in keys]
    except (pa.ArrowException, OSError) as problem:
        raise InputError(f"is not a readable parquet file ({problem})", fix="write it again") from None


def _json_columns(file: Path, keys: list[str], objects: Iterable[str]) -> Iterator[list[list]]:
    """One object per line, or one list of objects. The first row names the columns."""
    columns: list[str] = []
    found: list[list[Any]] = [[] for _ in keys]
    for number, (row, problem) in enumerate(json_rows(file, object_pairs_hook=_object, parse_float=_number)):
        if problem is not None:
            raise InputError(f"row {number} {problem}", fix="repair or drop the line")
        if not isinstance(row, dict):
            raise InputError(f"row {number} is of type {type(row).__name__}, not an object", fix="write it again")
        if (problem := _unreadable(row)) is not None:
            raise InputError(f"row {number} holds {problem}", fix="repair or drop the row")
        for key in objects:
            if not isinstance(row.get(key), dict | None):
                raise _no_object(key, f"is of type {type(row[key]).__name__} in row {number}")
        columns = columns or list(row)
        if not set(keys) <= set(columns):
            raise _missing_columns(keys, columns)
        for key, values in zip(keys, found, strict=True):
            values.append(row.get(key))
        if len(found[0]) == BATCH_ROWS:
            yield found
            found = [[] for _ in keys]
    yield found


def json_rows(file: Path, **hooks: Any) -> Iterator[tuple[Any, str | None]]:
    """Rows of a file that holds one JSON value per line or one JSON list, read in bounded memory.

    Args:
        hooks: of ``json.JSONDecoder``.

    Yields:
        (row, None); or, for a line that is no JSON or no UTF-8, (text of the line, what is wrong). Blank lines are
        skipped.

    Raises:
        InputError: the JSON list is malformed; rows after the error cannot be recovered.
    """
    with file.open("rb") as lines:
        if lines.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from ((row, None) for row in _list_rows(file, **hooks))
            return
        lines.seek(0)
        for line in lines:
            if not line.strip():
                continue
            try:
                yield json.loads(line, **hooks), None
            except UnicodeDecodeError as problem:
                yield (
                    line.decode("utf-8", "backslashreplace").rstrip("\r\n"),
                    f"is not UTF-8 (byte {line[problem.start]:#04x} at place {problem.start})",
                )
            except (ValueError, RecursionError) as problem:  # not JSON, or nested thousands of levels deep
                yield line.decode("utf-8", "backslashreplace").rstrip("\r\n"), f"is not valid JSON ({problem})"


def _decode(decode: Callable[[str, int], tuple[Any, int]], text: str, start: int, number: int) -> tuple[Any, int]:
    try:
        return decode(text, start)
    except RecursionError:
        raise InputError(f"row {number} is nested too deeply", fix="drop the row") from None


def _list_rows(file: Path, **hooks: Any) -> Iterator[Any]:
    """Rows of one JSON list, each decoded as soon as it has been read."""
    decode = json.JSONDecoder(**hooks).raw_decode
    with file.open(encoding="utf-8-sig") as text:
        buffer, position, number = text.read(CHUNK_CHARS), 0, 0
        while True:
            if closing := (LIST_EMPTY if number == 0 else LIST_END).match(buffer, position):
                if (buffer[closing.end() :] + text.read(CHUNK_CHARS)).strip():
                    raise InputError("has more text after its JSON list", fix="write one list, or one row per line")
                return
            opening = (LIST_START if number == 0 else LIST_NEXT).match(buffer, position)
            try:
                if opening is None:
                    raise json.JSONDecodeError("expected , or ]", buffer, position)
                row, end = _decode(decode, buffer, opening.end(), number)
                if end == len(buffer):  # "12" may be the start of "123"
                    raise json.JSONDecodeError("the list is not closed", buffer, end)
            except json.JSONDecodeError as problem:
                buffer, position = buffer[position:], 0
                more = text.read(max(CHUNK_CHARS, len(buffer))) if len(buffer) < LONGEST_ROW_CHARS else ""
                if not more:
                    raise InputError(f"row {number} is not valid JSON ({problem.msg})", fix="write it again") from None
                buffer += more
                continue
            yield row
            position, number = end, number + 1

"""Several teacher answers to a prompt, as the dataset reads them: a list in the teacher's column, or a column for each
teacher. A row carries the first answer; recipe/gad/training/teachers.py draws one for a training step."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipe.gad.run.data_file import TeacherKey, teacher_answers, teacher_columns
from recipe.gad.training.trajectory import TEACHER_IDS, TEACHER_TEXT

ANSWERS = "teacher_answers"
"""Column of a dataset whose rows have several answers: [{teacher, text, ids}, ...]; teacher is the answer's column."""

Answers = list[tuple[str, str]]
"""(column, text) of every answer of a row."""


def has_several(dataframe: Any, teacher_key: TeacherKey) -> bool:
    """Can the rows of a data set have several answers?"""
    return len(columns := teacher_columns(teacher_key)) > 1 or isinstance(dataframe[0][columns[0]], list)


def answers_of_rows(rows: Mapping[str, Sequence], teacher_key: TeacherKey) -> list[Answers]:
    """Answers of every row of a batch of columns."""
    columns = teacher_columns(teacher_key)
    cells = zip(*(rows[key] for key in columns), strict=True)
    return [teacher_answers(dict(zip(columns, row, strict=True))) for row in cells]


def answer_columns(
    answers: list[Answers], ids: list[list[int]], length: str, uncut: list[list[int]]
) -> dict[str, list]:
    """Columns of rows with several answers.

    Args:
        answers: of every row.
        ids, uncut: token ids of all these answers in their order, cut at the limit and before that.
        length: name of the column with the lengths of a row's answers, uncut.
    """
    columns: dict[str, list] = {TEACHER_TEXT: [], TEACHER_IDS: [], ANSWERS: [], length: []}
    start = 0
    for row in answers:
        own, start = slice(start, start + len(row)), start + len(row)
        columns[TEACHER_TEXT].append(row[0][1])
        columns[TEACHER_IDS].append(ids[own][0])
        known = zip(row, ids[own], strict=True)
        columns[ANSWERS].append([{"teacher": teacher, "text": text, "ids": of_it} for (teacher, text), of_it in known])
        columns[length].append([len(answer) for answer in uncut[own]])
    return columns

"""``gad eval``: scores of an evaluation folder (``scores.json``), and the comparison of several folders.

``scores.json`` holds ``text`` (recipe/gad/text_metrics.py), ``two_sample`` (recipe/gad/two_sample.py) and ``judge``
(recipe/gad/judge.py); the last two are there once they were asked for, as long as the answers stay the same.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipe.gad.answers import ANSWERS, IDENTITY, differences, read_answers, read_settings, write_atomically

SCORES = "scores.json"
TEXT_COLUMNS = {
    "rouge_l": "ROUGE-L",
    "length": "tokens",
    "cut": "cut",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "repetition": "repetition",
}


def read_scores(folder: str | Path) -> dict[str, Any]:
    """``scores.json`` of an evaluation folder if it belongs to the answers that are there now, else {}."""
    path = Path(folder) / SCORES
    if not path.is_file():
        return {}
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Fix: delete it and run gad eval again") from None
    return scores if scores.get("answers_sha256") == _answers_hash(folder) else {}


def _answers_hash(folder: str | Path) -> str:
    return hashlib.sha256((Path(folder) / ANSWERS).read_bytes()).hexdigest()


def update_scores(folder: str | Path, seed: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Compute the text metrics of a folder's answers, add ``sections`` (two_sample, judge), and write scores.json.

    Args:
        folder: evaluation folder with answers.
        seed: of the bootstrap.
        sections: results to add; those of earlier calls on the same answers stay.
    """
    from recipe.gad.text_metrics import text_metrics

    metrics = text_metrics(read_answers(folder), seed)
    scores = {
        **read_scores(folder),
        "answers_sha256": _answers_hash(folder),
        "text": {name: {side: asdict(e) for side, e in sides.items()} for name, sides in metrics.items()},
        **sections,
    }
    write_atomically(Path(folder) / SCORES, json.dumps(scores, indent=2) + "\n")
    return scores


# ---------------------------------------------------------------------- tables


def _cells(scores: dict[str, Any], side: str) -> dict[str, str]:
    """Column title -> text of one row of the table."""
    cells = {
        title: _interval(scores["text"][name].get(side), 1 if name == "length" else 3)
        for name, title in TEXT_COLUMNS.items()
    }
    if side == "student" and "two_sample" in scores:
        test = scores["two_sample"]
        cells["two-sample acc"] = f"{test['accuracy']:.3f} ± {test['accuracy_std']:.3f}"
    return cells


def _interval(estimate: dict[str, float] | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**estimate, d=digits)


def format_table(rows: dict[str, dict[str, str]]) -> str:
    """Row name -> column title -> cell, as aligned text; missing cells are "-"."""
    titles = list(dict.fromkeys(title for cells in rows.values() for title in cells))
    lines = [["", *titles], *([name, *(cells.get(title, "-") for title in titles)] for name, cells in rows.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles) + 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def scores_table(scores: dict[str, Any]) -> str:
    """The scores of one model as text: a row per metric, columns student and teacher."""
    student, teacher = (_cells(scores, side) for side in ("student", "teacher"))
    return format_table({title: {"student": student[title], "teacher": teacher.get(title, "-")} for title in student})


# ---------------------------------------------------------------------- several folders


def compare(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Scores of several evaluation folders on the same data and settings.

    Returns:
        Folder name -> {"model", "scores"}; names are the shortest ends of the paths that differ.

    Raises:
        ValueError: fewer than two folders, one lacks its scores, or data or settings differ (names what).
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} evaluation folder given, expected at least two different ones")
    settings = [read_settings(path) for path in paths]
    all_scores = [read_scores(path) for path in paths]
    for path, record, scores in zip(paths, settings, all_scores, strict=True):
        if not scores:
            raise ValueError(f"{path} has no {SCORES} for its answers. Fix: run gad eval on it first")
        changed = differences(settings[0], record, ignore=IDENTITY)
        for section in ("two_sample", "judge"):
            if section in scores and section in all_scores[0]:
                first, other = (s[section]["settings"] for s in (all_scores[0], scores))
                changed += [f"{section} {line}" for line in differences(first, other)]
        if changed:
            raise ValueError(
                f"{paths[0]} and {path} cannot be compared, they differ in {'; '.join(changed)}. "
                "Fix: run gad eval with the same data and settings for every model"
            )
    return {
        name: {"model": record["model"], "scores": scores}
        for name, record, scores in zip(_short_names(paths), settings, all_scores, strict=True)
    }


def _short_names(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the paths differ")


def comparison_table(comparison: dict[str, Any]) -> str:
    """A row per model and one for the teacher, a column per metric."""
    rows = {name: _cells(entry["scores"], "student") for name, entry in comparison.items()}
    return format_table({**rows, "teacher": _cells(next(iter(comparison.values()))["scores"], "teacher")})

"""``gad eval``: scores of an evaluation folder (``scores.json``), and the comparison of several folders.

``scores.json`` holds ``text``, ``two_sample`` and ``judge``, each written by the module of that name. The last two
are optional; they stay as long as the answers stay the same.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipe.gad.evaluation.intervals import cross_fitted_mean, paired_difference
from recipe.gad.evaluation.judge import RESULTS, JudgeSettings, against, judge, left_out
from recipe.gad.evaluation.sampling import (
    DIGEST,
    MODEL_SETTINGS,
    answers_hash,
    differences,
    read_answers,
    read_settings,
)
from recipe.gad.evaluation.text_metrics import rouge_l, text_metrics
from recipe.gad.openai_client import ChatClient
from recipe.gad.run.atomic_io import read_object, write_atomically
from recipe.gad.run.findings import InputError, visible

SCORES = "scores.json"
WIDTH = 120
"""Characters of a table's lines."""
TEXT_COLUMNS = {
    "rouge_l": "ROUGE-L",
    "length": "tokens",
    "cut": "cut",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "repetition": "repetition",
}


def read_scores(folder: str | Path) -> dict[str, Any]:
    """``scores.json`` of an evaluation folder; {} if there is none, or if the answers have changed since."""
    path = Path(folder) / SCORES
    if not path.is_file():
        return {}
    scores = read_object(path, "delete it and run gad eval again")
    if scores.get(DIGEST) != answers_hash(folder):
        return {}
    sections = [scores[name] for name in ("text", "two_sample", "judge") if name in scores]
    if not all(isinstance(section, dict) and isinstance(section.get("settings", {}), dict) for section in sections):
        raise _damaged(path)
    return scores


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} does not hold what gad eval writes", fix="delete it and run gad eval again")


def update_scores(folder: str | Path, **sections: Any) -> dict[str, Any]:
    """Add results (text, two_sample, judge) to scores.json; earlier results for the same answers stay."""
    scores = {**read_scores(folder), DIGEST: answers_hash(folder), **sections}
    write_atomically(Path(folder) / SCORES, json.dumps(scores, indent=2) + "\n")
    return scores


def text_section(answers: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The text metrics as JSON; ``seed`` is for the bootstrap."""
    return {name: {side: asdict(e) for side, e in by.items()} for name, by in text_metrics(answers, seed).items()}


def _two_sample(scores: dict[str, Any]) -> dict[str, Any] | None:
    """The section ``two_sample``; None if it is missing, or without wins: its interval is then too narrow."""
    section = scores.get("two_sample", {})
    return section if "wins_by_seed" in section else None


# ---------------------------------------------------------------------- tables


def _cells(scores: dict[str, Any], side: str) -> dict[str, str]:
    """Column title -> text of one row of the table."""
    cells = {
        title: _interval(scores["text"][name].get(side), 1 if name == "length" else 3)
        for name, title in TEXT_COLUMNS.items()
    }
    test = _two_sample(scores)
    if side == "student" and test is not None:
        cells["two-sample acc"] = f"{_tested(test['accuracy'])} ± {test['accuracy_std']:.3f}"
    verdicts = scores.get("judge", {})
    if "score" in verdicts:
        cells["judge 1-10"] = _interval(verdicts["score"]["first" if side == "student" else "second"], 2)
    if side == "student" and "pairwise" in verdicts:
        cells |= {f"judge {name}": _interval(verdicts["pairwise"][name], 3) for name in RESULTS}
    return cells


def _interval(estimate: dict[str, float] | None, digits: int) -> str:
    if estimate is None:
        return "-"
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**estimate, d=digits)


def _tested(estimate: dict[str, float], sign: str = "") -> str:
    p = estimate["p_value"]
    text = "{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]".format(**estimate, sign=sign)
    return f"{text} p{f'={p:.3f}' if p >= 0.0005 else '<0.001'}"


def format_table(rows: dict[str, dict[str, str]], width: int = WIDTH) -> str:
    """Row name -> column title -> cell, as aligned text; missing cells are "-".

    Columns that do not fit ``width`` characters follow in further blocks, each with the names of the rows.
    """
    titles = list(dict.fromkeys(title for cells in rows.values() for title in cells))
    names = _column("", list(rows))
    columns = [_column(title, [cells.get(title, "-") for cells in rows.values()]) for title in titles]
    blocks: list[list[list[str]]] = []
    for column in columns:
        if not blocks or sum(len(cells[0]) + 2 for cells in blocks[-1]) + len(column[0]) > width:
            blocks.append([names])
        blocks[-1].append(column)
    lines = (["  ".join(cells).rstrip() for cells in zip(*block, strict=True)] for block in blocks)
    return "\n\n".join("\n".join(block) for block in lines)


def _column(title: str, cells: list[str]) -> list[str]:
    """Title and cells, padded to one width."""
    shown = [visible(text) for text in (title, *cells)]
    return [text.ljust(max(map(len, shown))) for text in shown]


def scores_table(scores: dict[str, Any]) -> str:
    """The scores of one model as text: a row per metric, columns student and teacher."""
    student, teacher = (_cells(scores, side) for side in ("student", "teacher"))
    table = format_table({title: {"student": student[title], "teacher": teacher.get(title, "-")} for title in student})
    return f"{table}\n{left_out(scores['judge'])}" if "judge" in scores else table


# ---------------------------------------------------------------------- several folders


def check_scores(comparison: dict[str, dict[str, Any]]) -> None:
    """Raise InputError, which names the file, if scores of :func:`compare` cannot be shown."""
    for entry in comparison.values():
        try:
            for side in ("student", "teacher"):
                _cells(entry["scores"], side)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise _damaged(Path(entry["folder"]) / SCORES) from None


def is_comparison(text: str) -> bool:
    """Whether ``text`` is what ``gad eval compare --output`` writes."""
    try:
        entries = list(json.loads(text).values())
    except (ValueError, AttributeError, RecursionError):
        return False
    return bool(entries) and all(isinstance(entry, dict) and {"folder", "scores"} <= entry.keys() for entry in entries)


def compare(folders: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Scores of several evaluation folders on the same data and settings.

    Returns:
        Folder name -> {"folder", "model", "scores"}; each name is the shortest end of its path that tells it apart.

    Raises:
        ValueError: fewer than two folders, missing scores, or different data or settings (named).
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} evaluation folder given, expected at least two different ones")
    runs = [(path, read_settings(path), _prompts(path), read_scores(path)) for path in paths]
    first_path, first_settings, first_prompts, first_scores = runs[0]
    for path, settings, prompts, scores in runs:
        if "text" not in scores:
            raise InputError(f"{path} has no {SCORES} for its answers", fix="run gad eval on it first")
        changed = differences(first_settings, settings, ignore=MODEL_SETTINGS)
        for section in ("two_sample", "judge"):
            if section in scores and section in first_scores:
                before, now = (part[section].get("settings", {}) for part in (first_scores, scores))
                found = differences(before, now, ignore=("mode",))
                changed += [f"{section} {line}" for line in found]
        if prompts != first_prompts and not changed:
            changed = [f"their prompts: {len(first_prompts)} and {len(prompts)} answers to different prompts"]
        if changed:
            raise InputError(
                f"{first_path} and {path} cannot be compared, they differ in {'; '.join(changed)}",
                fix="run gad eval with the same data and settings for every model",
            )
    return {
        name: {"folder": str(path), "model": settings["model"], "scores": scores}
        for name, (path, settings, _, scores) in zip(_short_names(paths), runs, strict=True)
    }


def _prompts(folder: Path) -> list[tuple[int, int, Any]]:
    """The prompts that the folder answers. They differ if two tokenizers drop different long prompts."""
    return [(answer["index"], answer["sample"], answer["messages"]) for answer in read_answers(folder)]


def add_differences(comparison: dict[str, dict[str, Any]], seed: int) -> None:
    """Compare every model with the first one, prompt by prompt.

    Adds "difference_to_first" to the entries after the first one: the entry's value minus the first's in ``rouge_l``,
    and in ``two_sample`` where both have that section, each with its 95 % interval and the two-sided p-value of no
    difference.

    Args:
        comparison: of :func:`compare`.
        seed: of the bootstrap and of the permutations.
    """

    first, *others = comparison.values()
    of_first = read_answers(first["folder"])
    prompts = [answer["index"] for answer in of_first]
    rouge_of_first = [rouge_l(answer) for answer in of_first]
    for entry in others:
        gains = [
            rouge_l(answer) - other for answer, other in zip(read_answers(entry["folder"]), rouge_of_first, strict=True)
        ]
        found = {"rouge_l": asdict(paired_difference(prompts, gains, seed))}
        before, after = _two_sample(first["scores"]), _two_sample(entry["scores"])
        if before is not None and after is not None:
            by_seed = zip(before["wins_by_seed"], after["wins_by_seed"], strict=True)
            changes = [[b - a for a, b in zip(*wins, strict=True)] for wins in by_seed]
            found["two_sample"] = asdict(cross_fitted_mean(prompts, changes, null=0.0))
        entry["difference_to_first"] = found


def judge_against_first(
    comparison: dict[str, dict[str, Any]], settings: JudgeSettings, base_url: str | None, concurrency: int, seed: int
) -> None:
    """Let a judge compare every model's answers with those of the first, pair by pair.

    Adds "judge_against_first" to the entries after the first one; win, tie and lose are of the entry's model (see
    :func:`recipe.gad.evaluation.judge.judge`).
    """
    first, *others = comparison.values()
    rivals = [answer["student"] for answer in read_answers(first["folder"])]
    for entry in others:
        candidates = against(read_answers(entry["folder"]), rivals)
        client = ChatClient(base_url)
        entry["judge_against_first"] = judge(candidates, client, settings, entry["folder"], concurrency, seed)


def _short_names(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the paths differ")


def comparison_table(comparison: dict[str, dict[str, Any]]) -> str:
    """A row per model and one for the teacher, a column per metric."""
    first = next(iter(comparison))
    rows = {name: _cells(entry["scores"], "student") for name, entry in comparison.items()}
    for name, entry in comparison.items():
        for key, title in (("rouge_l", "ROUGE-L"), ("two_sample", "two-sample acc")):
            if key in entry.get("difference_to_first", {}):
                rows[name][f"{title} minus {first}"] = _tested(entry["difference_to_first"][key], "+")
        if "judge_against_first" in entry:
            verdicts = entry["judge_against_first"]["pairwise"]
            rows[name] |= {f"{result} vs {first}": _interval(verdicts[result], 3) for result in RESULTS}
    notes = [
        f"\n{name}: {left_out(entry[key])}"
        for name, entry in comparison.items()
        for entry, key in ((entry["scores"], "judge"), (entry, "judge_against_first"))
        if key in entry
    ]
    return format_table({**rows, "teacher": _cells(comparison[first]["scores"], "teacher")}) + "".join(notes)

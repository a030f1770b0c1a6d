"""The referee's page: ``referee.html`` for people and ``referee.json`` for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from recipe.gad.monitor.report import COLOURS, page_template
from recipe.gad.referee.cost import Used, used
from recipe.gad.referee.jobs import Run, jobs_of
from recipe.gad.referee.plan import Plan
from recipe.gad.referee.results import ArmResult, Comparison, SizeResult
from recipe.gad.referee.schedule import State, error_of
from recipe.gad.referee.verdict import GUARDS, MARGINS, METRICS, TOLERANCE, p_text
from recipe.gad.run.atomic_io import write_atomically

WIDTH, LEFT, RIGHT, ROW = 720, 170, 20, 34
"""Sizes of the pictures, in the units of their viewBox: whole width, labels, margin, and height of a row."""
CURVE_HEIGHT = 260


def write_page(
    plan: Plan, runs: Sequence[Run], sizes: Sequence[SizeResult], state: State, rows: int | None, output_dir: Path
) -> Path:
    """Write both files.

    Args:
        plan: what was asked for.
        runs: from :func:`recipe.gad.referee.jobs.expand`.
        sizes: the comparison of every data size.
        state: of the jobs.
        rows: of the training file, if they are known.
        output_dir: gets the files.

    Returns:
        the HTML file.
    """
    costs = {
        (str(size.rows), arm.name): _used(plan, runs, size, arm, state, rows) for size in sizes for arm in size.arms
    }
    failures = failed_jobs(runs, state)
    write_atomically(output_dir / "referee.json", json.dumps(as_json(plan, sizes, costs, failures), indent=2) + "\n")
    page = page_template(Path(__file__).with_name("page.html.j2")).render(
        plan=plan,
        sizes=[(size, forest(size, plan.measure), curves(size)) for size in sizes],
        costs=costs,
        failures=failures,
        metrics=METRICS,
        measure=METRICS[plan.measure],
        guards=[METRICS[guard].title for guard in GUARDS],
        margin=MARGINS[plan.measure],
        tolerance=TOLERANCE,
        interval=interval,
        p_text=p_text,
    )
    write_atomically(output_dir / "referee.html", page)
    return output_dir / "referee.html"


def _used(plan: Plan, runs: Sequence[Run], size: SizeResult, arm: ArmResult, state: State, rows: int | None) -> Used:
    group = [run for run in runs if run.rows == size.rows and run.arm.name == arm.name and run.seed in arm.seeds]
    return used(group, state, plan, rows)


def failed_jobs(runs: Sequence[Run], state: State) -> list[dict[str, Any]]:
    """Jobs that failed or were left out, with the arms that they belong to, their last error and their log."""
    arms: dict[str, list[str]] = {}
    for run in runs:
        for name in [*(t.name for t in run.trainings), *(e.name for e in run.evaluations)]:
            arms.setdefault(name, []).append(run.arm.name)
    return [
        {
            "job": job.name,
            "arms": list(dict.fromkeys(arms[job.name])),
            "status": state.status(job.name),
            "error": error_of(job.log) if state.status(job.name) == "failed" else "a job that it needs failed",
            "log": str(job.log),
        }
        for job in jobs_of(list(runs))
        if state.status(job.name) in ("failed", "left out")
    ]


# ---------------------------------------------------------------------- JSON


def as_json(
    plan: Plan, sizes: Sequence[SizeResult], costs: dict[tuple[str, str], Used], failures: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of ``referee.json``."""
    return {
        "plan": asdict(plan),
        "measure": plan.measure,
        "sizes": [
            {
                "train_rows": size.rows,
                "headline": size.headline,
                "arms": {arm.name: _arm_json(arm, costs[str(size.rows), arm.name]) for arm in size.arms},
                "comparisons": [asdict(comparison) for comparison in size.comparisons],
                "missing": list(size.missing),
            }
            for size in sizes
        ],
        "failures": failures,
    }


def _arm_json(arm: ArmResult, cost: Used) -> dict[str, Any]:
    return {
        "seeds": list(arm.seeds),
        "chosen": {metric: asdict(estimate) for metric, estimate in arm.chosen.items()},
        "last": {metric: asdict(estimate) for metric, estimate in arm.last.items()},
        "checkpoints": {
            str(result.run.seed): {
                "chosen": result.chosen.evaluation.model,
                "candidates": {str(one.evaluation.step): one.chosen_on for one in result.candidates},
            }
            for result in arm.runs
        },
        "curve": [list(point) for point in arm.curve],
        "used": asdict(cost),
    }


# ---------------------------------------------------------------------- texts and pictures


def interval(estimate: Any, metric: str, signed: bool = False) -> str:
    """``0.412 [0.401, 0.423]`` in the digits of the metric, with signs for a difference."""
    digits = METRICS[metric].digits
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    return f"{form} [{form}, {form}]".format(estimate.value, estimate.low, estimate.high)


class Bar(NamedTuple):
    """A row of the picture of differences: positions in the picture."""

    name: str
    level: str
    y: float
    value: float
    low: float
    high: float
    dots: tuple[float, ...]
    """One per training seed."""


class Forest(NamedTuple):
    """The picture of the differences from the control in the measure."""

    bars: list[Bar]
    zero: float
    height: float
    ticks: list[tuple[float, str]]


def forest(size: SizeResult, measure: str) -> Forest | None:
    """Positions of the differences; None if nothing was compared."""
    if not size.comparisons:
        return None
    found = [(comparison, comparison.chosen[measure]) for comparison in size.comparisons]
    ends = [x for _, d in found for x in (d.estimate.low, d.estimate.high, *d.by_seed)]
    reach = max(0.01, *map(abs, ends))
    middle, half = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - RIGHT - LEFT) / 2

    def x(value: float) -> float:
        return round(middle + half * value / reach, 1)

    bars = [_bar(comparison, measure, row, x) for row, (comparison, _) in enumerate(found)]
    ticks = [(x(share * reach), f"{share * reach:+.3f}") for share in (-1, -0.5, 0, 0.5, 1)]
    return Forest(bars, x(0), len(bars) * ROW + 30, ticks)


def _bar(comparison: Comparison, measure: str, row: int, x: Any) -> Bar:
    found = comparison.chosen[measure]
    ends = x(found.estimate.value), x(found.estimate.low), x(found.estimate.high)
    return Bar(comparison.arm, comparison.verdict.level, (row + 0.5) * ROW, *ends, tuple(map(x, found.by_seed)))


class Curve(NamedTuple):
    name: str
    colour: str
    points: list[tuple[float, float]]

    @property
    def path(self) -> str:
        return " ".join(f"{x},{y}" for x, y in self.points)


class Curves(NamedTuple):
    """The picture of the measure over teacher batches."""

    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def curves(size: SizeResult) -> Curves | None:
    """Positions of every arm's evaluated checkpoints; None if no arm has been trained."""
    trained = [arm for arm in size.arms if arm.runs[0].run.trainings]
    if not trained:
        return None
    points = [point for arm in trained for point in arm.curve]
    last = max(batches for batches, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = max(high - low, 0.01)

    def place(batches: float, value: float) -> tuple[float, float]:
        x = 60 + (WIDTH - RIGHT - 60) * batches / last
        return round(x, 1), round(20 + (CURVE_HEIGHT - 60) * (low + span - value) / span, 1)

    lines = [
        Curve(arm.name, COLOURS[i % len(COLOURS)], [place(*point) for point in arm.curve])
        for i, arm in enumerate(trained)
    ]
    x_ticks = [(place(last * share, low)[0], f"{last * share:.0f}") for share in (0, 0.25, 0.5, 0.75, 1)]
    y_ticks = [(place(0, low + span * share)[1], f"{low + span * share:.3f}") for share in (0, 0.5, 1)]
    return Curves(lines, x_ticks, y_ticks)

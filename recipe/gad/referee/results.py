"""From evaluations to a comparison: values per prompt, the choice of checkpoints, and the differences of the arms.

The prompts of the validation data are halved once. Of every training a checkpoint is chosen on one half; all numbers of
the page come from the other half. So no arm gains by having more checkpoints to choose from.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe.gad.evaluation.intervals import Estimate, by_key
from recipe.gad.evaluation.sampling import read_answers
from recipe.gad.evaluation.scores import compare as check_comparable
from recipe.gad.evaluation.scores import read_scores
from recipe.gad.evaluation.text_metrics import answer_metrics
from recipe.gad.referee.differences import Difference, difference, mean_estimate, widened
from recipe.gad.referee.jobs import Evaluation, Run
from recipe.gad.referee.plan import Plan
from recipe.gad.referee.verdict import METRICS, Verdict, headline, judge
from recipe.gad.run.findings import InputError

SPLIT_SEED = 0
"""Of the halves of the prompts."""
MIN_PROMPTS = 4
"""Fewer cannot be halved and resampled."""

ByPrompt = dict[int, float]
"""Prompt (index of the answers) -> value, the mean over the prompt's answers."""


@dataclass(frozen=True)
class Values:
    """Results of one evaluated checkpoint, prompt by prompt."""

    metrics: dict[str, ByPrompt]
    wins: tuple[ByPrompt, ...] = ()
    """For each seed of the two-sample test, the share of a prompt's pairs in which its discriminator was right."""


def prompt_wins(two_sample: dict[str, Any], answers: Sequence[dict[str, Any]]) -> tuple[ByPrompt, ...]:
    """The wins of the two-sample test, from that section of ``scores.json`` and the lines of ``answers.jsonl``.

    Raises:
        ValueError: the section holds no verdict on every answer.
    """
    by_seed = two_sample.get("wins_by_seed", [])
    if not by_seed or any(len(wins) != len(answers) for wins in by_seed):
        raise InputError("scores.json holds no two-sample verdict on every answer", fix="delete it, and rerun")
    prompts = [answer["index"] for answer in answers]
    return tuple(_means(prompts, wins) for wins in by_seed)


def _means(prompts: Sequence[int], values: Sequence[float]) -> ByPrompt:
    groups = by_key(prompts, values)
    return {prompt: sum(group) / len(group) for prompt, group in zip(dict.fromkeys(prompts), groups, strict=True)}


def read_values(folder: Path) -> Values:
    """Values per prompt of a finished evaluation folder."""
    answers, scores = read_answers(folder), read_scores(folder)
    prompts = [answer["index"] for answer in answers]
    rows = [answer_metrics(answer) for answer in answers]
    names = [metric for metric in METRICS if (metric, "student") in rows[0]]
    metrics = {name: _means(prompts, [row[name, "student"] for row in rows]) for name in names}
    if "two_sample" not in scores:
        return Values(metrics)
    wins = prompt_wins(scores["two_sample"], answers)
    metrics["two_sample"] = {prompt: _mean([by[prompt] for by in wins]) for prompt in wins[0]}
    return Values(metrics, wins)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def halves(prompts: Sequence[int], seed: int = SPLIT_SEED) -> tuple[list[int], list[int]]:
    """Prompts to choose checkpoints on, and prompts to report on; sorted, the same for every model.

    Raises:
        ValueError: too few prompts.
    """
    if len(prompts) < MIN_PROMPTS:
        raise ValueError(f"{len(prompts)} validation prompts, expected at least {MIN_PROMPTS}")
    shuffled = sorted(prompts)
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[: len(shuffled) // 2]), sorted(shuffled[len(shuffled) // 2 :])


def mean(values: Values, metric: str, prompts: Sequence[int]) -> float:
    return _mean([values.metrics[metric][prompt] for prompt in prompts])


@dataclass(frozen=True)
class Scored:
    """An evaluated checkpoint of a run."""

    evaluation: Evaluation
    values: Values
    chosen_on: float
    """Measure on the half for choosing."""


@dataclass(frozen=True)
class RunResult:
    """A run whose candidates are evaluated."""

    run: Run
    candidates: tuple[Scored, ...]
    chosen: Scored
    last: Scored


@dataclass(frozen=True)
class ArmResult:
    """An arm with one data size; every estimate is over seeds and prompts of the reporting half."""

    name: str
    seeds: tuple[int, ...]
    chosen: dict[str, Estimate]
    """Metric -> estimate, of the chosen checkpoints."""
    last: dict[str, Estimate]
    """The same of the last checkpoints."""
    runs: tuple[RunResult, ...]
    curve: tuple[tuple[int, float], ...]
    """(teacher batches, mean measure over the seeds on the reporting half) of every evaluated checkpoint."""


@dataclass(frozen=True)
class Comparison:
    """An arm against the control over the seeds that both have finished."""

    arm: str
    seeds: tuple[int, ...]
    chosen: dict[str, Difference]
    last: dict[str, Difference]
    verdict: Verdict


@dataclass(frozen=True)
class SizeResult:
    """All arms with one data size."""

    rows: int | str
    arms: tuple[ArmResult, ...]
    comparisons: tuple[Comparison, ...]
    headline: str
    missing: tuple[str, ...]
    """Arms without any result, and the seeds that an arm lacks."""


def results(plan: Plan, runs: Sequence[Run]) -> list[SizeResult]:
    """The comparison for every data size, of what is evaluated so far.

    Raises:
        ValueError: nothing is evaluated, or evaluations cannot be compared.
    """
    finished = {e.name: e for run in runs for e in run.evaluations if e.is_finished()}
    if not finished:
        raise ValueError("no evaluation is finished, so there is nothing to compare; see the logs")
    if len(finished) > 1:
        check_comparable([evaluation.folder for evaluation in finished.values()])
    values = {name: read_values(evaluation.folder) for name, evaluation in finished.items()}
    choosing, reporting = halves(list(next(iter(values.values())).metrics["rouge_l"]))
    return [
        _size(plan, rows, [run for run in runs if run.rows == rows], values, choosing, reporting)
        for rows in plan.train_rows
    ]


def _size(
    plan: Plan, rows: int | str, runs: list[Run], values: dict[str, Values], choosing: list[int], reporting: list[int]
) -> SizeResult:
    by_arm: dict[str, list[RunResult]] = {}
    missing = []
    for run in runs:
        if result := choose(run, values, plan.measure, choosing):
            by_arm.setdefault(run.arm.name, []).append(result)
        else:
            missing.append(f"{run.arm.name}, seed {run.seed}")
    arms = tuple(_arm(name, found, values, plan.measure, reporting) for name, found in by_arm.items())
    comparisons = []
    for arm in plan.compared():
        pair = by_arm.get(arm.name, []), by_arm.get(plan.control, [])
        if comparison := compare_arms(arm.name, plan, *pair, reporting):
            comparisons.append(comparison)
    verdicts = [(comparison.arm, comparison.verdict) for comparison in comparisons]
    return SizeResult(rows, arms, tuple(comparisons), headline(verdicts, plan.control), tuple(missing))


def choose(run: Run, values: dict[str, Values], measure: str, prompts: Sequence[int]) -> RunResult | None:
    """The run with its best checkpoint on ``prompts``, the later one of equals; None without an evaluated one."""
    scored = tuple(
        Scored(evaluation, values[evaluation.name], mean(values[evaluation.name], measure, prompts))
        for evaluation in run.candidates
        if evaluation.name in values
    )
    if not scored:
        return None
    best = max(scored, key=lambda one: (METRICS[measure].sign * one.chosen_on, one.evaluation.step))
    return RunResult(run, scored, best, scored[-1])


def _table(values: Sequence[Values], metric: str, prompts: Sequence[int]) -> list[list[float]]:
    """(training seeds, prompts)."""
    return [[one.metrics[metric][prompt] for prompt in prompts] for one in values]


def _wins(values: Sequence[Values], prompts: Sequence[int]) -> list[list[float]]:
    """(seeds of the two-sample test, prompts): means over the training seeds."""
    tests = range(len(values[0].wins))
    return [[_mean([one.wins[test][prompt] for one in values]) for prompt in prompts] for test in tests]


def differences(first: Sequence[Values], second: Sequence[Values], prompts: Sequence[int]) -> dict[str, Difference]:
    """Metric -> first less second, paired by training seed and prompt.

    Args:
        first, second: one for each training seed, in the same order.
        prompts: those that count.
    """
    found = {}
    for metric in (metric for metric in METRICS if metric in first[0].metrics):
        wins = _minus(_wins(first, prompts), _wins(second, prompts)) if metric == "two_sample" else None
        found[metric] = difference(_table(first, metric, prompts), _table(second, metric, prompts), wins)
    return found


def _arm(
    name: str, found: list[RunResult], values: dict[str, Values], measure: str, prompts: Sequence[int]
) -> ArmResult:
    if not found[0].run.trainings:
        found = found[:1]  # the untrained student is one model, whatever the seed
    chosen, last = [result.chosen for result in found], [result.last for result in found]

    def estimates(scored: list[Scored]) -> dict[str, Estimate]:
        found = [one.values for one in scored]
        names = [metric for metric in METRICS if metric in found[0].metrics]
        means = {metric: mean_estimate(_table(found, metric, prompts)) for metric in names}
        if "two_sample" in means:
            wide = widened(means["two_sample"], _wins(found, prompts), null=0.5)
            means["two_sample"] = replace(wide, low=max(wide.low, 0.0), high=min(wide.high, 1.0))
        return means

    by_batches: dict[int, list[float]] = {}
    for evaluation in (evaluation for result in found for evaluation in result.run.evaluations):
        if evaluation.name in values:
            point = mean(values[evaluation.name], measure, prompts)
            by_batches.setdefault(evaluation.teacher_batches, []).append(point)
    curve = tuple((batches, sum(points) / len(points)) for batches, points in sorted(by_batches.items()))
    seeds = tuple(result.run.seed for result in found)
    return ArmResult(name, seeds, estimates(chosen), estimates(last), tuple(found), curve)


def _minus(first: list[list[float]], second: list[list[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]


def compare_arms(
    arm: str, plan: Plan, found: list[RunResult], control: list[RunResult], prompts: Sequence[int]
) -> Comparison | None:
    """Differences over the seeds that both have; None without one."""
    by_seed = {result.run.seed: result for result in control}
    pairs = [(result, by_seed[result.run.seed]) for result in found if result.run.seed in by_seed]
    if not pairs:
        return None

    def of(which: str) -> dict[str, Difference]:
        first, second = ([getattr(result, which).values for result in side] for side in zip(*pairs, strict=True))
        return differences(first, second, prompts)

    chosen = of("chosen")
    verdict = judge(arm, plan.control, chosen, plan.measure)
    seeds = tuple(first.run.seed for first, _ in pairs)
    return Comparison(arm, seeds, chosen, of("last"), verdict)

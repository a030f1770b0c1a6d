"""What the jobs of a plan use: teacher batches, time, and an estimate for the jobs that have not run yet."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from recipe.gad.referee.jobs import Evaluation, Run, Training
from recipe.gad.referee.plan import ALL_ROWS, Arm, Plan
from recipe.gad.referee.schedule import State
from recipe.gad.run.log import MetricLog, series


def step_seconds(training: Training) -> list[float]:
    """Seconds of every step that a training has logged."""
    log = MetricLog(training.folder / "metrics.jsonl")
    log.update()
    return list(series(log.metrics, "timing_s/step").values())


def distinct_rows(arm: Arm, batch: int, rows: int) -> int:
    """Different teacher answers that an arm reads, of ``rows``: every stage reads them in the same order."""
    return min(rows, max((stage.steps for stage in arm.stages), default=0) * batch)


@dataclass(frozen=True)
class Used:
    """What an arm used, the mean over its seeds; shared trainings count for every arm."""

    teacher_batches: int
    teacher_answers: int
    """Answers read, repetitions included."""
    distinct_answers: int | None
    """None if the rows of the training file are not known."""
    step_minutes: float
    wall_minutes: float


def used(run_group: Sequence[Run], state: State, plan: Plan, rows: int | None) -> Used:
    """What one arm with one data size used, from the logs and the state of its runs."""
    arm, size = run_group[0].arm, run_group[0].rows
    available = rows if size == ALL_ROWS else int(size)
    steps = [sum(sum(step_seconds(training)) for training in run.trainings) for run in run_group]
    wall = [sum(state.seconds(training.name) for training in run.trainings) for run in run_group]
    return Used(
        arm.teacher_batches,
        arm.teacher_batches * plan.train_batch_size,
        None if available is None else distinct_rows(arm, plan.train_batch_size, available),
        statistics.fmean(steps) / 60,
        statistics.fmean(wall) / 60,
    )


# ---------------------------------------------------------------------- dry run


@dataclass
class Estimator:
    """Minutes of jobs that have not run, from jobs that have, else from the plan's ``seconds_per_step``."""

    trainings: list[Training]
    evaluations: list[Evaluation]
    state: State

    def seconds_per_step(self, training: Training) -> float | None:
        """The median step of the finished runs of an equal stage, else the plan's figure, else None."""
        equal = (other for other in self.trainings if other.stage == training.stage and other.is_finished())
        seconds = [second for other in equal for second in step_seconds(other)]
        return statistics.median(seconds) if seconds else training.stage.seconds_per_step

    def start_seconds(self) -> float | None:
        """Mean seconds of a finished training outside of its steps."""
        done = [training for training in self.trainings if training.is_finished() and self.state.seconds(training.name)]
        rest = [max(0.0, self.state.seconds(training.name) - sum(step_seconds(training))) for training in done]
        return statistics.fmean(rest) if rest else None

    def evaluation_seconds(self) -> float | None:
        """Mean seconds of a finished evaluation."""
        seconds = [self.state.seconds(e.name) for e in self.evaluations if e.is_finished()]
        seconds = [second for second in seconds if second]
        return statistics.fmean(seconds) if seconds else None


def _unique(items: Sequence) -> list:
    return list({item.name: item for item in items}.values())


def dry_run(plan: Plan, runs: Sequence[Run], state: State, slots: int) -> str:
    """Jobs, equal-batch accounting and cost, as text."""
    trainings = _unique([training for run in runs for training in run.trainings])
    evaluations = _unique([evaluation for run in runs for evaluation in run.evaluations])
    estimator = Estimator(trainings, evaluations, state)
    lines = [f"{len(trainings)} trainings and {len(evaluations)} evaluations, {slots} at a time", ""]
    lines += [*_accounting(plan), "", *_job_lines(estimator), "", *_cost_lines(estimator, slots)]
    return "\n".join(lines)


def _accounting(plan: Plan) -> list[str]:
    lines = [f"teacher batches of {plan.train_batch_size} answers, per training seed:"]
    for name, arm in plan.arms.items():
        role = "control" if name == plan.control else "reference" if plan.is_reference(name) else "compared"
        chain = " + ".join(f"{stage.kind} {stage.steps}" for stage in arm.stages) or "the untrained student"
        lines.append(f"  {name:24} {arm.teacher_batches:6}  {role:10} {chain}")
    return lines


def _job_lines(estimator: Estimator) -> list[str]:
    lines = []
    for training in estimator.trainings:
        seconds = estimator.seconds_per_step(training)
        cost = "finished" if training.is_finished() else _minutes(seconds and seconds * training.stage.steps)
        lines.append(f"  {training.name:44} {training.stage.steps:6} steps  {cost}")
    saved = sum(evaluation.is_finished() for evaluation in estimator.evaluations)
    return [*lines, f"  {len(estimator.evaluations)} evaluations, {saved} of them finished"]


def _minutes(seconds: float | None) -> str:
    return "cost unknown" if seconds is None else f"{seconds / 60:.1f} min"


def _cost_lines(estimator: Estimator, slots: int) -> list[str]:
    left = [training for training in estimator.trainings if not training.is_finished()]
    known = [(training, estimator.seconds_per_step(training)) for training in left]
    unknown = sorted({training.stage.kind for training, seconds in known if seconds is None})
    seconds = sum(training.stage.steps * second for training, second in known if second is not None)
    lines = []
    if unknown:
        lines.append(
            f"The step time of {', '.join(unknown)} is not known: no run of such a stage is finished, and the plan "
            "has no seconds_per_step for it. Its steps are not in the sum."
        )
    for what, count, each in (
        ("starts of trainings", len(left), estimator.start_seconds()),
        ("evaluations", sum(not e.is_finished() for e in estimator.evaluations), estimator.evaluation_seconds()),
    ):
        if each is None and count:
            lines.append(f"The time of {count} {what} is not known yet, and not in the sum.")
        seconds += count * (each or 0.0)
    total = f"{seconds / 60:.0f} job minutes are left"
    return [*lines, f"{total}: about {seconds / 60 / slots:.0f} GPU minutes with {slots} at a time on one GPU, if the "
            f"step times were measured with {slots} at a time."]  # fmt: skip

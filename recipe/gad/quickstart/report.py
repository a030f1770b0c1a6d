"""The CPU quickstart's report: a table, sample answers and a picture of its finished stages, and a progress bar.

    python -m recipe.gad.quickstart.report show --warmup_dir DIR --seqkd_dir DIR --gad_dir DIR
    python -m recipe.gad.quickstart.report progress --metrics DIR/metrics.jsonl --pid PID

Run folders hold ``metrics.jsonl`` (verl's file logger) and ``val_samples/<step>.jsonl`` (verl's validation dump).
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recipe.gad.quickstart.problem import answer, closeness, letters_right
from recipe.gad.run.log import (
    MetricLog,
    Metrics,
    answers_over_training,
    dump_files,
    load_metrics,
    read_dump,
    running_mean,
    series,
)


def _validation_dumps(folder: Path) -> dict[int, Path]:
    """Validation dumps of a folder by step; ValueError if there are none."""
    files = dump_files(folder)
    if not files:
        raise ValueError(f"no validation dumps <step>.jsonl in {folder}")
    return files


def _column(rows: Sequence[dict], key: str) -> list[str]:
    return [row[key] for row in rows]


def closeness_from_dumps(folder: str | Path) -> dict[int, float]:
    """Closeness in [0, 1] of each validation dump ``<step>.jsonl`` of ``folder`` to its teacher texts, by step."""
    dumps = {step: read_dump(path) for step, path in _validation_dumps(Path(folder)).items()}
    return {step: closeness(_column(rows, "output"), _column(rows, "gts")) for step, rows in dumps.items()}


def sample_triples(before: str | Path, after: str | Path, k: int = 3) -> list[tuple[str, str, str, str]]:
    """The first ``k`` prompts in both validation dumps, as (prompt, teacher, student before, student after)."""
    rows = answers_over_training([read_dump(before), read_dump(after)], k)
    return [(prompt, teacher, early["output"], late["output"]) for prompt, teacher, (early, late) in rows]


def _required_series(metrics: Metrics, name: str) -> dict[int, float]:
    found = series(metrics, name)
    if not found:
        raise ValueError(f"no step has the metric {name}")
    return found


def _join_stages(warmup: dict[int, float], gad: dict[int, float]) -> tuple[dict[int, float], int]:
    """Both stages on one axis, with the warmup's last step added to GAD's steps; and that last step."""
    last = max(warmup)
    return {**warmup, **{last + step: value for step, value in gad.items()}}, last


def plot_curves(
    warmup_metrics: Metrics,
    gad_metrics: Metrics,
    closeness_by_step: dict[int, float],
    seqkd_closeness_by_step: dict[int, float],
    out_png: str | Path,
    title: str,
) -> None:
    """Draw warmup and GAD in one picture: the discriminator's accuracy, and the closeness of the answers; SeqKD beside.

    Args:
        warmup_metrics, gad_metrics: from :func:`recipe.gad.run.log.load_metrics`, each counting its steps from 1.
        closeness_by_step: closeness of the validation answers on the joint axis (GAD's step s at warmup's last + s).
        seqkd_closeness_by_step: the same of SeqKD from the warmup's student.
        out_png: picture to write.
        title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    d_acc, handover = _join_stages(
        _required_series(warmup_metrics, "critic/d_acc"), _required_series(gad_metrics, "critic/d_acc")
    )
    steps, values = list(d_acc), list(d_acc.values())
    smooth = running_mean(values, 5)

    figure = Figure(figsize=(9, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.subplots()
    right = left.twinx()
    blue, orange, grey = "#1f5fa8", "#d1600a", "#666666"
    left.plot(steps, values, color=blue, alpha=0.25, lw=1)
    (line_d,) = left.plot(steps, smooth, color=blue, lw=2.2, label="discriminator accuracy (mean of 5 steps)")
    points = dict(sorted(closeness_by_step.items()))
    (line_c,) = right.plot(
        list(points), list(points.values()), color=orange, lw=2.2, marker="o", ms=5, label="closeness to the teacher"
    )
    imitation = dict(sorted(seqkd_closeness_by_step.items()))
    (line_s,) = right.plot(
        list(imitation),
        list(imitation.values()),
        color=grey,
        lw=1.8,
        ls="--",
        marker="s",
        ms=4,
        label="the same, SeqKD",
    )
    left.axhline(0.5, color=blue, lw=1, ls=":")
    left.axvline(handover, color=grey, lw=1.2, ls="--")
    for x, text, side in ((handover, "warmup ", "right"), (handover, " GAD", "left")):
        left.text(x, 1.035, text, ha=side, va="center", color=grey, fontsize=11, fontweight="bold")
    left.text(steps[-1], 0.505, "coin toss", ha="right", va="bottom", color=blue, fontsize=9)
    left.set_xlabel("training step", fontsize=11)
    left.set_ylabel("discriminator accuracy", color=blue, fontsize=11)
    right.set_ylabel("closeness of validation answers", color=orange, fontsize=11)
    for axis, color in ((left, blue), (right, orange)):
        axis.set_ylim(0, 1.07)
        axis.tick_params(axis="y", colors=color, labelsize=10)
        axis.spines["top"].set_visible(False)
    left.set_xlim(0, max(*steps, *points, *imitation) * 1.01)
    left.grid(axis="y", alpha=0.2)
    left.legend(handles=[line_d, line_c, line_s], loc="lower right", fontsize=10, framealpha=0.9)
    figure.suptitle(title, fontsize=13)
    figure.savefig(out_png)


def summary(warmup_dir: str | Path, seqkd_dir: str | Path, gad_dir: str | Path) -> str:
    """Table of the runs as text: base student (if dumped), ends of warmup, SeqKD and GAD; and which is closer.

    Discriminator accuracy is the mean over the last 10 steps of a stage; the other rows come from its last validation.
    """
    runs = [Path(warmup_dir), Path(seqkd_dir), Path(gad_dir)]
    metrics = [load_metrics(run / "metrics.jsonl") for run in runs]
    files = [_validation_dumps(run / "val_samples") for run in runs]
    dumps = [read_dump(list(f.values())[-1]) for f in files]
    if 0 in files[0] and len(files[0]) > 1:
        dumps.insert(0, read_dump(files[0][0]))

    def last_steps(run: Metrics, name: str) -> float:
        values = list(_required_series(run, name).values())[-10:]
        return sum(values) / len(values)

    def words(texts: list[str]) -> float:
        return sum(len(text.split()) for text in texts) / len(texts)

    near = [closeness(_column(d, "output"), _column(d, "gts")) for d in dumps]
    right = [letters_right(_column(d, "input"), _column(d, "output")) for d in dumps]
    accuracy = [None if run is metrics[1] else last_steps(run, "critic/d_acc") for run in metrics]
    table: dict[str, Sequence[float | None]] = {"discriminator accuracy": accuracy, "closeness to the teacher": near}
    rouge = next((n for run in metrics for row in run.values() for n in row if "rouge" in n and "mean" in n), None)
    if rouge and all(any(rouge in row for row in run.values()) for run in metrics):
        table["ROUGE-L to the teacher"] = [list(_required_series(run, rouge).values())[-1] for run in metrics]
    table["letters right"] = right
    table["words of an answer"] = [words(_column(d, "output")) for d in dumps]

    lines = [f"{'':26}{'base':>9}{'warmup':>9}{'SeqKD':>9}{'GAD':>9}"]
    for name, values in table.items():
        padded = [None] * (4 - len(values)) + list(values)
        lines.append(f"{name:26}" + "".join(f"{'-' if v is None else format(v, '.3f'):>9}" for v in padded))
    teacher = _column(dumps[-1], "gts")
    rng = random.Random(0)
    again = [answer(row["input"], "teacher", rng) for row in dumps[-1]]
    lines.append(
        f"The teacher itself: closeness of a second sample {closeness(again, teacher):.3f}, {words(teacher):.3f} words."
    )
    steps = [max(run) for run in metrics[1:]]
    closer, gap = ("GAD", near[-1] - near[-2]) if near[-1] >= near[-2] else ("SeqKD", near[-2] - near[-1])
    lines.append(
        f"{closer} is closer to the teacher by {gap:.3f}; GAD has {right[-1] - right[-2]:+.3f} of the letters right "
        f"against SeqKD and {right[-1] - right[-3]:+.3f} against the warmup"
        f" ({steps[0]} SeqKD steps, {steps[1]} GAD steps)."
    )
    return "\n".join(lines)


def build_report(
    warmup_dir: str | Path,
    seqkd_dir: str | Path,
    gad_dir: str | Path,
    out_png: str | Path | None = None,
    samples: int = 3,
) -> str:
    """Draw the curves of the run folders (default ``gad_dir/curves.png``); return the table and sample answers."""
    warmup_dir, seqkd_dir, gad_dir = Path(warmup_dir), Path(seqkd_dir), Path(gad_dir)
    out_png = Path(out_png or gad_dir / "curves.png")
    warmup, gad = (load_metrics(run / "metrics.jsonl") for run in (warmup_dir, gad_dir))
    handover = max(_required_series(warmup, "critic/d_acc"))
    before = closeness_from_dumps(warmup_dir / "val_samples")

    def after_warmup(run: Path) -> dict[int, float]:
        return {handover + step: value for step, value in closeness_from_dumps(run / "val_samples").items()}

    start = {handover: list(before.values())[-1]}
    plot_curves(
        warmup,
        gad,
        before | after_warmup(gad_dir),
        start | after_warmup(seqkd_dir),
        out_png,
        "GAD and SeqKD on the toy problem",
    )

    early, late = (list(_validation_dumps(run / "val_samples").values())[-1] for run in (warmup_dir, gad_dir))
    lines = [summary(warmup_dir, seqkd_dir, gad_dir), ""]
    for prompt, teacher, first, last in sample_triples(early, late, samples):
        lines += [f"prompt     {prompt}", f"  teacher  {teacher}", f"  warmup   {first}", f"  GAD      {last}"]
    return "\n".join([*lines, "", f"curves: {out_png}"])


def follow_progress(metrics_path: str | Path, pid: int, steps: int | None = None, interval: float = 1.0) -> None:
    """Show a progress bar on stderr over the steps that process ``pid`` logs; return when the process ends."""
    from tqdm import tqdm

    log, running = MetricLog(metrics_path), True
    with tqdm(total=steps, unit="step") as bar:
        while running:
            running = _is_running(pid)
            log.update()
            accuracy = series(log.metrics, "critic/d_acc")
            if accuracy:
                bar.set_postfix_str(f"d_acc {accuracy[max(accuracy)]:.2f}", refresh=False)
            bar.update(max(log.metrics, default=0) - bar.n)
            if running:
                time.sleep(interval)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.gad.quickstart.report", description="What the CPU quickstart shows of its runs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="table, sample answers and picture of a finished quickstart")
    show.add_argument("--warmup_dir", required=True, help="run folder of the warmup stage")
    show.add_argument("--seqkd_dir", required=True, help="run folder of SeqKD from the warmup's student")
    show.add_argument("--gad_dir", required=True, help="run folder of the GAD stage")
    show.add_argument("--out", help="picture to write (default: curves.png in --gad_dir)")
    progress = commands.add_parser("progress", help="progress bar of a running stage, until its process ends")
    progress.add_argument("--metrics", required=True, help="metrics.jsonl of the run")
    progress.add_argument("--pid", type=int, required=True, help="process to wait for")
    progress.add_argument("--steps", type=int, help="steps of the stage, for the remaining time")
    args = parser.parse_args(argv)
    try:
        if args.command == "progress":
            follow_progress(args.metrics, args.pid, args.steps)
        else:
            print(build_report(args.warmup_dir, args.seqkd_dir, args.gad_dir, args.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

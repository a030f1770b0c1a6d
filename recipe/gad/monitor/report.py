"""``gad report``: the curves, samples, settings and health of one or several runs as one HTML file.

Several runs are overlaid by their own steps. A pipeline folder counts as its stages, and its GAD steps are counted on
from the last step of its warmup, so that one axis shows warmup -> GAD.
"""

import base64
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from recipe.gad.monitor.rules import EarlierFinding, all_clear, apply_rules, clip_band, damaged_files, earlier_findings
from recipe.gad.run.atomic_io import alone_in, check_output, write_atomically
from recipe.gad.run.findings import Finding, visible
from recipe.gad.run.log import (
    ROUGE_L,
    VAL_D_ACC,
    VAL_TWO_SAMPLE,
    VANILLA,
    Metrics,
    answers_over_training,
    load_metrics,
    matching_names,
    phase_seconds,
    read_overrides,
    read_samples,
    recorded_loss_mode,
    recorded_value,
    running_mean,
    series,
)

SMOOTHING = 5
"""Steps of the running mean that is drawn over the raw curve."""

SMOOTHED_FROM = 20
"""Fewer points are drawn as they are: there is nothing to smooth, and every point counts."""

SAMPLED_PROMPTS = 6
SAMPLED_STEPS = 5
"""Prompts shown, and how many validations of each: a page that can be read, from first to last."""


AGAINST_IMITATION = (
    "No curve here says whether GAD was worth its time. With a 135M student and 4,458 answers of GPT-4, SeqKD gained "
    "more per GPU second until it had read each answer about 20 times. From there, more SeqKD gained nothing or did "
    "harm. GAD took about a third of the distance that was left in the two-sample test, in twice the time, and fewer "
    "answers were cut or repeated (docs/experiments.md). Train SeqKD until gad eval finds no gain, then compare both "
    "from there."
)
"""Under every GAD run. docs/experiments.md is the home of the numbers."""


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """A run folder as read. ``offset`` is added to its steps in the pictures; ``findings`` are about its last state,
    ``earlier`` about states before."""

    path: Path
    label: str
    metrics: Metrics
    offset: int = 0
    findings: list[Finding] = field(default_factory=list)
    earlier: list[EarlierFinding] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)
    samples: dict[int, list[dict]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    overrides: dict[str, str] = field(default_factory=dict)
    loss_mode: str = VANILLA

    @property
    def all_clear(self) -> str:
        return all_clear(self.metrics)

    @property
    def last_step(self) -> int:
        return max(self.metrics)

    def final(self, name: str, n: int = 10) -> float | None:
        """Mean of the last ``n`` values of a metric."""
        values = list(series(self.metrics, name).values())[-n:]
        return sum(values) / len(values) if values else None


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs of the given folders; a folder without metrics.jsonl counts as the run folders right inside it.

    Raises:
        ValueError: a folder holds no run, or a file in it cannot be read as what it should be.
    """
    found: list[tuple[Path, int]] = []  # (run folder, last step of the warmup beside it)
    for folder in map(Path, folders):
        if (folder / "metrics.jsonl").is_file():
            found.append((folder, 0))
            continue
        # the log of a stage that has just started is empty
        stages = sorted(path.parent for path in folder.glob("*/metrics.jsonl") if path.stat().st_size)
        if not stages:
            raise ValueError(
                f"{folder} holds no run: expected {folder / 'metrics.jsonl'} or stages like "
                f"{folder / 'gad/metrics.jsonl'}; give the --output_dir of a run"
            )
        handover = max(load_metrics(folder / "warmup/metrics.jsonl", [])) if folder / "warmup" in stages else 0
        order = [folder / "seqkd", folder / "warmup"]
        stages.sort(key=lambda path: order.index(path) if path in order else len(order))
        found += [(stage, handover) for stage in stages]
    paths = [path.resolve() for path, _ in found]
    twice = [path for i, path in enumerate(paths) if path in paths[:i]]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; name every run once")
    parent = os.path.commonpath([path.parent for path in paths])
    return [
        _read_run(path, visible(str(path.relative_to(parent))), handover, paths)
        for path, (_, handover) in zip(paths, found, strict=True)
    ]


def _handover(model: Any, paths: list[Path]) -> int:
    """Step of the checkpoint of one of the runs in ``paths`` that is ``model``, a run's student; 0 if of none."""
    step = re.fullmatch(r"(.+)/global_step_(\d+)/actor/huggingface", model) if isinstance(model, str) else None
    return int(step[2]) if step and Path(step[1]).resolve() in paths else 0


def _read_run(path: Path, label: str, handover: int, paths: list[Path]) -> Run:
    left_out: list[str] = []
    run = Run(path, label, load_metrics(path / "metrics.jsonl", left_out))
    try:
        start = _handover(recorded_value(path, "actor_rollout_ref.model.path"), paths)
        handover = handover or start
        run.loss_mode = recorded_loss_mode(path)
        run.overrides = read_overrides(path)
    except ValueError as error:
        left_out.append(str(error))
    is_gad = bool(matching_names(run.metrics, "actor/pg_loss"))
    run.offset = handover if is_gad else 0  # only GAD follows a warmup
    run.samples, run.notes = read_samples(path, SAMPLED_STEPS, run.metrics)
    if is_gad:
        run.notes.append(AGAINST_IMITATION)
    samples = list(run.samples.values())[-1] if run.samples else ()
    findings, run.looked_at = apply_rules(run.metrics, samples, run.loss_mode)
    run.findings = [*damaged_files(left_out), *findings]
    run.earlier = earlier_findings(run.metrics, run.findings, loss_mode=run.loss_mode)
    return run


# ------------------------------------------------------------------------------------------------------------ pictures


class Panel(NamedTuple):
    """A picture: metrics (label -> name pattern), what it says, and the band in which values usually lie."""

    name: str
    title: str
    says: str
    curves: dict[str, str]
    band: tuple[float, float] | None = None
    unit: str = ""


SIDES = {"student": "response_length", "teacher": "teacher_response_length"}
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Discriminator": (
        Panel(
            "d_acc",
            "Discriminator accuracy",
            "Share of pairs in which D prefers the teacher; 0.5 is a coin toss. High after the warmup, in the band "
            "once the student follows. Alone it proves nothing: look at ROUGE-L beside it. Its distance from the "
            "accuracy on validation prompts is memorizing; the accuracy there is what the reward is worth. A fresh "
            "discriminator was trained on validation answers alone: if it tells the sides apart and D does not, the "
            "student has only left D's sight. Old answers are those of gad.replay, prefixes those of "
            "gad.credit=token.",
            {
                "d_acc": "critic/d_acc",
                "on validation prompts": VAL_D_ACC,
                "fresh discriminator": VAL_TWO_SAMPLE,
                "on old answers": "critic/replay_d_acc",
                "on prefixes": "critic/d_prefix_acc",
            },
            (0.5, 0.9),
        ),
        Panel("d_loss", "Discriminator loss", "ln 2 = 0.693 is guessing, 0 is certainty.", {"d_loss": "critic/d_loss"}),
        Panel(
            "scores",
            "Scores of D",
            "Mean score of each side. Only their distance means something: D's scores are free up to a constant.",
            {"teacher": "critic/teacher_value_mean", "student": "critic/student_value_mean"},
        ),
        Panel(
            "score_gap",
            "Score gap",
            "Teacher minus student; it closes as the student comes closer (or games D).",
            {"score_gap": "critic/score_gap"},
        ),
        Panel(
            "score_length_corr",
            "Scores and lengths",
            "Correlation of D's score with the length among answers to one prompt. Far from 0, the student is mainly "
            "rewarded for longer (1) or shorter (-1) answers.",
            {"score_length_corr": "critic/score_length_corr"},
        ),
    ),
    "Closeness to the teacher": (
        Panel(
            "rouge_l",
            "ROUGE-L of validation",
            "Overlap of validation answers with the teacher's. It should not fall. A lower temperature raises it too: "
            "only gad eval's two-sample test says who is closer.",
            {"": ROUGE_L},
        ),
        Panel(
            "lengths",
            "Answer lengths",
            "Mean tokens of an answer. The student's should move towards the teacher's.",
            {side: f"{name}/mean" for side, name in SIDES.items()},
            unit="tokens",
        ),
        Panel(
            "cut_ratios",
            "Cut answers",
            "Share of answers that reached the length limit.",
            {side: f"{name}/cut_ratio" for side, name in SIDES.items()},
        ),
    ),
    "Policy": (
        Panel("entropy", "Entropy", "Nats per token. Near 0 the student has collapsed.", {"entropy": "actor/entropy"}),
        Panel(
            "pg_loss",
            "Policy gradient loss",
            "Around 0 by construction, together with the teacher's part if it is in the group.",
            {"students": "actor/pg_loss", "teacher": "actor/teacher_pg_loss"},
        ),
        Panel(
            "policy_gate",
            "Policy gate and lead",
            "Factor of the policy gradient; 1 is open. While D leads (1), the student stands still.",
            {"gate": "gad/policy_gate", "lead": "gad/leading"},
        ),
        Panel(
            "pg_clipfrac",
            "Clipped tokens",
            "Share of tokens whose update is clipped. It needs several optimizer steps per batch. The band is that "
            "of the loss; runs of different losses have none in common.",
            {"pg_clipfrac": "actor/pg_clipfrac"},
        ),
        Panel("ppo_kl", "KL within a step", "Sampling against updated policy, nats per token.", {"": "actor/ppo_kl"}),
        Panel("kl_loss", "KL to the reference", "From the warmup policy, nats per token.", {"": "actor/kl_loss"}),
        Panel(
            "sft_loss",
            "Imitation loss",
            "Next-token loss on the teacher's text, alone or beside the policy gradient.",
            {"alone": "actor/sft_loss", "beside": "actor/imitation_loss"},
        ),
        Panel(
            "dpo",
            "DPO",
            "Its loss, and the share of pairs in which the policy has come to prefer the teacher.",
            {"loss": "actor/dpo_loss", "accuracy": "actor/dpo_acc"},
        ),
        Panel(
            "grad_norm",
            "Gradient norms",
            "Before clipping.",
            {"actor": "actor/grad_norm", "discriminator": "critic/grad_norm"},
        ),
    ),
    "Cost": (
        Panel(
            "memory",
            "Memory",
            "Highest so far of a process on the GPU (allocated by the actor's and the critic's step), and of the host.",
            {
                "GPU, actor": "actor/perf/max_memory_allocated_gb",
                "GPU, discriminator": "critic/perf/max_memory_allocated_gb",
                "GPU": "perf/max_memory_allocated_gb",
                "host": "actor/perf/cpu_memory_used_gb",
            },
            unit="GB",
        ),
        Panel("throughput", "Throughput", "Tokens per second and GPU.", {"": "perf/throughput"}, unit="tokens/s"),
        Panel("missing", "Missing rollouts", "Samples that were not delivered.", {"": "gad/missing_rollouts"}),
    ),
}
STEP_TIME = Panel("step_time", "Step time", "Seconds of a step by phase.", {"": "timing_s/step"}, unit="s")

COLOURS = ("#3b8bd0", "#e07b29", "#2ca27c", "#c768a8", "#b59a10", "#8a7fd6", "#d0524f", "#7a8c99")
"""Of runs, or of the curves of a single one; readable on white and on black."""
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
LEGEND_WIDTH = 75
"""Characters of legend text that fit side by side below a picture."""
LEGEND_ROW = 0.2
"""Inches that a row of it needs."""
THEMES = {"light": ("#ffffff", "#24292f", "#c9d1d9"), "dark": ("#15191f", "#d5dbe1", "#3a424c")}
"""Background, text and grid of the pictures."""


def _has(run: Run, panel: Panel) -> bool:
    return any(matching_names(run.metrics, pattern) for pattern in panel.curves.values())


def _band(panel: Panel, runs: Sequence[Run]) -> tuple[float, float] | None:
    """Where values usually lie in all of the runs that a panel shows."""
    if panel.name != "pg_clipfrac":
        return panel.band
    bands = {clip_band(run.loss_mode) for run in runs if _has(run, panel)}
    return bands.pop() if len(bands) == 1 else None


def _draw(panel: Panel, runs: Sequence[Run], theme: str) -> bytes:
    """PNG of a panel; at least one of the runs has its metrics. A run keeps its colour in all panels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    background, text, grid = THEMES[theme]
    style = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), background),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), grid),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.grid": True,
        "axes.axisbelow": True,
        "text.parse_math": False,  # a run folder may be called a$b
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        timed = [run for run in runs if _has(run, STEP_TIME)]
        rows = len(timed) if panel is STEP_TIME else 1
        figure = Figure(figsize=(6.4, 1.1 + 2.5 * rows), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, squeeze=False)[:, 0])
        if panel is STEP_TIME:
            _draw_phases(axes, timed)
        else:
            _draw_curves(axes[0], panel, runs, text)
        for axis in axes:
            axis.set_ylabel(panel.unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].set_xlabel("step")
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_curves(axis: Any, panel: Panel, runs: Sequence[Run], text_colour: str) -> None:
    names = [
        (label or _short(name), name)
        for label, pattern in panel.curves.items()
        for name in sorted({name for run in runs for name in matching_names(run.metrics, pattern)})
    ]
    legend: dict[str, Any] = {}
    if band := _band(panel, runs):
        usual = axis.axhspan(*band, color=COLOURS[2], alpha=0.13, lw=0)
        legend[f"usual: {band[0]}-{band[1]}"] = usual
    several = len(runs) > 1
    for i, run in enumerate(runs):
        for j, (label, name) in enumerate(names):
            points = series(run.metrics, name)
            if not points:
                continue
            # several runs: a colour per run, a dash per metric; one run: a colour per metric
            colour = COLOURS[(i if several else j) % len(COLOURS)]
            dash = DASHES[j % len(DASHES)] if several else "-"
            text = label if not several else f"{run.label} {label}" if len(names) > 1 else run.label
            steps, values = [step + run.offset for step in points], list(points.values())
            smooth = len(values) >= SMOOTHED_FROM
            if smooth:
                axis.plot(steps, values, color=colour, alpha=0.3, lw=0.8)
                values = running_mean(values, SMOOTHING)
            marker = "" if smooth else "o"
            (legend[text],) = axis.plot(steps, values, ls=dash, color=colour, lw=1.8, marker=marker, ms=3.5)
    for handover in {run.offset for run in runs if run.offset and _has(run, panel)}:
        axis.axvline(handover, color=text_colour, lw=1, ls="--", alpha=0.6)
        axis.annotate(" GAD", (handover, 1.01), xycoords=("data", "axes fraction"), fontsize=9)
    columns = max(1, min(3, LEGEND_WIDTH // max(map(len, legend))))
    axis.figure.set_figheight(axis.figure.get_figheight() + LEGEND_ROW * (len(legend) // columns))
    axis.figure.legend(
        list(legend.values()), list(legend), fontsize=8.5, ncols=columns, frameon=False, loc="outside lower center"
    )


def _short(name: str) -> str:
    """``val-aux/toy/rouge_l/mean@1`` -> ``toy``, ``actor/pg_loss`` -> ``pg_loss``: the part that differs."""
    parts = name.split("/")
    return "/".join(parts[1:-2]) if len(parts) > 3 else parts[-1]


def _draw_phases(axes: Sequence[Any], runs: Sequence[Run]) -> None:
    """Stacked seconds of every phase, one row per run, each with the colour of its phase in all rows."""
    phases = step_phases(runs)
    for axis, run in zip(axes, runs, strict=True):
        timed = list(series(run.metrics, "timing_s/step"))
        rows = [phase_seconds(run.metrics[step]) for step in timed]
        steps = [step + run.offset for step in timed]
        below = [0.0] * len(rows)
        for i, phase in enumerate(phases):
            seconds = [row.get(phase, 0.0) for row in rows]
            above = [low + s for low, s in zip(below, seconds, strict=True)]
            axis.fill_between(steps, below, above, step="mid", color=_phase_colour(i), lw=0, label=phase)
            below = above
        axis.set_title(run.label if len(runs) > 1 else "", fontsize=10, loc="left")
        axis.margins(x=0)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles[::-1], labels[::-1], fontsize=8.5, frameon=False, loc="outside right upper")


def _phase_colour(i: int) -> Any:
    """More phases than COLOURS: the second round is paler."""
    from matplotlib.colors import to_rgba

    return to_rgba(COLOURS[i % len(COLOURS)], 1.0 if i < len(COLOURS) else 0.5)


def step_phases(runs: Sequence[Run]) -> list[str]:
    """Names of all phases of the runs, in the order in which they ran, "other" last."""
    names = {phase: None for run in runs for row in run.metrics.values() for phase in phase_seconds(row)}
    return [*(name for name in names if name != "other"), *(["other"] if "other" in names else [])]


# ---------------------------------------------------------------------------------------------------------------- page


def page_template(file: Path) -> Any:
    """Jinja template of a self-contained page; ``style`` in it is the style sheet that all pages share."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["style"] = Markup(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    return environment.from_string(file.read_text(encoding="utf-8"))


def write_report(folders: Sequence[str | Path], output: str | Path = "report.html") -> list[Run]:
    """Write the report of the given runs, and its pictures (light) as PNGs beside it in ``<name of output>_png/``.

    Args:
        folders: run folders, or pipeline folders with stages inside; see :func:`find_runs`.
        output: the HTML file; replaced whole or not at all.

    Returns:
        The runs with their findings.

    Raises:
        ValueError: a folder holds no run, or ``output`` is no new file and no earlier report; nothing is written.
    """
    runs, output = find_runs(folders), Path(output)
    check_output(output, lambda text: "<title>GAD report: " in text)
    png_folder = output.with_name(f"{output.stem}_png")
    with alone_in(png_folder, "gad report"):
        _write(runs, output, png_folder)
    return runs


def _write(runs: Sequence[Run], output: Path, png_folder: Path) -> None:
    """Draw the pictures into their folder, and write the page."""
    from tqdm import tqdm

    drawn: dict[str, list[tuple[Panel, dict[str, str]]]] = {section: [] for section in (*SECTIONS, "Step time")}
    left_out: list[Panel] = []
    files: dict[str, bytes] = {}
    panels = [(section, panel) for section, panels in SECTIONS.items() for panel in panels] + [("Step time", STEP_TIME)]
    for section, panel in tqdm(panels, "drawing", leave=False, unit=" pictures", disable=None):
        if not any(_has(run, panel) for run in runs):
            left_out.append(panel)
            continue
        pictures = {theme: _draw(panel, runs, theme) for theme in THEMES}
        files[panel.name] = pictures["light"]
        drawn[section].append((panel, {theme: base64.b64encode(png).decode() for theme, png in pictures.items()}))

    template = page_template(Path(__file__).with_name("report.html.j2"))
    page = template.render(
        runs=runs,
        summary=_summary(runs),
        sections={section: panels for section, panels in drawn.items() if panels},
        left_out=left_out,
        samples={run.label: rows for run in runs if (rows := _samples(run))},
        settings=_settings(runs),
    )
    write_atomically(output, page)
    for panel in left_out:
        (png_folder / f"{panel.name}.png").unlink(missing_ok=True)  # of an earlier report
    for name, png in files.items():
        write_atomically(png_folder / f"{name}.png", png)


def _summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of the table at the top: name, and a text per run."""

    def mean(name: str) -> list[str]:
        values = [run.final(name) for run in runs]
        return ["" if value is None else f"{value:.4g}" for value in values]

    rows = [("steps", [str(run.last_step) for run in runs]), ("discriminator accuracy", mean("critic/d_acc"))]
    for name in sorted({name for run in runs for name in matching_names(run.metrics, ROUGE_L)}):
        values = [list(series(run.metrics, name).values()) for run in runs]
        label = f"ROUGE-L of validation, {_short(name)}: first → best → last"
        rows.append((label, [" → ".join(f"{x:.3f}" for x in (v[0], max(v), v[-1])) if v else "" for v in values]))
    rows += [(f"answer of the {side} (tokens)", mean(f"{name}/mean")) for side, name in SIDES.items()]
    rows += [("seconds per step", mean("timing_s/step")), ("tokens per second and GPU", mean("perf/throughput"))]
    return [(name, values) for name, values in rows if any(values)]


def _samples(run: Run) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Prompt, teacher's answer, and the student's as (step and ROUGE-L, text)."""
    prompts = []
    for prompt, teacher, rows in answers_over_training(list(run.samples.values()), SAMPLED_PROMPTS):
        answers = []
        for step, row in zip(run.samples, rows, strict=True):
            rouge_l = row.get("rouge_l", math.nan)
            answers.append((f"step {step}" + ("" if math.isnan(rouge_l) else f" ({rouge_l:.2f})"), row["output"]))
        prompts.append((prompt, teacher, answers))
    return prompts


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Hydra overrides side by side: key, value of every run that has a record, and whether the runs differ."""
    with_record = [run for run in runs if run.overrides]
    keys = sorted({key for run in with_record for key in run.overrides})
    rows = [(key, [run.overrides.get(key, "") for run in with_record]) for key in keys]
    return [(key, values, len(set(values)) > 1) for key, values in rows]

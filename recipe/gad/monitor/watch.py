"""``gad watch``: the state of a running stage in the terminal, from its metrics.jsonl."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from recipe.gad.monitor.rules import all_clear, apply_rules, damaged_files
from recipe.gad.run.findings import Finding, line, visible
from recipe.gad.run.log import (
    ROUGE_L,
    VAL_D_ACC,
    VAL_TWO_SAMPLE,
    VANILLA,
    MetricLog,
    matching_names,
    phase_seconds,
    read_samples,
    recorded_loss_mode,
    series,
    total_training_steps,
)

KEY_METRICS = (
    "critic/d_acc",
    VAL_D_ACC,
    VAL_TWO_SAMPLE,
    "critic/d_loss",
    "critic/score_gap",
    ROUGE_L,
    "response_length/mean",
    "teacher_response_length/mean",
    "response_length/cut_ratio",
    "actor/entropy",
    "actor/kl_loss",
    "actor/pg_clipfrac",
    "actor/sft_loss",
    "actor/dpo_loss",
    "actor/dpo_acc",
    "actor/grad_norm",
    "critic/grad_norm",
    "perf/throughput",
)
"""Shown in this order where logged (patterns)."""

LAST_STEPS = 10
"""Steps of the means: of a metric beside its last value, of the step time and its phases."""

SPARKLINE = 24
"""Characters of a sparkline."""

SHORTEST_SPARKLINE = 12
"""The table leaves the column out if it has less room: its title has as many characters."""

NUMBERS = 27
"""Characters of the columns with numbers, spaces between the columns included."""

QUIET_STEPS = 5
QUIET_SECONDS = 60
"""No new line for five step times, and a minute at least: the run may have stopped. Validation and saving take longer
than a step, and the first step of a run longer still."""

STYLES = {"error": "bold red", "warning": "yellow", "ok": "cyan"}


def sparkline(values: Sequence[float], width: int = SPARKLINE) -> str:
    """Up to ``width`` means of neighbouring values as blocks, lowest to highest; "×" where not finite."""
    blocks = "▁▂▃▄▅▆▇█"
    if not len(values):
        return ""
    means = [float(np.mean(part)) for part in np.array_split(np.asarray(values, dtype=float), min(width, len(values)))]
    finite = [mean for mean in means if np.isfinite(mean)]
    if not finite:
        return "×" * len(means)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    top = len(blocks) - 1
    return "".join(blocks[round((mean - low) / span * top)] if np.isfinite(mean) else "×" for mean in means)


def duration(seconds: float) -> str:
    """``4 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class RunState:
    """The state of a run folder; :meth:`update` reads what was added since."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self.log = MetricLog(self.run_dir / "metrics.jsonl")
        self.total_steps: int | None = None
        self.findings: list[Finding] = []

    def update(self) -> bool:
        """Read what is new; returns whether there was anything."""
        if not self.log.update():
            return False
        left_out, loss_mode = list(self.log.damaged), VANILLA
        try:
            self.total_steps = total_training_steps(self.run_dir)
            loss_mode = recorded_loss_mode(self.run_dir)
        except ValueError as error:
            left_out.append(str(error))
        samples, _ = read_samples(self.run_dir, 1, self.log.metrics)
        findings, _ = apply_rules(self.log.metrics, next(iter(samples.values()), ()), loss_mode)
        self.findings = [*damaged_files(left_out), *findings]
        return True

    @property
    def last_step(self) -> int:
        return max(self.log.metrics)

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and bool(self.log.metrics) and self.last_step >= self.total_steps

    @property
    def quiet_seconds(self) -> float:
        """Seconds since the last line was written."""
        return max(0.0, time.time() - self.log.modified)

    def step_seconds(self) -> float | None:
        """Mean of the last steps."""
        seconds = [value for value in series(self.log.metrics, "timing_s/step").values() if np.isfinite(value)]
        seconds = seconds[-LAST_STEPS:]
        return sum(seconds) / len(seconds) if seconds else None

    def phases(self) -> dict[str, float]:
        """Mean seconds of every phase over the last steps."""
        rows = [row for _, row in sorted(self.log.metrics.items()) if "timing_s/step" in row][-LAST_STEPS:]
        sums: dict[str, float] = {}
        for row in rows:
            for phase, seconds in phase_seconds(row).items():
                sums[phase] = sums.get(phase, 0.0) + seconds / len(rows)
        return sums

    def headline(self) -> str:
        """``gad  step 30/100  2.1 s per step  2 min left``, and how long the run has been silent if that is long."""
        seconds = self.step_seconds()
        parts = [visible(self.run_dir.resolve().name)]
        parts.append(f"step {self.last_step}" + (f"/{self.total_steps}" if self.total_steps else ""))
        if seconds is not None:
            parts.append(f"{seconds:.3g} s per step")
        if self.finished:
            parts.append("finished")
        else:
            if seconds is not None and self.total_steps:
                parts.append(f"{duration(seconds * (self.total_steps - self.last_step))} left")
            if self.quiet_seconds > max(QUIET_SECONDS, QUIET_STEPS * (seconds or 0.0)):
                parts.append(f"silent for {duration(self.quiet_seconds)}: has it stopped?")
        return "  ".join(parts)

    def line(self, width: int | None = None) -> str:
        """The last step as one line of text: the headline, and the metrics that fit ``width`` characters."""
        names = [name for pattern in KEY_METRICS for name in matching_names(self.log.metrics, pattern)]
        row, text = self.log.metrics[self.last_step], self.headline()
        for part in (f"  {name} {row[name]:.4g}" for name in names if name in row):
            if width is None or len(text) + len(part) <= width:
                text += part
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.shown(options.max_width)

    def shown(self, width: int) -> RenderableType:
        """Headline, findings, a table of the metrics and the times of the phases, for ``width`` characters."""
        if not self.log.metrics:
            return Text(visible(f"{self.run_dir}: waiting for the first step ({self.log.path})"))
        parts: list[RenderableType] = [Text(self.headline(), style="bold")]
        if self.total_steps:
            bar = Table.grid()
            bar.add_row(ProgressBar(total=self.total_steps, completed=self.last_step, width=60))
            parts.append(bar)
        findings = [Text(line(finding), style=STYLES[finding.level]) for finding in self.findings]
        parts += [*(findings or [Text(all_clear(self.log.metrics), style="green")]), Text()]
        names = [name for pattern in KEY_METRICS for name in matching_names(self.log.metrics, pattern)]
        room = width - max(map(len, names), default=0) - NUMBERS  # names are whole: they tell the rows apart
        table = Table("metric", box=None, padding=(0, 2, 0, 0))
        if room >= SHORTEST_SPARKLINE:
            table.add_column("over the run", no_wrap=True)
        table.add_column("last", no_wrap=True)
        if room >= 0:
            table.add_column(f"mean of {LAST_STEPS}", no_wrap=True)
        table.columns[0].no_wrap = True
        for name in names:
            values = list(series(self.log.metrics, name).values())
            curve = [sparkline(values, min(room, SPARKLINE))] if room >= SHORTEST_SPARKLINE else []
            mean = [f"{float(np.mean(values[-LAST_STEPS:])):.4g}"] if room >= 0 else []
            table.add_row(Text(name), *curve, f"{values[-1]:.4g}", *mean)
        parts += [table, Text()]
        if phases := self.phases():
            seconds = (f"{phase} {value:.2g}s" for phase, value in phases.items())
            parts.append(Text("step time  " + "  ".join(seconds)))
        return Group(*parts)


def watch(run_dir: str | Path, once: bool = False, interval: float = 2.0) -> None:
    """Show a run until its last step, if the configuration names it, or until Ctrl-C.

    Args:
        run_dir: folder of one run; it may not have logged anything yet, unless ``once``.
        once: print the state of now and return.
        interval: seconds between two looks at the file.

    Raises:
        ValueError: no such folder, or nothing logged (``once``).
    """
    if not Path(run_dir).is_dir():
        raise ValueError(f"no folder {run_dir}; give the --output_dir of a run")
    state, console = RunState(run_dir), Console()
    stages = sorted(str(path.parent) for path in Path(run_dir).glob("*/metrics.jsonl"))
    if stages and not state.log.path.is_file():
        raise ValueError(f"{run_dir} is a pipeline folder; watch one of its stages: {', '.join(stages)}")
    if once:
        state.update()
        if not state.log.metrics:
            damaged = state.log.damaged
            raise ValueError(damaged[0] if damaged else f"{state.log.path} has no complete line: nothing is logged yet")
        console.print(state)
        return
    try:
        if console.is_terminal:
            with Live(state, console=console, auto_refresh=False) as live:
                for _ in _looks(state, interval):
                    live.refresh()
        else:
            _print_lines(state, interval)
    except KeyboardInterrupt:  # the way to end it
        pass


def _looks(state: RunState, interval: float) -> Iterator[bool]:
    """Look at the log now and every ``interval`` seconds, until the run has finished; whether it has grown."""
    yield state.update()
    while not state.finished:
        time.sleep(interval)
        yield state.update()


def _print_lines(state: RunState, interval: float) -> None:
    """Print a line whenever the log has grown, and every finding when it is first made."""
    news = News(state)
    for has_grown in _looks(state, interval):
        for text in news.lines() if has_grown else ():
            print(text, flush=True)


class News:
    """What to print of a run whose log has grown."""

    def __init__(self, state: RunState, width: int | None = None):
        self.state, self.width = state, width
        self._told: set[str] = set()

    def lines(self) -> list[str]:
        """The last step, and the findings that the call before did not have."""
        if not self.state.log.metrics:
            return []
        new = [line(finding) for finding in self.state.findings if finding.what not in self._told]
        self._told = {finding.what for finding in self.state.findings}
        return [self.state.line(self.width), *new]

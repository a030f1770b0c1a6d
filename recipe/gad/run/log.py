"""Reads what a training run leaves in its folder: metrics, validation samples and settings.

    RUN_DIR/metrics.jsonl            verl's file logger: a line {"step": 3, "data": {"critic/d_acc": 0.9, ...}} per step
    RUN_DIR/val_samples/<step>.jsonl verl's validation dump: input, output, gts (the teacher's answer), score, ...
    RUN_DIR/hydra/.hydra/*.yaml      the settings, as Hydra records them

The run may still be writing: a last line without its newline does not count yet.
"""

import json
import math
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from recipe.gad.run.findings import visible

Metrics = dict[int, dict[str, float]]
"""Step -> name -> value; NaN where the logger wrote null, which is how it writes NaN and the infinities, or a number
beyond :data:`LARGEST`. Control characters in names are escaped."""

LARGEST = 1e100
"""Largest value that counts as finite; sums and squares of larger ones overflow."""
LAST_STEP = 2**53

ROUGE_L = "val-aux/*/rouge_l/mean@*"
"""Name pattern of the validation answers' ROUGE-L against the teacher's, one metric per data source."""

VAL_D_ACC = "val-aux/d_acc"
"""Name of the discriminator's accuracy on the validation prompts."""

VAL_TWO_SAMPLE = "val-aux/two_sample"
"""Name of the accuracy of discriminators that are trained anew in every validation (gad.fresh_discriminator)."""

VANILLA = "vanilla"
"""verl's default of actor_rollout_ref.actor.policy_loss.loss_mode: the loss of PPO."""


class MetricLog:
    """``metrics.jsonl`` of a run that may still be running; every :meth:`update` reads only the new lines.

    ``damaged`` names the complete lines that the logger did not write so, with the reason; they are left out.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._restart(None)

    def _restart(self, identity: tuple[int, int] | None) -> None:
        self.metrics: Metrics = {}
        self.damaged: list[str] = []
        self.modified = 0.0  # seconds since the epoch
        self._identity = identity
        self._offset = self._lines = 0

    def update(self) -> bool:
        """Read the lines added since the last call (all of them if a resumed run has replaced the file).

        Returns:
            Whether there were any; False while there is no file.
        """
        if not self.path.is_file():
            return False
        with open(self.path, "rb") as file:
            stat = os.fstat(file.fileno())
            restarted = (stat.st_dev, stat.st_ino) != self._identity or stat.st_size < self._offset
            if restarted:
                self._restart((stat.st_dev, stat.st_ino))
            self.modified = stat.st_mtime
            file.seek(self._offset)
            added = file.read()
        added = added[: added.rfind(b"\n") + 1]
        for line in added.split(b"\n")[:-1]:
            self._lines += 1
            try:
                self._take(_parse_line(line))
            except ValueError as error:
                self.damaged.append(f"{self.path}, line {self._lines}: {error}")
        self._offset += len(added)
        return restarted or bool(added)

    def _take(self, row: dict) -> None:
        step, data = row.get("step"), row.get("data")
        if type(step) is not int or abs(step) > LAST_STEP or not isinstance(data, dict):
            raise ValueError(f'expected {{"step": ..., "data": {{...}}}}, got {str(row)[:80]}')
        numbers = {name: value for name, value in data.items() if value is None or isinstance(value, int | float)}
        self.metrics.setdefault(step, {}).update({visible(name): _number(v) for name, v in numbers.items()})


def _number(value: float | None) -> float:
    return float(value) if value is not None and abs(value) <= LARGEST else math.nan


def _parse_line(line: bytes) -> dict:
    """The JSON object of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    return row


def load_metrics(jsonl_path: str | Path, damaged: list[str] | None = None) -> Metrics:
    """All metrics of a run.

    Args:
        jsonl_path: the run's ``metrics.jsonl``.
        damaged: gets a text for each line that is not one that the logger writes; such a line is left out.

    Raises:
        ValueError: there is no file or no complete line; or, without ``damaged``, a line is not the logger's.
    """
    log = MetricLog(jsonl_path)
    log.update()
    if log.damaged and (damaged is None or not log.metrics):
        raise ValueError(log.damaged[0])
    if not log.metrics:
        raise ValueError(f"{log.path} has no complete line" if log.path.is_file() else f"no file {log.path}")
    if damaged is not None:
        damaged += log.damaged
    return log.metrics


def matching_names(metrics: Metrics, pattern: str) -> list[str]:
    """Sorted metric names that match ``pattern`` (shell wildcards) in any step."""
    return sorted({name for row in metrics.values() for name in row if fnmatchcase(name, pattern)})


def series(metrics: Metrics, name: str) -> dict[int, float]:
    """Step -> value of one metric, in the order of the steps; empty if the run never logged it."""
    return {step: metrics[step][name] for step in sorted(metrics) if name in metrics[step]}


def phase_seconds(row: dict[str, float]) -> dict[str, float]:
    """Seconds of the phases of one step (a row of :data:`Metrics`), in order; "other" is the rest of the step."""
    phases = {
        name.removeprefix("timing_s/"): seconds
        for name, seconds in row.items()
        if name.startswith("timing_s/") and name != "timing_s/step" and math.isfinite(seconds)
    }
    if "timing_s/step" in row:
        phases["other"] = max(0.0, row["timing_s/step"] - sum(phases.values()))
    return phases


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of every value and the up to ``width - 1`` values before it."""
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def dump_files(folder: str | Path) -> dict[int, Path]:
    """Validation dumps ``<step>.jsonl`` of a folder by step, in order; empty if there are none."""
    files = {int(path.stem): path for path in Path(folder).glob("*.jsonl") if path.stem.isdecimal()}
    return dict(sorted(files.items()))


def read_dump(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a validation dump.

    Raises:
        ValueError: there is no complete row, or a row lacks one of the texts input, output and gts.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = _parse_line(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not all(isinstance(row.get(key), str) for key in ("input", "output", "gts")):
            raise ValueError(f"{path}, line {number}: needs the texts input, output and gts, got {str(row)[:80]}")
        if "rouge_l" in row:
            score = row["rouge_l"]
            row["rouge_l"] = _number(score) if isinstance(score, int | float) else math.nan
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no complete line")
    return rows


def read_samples(run_dir: str | Path, n: int, metrics: Metrics) -> tuple[dict[int, list[dict]], list[str]]:
    """Rows of up to ``n`` validation dumps of a run, by step: the last, the first, and evenly spaced ones between.

    A dump that cannot be read is left out, because samples are optional. So is a dump of a step at which ``metrics``,
    those of the run, have no validation: a run that went back to an earlier checkpoint leaves dumps of later steps.

    Returns:
        The rows by step, and a line of text for what is left out.
    """
    files = dump_files(Path(run_dir) / "val_samples")
    validated = {step for step, row in metrics.items() if any(name.startswith("val-") for name in row)}
    other = [step for step in files if validated and step not in validated]
    steps = [step for step in files if step not in other]
    if len(steps) > n:
        steps = sorted({steps[-1 - round(i * (len(steps) - 1) / max(1, n - 1))] for i in range(n)})
    samples, left_out = {}, []
    if other:
        shown = ", ".join(map(str, other))
        left_out.append(f"samples of step {shown} are left out: the run's metrics have no validation at that step")
    for step in steps:
        try:
            samples[step] = read_dump(files[step])
        except ValueError as error:
            left_out.append(f"samples of step {step} are left out: {error}")
    return samples, left_out


def answers_over_training(dumps: Sequence[list[dict]], k: int) -> list[tuple[str, str, list[dict]]]:
    """First ``k`` prompts (sorted) that are in all dumps, as (prompt, teacher's answer, its row in every dump)."""
    by_prompt = [{(row["input"], row["gts"]): row for row in dump} for dump in dumps]
    shared = sorted(set.intersection(*(set(rows) for rows in by_prompt))) if by_prompt else []
    return [(*key, [rows[key] for rows in by_prompt]) for key in shared[:k]]


def read_overrides(run_dir: str | Path) -> dict[str, str]:
    """Hydra overrides of a run: key -> last value given; empty if Hydra left no record.

    The environment of the Ray workers (``ray_kwargs``) is left out: it may hold API keys, and reports are shared.
    """
    path = Path(run_dir) / "hydra/.hydra/overrides.yaml"
    overrides = _read_yaml(path, list)
    if not all(isinstance(text, str) for text in overrides):
        raise ValueError(f"{path} holds more than texts, expected a list of overrides as Hydra writes it")
    pairs = (text.lstrip("+~").partition("=") for text in overrides)
    return {key: value for key, _, value in pairs if not key.startswith("ray_kwargs")}


def total_training_steps(run_dir: str | Path) -> int | None:
    """``trainer.total_training_steps`` of a run; None if it is not a number, or if Hydra left no record."""
    steps = recorded_value(run_dir, "trainer.total_training_steps")
    return steps if isinstance(steps, int) and 0 < steps <= LAST_STEP else None


def _read_yaml(path: Path, kind: type) -> Any:
    """Value of a YAML file; an empty ``kind`` if the file is missing or empty.

    Raises:
        ValueError: the file is not YAML, or holds another kind of value.
    """
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or the 99th of a month
        raise ValueError(f"{path} is not readable YAML ({' '.join(str(error).split())})") from None
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a {kind.__name__} as Hydra writes it")
    return value


def recorded_config(run_dir: str | Path) -> dict[str, Any]:
    """Configuration of a run as Hydra recorded it, interpolations unresolved; empty if Hydra left no record.

    Raises:
        ValueError: the record is not YAML, or not a mapping.
    """
    return _read_yaml(Path(run_dir) / "hydra/.hydra/config.yaml", dict)


def recorded_value(run_dir: str | Path, key: str) -> Any:
    """Value of a dotted key in :func:`recorded_config`; None if it is not there."""
    value: Any = recorded_config(run_dir)
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def recorded_loss_mode(run_dir: str | Path) -> str:
    """``actor_rollout_ref.actor.policy_loss.loss_mode`` of a run; vanilla if Hydra left no record."""
    mode = recorded_value(run_dir, "actor_rollout_ref.actor.policy_loss.loss_mode")
    return mode if isinstance(mode, str) else VANILLA

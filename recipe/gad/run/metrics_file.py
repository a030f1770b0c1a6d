"""The lines with which a resumed run continues ``metrics.jsonl``.

A run may be killed after a save and before the line of that step. The save therefore holds the training metrics of its
step in ``global_step_N/metrics.json``, and the resumed run logs them with the validation with which it starts.
"""

import json
from pathlib import Path
from typing import Any

from recipe.gad.run.atomic_io import read_object

FILE = "metrics.json"


def continued(
    lines: list[bytes], step: int, data: dict[str, Any], run_dir: Path
) -> tuple[list[bytes], dict[str, Any] | None]:
    """What the file of a resumed run starts with.

    A resumed run starts with a validation at its checkpoint's step, or without one with the next step. A run that is at
    step 0 has resumed nothing.

    Args:
        lines: the whole lines of the interrupted run.
        step: step of the resumed run's first line.
        data: metrics of that line.
        run_dir: holds the checkpoints.

    Returns:
        The lines that stay, and the metrics to log after them; None if a line of ``step`` is among those that stay.

    Raises:
        InputError: the metrics in the checkpoint are damaged.
    """
    steps = [json.loads(line)["step"] for line in lines]
    trains = "training/global_step" in data
    resumed = step - 1 if trains or step == 0 else step
    kept = [line for line, s in zip(lines, steps, strict=True) if s <= resumed]
    file = run_dir / f"global_step_{resumed}" / FILE
    if resumed in steps or not file.is_file():
        return kept, None if resumed == step and resumed in steps else data
    saved = read_object(file, fix=f"remove it; the log then lacks the training metrics of step {resumed}")
    if trains:
        return [*kept, json.dumps({"step": resumed, "data": saved}).encode() + b"\n"], data
    return kept, {**saved, **data}

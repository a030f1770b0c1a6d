"""When a run must stop because its numbers have broken: several steps in a row with NaN or infinite metrics.

The optimizer skips a step whose gradient is not finite. One such step harms nothing, but a side whose weights have
broken skips every step, and the run would train on without it.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transfer_queue as tq

from recipe.gad.run.atomic_io import write_atomically
from recipe.gad.run.checkpoint import current_steps, resume_problems
from recipe.gad.run.findings import error

SIDES = ("actor/", "critic/")
"""Prefixes of the metrics that must be finite: losses, gradients and scores of both sides."""


class BrokenRunError(RuntimeError):
    """Training has broken: the message names metrics, steps, what was saved, and the last good checkpoint."""


def not_finite(metrics: dict[str, Any]) -> list[str]:
    """Sorted names of NaN or infinite metrics of the actor or the discriminator."""
    numbers = {name: value for name, value in metrics.items() if name.startswith(SIDES)}
    return sorted(name for name, value in numbers.items() if not math.isfinite(value))


class BadSteps:
    """Counts bad steps in a row.

    Args:
        limit: ``gad.stop_after_bad_steps``; 0 never stops.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_a_row = 0

    def must_stop(self, metrics: dict[str, Any]) -> bool:
        """Count the step of ``metrics``, and log the count in it as ``gad/bad_steps``."""
        self.in_a_row = self.in_a_row + 1 if not_finite(metrics) else 0
        metrics["gad/bad_steps"] = self.in_a_row
        return 0 < self.limit <= self.in_a_row

    def stop(self, folder: str | Path, step: int, metrics: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
        """Save what broke into ``bad_step_N`` of the run's folder, and raise.

        Args:
            folder: the run's output folder.
            step: the step of ``metrics``, the last of the bad ones.
            rows: the texts of the step, one JSON object each.

        Raises:
            BrokenRunError: always.
        """
        saved = Path(folder) / f"bad_step_{step}"
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        write_atomically(saved / "metrics.json", json.dumps(numbers, indent=1))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(saved / "rows.jsonl", "".join(lines))
        first = step - self.in_a_row + 1
        good = [n for n, path in current_steps(folder).items() if n < first and not resume_problems(path, False)]
        fix = "lower optim.lr and optim.clip_grad of that side (actor_rollout_ref.actor or critic), and start again"
        if good:
            path = Path(folder) / f"global_step_{good[-1]}"
            fix += f" from the last good checkpoint: trainer.resume_mode=resume_path trainer.resume_from_path={path}"
        else:
            fix += "; no checkpoint was saved before it"
        steps = f"steps {first} to {step} have" if first < step else f"step {step} has"
        what = (
            f"{steps} NaN or infinite metrics ({', '.join(not_finite(metrics))}), and "
            f"gad.stop_after_bad_steps={self.limit}. The rows and metrics of step {step} are in {saved}"
        )
        raise BrokenRunError(str(error(what, fix)))


def texts(tokenizer: Any, keys: list[str], partition_id: str) -> list[dict[str, str]]:
    """Prompt and answer of rows in TransferQueue, special tokens included."""
    data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["prompts", "responses"])
    columns = [[tokenizer.decode(ids) for ids in data[name].unbind()] for name in ("prompts", "responses")]
    return [{"key": key, "prompt": p, "answer": a} for key, p, a in zip(keys, *columns, strict=True)]

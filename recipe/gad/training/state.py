"""What a resumed run needs besides stock checkpoints: ``global_step_N/gad_state.pt`` and ``metrics.json``."""

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import orjson
import torch

from recipe.gad.run import metrics_file
from recipe.gad.run.atomic_io import write_atomically
from recipe.gad.run.findings import InputError

logger = logging.getLogger(__name__)

STATE = "gad_state.pt"
UNFINISHED = ("timing_", "perf/time_per_step", "perf/throughput")
"""Metrics of the whole step's time, which a save is a part of."""


def save_state(step_folder: str | Path, state: dict[str, Any]) -> None:
    """Write the state of the parts of a run that are switched on, atomically; nothing if there are none.

    Args:
        step_folder: ``global_step_N``; created if it is missing.
        state: name of a part -> its state, plain data or tensors.
    """
    if state:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(Path(step_folder) / STATE, buffer.getvalue())


def load_state(step_folder: str | Path, names: set[str]) -> dict[str, Any]:
    """State of the named parts. A part that was off when the checkpoint was saved is left out, with a warning.

    Raises:
        InputError: the file is damaged, or holds more than plain data and tensors.
    """
    file = Path(step_folder) / STATE
    try:
        state = torch.load(file, weights_only=True) if names and file.is_file() else {}
    except (RuntimeError, EOFError, pickle.UnpicklingError) as broken:
        raise InputError(
            f"{file} is damaged, or holds more than the plain data that a run writes ({type(broken).__name__})",
            fix="resume from another checkpoint (trainer.resume_mode=resume_path)",
        ) from broken
    for name in sorted(names - set(state)):
        logger.warning("%s holds no state of %s, which starts anew", file, name)
    return {name: state[name] for name in names & set(state)}


def save_metrics(trainer: Any, batch: Any, metrics: dict[str, Any], step_folder: str | Path) -> None:
    """Write the training metrics of the step now running, those of its time apart, as the step's line will hold them.

    Args:
        trainer: its ``_compute_metrics`` adds those of the batch. The trainer does not change.
        batch: what the trainer's ``step`` has returned; its rows are still in the queue.
        metrics: what ``step`` has measured, left as it is.
        step_folder: ``global_step_N``; created if it is missing.
    """
    view, measured, step = copy.copy(trainer), dict(metrics), trainer.global_steps
    view._rollout_moe_lb_metrics_accumulator = copy.deepcopy(trainer._rollout_moe_lb_metrics_accumulator)
    epoch = (step - 1) // trainer.steps_per_epoch
    view._compute_metrics(batch, measured, {"step": 1.0, **trainer.timing_raw}, global_steps=step, epoch=epoch)
    data = {name: value for name, value in measured.items() if not name.startswith(UNFINISHED)}
    write_atomically(Path(step_folder) / metrics_file.FILE, orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY))

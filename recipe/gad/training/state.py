"""What a resumed run needs besides stock checkpoints: ``global_step_N/gad_state.pt``."""

import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from recipe.gad.run.atomic_io import write_atomically
from recipe.gad.run.findings import InputError

logger = logging.getLogger(__name__)

STATE = "gad_state.pt"


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

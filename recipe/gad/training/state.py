"""What a resumed run needs besides stock checkpoints: ``global_step_N/gad_state.pt``."""

import io
import logging
from pathlib import Path
from typing import Any

import torch

from recipe.gad.run.atomic_io import write_atomically

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
    """State of the named parts. A part that was off when the checkpoint was saved is left out, with a warning."""
    file = Path(step_folder) / STATE
    state = torch.load(file, weights_only=False) if names and file.is_file() else {}
    for name in sorted(names - set(state)):
        logger.warning("%s holds no state of %s, which starts anew", file, name)
    return {name: state[name] for name in names & set(state)}

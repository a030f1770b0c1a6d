"""The disk under a run's checkpoints: a save that cannot fit is not begun, and one that fails names the full disk."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from recipe.gad.run.checkpoint import ROLES, resume_problems, step_folders, tracked_step
from recipe.gad.run.findings import InputError

FULL = 16 << 20
"""Free bytes below which the disk is to blame for a failed save; verl's writers may not pass on the system's reason."""
REASONS = ("No space left on device", "Disk quota exceeded")
CUT_OFF = "inline_container"
"""In torch's message about a file that took a part of what it wrote: the disk was full, and may have room again."""


def shown(size: float) -> str:
    """Bytes in the unit that leaves at least one digit before the point: ``1.5 GiB``, ``40.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of ``folder``, which need not exist."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def names_full_disk(problem: Exception) -> bool:
    """Does an error give a full disk as its reason? Some libraries pass the system's reason on as text only."""
    return any(reason in str(problem) for reason in REASONS)


def full_disk(folder: Path) -> str:
    """``the disk of DIR is full (1.5 KiB are free)``."""
    return f"the disk of {folder} is full ({shown(free_bytes(folder))} are free)"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class DiskWatch:
    """Compares the free disk with the size of the last checkpoint before each save.

    Args:
        config: of the run.
    """

    def __init__(self, config: DictConfig):
        self.folder = Path(config.trainer.default_local_dir).absolute()
        self._keep = {role: config.trainer.get(f"max_{role}_ckpt_to_keep") or 0 for role in ROLES}
        self._saves = 0

    @contextmanager
    def save(self, step_folder: Path) -> Iterator[None]:
        """Surround a save into ``global_step_N``.

        Raises:
            InputError: the save cannot fit, or it has failed and the disk is full. Names the folder, the free space and
                the last good checkpoint.
        """
        at, step = tracked_step(self.folder) or 0, int(step_folder.name.removeprefix("global_step_"))
        earlier = [path for n, path in step_folders(self.folder).items() if n < step and n <= at]
        good = [path for path in earlier if not resume_problems(path, False)]
        last = f"the last good checkpoint is {good[-1].name}" if good else "no checkpoint was saved before it"
        fix = "free space there, or set a smaller trainer.max_actor_ckpt_to_keep and trainer.max_critic_ckpt_to_keep, "
        fix += "and rerun the same command to resume"
        if good:
            needed, free = self._needed(good[-1]), free_bytes(self.folder) + _size(step_folder)
            if needed > free:
                raise InputError(
                    f"the save of {step_folder.name} needs about {shown(needed)}, as {good[-1].name} takes, and "
                    f"{shown(free)} are free at {self.folder}: the run ends before it; {last}",
                    fix,
                )
        try:
            yield
        except Exception as problem:
            if names_full_disk(problem) or free_bytes(self.folder) < FULL:
                found = f"{full_disk(self.folder)}, so the save of {step_folder.name} failed"
            elif CUT_OFF in str(problem):
                found = f"the save of {step_folder.name} failed because a file was cut off, as on a full disk; "
                found += f"{shown(free_bytes(self.folder))} are free now at {self.folder}"
            else:
                raise
            raise InputError(f"{found}; {last}", fix) from problem
        self._saves += 1

    def _needed(self, last: Path) -> int:
        """Bytes of ``last``, without the roles whose oldest checkpoint verl removes before it saves the next."""
        replaced = [role for role, keep in self._keep.items() if 1 < keep <= self._saves]
        return _size(last) - sum(_size(last / role) for role in replaced)

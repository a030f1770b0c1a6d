"""Extends stock ``verl.trainer.ppo.v1``: importing the package also registers the GAD trainer (trainer_mode "gad").

verl looks trainers up by name in every process.
Goes when: a configuration key names a trainer class by module path.
"""

from verl.trainer.ppo.v1.trainer_gad import PPOTrainerGAD

__all__ = ["PPOTrainerGAD"]

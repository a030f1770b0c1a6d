"""Extends stock ``verl.trainer.ppo.v1``: importing the package also registers the GAD trainer (trainer_mode "gad")."""

from verl.trainer.ppo.v1.trainer_gad import PPOTrainerGAD

__all__ = ["PPOTrainerGAD"]

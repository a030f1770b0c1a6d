"""Extends stock ``verl.workers.rollout.base``: the trainer's side of the Hugging Face rollout (``rollout.name=hf``).

Stock keeps rollouts in a private dictionary without a register function.
Goes when: that function exists, or verl ships a Hugging Face replica.
"""

from verl.workers.rollout.base import _ROLLOUT_REGISTRY

_ROLLOUT_REGISTRY[("hf", "async")] = "recipe.gad.cpu.hf_replica.ServerAdapter"

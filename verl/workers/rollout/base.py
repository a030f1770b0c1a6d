"""Extends stock ``verl.workers.rollout.base``: knows the Hugging Face rollout (``rollout.name=hf``) on the trainer's side."""

from verl.workers.rollout.base import _ROLLOUT_REGISTRY

_ROLLOUT_REGISTRY[("hf", "async")] = "verl.workers.rollout.hf_replica.ServerAdapter"

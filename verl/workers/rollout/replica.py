"""Extends stock ``verl.workers.rollout.replica``: knows the Hugging Face replica (``rollout.name=hf``)."""

from verl.workers.rollout.replica import RolloutReplicaRegistry


def _load_hf():
    from recipe.gad.cpu.hf_replica import HFReplica

    return HFReplica


RolloutReplicaRegistry.register("hf", _load_hf)

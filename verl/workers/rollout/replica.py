"""Extends stock ``verl.workers.rollout.replica``: knows the Hugging Face replica (``rollout.name=hf``).

The registry has to know it in every process, including those that import none of our other modules.
Goes when: the configuration can name a replica by module path, or verl ships a Hugging Face replica.
"""

from verl.workers.rollout.replica import RolloutReplicaRegistry


def _load_hf():
    from recipe.gad.cpu.hf_replica import HFReplica

    return HFReplica


RolloutReplicaRegistry.register("hf", _load_hf)

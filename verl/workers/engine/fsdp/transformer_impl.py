"""Extends stock ``verl.workers.engine.fsdp.transformer_impl``: FSDP2 on the CPU platform; log-probs without flash-attn.

Stock registers its engines for cuda and npu only, and gives a forward-only model (the reference) a CPU offload policy
with pinned memory, which needs an accelerator. Without flash-attn, it loops over single tokens.
Goes when: stock FSDP2 runs on a CPU, and stock log-probabilities of packed tokens need no loop over tokens.
"""

import torch

from recipe.gad.training.log_probs import logprobs_from_logits  # noqa: F401 (stock code below calls it)
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead, FSDPEngineWithValueHead


class _CPUEngineMixin(FSDPEngine):
    """Builds a forward-only model like a trained one (there is nowhere to offload to), and new weights from a seed."""

    def _build_module(self):
        # the score head of a critic that starts from a language model is drawn at random: by engine_config.seed here,
        # so that a run repeats itself
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            return super()._build_module()

    def _build_lora_module(self, module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.engine_config.seed)
            return super()._build_lora_module(module)

    def _build_fsdp_module(self, module):
        forward_only = self.engine_config.forward_only
        object.__setattr__(self.engine_config, "forward_only", False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            object.__setattr__(self.engine_config, "forward_only", forward_only)


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")
class CPUFSDPEngineWithLMHead(_CPUEngineMixin, FSDPEngineWithLMHead):
    """Stock FSDP2 language model on CPUs."""


@EngineRegistry.register(model_type="value_model", backend=["fsdp2"], device="cpu")
class CPUFSDPEngineWithValueHead(_CPUEngineMixin, FSDPEngineWithValueHead):
    """Stock FSDP2 value model on CPUs."""

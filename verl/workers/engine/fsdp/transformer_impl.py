"""Extends stock ``verl.workers.engine.fsdp.transformer_impl``: FSDP2 on the CPU, log-probs without flash-attn, critics.

Stock registers its engines for cuda and npu only, and offloads a forward-only model (the reference) to pinned memory,
which needs an accelerator. Without flash-attn, it loops over tokens. It sets a critic's hidden_dropout to a text.
Goes when: stock FSDP2 runs on a CPU, stock log-probs need no loop over tokens, and hidden_dropout is set to a number.
"""

import torch

from recipe.gad.training.log_probs import logprobs_from_logits  # noqa: F401 (stock code below calls it)
from recipe.gad.training.value_head import with_number_dropout
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead, FSDPEngineWithValueHead

FSDPEngineWithValueHead._build_module = with_number_dropout(FSDPEngine._build_module)


class _CPUEngineMixin(FSDPEngine):
    """Builds a forward-only model like a trained one (there is nowhere to offload to), and new weights from a seed."""

    def _build_module(self):
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

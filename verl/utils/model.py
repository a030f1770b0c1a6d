"""Extends stock ``verl.utils.model``: how a critic is built.

Stock ``load_valuehead_model`` hard-codes flash_attention_2: without the flash_attn package no critic can be built. Here
the one that ``critic.model.override_config.attn_implementation`` names is used; flash_attention_2 stays the default.
Families without a token-classification class in transformers get one (recipe/gad/run/score_head.py).

With ``critic.model.override_config.float32_score_head=True`` (gad_trainer.yaml sets it) the score head computes in
float32, since bfloat16 rounds scores of different answers to the same reward.
Goes when: the stock function honors ``attn_implementation`` and a dtype for the score head, for every causal LM.
"""

import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

from recipe.gad.run.score_head import check_loaded, register_discriminator
from verl.utils.model import load_valuehead_model as _stock_load_valuehead_model


class _Float32Linear(torch.nn.Linear):
    """A linear layer that computes in float32, whatever autocast and the dtype of its sharded weights are."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden.float(), self.weight.float(), bias)


def load_valuehead_model(
    local_path: str, torch_dtype, model_config: PretrainedConfig, trust_remote_code: bool
) -> PreTrainedModel:
    """A token-classification model with one label; with flash attention and no ``float32_score_head``, stock verl's.

    ``model_config`` is a Hugging Face config; its attention implementation and ``float32_score_head`` are used.

    Raises:
        InputError: the family cannot be a discriminator, or a weight other than the score head's would be random.
    """
    attention = getattr(model_config, "_attn_implementation", None) or "flash_attention_2"
    float32 = getattr(model_config, "float32_score_head", None)
    if attention == "flash_attention_2" and float32 is None:  # no GAD run
        return _stock_load_valuehead_model(local_path, torch_dtype, model_config, trust_remote_code)
    register_discriminator(model_config, trust_remote_code)
    model, info = AutoModelForTokenClassification.from_pretrained(
        local_path,
        torch_dtype=torch_dtype,
        config=model_config,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    check_loaded(info, local_path)
    head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if float32 and isinstance(head, torch.nn.Linear):
        head.__class__ = _Float32Linear  # not a new module: its weights, name and place in the model stay
    return model

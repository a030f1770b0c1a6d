"""Extends stock ``verl.utils.model``: how a critic is built.

Stock ``load_valuehead_model`` hard-codes flash_attention_2, so without the flash_attn package a critic cannot be built
even if ``critic.model.override_config.attn_implementation`` asks for another one (the error then asks for trl). Here
the attention asked for is used; the default stays flash_attention_2.

With ``critic.model.override_config.float32_score_head=True`` (gad_trainer.yaml sets it) the score head computes in
float32. In bfloat16, as in stock, scores near 2 come in steps of 1/64: answers that D tells apart get equal rewards,
and group-normalised advantages magnify the rounding.
"""

import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

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
    """A token-classification model with one label (or, for flash attention, what stock verl falls back to).

    Args:
        local_path: model folder.
        torch_dtype: dtype of the weights.
        model_config: Hugging Face config; its attention implementation and ``float32_score_head`` are used.
        trust_remote_code: as in ``from_pretrained``.
    """
    attention = getattr(model_config, "_attn_implementation", None) or "flash_attention_2"
    if attention == "flash_attention_2":
        model = _stock_load_valuehead_model(local_path, torch_dtype, model_config, trust_remote_code)
    else:
        model = AutoModelForTokenClassification.from_pretrained(
            local_path,
            torch_dtype=torch_dtype,
            config=model_config,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    head = getattr(model, "score", None)
    if getattr(model_config, "float32_score_head", False) and isinstance(head, torch.nn.Linear):
        head.__class__ = _Float32Linear
    return model

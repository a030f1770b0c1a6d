"""Extends stock ``verl.utils.model``: how a critic is built.

Stock ``load_valuehead_model`` hard-codes flash_attention_2: without the flash_attn package no critic can be built. Here
the one that ``critic.model.override_config.attn_implementation`` names is used; flash_attention_2 stays the default.
The rest is in recipe/gad/training/value_head.py: a class for every family, and a score head that computes in float32
(``critic.model.override_config.float32_score_head``, which gad_trainer.yaml sets), since bfloat16 rounds scores of
different answers to the same reward.
Goes when: the stock function honors ``attn_implementation`` and a dtype for the score head, for every causal LM.
"""

from transformers import PretrainedConfig, PreTrainedModel

from recipe.gad.training.value_head import load_discriminator
from verl.utils.model import load_valuehead_model as _stock_load_valuehead_model


def load_valuehead_model(
    local_path: str, torch_dtype, model_config: PretrainedConfig, trust_remote_code: bool
) -> PreTrainedModel:
    """GAD's discriminator; with flash attention and no ``float32_score_head`` in the configuration, stock verl's model.

    ``model_config`` is a Hugging Face config; its attention implementation and ``float32_score_head`` are used.
    """
    attention = getattr(model_config, "_attn_implementation", None) or "flash_attention_2"
    if attention == "flash_attention_2" and not hasattr(model_config, "float32_score_head"):  # no GAD run
        return _stock_load_valuehead_model(local_path, torch_dtype, model_config, trust_remote_code)
    return load_discriminator(local_path, torch_dtype, model_config, attention, trust_remote_code)

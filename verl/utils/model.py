"""Extends stock ``verl.utils.model``: the critic is built with the attention it was asked for.

Stock ``load_valuehead_model`` hard-codes flash_attention_2, so without the flash_attn package a critic cannot be
built even if ``critic.model.override_config.attn_implementation`` asks for another one (the error then asks for trl).
The default stays flash_attention_2.
"""

from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

from verl.utils.model import load_valuehead_model as _stock_load_valuehead_model


def load_valuehead_model(
    local_path: str, torch_dtype, model_config: PretrainedConfig, trust_remote_code: bool
) -> PreTrainedModel:
    """A token-classification model with one label, or stock verl's trl value head for flash attention.

    Args:
        local_path: model folder.
        torch_dtype: dtype of the weights.
        model_config: Hugging Face config; its attention implementation is used.
        trust_remote_code: as in ``from_pretrained``.
    """
    attention = getattr(model_config, "_attn_implementation", None) or "flash_attention_2"
    if attention == "flash_attention_2":
        return _stock_load_valuehead_model(local_path, torch_dtype, model_config, trust_remote_code)
    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        torch_dtype=torch_dtype,
        config=model_config,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
    )

"""Loads the discriminator: the family's token-classification class with a score head that may compute in float32."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

from recipe.gad.run.score_head import check_loaded, register_discriminator


class Float32Linear(torch.nn.Linear):
    """A linear layer that computes in float32, whatever autocast and the dtype of its sharded weights are."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(hidden.float(), self.weight.float(), bias)


def load_discriminator(
    path: str, dtype: Any, config: PretrainedConfig, attention: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model in a folder with one score per token; its head may be new, every other weight is the folder's.

    Args:
        config: Hugging Face configuration with num_labels=1; with ``float32_score_head`` true, the head computes in
            float32.
        attention: as in ``from_pretrained(attn_implementation=...)``.

    Raises:
        InputError: the family cannot be a discriminator, or a weight other than the score head's would be random.
    """
    register_discriminator(config, trust_remote_code)
    model, info = AutoModelForTokenClassification.from_pretrained(
        path,
        torch_dtype=dtype,
        config=config,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    check_loaded(info, path)
    head = score_head(model)
    if getattr(config, "float32_score_head", False) and isinstance(head, torch.nn.Linear):
        head.__class__ = Float32Linear  # not a new module: its weights, name and place in the model stay
    return model


def score_head(model: PreTrainedModel) -> torch.nn.Module | None:
    """The module that turns the last hidden state into a score; None if custom code gave it another name."""
    return getattr(model, "score", None) or getattr(model, "classifier", None)


def with_number_dropout(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same builder of a critic, for configurations whose ``hidden_dropout`` must be a number.

    Stock ``FSDPEngine._build_module`` sets it to the text "0", which strict configurations of transformers refuse; then
    it is 0.0 here. Configurations that have no such number get the text as before.
    """

    @functools.wraps(build)
    def build_module(engine: Any) -> Any:
        kind: Any = type(engine.model_config.hf_config)
        stock = kind.__setattr__

        def set_value(config: Any, name: str, value: Any) -> None:
            is_number = name == "hidden_dropout" and isinstance(getattr(config, name, None), int | float)
            stock(config, name, 0.0 if is_number and value == "0" else value)

        kind.__setattr__ = set_value
        try:
            return build(engine)
        finally:
            kind.__setattr__ = stock

    return build_module

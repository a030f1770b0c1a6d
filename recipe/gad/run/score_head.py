"""The discriminator's class: a score head over the backbone of any causal language model.

verl asks transformers for the family's ``...ForTokenClassification``. Where transformers has none,
:func:`register_discriminator` builds one and registers it, so that every ``AutoModelForTokenClassification`` call of
this process finds it: loading, verl's checkpoints, its model merger, and ``gad export``. docs/models.md lists the
families.
"""

import re
from pathlib import Path
from typing import Any

from recipe.gad.run.findings import Finding, InputError, either, error

HEAD = re.compile(r"(score|classifier)\.(weight|bias)")
"""Parameters that may be drawn at random when a discriminator starts from a language model."""
SAVED_KINDS = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")
"""Parts of the class names that verl's FSDP checkpoints can save."""
HEADS = ("num_attention_heads", "num_key_value_heads")
"""What verl's FSDP engines read of every configuration, whether or not sequences are split over GPUs."""
OTHER_MODEL = "critic.model.path=FOLDER of a model that docs/models.md lists as ok, with the student's vocabulary"


def register_discriminator(config: Any, trust_remote_code: bool = False) -> str:
    """Make ``AutoModelForTokenClassification`` know the family of a Hugging Face ``config``.

    Returns:
        Name of the class that will be used.

    Raises:
        InputError: the family has no class, and none can be built.
    """
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForTokenClassification,
    )

    kind, auto = type(config), AutoModelForTokenClassification
    remote = (getattr(config, "auto_map", None) or {}) if trust_remote_code else {}
    if auto.__name__ in remote:
        return str(remote[auto.__name__]).rpartition(".")[2]
    if kind in auto._model_mapping:
        return auto._model_mapping[kind].__name__
    name = config.model_type

    def refuse(why: str) -> InputError:
        return InputError(f"model type {name} cannot be a discriminator: {why}", fix=OTHER_MODEL)

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder")
    lm_auto = next((a for a in (AutoModelForImageTextToText, AutoModelForCausalLM) if kind in a._model_mapping), None)
    if lm_auto is None and remote:
        raise refuse(f"its code has no {auto.__name__}")
    if lm_auto is None or kind not in AutoModel._model_mapping:
        raise refuse(f"transformers has no {'causal language model' if lm_auto is None else 'backbone'} of this type")
    backbone, lm_class = AutoModel._model_mapping[kind], lm_auto._model_mapping[kind]
    with torch.device("meta"):  # no memory; eager: flash attention is not installed on every machine
        lm = lm_class._from_config(config, attn_implementation="eager")
    prefix = next((child for child, module in lm.named_children() if type(module) is backbone), None)
    if prefix is None:
        raise refuse(f"transformers has no backbone class of which {lm_class.__name__} holds an instance")
    built = _build_class(backbone, prefix)
    from transformers import conversion_mapping

    renamed = conversion_mapping.get_checkpoint_conversion_mapping(lm_class.__name__)
    if renamed is not None:  # the weights of this language model have other names on disk
        conversion_mapping.register_checkpoint_conversion_mapping(built.__name__, renamed, overwrite=True)
    auto.register(kind, built)
    return built.__name__


def _build_class(backbone: Any, prefix: str) -> type:
    """``...ForTokenClassification`` of a backbone; its weights have the names they have in the language model.

    Args:
        prefix: the attribute under which the family's language model holds the backbone.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GenericForTokenClassification
    from transformers.modeling_outputs import TokenClassifierOutput

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # every backbone gives a last hidden state, but recurrent ones take no cache and give no attentions
        hidden = getattr(self, prefix)(*args, **kwargs).last_hidden_state
        return TokenClassifierOutput(logits=self.score(self.dropout(hidden)))

    family = next(base for base in backbone.__mro__[1:] if issubclass(base, PreTrainedModel))
    # transformers reads the class's module to learn which attention and expert kernels the family has
    name = backbone.__name__.removesuffix("Model") + "ForTokenClassification"
    attributes = {
        "__module__": backbone.__module__,
        "__doc__": f"{backbone.__name__} with a score head.",
        "base_model_prefix": prefix,
        "config_class": backbone.config_class,
        "forward": forward,
    }
    return type(name, (GenericForTokenClassification, family), attributes)


def check_loaded(info: dict[str, Any], path: str | Path) -> None:
    """Refuse a discriminator in which anything but its score head was drawn at random.

    Args:
        info: what ``from_pretrained(..., output_loading_info=True)`` returned.

    Raises:
        InputError: names the missing tensors.
    """
    missing = sorted(name for name in info["missing_keys"] if not HEAD.fullmatch(name))
    if missing:
        some = ", ".join(missing[:3])
        raise InputError(
            f"{path}: {len(missing)} tensors of the discriminator are not in its files and would be random ({some})",
            fix="critic.model.path=FOLDER of a whole model; copy or save this one again",
        )
    if any(name.startswith("v_head.") for name in info["unexpected_keys"]):
        raise InputError(
            f"{path} holds a score head named v_head, which is not read, so its scores would be random",
            fix="start from the language model that it was trained from",
        )


def discriminator_problem(folder: Path, trust_remote_code: bool = False) -> Finding | None:
    """Why the model in a Hugging Face folder cannot be a discriminator, from its config.json; None if it can."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        register_discriminator(config, trust_remote_code)
    except InputError as problem:
        return problem.finding
    except Exception as problem:  # a broken configuration can raise anything
        return error(f"transformers cannot build this model as a discriminator ({_reason(problem)})", fix=OTHER_MODEL)
    names = config.architectures or []
    if len(names) != 1 or not any(known in names[0] for known in SAVED_KINDS):
        return error(
            f"model type {config.model_type} cannot be a discriminator: config.json says architectures={names}, and "
            f"verl saves one class, named {either(f'...{kind}' for kind in SAVED_KINDS)}",
            fix=OTHER_MODEL,
        )
    if (why := _unread_heads(config)) is not None:
        return error(f"model type {config.model_type} cannot be a discriminator: {why}", fix=OTHER_MODEL)
    return None


def student_problem(folder: Path, trust_remote_code: bool = False) -> Finding | None:
    """Why verl's FSDP engines cannot load the student in a Hugging Face folder; None if nothing is known against it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # a broken configuration can raise anything; transformers names it when it loads the model
        return None
    if (why := _unread_heads(config)) is None:
        return None
    return error(f"model type {config.model_type} cannot be a student: {why}", fix="choose a student of another family")


def _unread_heads(config: Any) -> str | None:
    text = getattr(config, "text_config", None) or config.get_text_config()
    lacking = [name for name in HEADS if not isinstance(getattr(text, name, None), int)]
    if not lacking or all(isinstance(getattr(config, name, None), int) for name in HEADS):
        return None
    return f"verl reads {' and '.join(lacking)} of its configuration, which has none"


def _reason(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(" :")

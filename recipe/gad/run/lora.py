"""Where LoRA adapters go in a model: PEFT's settings, and what is refused before a model loads."""

import re
from pathlib import Path
from typing import Any

from recipe.gad.run.findings import Finding, error
from recipe.gad.run.score_head import register_discriminator

ATTENTION = "[q_proj,k_proj,v_proj,o_proj]"
NAMES = ("target_modules", "target_parameters", "exclude_modules")


def lora_config(settings: Any, head: str | None = None) -> Any:
    """``peft.LoraConfig`` of new adapters.

    Args:
        settings: ``critic.model`` or ``actor_rollout_ref.model``: lora_rank, lora_alpha, target_modules,
            target_parameters and exclude_modules, which mean what they mean to stock verl.
        head: name of a module that gets no adapter, whatever the settings say.
    """
    from peft import LoraConfig

    values: list[Any] = [getattr(settings, name, None) for name in NAMES]  # OmegaConf's lists among them
    values = [value if value is None or isinstance(value, str) else list(value) for value in values]
    targets, parameters, exclude = values
    if head is not None:
        if isinstance(exclude, list):  # names that a module's name ends with, as PEFT reads a list
            exclude = "|".join(rf"(.*\.)?{re.escape(name)}" for name in exclude)
        exclude = "|".join(filter(None, [exclude, rf"{head}(\..*)?"]))
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=targets,
        target_parameters=parameters,
        exclude_modules=exclude,
    )


def adapter_problem(folder: Path, key: str, settings: Any, critic: bool, trust_remote_code: bool) -> Finding | None:
    """Why the model in a Hugging Face folder cannot have these adapters; None if it can. No weight is loaded.

    Adapters must be on linear maps: those on the fused experts of an MoE, for example, cannot be merged at a save.

    Args:
        key: ``critic.model`` or ``actor_rollout_ref.model``, which the finding names.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    targets, fix = settings.target_modules, f"name linear maps, for example {key}.target_modules={ATTENTION}"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if critic:
            register_discriminator(config, trust_remote_code)
        kind = AutoModelForTokenClassification if critic else AutoModelForCausalLM
        if type(config) not in kind._model_mapping:
            return None  # custom code, or a student with images
        with torch.device("meta"):
            model = kind.from_config(config, attn_implementation="eager")
            adapted = get_peft_model(model, lora_config(settings))
    except Exception as problem:  # a broken configuration can raise anything
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        return error(f"{key}.target_modules={targets}: no adapters for {folder} ({reason})", fix)
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), torch.nn.Linear):
            return error(
                f"{key}.target_modules={targets} puts an adapter on {name.removeprefix('base_model.model.')}, which is "
                "no linear map, so no checkpoint could merge it",
                fix,
            )
    return None

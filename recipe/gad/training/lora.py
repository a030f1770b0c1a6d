"""LoRA: the adapters of a discriminator, and checkpoints whose Hugging Face folders hold merged weights.

Stock verl gives every adapter the task of a language model, which PEFT refuses for a discriminator; and it saves the
weights of a model with adapters under PEFT's names, which ``from_pretrained`` ignores.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from recipe.gad.run.atomic_io import read_object, write_atomically
from recipe.gad.run.checkpoint import LORA_META, PEFT_PREFIX, weight_map
from recipe.gad.run.config import ACTOR_MODEL, get, lora_rank
from recipe.gad.run.findings import InputError
from recipe.gad.run.lora import lora_config
from recipe.gad.training.value_head import score_head

logger = logging.getLogger(__name__)

PREFIX = f"{PEFT_PREFIX}model."
BASE, FACTORS = ".base_layer.weight", (".lora_A.default.weight", ".lora_B.default.weight")


def add_adapters(model: Any, settings: Any, seed: int) -> Any:
    """The discriminator with LoRA adapters: they and the score head are trained, every other weight is frozen.

    Args:
        model: from :func:`recipe.gad.training.value_head.load_discriminator`.
        settings: ``critic.model``, see :func:`recipe.gad.run.lora.lora_config`.
        seed: of the new adapters, so that a run repeats itself.

    Returns:
        PEFT model, whose adapters have the dtype of the weights.

    Raises:
        InputError: custom code gave the score head a name that is not known.
    """
    from peft import get_peft_model

    if (head := score_head(model)) is None:
        what = f"critic.model.lora_rank={settings.lora_rank}: {type(model).__name__} has no score head named score"
        raise InputError(what, fix="critic.model.lora_rank=0")
    name = next(name for name, module in model.named_modules() if module is head)
    model.enable_input_require_grads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora_config(settings, name), autocast_adapter_dtype=False)
    head.requires_grad_(True)
    return adapted


def merge_checkpoint(config: DictConfig, step_folder: Path) -> None:
    """Merge the adapters of the roles with LoRA in what a checkpoint of a run holds for ``from_pretrained``.

    The next stage, ``gad export`` and ``gad eval`` then read the trained model. A resumed run reads the shards, which
    hold weights and adapters apart. A pretrained adapter (lora_adapter_path) may be of another kind and stays as it is.
    """
    for role, model in (("actor", ACTOR_MODEL), ("critic", "critic.model")):
        if lora_rank(config, model) and not get(config, f"{model}.lora_adapter_path"):
            merge_adapters(step_folder / role)


def merge_adapters(role_folder: Path) -> None:
    """Replace W by W + alpha / r B A (LoRA, arXiv 2106.09685) in ``huggingface``, under the names of a plain model.

    A folder without adapters stays as it is. So does one with adapters of another kind than LoRA on linear maps, with a
    warning: the next stage refuses it and names ``gad export``.
    """
    from safetensors.torch import save_file

    folder, meta = role_folder / "huggingface", role_folder / LORA_META
    try:
        files = weight_map(folder)
    except ValueError:  # hf_model is not in checkpoint.save_contents
        return
    if not meta.is_file() or not any(name.startswith(PEFT_PREFIX) for name in files):
        return
    settings = read_object(meta)
    scale, factors = settings["lora_alpha"] / settings["r"], _read(folder, files, lambda name: ".lora_" in name)
    new_files: dict[str, str] = {}
    temporary = {folder / f".{file}.merging": folder / file for file in sorted(set(files.values()))}
    try:
        for name in factors:
            if not name.endswith(FACTORS) or name.rpartition(".lora_")[0] + BASE not in files:
                raise _OtherAdapter(name)
        for path, final in temporary.items():
            in_file = {name: file for name, file in files.items() if file == final.name and name not in factors}
            weights = dict(_merge(name, value, factors, scale) for name, value in _read(folder, in_file).items())
            save_file(weights, path, metadata={"format": "pt"})
            new_files |= dict.fromkeys(weights, final.name)
        for path, final in temporary.items():
            os.replace(path, final)
    except _OtherAdapter as problem:
        logger.warning("%s: %s is no LoRA of a linear map, so the adapters were not merged", folder, problem)
        return
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        write_atomically(index, json.dumps({**read_object(index), "weight_map": new_files}, indent=2))


class _OtherAdapter(Exception):
    """The name of a tensor that is not part of LoRA on a linear map."""


def _read(folder: Path, files: dict[str, str], wanted: Callable[[str], bool] = bool) -> dict[str, torch.Tensor]:
    """Tensors of a folder by name; ``files``: name -> file."""
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(folder / file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in files if files[name] == file and wanted(name)}
    return tensors


def _merge(name: str, weight: torch.Tensor, factors: dict[str, torch.Tensor], scale: float) -> tuple[str, torch.Tensor]:
    """Plain name and merged value of a tensor."""
    plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    first, second = (factors.get(name.removesuffix(BASE) + end) for end in FACTORS)
    if first is None or second is None:
        return plain, weight
    if weight.shape != (len(second), first.shape[1]):  # stored transposed
        raise _OtherAdapter(name)
    return plain, (weight.float() + scale * (second.float() @ first.float())).to(weight.dtype)

"""Turns a checkpoint of a run into a Hugging Face folder, and checks it against the checkpoint before it appears.

verl's ``huggingface`` folders are not ready for use: weights in float32 beside a config.json that says bfloat16, a
critic that calls itself a language model, and with LoRA tensor names that only PEFT reads. Where that folder holds no
usable weights, verl's own model merger joins the FSDP shards (in bfloat16).
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from recipe.gad.run.checkpoint import first_usable, role_folders, shard_counts, verify_hf_folder

ROLES = ("actor", "critic")
DTYPES = ("bfloat16", "float16", "float32")
LORA_CHOICES = ("merge", "adapter")
MERGER_DTYPE = "bfloat16"
"""The only dtype in which verl's merger gives weights."""
CHECK_TOKENS = 8
"""Length of the input on which outputs are compared."""
TOLERANCE = 1e-4
"""Largest difference between outputs that are computed in float32 from the same weights, relative to the largest."""


class Export(NamedTuple):
    """What was written, and how far it is from the checkpoint."""

    sources: tuple[Path, ...]
    """Role folder of the checkpoint, or of each averaged one, newest first."""
    architecture: str
    rounding: float
    """Largest change of an output (logit, or score) that rounding the weights to the dtype causes."""


# ---------------------------------------------------------------------- which checkpoint


def find_sources(checkpoint: str | Path, role: str | None, count: int = 1) -> tuple[list[Path], str]:
    """Role folders (``global_step_N/actor``) that a path names, newest first, and the role.

    Args:
        checkpoint: output folder of a run (its newest complete checkpoints count; skipped ones are named on stderr), a
            ``global_step_N`` folder, or its ``actor`` or ``critic`` folder.
        role: actor or critic; None: what the path says, else actor.
        count: how many checkpoints.

    Raises:
        ValueError: there is no such checkpoint, it is not complete, or the run has fewer.
    """
    path = Path(os.path.abspath(Path(checkpoint).expanduser()))
    if role is not None and role not in ROLES:
        raise ValueError(f"--role {role}: expected {' or '.join(ROLES)}. Fix: --role actor")
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder. Fix: pass a run's output folder or a global_step_N folder")
    of_role = path.name in ROLES and (path / "huggingface").is_dir()
    if of_role and role not in (None, path.name):
        raise ValueError(f"{path} is the {path.name}'s, and --role is {role}. Fix: pass {path.parent}")
    role = role or (path.name if of_role else "actor")
    usable, skipped = first_usable(role_folders(path, role), source_problems, count)
    if len(usable) == count:
        return usable, role
    if usable:
        steps = ", ".join(folder.parent.name for folder in usable)
        passed_over = f"; skipped: {'; '.join(skipped)}" if skipped else ""
        raise ValueError(
            f"--average {count}: {path} has {len(usable)} complete checkpoints of the {role} ({steps}{passed_over}). "
            "Fix: pass the run's output folder, a smaller number, or train with more of them (trainer.save_freq, "
            f"trainer.max_{role}_ckpt_to_keep)"
        )
    if skipped:
        raise ValueError(f"{path} cannot be exported: {'; '.join(skipped)}. Fix: choose another checkpoint")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} holds no checkpoint of the {role} (found: {found}). Fix: pass a run's output folder, a "
        f"global_step_N folder, or its {role} folder"
    )


def source_problems(folder: Path) -> list[str]:
    """Why a role folder cannot be exported; empty: it can."""
    problems = verify_hf_folder(folder / "huggingface")
    found, expected = shard_counts(folder)
    if not problems or found >= expected > 0:
        return []
    shards = f"{found} of {expected} model shards" if expected else "no FSDP shards"
    return [*problems, f"{folder} has {shards}"]


# ---------------------------------------------------------------------- reading


def join_shards(folder: Path, kind: Any, scratch: Path) -> tuple[Path, Path | None]:
    """The FSDP shards of a role folder as a Hugging Face folder of the model without its LoRA adapter.

    Args:
        folder: role folder.
        kind: auto class of the model.
        scratch: existing folder to write into.

    Returns:
        Folder with weights (bfloat16), configuration and tokenizer; folder of the LoRA adapter, None without LoRA.
    """
    import torch
    from safetensors.torch import save_file

    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger
    from verl.utils.transformers_compat import drop_tied_target_keys

    joined = scratch / "joined"
    shutil.copytree(folder / "huggingface", joined, ignore=shutil.ignore_patterns("*.safetensors*"))

    class Merger(FSDPModelMerger):
        """Saves by the role's class; the stock one goes by config.json, in which a critic is a language model."""

        adapter: str | None = None

        def save_hf_model_and_tokenizer(self, state_dict):
            self.adapter = self.save_lora_adapter(state_dict)
            with torch.device("meta"):
                model = kind.from_config(self.model_config)
            drop_tied_target_keys(state_dict, model, self.model_config)
            save_file(state_dict, joined / "model.safetensors", metadata={"format": "pt"})

    merger = Merger(
        ModelMergerConfig(
            operation="merge",
            backend="fsdp",
            local_dir=str(folder),
            target_dir=str(scratch),
            hf_model_config_path=str(joined),
        )
    )
    merger.merge_and_save()
    return joined, None if merger.adapter is None else Path(merger.adapter)


def load_source(folder: Path, role: str, scratch: Path) -> tuple[Any, Path | None]:
    """Model of a role folder in float32, without its LoRA adapter, and the adapter's folder (in ``scratch``) or None.

    Raises:
        ValueError: the weights do not fit the model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    kind = AutoModelForTokenClassification if role == "critic" else AutoModelForCausalLM
    stored, adapter = folder / "huggingface", None
    if verify_hf_folder(stored):
        stored, adapter = join_shards(folder, kind, scratch)
    model, info = kind.from_pretrained(stored, dtype=torch.float32, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            some = ", ".join(map(str, sorted(info[what])[:3]))
            raise ValueError(
                f"the weights of {folder} do not fit {type(model).__name__} ({what}: {some}). Fix: --role, if this is "
                "the other role's; a checkpoint of save_lora_only=True holds no model, only an adapter"
            )
    return model.eval(), adapter


def load_average(folders: list[Path], role: str, scratch: Path) -> tuple[Any, Path | None]:
    """As :func:`load_source`, with the mean of the weights of several checkpoints.

    Student and discriminator circle around each other; the mean over a stretch of training lies nearer to the centre
    than any of its points (Yazici et al. 2019, arXiv 1806.04498, for GANs).

    Raises:
        ValueError: the weights do not fit the model, or the checkpoints hold LoRA adapters.
    """
    import torch

    model, adapter = load_source(folders[0], role, scratch)
    if adapter is not None and len(folders) > 1:
        raise ValueError(
            f"--average {len(folders)}: {folders[0]} was trained with LoRA, and the mean of adapters is not that of "
            "the models. Fix: export without --average"
        )
    for count, folder in enumerate(folders[1:], start=2):
        with tempfile.TemporaryDirectory(dir=scratch) as own, torch.no_grad():
            other, _ = load_source(folder, role, Path(own))
            for mean, value in zip(model.parameters(), other.parameters(), strict=True):
                mean += (value - mean) / count
    return model, adapter


def _outputs(model: Any) -> Any:
    """Logits of a language model, or scores of a critic, for a fixed input: (tokens, vocabulary or 1), float32."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(CHECK_TOKENS) * 7 + 1) % vocabulary
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def _cast(model: Any, dtype: Any) -> Any:
    """The model with its parameters (not the buffers, which a loaded model computes anew) in another dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _require_same(found: Any, expected: Any, what: str) -> None:
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * max(1.0, scale):
        raise ValueError(
            f"{what}: outputs differ by {difference:.3g} (largest {scale:.3g}); nothing was written. "
            "Fix: choose another checkpoint, or report this"
        )


# ---------------------------------------------------------------------- writing


def export(
    checkpoint: str | Path,
    output: str | Path,
    role: str | None = None,
    dtype: str = "bfloat16",
    lora: str = "merge",
    average: int = 1,
) -> Export:
    """Write actor or critic of a checkpoint as a Hugging Face folder.

    The folder is loaded again and its logits (actor) or scores (critic) are compared with those of the checkpoint's
    weights, rounded to ``dtype``; only then it gets its name.

    Args:
        checkpoint: see :func:`find_sources`.
        output: folder to make; must not exist, or be empty.
        role: actor, critic or None (what the path says, else actor).
        dtype: bfloat16, float16 or float32.
        lora: of a run with LoRA, ``merge`` the adapter into the weights, or write the ``adapter`` alone.
        average: write the mean of the weights of so many checkpoints, the run's newest.

    Raises:
        ValueError: no complete checkpoint, a bad choice, an output that exists, or outputs that differ.
    """
    import torch
    from transformers import AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: expected {', '.join(DTYPES)}. Fix: --dtype bfloat16")
    if lora not in LORA_CHOICES:
        raise ValueError(f"--lora {lora}: expected {' or '.join(LORA_CHOICES)}. Fix: --lora merge")
    target = Path(os.path.abspath(Path(output).expanduser()))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists. Fix: --output_dir with a new name, or remove it")
    if average < 1:
        raise ValueError(f"--average {average}: expected a number of checkpoints. Fix: --average 3")
    folders, role = find_sources(checkpoint, role, average)
    folder = folders[0]
    if verify_hf_folder(folder / "huggingface") and dtype != MERGER_DTYPE:
        raise ValueError(
            f"--dtype {dtype}: {folder} has FSDP shards only, which verl's merger gives in {MERGER_DTYPE}. "
            f"Fix: --dtype {MERGER_DTYPE}, or a run without LoRA and with hf_model in its checkpoint.save_contents"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        result = scratch / "export"
        model, adapter = load_average(folders, role, scratch)
        architecture = type(model).__name__
        if lora == "adapter":
            _write_adapter(model, adapter, folder, result)
            architecture, rounding = f"LoRA adapter of {architecture}", 0.0
        else:
            rounding = _write_model(model, adapter, folder, result, getattr(torch, dtype))
        AutoTokenizer.from_pretrained(folder / "huggingface").save_pretrained(result)
        os.replace(result, target)
    finally:
        shutil.rmtree(scratch)
    return Export(tuple(folders), architecture, rounding)


def _write_model(model: Any, adapter: Path | None, folder: Path, result: Path, dtype: Any) -> float:
    """Returns the largest change of an output that rounding causes."""
    if adapter is not None:
        model = _with_adapter(model, adapter)
        apart = _outputs(model)
        model = model.merge_and_unload()
        _require_same(_outputs(model), apart, "the merged model and the model with its adapter")
    exact = _outputs(model)
    _cast(model, dtype).save_pretrained(result)
    rounded = _outputs(_cast(model, exact.dtype))
    written = type(model).from_pretrained(result, dtype="auto")
    if written.dtype != dtype:
        raise ValueError(f"the export says dtype {written.dtype}, expected {dtype}; nothing was written")
    _require_same(_outputs(_cast(written.eval(), exact.dtype)), rounded, f"the export and {folder}")
    return float((rounded - exact).abs().max())


def _write_adapter(model: Any, adapter: Path | None, folder: Path, result: Path) -> None:
    if adapter is None:
        raise ValueError(f"--lora adapter: {folder} was trained without LoRA. Fix: --lora merge")
    shutil.copytree(adapter, result)
    _with_adapter(model, result)


def _with_adapter(model: Any, adapter: Path) -> Any:
    """PEFT model whose adapter weights are those of the folder; PEFT itself only warns about names that do not fit."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    joined = PeftModel.from_pretrained(model, adapter).eval()
    stored = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(joined)
    wrong = {name for name in {*stored, *loaded} if name not in stored or name not in loaded}
    wrong |= {name for name in stored if name not in wrong and not loaded[name].equal(stored[name].to(loaded[name]))}
    if wrong:
        raise ValueError(f"the checkpoint's adapter does not fit its model ({min(wrong)}). Fix: choose another one")
    return joined

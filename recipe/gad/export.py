"""``gad export``: turns a checkpoint into a Hugging Face folder and compares the two before the folder appears.

verl's ``huggingface`` folders are not ready for use: the weights are in float32 while config.json says bfloat16, and
the critic's config.json calls it a language model. If that folder holds no usable weights, verl's model merger joins
the FSDP shards (in bfloat16). With LoRA, the folder holds merged weights (recipe/gad/training/lora.py), and the shards
hold the adapter.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from recipe.gad.run.atomic_io import naming
from recipe.gad.run.checkpoint import LORA_META, first_usable, role_folders, shard_counts, verify_hf_folder
from recipe.gad.run.checksums import damage, write_checksums
from recipe.gad.run.findings import InputError
from recipe.gad.run.hub import load_tokenizer
from recipe.gad.run.score_head import register_discriminator

ROLES = ("actor", "critic")
DTYPES = ("bfloat16", "float16", "float32")
LORA_CHOICES = ("merge", "adapter")
MERGER_DTYPE = "bfloat16"
"""The only dtype that verl's merger writes."""
DEFAULT_DTYPE, DEFAULT_LORA, DEFAULT_AVERAGE = "bfloat16", "merge", 1
"""Defaults of the function and of the command: dtype, treatment of LoRA, number of averaged checkpoints."""
ATTENTION = "eager"
"""Attention while exporting. A critic's config.json asks for the run's: flash-attn, say, which may be missing here."""
CHECK_TOKENS = 8
"""Length of the input on which outputs are compared, in tokens."""
TOLERANCE = 1e-4
"""Largest allowed difference of float32 outputs from the same weights, relative to the largest output."""


class Export(NamedTuple):
    """What was written, and how far its outputs are from the checkpoint's."""

    sources: tuple[Path, ...]
    """Role folder of the checkpoint, or of every averaged checkpoint, newest first."""
    architecture: str
    rounding: float
    """Largest change of an output (logit, or score) that rounding the weights to the dtype causes."""


# ---------------------------------------------------------------------- which checkpoint


def find_sources(checkpoint: str | Path, role: str | None, count: int = 1) -> tuple[list[Path], str]:
    """Resolve a path to role folders (``global_step_N/actor``), newest first, and the role.

    Args:
        checkpoint: output folder of a run (its newest complete checkpoints are taken; skipped ones are named on
            stderr), a ``global_step_N`` folder, or its ``actor`` or ``critic`` folder.
        role: actor or critic; None takes the role that the path names, else actor.
        count: number of checkpoints.

    Raises:
        ValueError: there is no such checkpoint, it is incomplete, or the run has fewer than ``count``.
    """
    path = Path(os.path.abspath(Path(checkpoint).expanduser()))
    if role is not None and role not in ROLES:
        raise InputError(f"--role {role}: expected {' or '.join(ROLES)}", fix="pass --role actor")
    if not path.is_dir():
        raise InputError(f"{path}: no such folder", fix="pass a run's output folder or a global_step_N folder")
    of_role = path.name in ROLES and (path / "huggingface").is_dir()
    if of_role and role not in (None, path.name):
        raise InputError(f"{path} is the {path.name}'s, and --role is {role}", fix=f"pass {path.parent}")
    role = role or (path.name if of_role else "actor")
    usable, skipped = first_usable(role_folders(path, role), source_problems, count)
    if len(usable) == count:
        return usable, role
    if usable:
        steps = ", ".join(folder.parent.name for folder in usable)
        and_skipped = f"; skipped: {'; '.join(skipped)}" if skipped else ""
        raise InputError(
            f"--average {count}: {path} has {len(usable)} complete checkpoints of the {role} ({steps}{and_skipped})",
            fix="pass the run's output folder or a smaller number, or keep more checkpoints in training "
            f"(trainer.save_freq, trainer.max_{role}_ckpt_to_keep)",
        )
    if skipped:
        raise InputError(f"{path} cannot be exported: {'; '.join(skipped)}", fix="choose another checkpoint")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{path} holds no checkpoint of the {role} (found: {found})",
        fix=f"pass a run's output folder, a global_step_N folder, or its {role} folder",
    )


def source_problems(folder: Path) -> list[str]:
    """Reasons why a role folder cannot be exported; empty if it can."""
    problems = verify_hf_folder(folder / "huggingface")
    found, expected = shard_counts(folder)
    if not problems or found >= expected > 0:
        return damage(folder.parent, (folder.name,), huggingface=not problems, contents=True)
    shards = f"{found} of {expected} model shards" if expected else "no FSDP shards"
    return [*problems, f"{folder} has {shards}"]


# ---------------------------------------------------------------------- reading


def check_shards(folder: Path) -> None:
    """Refuse shards that hold more than tensors: verl's merger unpickles them, and a pickle can run any code.

    Raises:
        ValueError: a shard is broken, or holds more than tensors.
    """
    import torch
    import torch.distributed.tensor  # it lists its classes as safe

    for shard in sorted(folder.glob("model_world_size_*_rank_*.pt")):
        try:
            weights = torch.load(shard, weights_only=True, map_location="cpu", mmap=True)
        except Exception as error:  # a damaged pickle can raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{shard} is broken, or holds more than tensors ({reason})", fix="choose another checkpoint"
            ) from None
        if not isinstance(weights, dict):
            raise InputError(
                f"{shard} holds a {type(weights).__name__}, expected named tensors", fix="choose another checkpoint"
            )


def join_shards(folder: Path, kind: Any, scratch: Path) -> tuple[Path, Path | None]:
    """Join the FSDP shards of a role folder into a Hugging Face folder, without the LoRA adapter.

    Args:
        folder: role folder.
        kind: auto class of the model (AutoModelForCausalLM for the actor).
        scratch: existing folder to write into.

    Returns:
        Folder with weights (bfloat16), configuration and tokenizer; folder of the LoRA adapter, or None without LoRA.

    Raises:
        ValueError: a shard is broken, or holds more than tensors.
    """
    import torch
    from safetensors.torch import save_file

    check_shards(folder)
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger
    from verl.utils.transformers_compat import drop_tied_target_keys

    joined = scratch / "joined"
    shutil.copytree(folder / "huggingface", joined, ignore=shutil.ignore_patterns("*.safetensors*"))

    class Merger(FSDPModelMerger):
        """Saves with the role's class. The stock merger reads config.json, which calls a critic a language model."""

        adapter: str | None = None

        def _load_lora_train_meta(self):  # stock writes the task of a language model for every adapter
            meta = super()._load_lora_train_meta()
            return meta and {**meta, "task_type": meta.get("task_type") if folder.name == "actor" else None}

        def save_hf_model_and_tokenizer(self, state_dict):
            self.adapter = self.save_lora_adapter(state_dict)
            with torch.device("meta"):
                model = kind.from_config(self.model_config, attn_implementation=ATTENTION)
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


def load_source(folder: Path, role: str, scratch: Path, shards: bool = False) -> tuple[Any, Path | None]:
    """Load the model of a role folder in float32; return it and the folder of an adapter that it lacks, or None.

    Args:
        shards: read the FSDP shards, even if the folder holds weights.

    Raises:
        ValueError: the weights do not fit the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    kind = AutoModelForTokenClassification if role == "critic" else AutoModelForCausalLM
    if role == "critic":
        register_discriminator(AutoConfig.from_pretrained(folder / "huggingface"))
    stored, adapter = folder / "huggingface", None
    if shards or verify_hf_folder(stored):
        stored, adapter = join_shards(folder, kind, scratch)
    model, info = kind.from_pretrained(
        stored, dtype=torch.float32, attn_implementation=ATTENTION, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            some = ", ".join(map(str, sorted(info[what])[:3]))
            raise InputError(
                f"the weights of {folder} do not fit {type(model).__name__} ({what}: {some})",
                fix="pass the right --role. A run with save_lora_only=True cannot be exported: "
                "it saves only the adapter",
            )
    return model.eval(), adapter


def load_average(folders: list[Path], role: str, scratch: Path) -> tuple[Any, Path | None]:
    """Like :func:`load_source`, but with the mean of the weights of several checkpoints.

    Student and discriminator circle around each other, and the mean of several steps lies closer to the center than
    any of them (shown for GANs by Yazici et al. 2019, arXiv 1806.04498).

    Raises:
        ValueError: the weights do not fit the model, or the checkpoints hold LoRA adapters.
    """
    import torch

    model, adapter = load_source(folders[0], role, scratch)
    if adapter is not None and len(folders) > 1:
        raise InputError(
            f"--average {len(folders)}: {folders[0]} was trained with LoRA, and averaged adapters are not the "
            "averaged models",
            fix="export without --average",
        )
    for count, folder in enumerate(folders[1:], start=2):
        with tempfile.TemporaryDirectory(dir=scratch) as joined, torch.no_grad():
            other, _ = load_source(folder, role, Path(joined))
            for mean, value in zip(model.parameters(), other.parameters(), strict=True):
                mean += (value - mean) / count
    return model, adapter


def _compute_outputs(model: Any) -> Any:
    """Logits of a language model, or scores of a critic, for a fixed input: float32 (tokens, vocabulary or 1)."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(CHECK_TOKENS) * 7 + 1) % vocabulary
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def _cast_parameters(model: Any, dtype: Any) -> Any:
    """Cast the parameters in place; buffers stay, since loading a model recomputes them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _require_same(found: Any, expected: Any, what: str) -> None:
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * max(1.0, scale):
        raise InputError(
            f"{what}: outputs differ by {difference:.3g} (largest output {scale:.3g}); nothing was written",
            fix="choose another checkpoint; if its outputs differ too, report it as a bug",
        )


# ---------------------------------------------------------------------- writing


def export_model(
    checkpoint: str | Path,
    output: str | Path,
    role: str | None = None,
    dtype: str = DEFAULT_DTYPE,
    lora: str = DEFAULT_LORA,
    average: int = DEFAULT_AVERAGE,
) -> Export:
    """Write the actor or critic of a checkpoint as a Hugging Face folder.

    The new folder is loaded, and its logits (actor) or scores (critic) are compared with those of the checkpoint's
    weights, rounded to ``dtype``. Then it is renamed to ``output``.

    Args:
        checkpoint: see :func:`find_sources`.
        output: folder to write; it must be empty or not exist.
        role: actor, critic or None (the role that the path names, else actor).
        dtype: bfloat16, float16 or float32.
        lora: for a run with LoRA, ``merge`` the adapter into the weights, or write only the ``adapter``.
        average: number of the run's newest checkpoints whose weights are averaged.

    Raises:
        ValueError: the checkpoint is incomplete, an argument is out of range, ``output`` exists, or outputs differ.
    """
    import torch

    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected {', '.join(DTYPES)}", fix=f"pass --dtype {DEFAULT_DTYPE}")
    if lora not in LORA_CHOICES:
        raise InputError(f"--lora {lora}: expected {' or '.join(LORA_CHOICES)}", fix=f"pass --lora {DEFAULT_LORA}")
    target = Path(os.path.abspath(Path(output).expanduser()))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists", fix="pass a new --output_dir, or remove this one")
    if average < 1:
        raise InputError(f"--average {average}: expected 1 or more", fix="pass --average 3")
    folders, role = find_sources(checkpoint, role, average)
    folder = folders[0]
    if verify_hf_folder(folder / "huggingface") and dtype != MERGER_DTYPE:
        raise InputError(
            f"--dtype {dtype}: {folder} has only FSDP shards, and verl's merger writes them in {MERGER_DTYPE}",
            fix=f"pass --dtype {MERGER_DTYPE}, or train with hf_model in checkpoint.save_contents",
        )
    tokenizer = load_tokenizer(folder / "huggingface")
    check_embeddings(folder / "huggingface", tokenizer)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        result = scratch / "export"
        with _naming_disk_errors(target):
            architecture, rounding = _write(folders, role, lora, getattr(torch, dtype), scratch, result)
            tokenizer.save_pretrained(result)
            write_checksums(result)
        follow_umask(result)
        os.replace(result, target)
    finally:
        shutil.rmtree(scratch)
    return Export(tuple(folders), architecture, rounding)


@contextmanager
def _naming_disk_errors(target: Path) -> Iterator[None]:
    """Raise the error of a full disk as an OSError that names ``target``, whichever library meets it."""
    from safetensors import SafetensorError

    try:
        with naming(target):
            yield
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error


def _write(folders: list[Path], role: str, lora: str, dtype: Any, scratch: Path, result: Path) -> tuple[str, float]:
    """Write the model or its adapter into ``result``: (architecture, the largest change of an output by rounding)."""
    if lora == "adapter":
        return f"LoRA adapter of {_write_adapter(folders, role, scratch, result)}", 0.0
    model, adapter = load_average(folders, role, scratch)
    return type(model).__name__, _write_model(model, adapter, folders[0], result, dtype)


def check_embeddings(folder: Path, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer gives ids for which the model of ``folder`` has no embedding."""
    from transformers import AutoConfig

    try:
        embeddings = int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
    except Exception as error:  # a broken configuration can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}/config.json cannot be read ({reason})", fix="choose another checkpoint") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= embeddings:
        raise InputError(
            f"{folder} has {embeddings} embeddings, and its tokenizer gives ids up to {largest}",
            fix="copy the tokenizer that the run was trained with into this folder",
        )


def follow_umask(folder: Path) -> None:
    """Give every file the mode of a new file; safetensors makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _write_model(model: Any, adapter: Path | None, folder: Path, result: Path, dtype: Any) -> float:
    """Write the model, check it, and return the largest change of an output that rounding causes."""
    if adapter is not None:
        model = _with_adapter(model, adapter)
        unmerged = _compute_outputs(model)
        model = model.merge_and_unload()
        _require_same(_compute_outputs(model), unmerged, "the merged model and the model with its adapter")
    exact = _compute_outputs(model)
    _cast_parameters(model, dtype).save_pretrained(result)
    rounded = _compute_outputs(_cast_parameters(model, exact.dtype))
    written = type(model).from_pretrained(result, dtype="auto", attn_implementation=ATTENTION)
    if written.dtype != dtype:
        raise ValueError(f"the export says dtype {written.dtype}, expected {dtype}; nothing was written")
    _require_same(_compute_outputs(_cast_parameters(written.eval(), exact.dtype)), rounded, f"the export and {folder}")
    return float((rounded - exact).abs().max())


def _write_adapter(folders: list[Path], role: str, scratch: Path, result: Path) -> str:
    """Write the adapter, check that it fits the weights it was trained on, and return the model's class."""
    folder = folders[0]
    if not (folder / LORA_META).is_file():
        raise InputError(f"--lora adapter: {folder} was trained without LoRA", fix="drop --lora adapter")
    if role == "critic":
        what = f"--lora adapter: {folder} is a discriminator, whose score head is trained beside the adapter"
        raise InputError(what, fix="pass --lora merge")
    if len(folders) > 1:
        raise InputError(f"--lora adapter --average {len(folders)}: adapters have no mean", fix="pass --lora merge")
    found, expected = shard_counts(folder)
    if not found >= expected > 0:
        what = f"--lora adapter: {folder} has {found} of {expected or 'its'} model shards, which hold the adapter"
        raise InputError(what, fix="pass --lora merge, or choose another checkpoint")
    model, adapter = load_source(folder, role, scratch, shards=True)
    assert adapter is not None, "the shards of a role with LORA_META hold an adapter"
    shutil.copytree(adapter, result)
    _with_adapter(model, result)
    return type(model).__name__


def _with_adapter(model: Any, adapter: Path) -> Any:
    """PEFT model with the folder's adapter. PEFT only warns about names that do not fit; here they raise ValueError."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    joined = PeftModel.from_pretrained(model, adapter).eval()
    stored = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(joined)
    wrong = {name for name in {*stored, *loaded} if name not in stored or name not in loaded}
    wrong |= {name for name in stored if name not in wrong and not loaded[name].equal(stored[name].to(loaded[name]))}
    if wrong:
        raise InputError(
            f"the checkpoint's adapter does not fit its model ({min(wrong)})", fix="choose another checkpoint"
        )
    return joined

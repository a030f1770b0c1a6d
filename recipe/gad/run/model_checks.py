"""Checks of a run's model and tokenizer folders."""

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.gad.run.checkpoint import has_score_head, weight_problems
from recipe.gad.run.config import (
    ACTOR,
    ACTOR_MODEL,
    LORA_KEYS,
    files_of,
    get,
    has_discriminator,
    integer,
    lora_rank,
    validates,
)
from recipe.gad.run.data_file import column_values
from recipe.gad.run.findings import Finding, Findings, error, note, warning
from recipe.gad.run.hub import HUB_ID, cached_model, load_tokenizer
from recipe.gad.run.lora import adapter_problem
from recipe.gad.run.score_head import discriminator_problem, student_problem
from recipe.gad.run.two_sample import FRESH, MIN_PROMPTS, fresh_settings

FSDP = ("fsdp", "fsdp2")


def _model_folder(config: DictConfig, key: str) -> tuple[Path | None, list[Finding]]:
    """Local folder of a model key, None if there is none to look into; and findings about the path."""
    path = get(config, key)
    if not isinstance(path, str) or not path:
        return None, [error(f"{key}={path}: no model", fix=f"{key}=/path/to/folder or organisation/name")]
    if path.startswith("hdfs://"):
        return None, [warning(f"{key}={path} is not local and was not checked")]
    folder = Path(path).expanduser()
    if folder.is_dir():
        if path.startswith("~") or path.endswith("/"):
            exact = f"{key}={folder.absolute()}"
            return folder, [error(f"{key}={path}: verl takes neither a leading ~ nor a trailing /", fix=exact)]
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
            what = f"{key}={path}: no config.json in this folder (found: {found})"
            return None, [error(what, fix="name a model's folder")]
        return folder, []
    if folder.exists() or path[0] in "/.~" or not HUB_ID.fullmatch(path):
        return None, [_no_folder(key, path)]
    if folder.parent.is_dir() and not cached_model(path):
        what = f"{key}={path}: a model of the hub, as no such folder is here; but there is a folder {folder.parent}"
        return None, [warning(what, fix="correct the path, if it is meant to be one")]
    if (os.environ.get("HF_HUB_OFFLINE") or "0").lower() in ("1", "true", "yes", "on") and not cached_model(path):
        return None, [warning(f"{key}={path} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set")]
    return None, [note(f"{key}={path}: a model of the hub; its files were not checked")]


def _no_folder(key: str, path: str) -> Finding:
    return error(f"{key}={path}: no such folder", fix="name an existing folder, or a hub model as organisation/name")


def _broken_weights(folder: Path) -> list[str]:
    if any(folder.glob("*.safetensors*")):
        return weight_problems(folder)
    if any(folder.glob("pytorch_model*.bin")):
        return []
    return [f"{folder} holds no weights (model.safetensors or its shards)"]


def check_models(config: DictConfig) -> Findings:
    """Model folders are whole; the discriminator's family can be one, and has a trained head in the GAD stage."""
    actor_key, critic_key = f"{ACTOR_MODEL}.path", "critic.model.path"
    for key in (actor_key, critic_key) if has_discriminator(config) else (actor_key,):
        folder, findings = _model_folder(config, key)
        broken = [] if folder is None else _broken_weights(folder)
        if key == actor_key or get(config, critic_key) != get(config, actor_key):
            yield from findings
            yield from (error(f"{key}: {problem}", fix="copy or save the model again") for problem in broken)
        if folder is None:
            continue
        if not broken and (key == critic_key or get(config, f"{ACTOR}.strategy") in FSDP):
            find = discriminator_problem if key == critic_key else student_problem
            problem = find(folder, bool(get(config, f"{key.removesuffix('.path')}.trust_remote_code")))
            if problem is not None:
                yield problem.about(f"{key}={folder}")
        if key == critic_key and get(config, "gad.stage") == "gad" and not broken and not has_score_head(folder):
            yield error(
                f"{key}={folder} has no score head (no tensor score.weight): verl would draw a random discriminator",
                fix=f"{key}=WARMUP_DIR/global_step_N/critic/huggingface (run_gad.sh --warmup_dir WARMUP_DIR)",
            )


def check_lora(config: DictConfig) -> Findings:
    """LoRA is set with the key that the engine reads, and in a way that suits a discriminator."""
    critic = has_discriminator(config)
    for role, model in ((ACTOR, ACTOR_MODEL), ("critic", "critic.model")) if critic else ((ACTOR, ACTOR_MODEL),):
        strategy, rank = get(config, f"{role}.strategy"), lora_rank(config, model)
        if strategy in FSDP and not get(config, f"{model}.lora_rank") and rank:
            yield error(
                f"{model}.lora.rank={rank} is Megatron's key, and {role}.strategy={strategy} reads {model}.lora_rank",
                fix=f"{model}.lora_rank={rank} {model}.lora.rank=0",
            )
        elif strategy in FSDP and rank and (problem := _adapter_problem(config, role, model)):
            yield problem
    if not critic:
        return
    if (rank := lora_rank(config, "critic.model")) and (strategy := get(config, "critic.strategy")) not in FSDP:
        yield error(
            f"critic.model: the LoRA rank is {rank}, and only FSDP trains adapters of a discriminator "
            f"(critic.strategy={strategy})",
            fix="critic.strategy=fsdp2, or train the whole discriminator: "
            + " ".join(f"critic.model.{name}=0" for name in LORA_KEYS),
        )
    if path := get(config, "critic.model.lora_adapter_path"):
        yield error(
            f"critic.model.lora_adapter_path={path}: the adapters of a discriminator start new",
            fix="critic.model.lora_adapter_path=null critic.model.path=FOLDER with the adapter merged",
        )
    if rank and get(config, "critic.checkpoint.save_lora_only"):
        yield error(
            "critic.checkpoint.save_lora_only=True would leave the trained score head out of the checkpoints",
            fix="critic.checkpoint.save_lora_only=False",
        )


def _adapter_problem(config: DictConfig, role: str, model: str) -> Finding | None:
    folder = Path(str(get(config, f"{model}.path"))).expanduser()
    trust = bool(get(config, f"{model}.trust_remote_code"))
    if get(config, f"{model}.lora_adapter_path") or not folder.is_dir():
        return None
    if _broken_weights(folder) or (role == "critic" and discriminator_problem(folder, trust)):
        return None  # check_models reports it
    return adapter_problem(folder, model, get(config, model), role == "critic", trust)


def check_tokenizers(config: DictConfig) -> Findings:
    """The discriminator reads the student's token ids, so both have the same vocabulary."""
    keys = [f"{ACTOR_MODEL}.tokenizer_path", "critic.model.tokenizer_path", "critic.model.path"]
    keys = keys if has_discriminator(config) else keys[:1]
    for key in keys[:2]:
        path = get(config, key)
        if path in (None, get(config, f"{ACTOR_MODEL}.path"), get(config, "critic.model.path")):
            continue
        if not Path(path).expanduser().is_dir() and not HUB_ID.fullmatch(path):
            yield _no_folder(key, path)
            return
    actor = get(config, keys[0]) or get(config, f"{ACTOR_MODEL}.path")
    if not isinstance(actor, str) or not Path(actor).expanduser().is_dir():
        if isinstance(actor, str) and HUB_ID.fullmatch(actor) and len(keys) > 1:
            yield note(f"not checked: the tokenizer of {actor} is in no local folder")
        return  # else check_models reports an error
    others = {key: get(config, key) for key in keys[1:]}
    if len(keys) > 1 and (settings := fresh_settings(config)) is not None:
        others[f"{FRESH}.model"] = settings.model
    for key, critic in others.items():
        if not isinstance(critic, str) or critic == actor:
            continue
        folders = Path(actor).expanduser(), Path(critic).expanduser()
        if not (folders[1].is_dir() and any(folders[1].glob("*token*"))):
            if folders[1].is_dir() or HUB_ID.fullmatch(critic):
                yield warning(f"{key}={critic}: no local tokenizer to compare with the vocabulary of {actor}")
        elif not _same_tokenizer_files(*folders):
            yield from _vocabulary_findings(key, *folders, bool(get(config, f"{ACTOR_MODEL}.trust_remote_code")))


def check_fresh_discriminator(config: DictConfig) -> Findings:
    """Fresh discriminators, if wanted, have a base model, and validations with answers to learn from."""
    if (settings := fresh_settings(config)) is None:
        return
    key = f"{FRESH}.model"
    what, off = f"{key}={get(config, key)}", f"{key}=null"
    if not has_discriminator(config):
        yield error(
            f"{what}: stage {get(config, 'gad.stage')} trains no discriminator, on whose GPUs fresh ones are trained",
            fix=f"{off}, and gad eval --two_sample_model for the checkpoints",
        )
        return
    if not get(config, "gad.val_d_acc"):
        yield error(f"{what} needs the samples that gad.val_d_acc notes", fix=f"gad.val_d_acc=True, or {off}")
    if not validates(config):
        yield error(
            f"{what}, but trainer.test_freq={get(config, 'trainer.test_freq')} and trainer.val_before_train="
            f"{get(config, 'trainer.val_before_train')}: there is no validation",
            fix=f"trainer.test_freq=50, or {off}",
        )
    folder = Path(settings.model)
    if folder.is_dir() and (problem := discriminator_problem(folder)) is not None:
        yield problem.about(what)
    files, limit = files_of(get(config, "data.val_files")), integer(config, "data.val_max_samples", -1, minimum=-1)
    try:
        prompts = len(set().union(*(column_values(file, get(config, "data.prompt_key")) for file in files)))
    except (ValueError, OSError):  # check_data reports files that cannot be read
        return
    if 0 < (prompts := min(prompts, limit) if limit > 0 else prompts) < MIN_PROMPTS:
        yield error(
            f"{what}: validation has {prompts} different prompts (data.val_files: {', '.join(files)}; "
            f"data.val_max_samples={limit}), and discriminators need {MIN_PROMPTS}: one to learn from, one to judge",
            fix=f"validate on more prompts, or {off}",
        )


def _same_tokenizer_files(first: Path, second: Path) -> bool:
    """True if both folders hold the same tokenizer.json, byte for byte, and the same added tokens."""

    def added_tokens(folder: Path) -> Any:
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return settings.get("added_tokens_decoder") if isinstance(settings, dict) else None

    files = [folder / "tokenizer.json" for folder in (first, second)]
    if not all(file.is_file() for file in files):
        return False
    return files[0].read_bytes() == files[1].read_bytes() and added_tokens(first) == added_tokens(second)


def _vocabulary_findings(key: str, actor: Path, critic: Path, trust_remote_code: bool) -> Findings:
    ours, theirs = (load_tokenizer(folder, trust_remote_code).get_vocab() for folder in (actor, critic))
    if ours == theirs:
        return
    differing = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))[:3]
    examples = ", ".join(f"{token!r} {ours.get(token)} / {theirs.get(token)}" for token in differing)
    yield error(
        f"{key}={critic} has another vocabulary than the actor ({actor}): {len(theirs)} and {len(ours)} tokens; "
        f"ids that differ (actor / critic): {examples}",
        fix="start the discriminator from the student or a model of its family",
    )

"""Checks a GAD run before any model is loaded: configuration, data, model folders, output folder, Ray's CPUs.

    python -m recipe.gad.check [--config-name gad_trainer] [key=value ...]     exit code 2 if anything is wrong
    python -m recipe.gad.check --print-config [key=value ...]

The trainer calls :func:`check_config` too, and ``gad doctor`` adds slower checks (recipe/gad/doctor.py). Every check is
a generator of messages, errors as ``str``, warnings as :class:`Warn`, and what is worth knowing as :class:`Note`; an
error or a warning names the key, its value, what was expected, and the fix.
"""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.gad.checkpoint import check_folder, has_score_head, resume_problems, stage_of, weight_problems
from recipe.gad.teacher_file import data_file_problems
from recipe.gad.tokens import load_tokenizer

STAGES = ("seqkd", "warmup", "gad")
OBJECTIVES = ("policy_gradient", "imitation")
ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
ACTOR_MODEL = "actor_rollout_ref.model"
RAY_STARTED = Path("/tmp/ray/ray_current_cluster")
"""Made by `ray start` on this machine: ray.init() without an address joins that cluster."""
LORA_KEYS = ("lora_rank", "lora.rank")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ConfigError(ValueError):
    """A run that cannot work; ``errors`` and ``warnings`` hold the messages one by one."""

    def __init__(self, errors: list[str], warnings: list[str] | None = None):
        self.errors = errors
        self.warnings = warnings or []
        super().__init__(errors, warnings)

    def __str__(self) -> str:
        return "this GAD run cannot start:\n" + "\n".join(f"- {error}" for error in self.errors)


class Warn(str):
    """A message that does not stop the run."""


class Note(str):
    """A message about something that is as it should be."""


Messages = Iterator[str]
Check = Callable[[DictConfig], Messages]


class Finding(NamedTuple):
    """One line of a report."""

    level: str
    """``ok``, ``warning`` or ``error``."""

    check: str
    """Name of the check, such as ``batches``."""

    message: str


def run_checks(config: DictConfig, checks: Iterable[Check]) -> list[Finding]:
    """Findings of ``checks``, in their order; a check that finds nothing gives one of level ``ok``.

    Args:
        config: gad_trainer.yaml composed with overrides; left as it is.
        checks: functions named ``check_...``, whose docstring says in its first line what holds if they find nothing.
    """
    try:
        resolved: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        return [Finding("error", "configuration", f"the configuration does not resolve: {_one_line(error)}")]
    findings: list[Finding] = []
    for check in checks:
        messages: list[str] = []
        try:
            for message in check(resolved):
                messages.append(message)
        except ConfigError as error:
            messages.extend(error.errors)
        messages = messages or [Note((check.__doc__ or "").split("\n")[0])]
        name = check.__name__.removeprefix("check_")
        findings.extend(Finding(_level(message), name, message) for message in dict.fromkeys(messages))
    return findings


def _level(message: str) -> str:
    return "warning" if isinstance(message, Warn) else "ok" if isinstance(message, Note) else "error"


def check_config(config: DictConfig) -> list[str]:
    """Everything about a GAD run that can be known before models are loaded.

    Args:
        config: gad_trainer.yaml composed with overrides; left as it is.

    Returns:
        Warnings.

    Raises:
        ConfigError: (a ValueError) lists every error found.
    """
    findings = run_checks(config, CHECKS)
    errors, warnings = ([f.message for f in findings if f.level == level] for level in ("error", "warning"))
    if errors:
        raise ConfigError(list(dict.fromkeys(errors)), warnings)
    return warnings


# ---------------------------------------------------------------------- reading values


def get(config: DictConfig, key: str, default: Any = None) -> Any:
    """Value of a dotted key, ``default`` if there is none or it is null."""
    value = OmegaConf.select(config, key)
    return default if value is None else value


def integer(config: DictConfig, key: str, default: int | None = None, minimum: int = 1) -> int:
    """Whole number of a dotted key.

    Raises:
        ConfigError: it is not one, or below ``minimum``.
    """
    value = get(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError([f"{key}={value}: expected a whole number of at least {minimum}. Fix: set it"])
    return value


def neighbours(value: int, step: int) -> str:
    """The multiples of ``step`` next to ``value``: "8 or 16"."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


def has_discriminator(config: DictConfig) -> bool:
    return get(config, "gad.stage") != "seqkd"


def needs_reference(config: DictConfig) -> bool:
    return bool(get(config, f"{ACTOR}.use_kl_loss")) or bool(get(config, "algorithm.use_kl_in_reward"))


def lora_rank(config: DictConfig, model: str) -> int:
    """Rank of LoRA on a model (ACTOR_MODEL or "critic.model"), 0 without; verl reads two keys."""
    return max(integer(config, f"{model}.{name}", 0, minimum=0) for name in LORA_KEYS)


def world_size(config: DictConfig) -> int:
    return integer(config, "trainer.nnodes") * integer(config, "trainer.n_gpus_per_node")


def parallelism(config: DictConfig, role: str) -> tuple[int, int] | None:
    """(GPUs that hold one model copy's worth of data, GPUs that share one sequence) of ``critic`` or the actor.

    None for engines that GAD has not been tried with.
    """
    strategy = get(config, f"{role}.strategy")
    if strategy == "megatron":
        tensor, pipeline, context = (
            integer(config, f"{role}.megatron.{name}_parallel_size", 1)
            for name in ("tensor_model", "pipeline_model", "context")
        )
        return tensor * pipeline * context, context
    if strategy not in ("fsdp", "fsdp2"):
        return None
    engine = f"{role}.fsdp" if role == "critic" else f"{role}.fsdp_config"
    sequence = integer(config, f"{engine}.ulysses_sequence_parallel_size", 1)
    if role != "critic":  # the older key wins in verl's actor; its critic does not read it
        older = integer(config, f"{role}.ulysses_sequence_parallel_size", 1)
        sequence = older if older > 1 else sequence
    return sequence, sequence


# ---------------------------------------------------------------------- 1. the overlay


def check_plugin(config: DictConfig) -> Messages:
    """Our changes to verl are active here and in every process that imports verl."""
    name = "recipe.gad.plugin"
    before_verl = "verl" not in sys.modules or name in sys.modules
    found = [entry.name for entry in entry_points(group="verl.plugins") if entry.value.partition(":")[0] == name]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if not found:
        yield f"no verl.plugins entry point {name} is installed: verl would run without GAD. Fix: pip install -e ."
    elif policy != "auto" and not set(found) & {part.strip() for part in policy.split(",")}:
        yield (
            f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading the GAD plugin. "
            "Fix: unset VERL_USE_EXTERNAL_PLUGINS"
        )
    try:
        with redirect_stderr(io.StringIO()) as printed:  # a plugin that fails prints its traceback
            from recipe.gad import plugin
    except PackageNotFoundError as error:
        yield f"the package {error.name} is not installed. Fix: pip install -e ."
        return
    except Exception as error:
        yield f"the GAD plugin cannot be loaded: {_one_line(error) or printed.getvalue().strip()}"
        return
    if version("verl") != plugin.VERL_VERSION:
        yield f"verl {version('verl')} is installed. Fix: pip install verl=={plugin.VERL_VERSION}"
    elif not (before_verl and plugin.installed()):
        yield "verl was imported without the GAD plugin. Fix: pip install -e . and start Python again"


# ---------------------------------------------------------------------- 4. and 10. stage and sampling


def check_stage(config: DictConfig) -> Messages:
    """Stage, objective and discriminator fit together."""
    stage, objective = get(config, "gad.stage"), get(config, "gad.actor_objective")
    critic = bool(get(config, "critic.enable"))
    if stage not in STAGES:
        yield f"gad.stage={stage}: expected one of {', '.join(STAGES)}. Fix: gad.stage=gad"
        return
    if objective not in OBJECTIVES:
        yield f"gad.actor_objective={objective}: expected {' or '.join(OBJECTIVES)}. Fix: set one of them"
        return
    if stage == "seqkd" and objective != "imitation":
        yield f"gad.actor_objective={objective}: stage seqkd only imitates. Fix: gad.actor_objective=imitation"
    if stage == "seqkd" and critic:
        yield "critic.enable=True: stage seqkd trains no discriminator. Fix: critic.enable=False"
    if stage != "seqkd" and not critic:
        yield f"critic.enable={get(config, 'critic.enable')}: stage {stage} trains one. Fix: critic.enable=True"
    if (stage, objective) in (("warmup", "policy_gradient"), ("gad", "imitation")):
        other = OBJECTIVES[objective == "policy_gradient"]
        yield Warn(f"gad.actor_objective={objective} in stage {stage}: the paper uses {other}")
    if not get(config, "trainer.use_v1"):
        yield "trainer.use_v1=False: GAD is a v1 trainer. Fix: trainer.use_v1=True"
    if (mode := get(config, "trainer.v1.trainer_mode")) != "gad":
        yield f"trainer.v1.trainer_mode={mode}: the GAD trainer would not run. Fix: trainer.v1.trainer_mode=gad"
    poll = get(config, "gad.poll_interval")
    if isinstance(poll, bool) or not isinstance(poll, int | float) or poll <= 0:
        yield f"gad.poll_interval={poll}: expected a number of seconds above 0. Fix: gad.poll_interval=0.1"


def check_sampling(config: DictConfig) -> Messages:
    """The samples of one prompt differ, and GRPO has at least two to compare."""
    n = integer(config, f"{ROLLOUT}.n")
    temperature = get(config, f"{ROLLOUT}.temperature")
    policy_gradient = get(config, "gad.actor_objective") == "policy_gradient"
    if policy_gradient and get(config, "algorithm.adv_estimator") == "grpo" and n < 2:
        yield (
            f"{ROLLOUT}.n={n}: GRPO normalises over the samples of one prompt, expected at least 2. Fix: {ROLLOUT}.n=8"
        )
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature < 0:
        yield f"{ROLLOUT}.temperature={temperature}: expected a number above 0. Fix: {ROLLOUT}.temperature=0.8"
    elif n > 1 and temperature == 0:
        yield (
            f"{ROLLOUT}.temperature={temperature}: the {n} samples of a prompt would be the same text. "
            f"Fix: {ROLLOUT}.temperature=0.8"
        )


def check_saving(config: DictConfig) -> Messages:
    """A warmup run leaves checkpoints for the GAD stage."""
    if get(config, "gad.stage") != "warmup":
        return
    if (save_freq := integer(config, "trainer.save_freq", -1, minimum=-1)) <= 0:
        yield Warn(
            f"trainer.save_freq={save_freq}: no checkpoint is saved for the GAD stage. Fix: trainer.save_freq=50"
        )
    for role in (ACTOR, "critic"):
        if "hf_model" not in get(config, f"{role}.checkpoint.save_contents", []):
            yield Warn(f"{role}.checkpoint.save_contents lacks hf_model, from which the GAD stage starts. Fix: add it")


# ---------------------------------------------------------------------- 2. data


def files_of(value: Any) -> list[str]:
    """Files of a data key: one path, a list of paths, or none."""
    return [str(value)] if isinstance(value, str | Path) else [str(file) for file in value or []]


def check_data(config: DictConfig) -> Messages:
    """Every row of every file has a prompt and a teacher answer; there are enough rows for one step."""
    prompt_key, teacher_key = get(config, "data.prompt_key"), get(config, "data.teacher_key")
    if teacher_key is None:
        yield "data.teacher_key=null: GAD needs the teacher's answers. Fix: data.teacher_key=teacher_response"
    if (truncation := get(config, "data.truncation")) not in ("error", "left", "right"):
        yield f"data.truncation={truncation}: expected error, left or right. Fix: data.truncation=right"
    checked: dict[str, int | None] = {}
    for key in ("data.train_files", "data.val_files"):
        files = files_of(get(config, key))
        if not files:
            yield f"{key}={get(config, key)}: no file. Fix: {key}=/path/to/file.parquet"
        for file in (file for file in files if file not in checked):
            if file.startswith("hdfs://"):
                checked[file] = None
                yield Warn(f"{key}: {file} is not local and was not checked")
                continue
            if file.startswith("~"):
                yield f"{key}: verl does not expand ~ in {file}. Fix: {Path(file).expanduser()}"
            checked[file], problems = data_file_problems(file, prompt_key, teacher_key)
            yield from (f"{key}: {problem}" for problem in problems)
    rows = [checked[file] for file in files_of(get(config, "data.train_files"))]
    if not rows or not all(rows):
        return
    limit = integer(config, "data.train_max_samples", -1, minimum=-1)
    total = sum(row for row in rows if row is not None)
    total = min(total, limit) if limit > 0 else total
    batch = integer(config, "data.train_batch_size")
    if total < batch:
        yield (
            f"data.train_batch_size={batch}, but data.train_files has {total} rows (after data.train_max_samples): "
            f"not one step. Fix: data.train_batch_size={total} or less, or more data"
        )


# ---------------------------------------------------------------------- 3. models


def _model_folder(config: DictConfig, key: str) -> tuple[Path | None, list[str]]:
    """(local folder of a model key or None, messages)."""
    path = get(config, key)
    if not isinstance(path, str) or not path:
        return None, [f"{key}={path}: no model. Fix: {key}=/path/to/folder or organisation/name"]
    if path.startswith("hdfs://"):
        return None, [Warn(f"{key}={path} is not local and was not checked")]
    folder = Path(path).expanduser()
    if folder.is_dir():
        if path.startswith("~") or path.endswith("/"):
            exact = str(folder.absolute())
            return folder, [f"{key}={path}: verl takes neither a leading ~ nor a trailing /. Fix: {key}={exact}"]
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
            return None, [f"{key}={path}: no config.json in this folder (found: {found}). Fix: name a model's folder"]
        return folder, []
    if folder.exists() or path[0] in "/.~" or not HUB_ID.fullmatch(path):
        return None, [_no_folder(key, path)]
    if (os.environ.get("HF_HUB_OFFLINE") or "0").lower() in ("1", "true", "yes", "on") and not cached_model(path):
        return None, [Warn(f"{key}={path} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set")]
    return None, []


def _no_folder(key: str, path: str) -> str:
    return f"{key}={path}: no such folder. Fix: name an existing folder, or a hub model as organisation/name"


def cached_model(repo: str) -> Path | None:
    """Folder of a hub model in the Hugging Face cache, None if it was not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repo, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _broken_weights(folder: Path) -> list[str]:
    if any(folder.glob("*.safetensors*")):
        return weight_problems(folder)
    if any(folder.glob("pytorch_model*.bin")):
        return []
    return [f"{folder} holds no weights (model.safetensors or its shards)"]


def check_models(config: DictConfig) -> Messages:
    """Model folders exist and are whole; in the GAD stage the discriminator's head is a trained one."""
    actor_key, critic_key = f"{ACTOR_MODEL}.path", "critic.model.path"
    for key in (actor_key, critic_key) if has_discriminator(config) else (actor_key,):
        folder, messages = _model_folder(config, key)
        broken = [] if folder is None else _broken_weights(folder)
        if key == actor_key or get(config, critic_key) != get(config, actor_key):
            yield from messages
            yield from (f"{key}: {problem}. Fix: copy or save the model again" for problem in broken)
        if folder is None:
            continue
        if key == critic_key and get(config, "gad.stage") == "gad" and not broken and not has_score_head(folder):
            yield (
                f"{key}={folder} has no score head (no tensor score.weight): verl would draw a random discriminator. "
                f"Fix: {key}=WARMUP_DIR/global_step_N/critic/huggingface (run_gad.sh --warmup_dir WARMUP_DIR)"
            )


def check_critic_lora(config: DictConfig) -> Messages:
    """The discriminator is trained whole: verl cannot train a LoRA adapter on it."""
    if has_discriminator(config) and (rank := lora_rank(config, "critic.model")):
        fix = " ".join(f"critic.model.{name}=0" for name in LORA_KEYS)
        yield (
            f"critic.model: the LoRA rank is {rank}, but verl gives every adapter the task of a language model, which "
            f"PEFT refuses for a discriminator (AttributeError). Fix: {fix}"
        )


def check_tokenizers(config: DictConfig) -> Messages:
    """The discriminator, which reads the student's token ids, has the same vocabulary."""
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
        return  # a hub model, or reported by check_models
    for key in keys[1:]:
        critic = get(config, key)
        if not isinstance(critic, str) or critic == actor:
            continue
        folders = Path(actor).expanduser(), Path(critic).expanduser()
        if not (folders[1].is_dir() and any(folders[1].glob("*token*"))):
            if folders[1].is_dir() or HUB_ID.fullmatch(critic):
                yield Warn(f"{key}={critic}: no local tokenizer to compare with the vocabulary of {actor}")
        elif not _same_tokenizer_files(*folders):
            yield from _vocabulary_messages(key, *folders, bool(get(config, f"{ACTOR_MODEL}.trust_remote_code")))


def _same_tokenizer_files(first: Path, second: Path) -> bool:
    """True if both folders hold the same tokenizer.json, byte for byte, and the same added tokens."""

    def added_tokens(folder: Path) -> Any:
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return settings.get("added_tokens_decoder")

    files = [folder / "tokenizer.json" for folder in (first, second)]
    if not all(file.is_file() for file in files):
        return False
    return files[0].read_bytes() == files[1].read_bytes() and added_tokens(first) == added_tokens(second)


def _vocabulary_messages(key: str, actor: Path, critic: Path, trust_remote_code: bool) -> Messages:
    try:
        ours, theirs = (load_tokenizer(folder, trust_remote_code).get_vocab() for folder in (actor, critic))
    except ValueError as error:
        yield str(error)
        return
    if ours == theirs:
        return
    differing = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))[:3]
    examples = ", ".join(f"{token!r} {ours.get(token)} / {theirs.get(token)}" for token in differing)
    yield (
        f"{key}={critic} has another vocabulary than the actor ({actor}): {len(theirs)} and {len(ours)} tokens; "
        f"ids that differ (actor / critic): {examples}. "
        "Fix: start the discriminator from the student or a model of its family"
    )


# ---------------------------------------------------------------------- 5. batch arithmetic


def _valid_batches(key: str, batch: int, mini: int, ranks: int) -> str:
    """ "critic.ppo_mini_batch_size=16 or 24 with data.train_batch_size=32 or 48": values that work together."""
    minis = [int(value) for value in neighbours(mini, ranks).split(" or ")]
    fix = f"{key}={' or '.join(map(str, minis))}"
    if all(batch % value == 0 for value in minis):
        return fix
    batches = [max(1, round(batch / value)) * value for value in minis]
    return f"{fix} with data.train_batch_size={' or '.join(map(str, batches))}"


def check_batches(config: DictConfig) -> Messages:
    """Batches split evenly into mini-batches, and those over the data-parallel ranks."""
    batch, gpus = integer(config, "data.train_batch_size"), world_size(config)
    for role in (ACTOR, "critic") if has_discriminator(config) else (ACTOR,):
        key = f"{role}.ppo_mini_batch_size"
        mini = integer(config, key)
        if batch % mini:
            yield (
                f"data.train_batch_size={batch} is not a multiple of {key}={mini} (both count prompts). "
                f"Fix: data.train_batch_size={neighbours(batch, mini)}, or {key}={batch}"
            )
        parallel = parallelism(config, role)
        if parallel is None:
            continue
        copy, where = parallel[0], "trainer.nnodes x trainer.n_gpus_per_node"
        if gpus % copy:
            yield (
                f"{role}: its model parallelism takes {copy} GPUs, which does not divide the {gpus} of {where}. "
                f"Fix: {neighbours(gpus, copy)} GPUs, or less parallelism"
            )
        elif mini % (ranks := gpus // copy):
            yield (
                f"{key}={mini} is not a multiple of the {ranks} data-parallel ranks ({where} = {gpus}, "
                f"{copy} per rank). Fix: {_valid_batches(key, batch, mini, ranks)}, "
                f"or {copy * max(r for r in range(1, ranks) if mini % r == 0)} GPUs"
            )
    names = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
    engine = 1
    for name in names:
        engine *= integer(config, f"{ROLLOUT}.{name}", 1)
    if gpus % engine:
        divisors = [str(size) for size in range(1, gpus + 1) if gpus % size == 0]
        yield (
            f"{ROLLOUT}.tensor_model_parallel_size={get(config, f'{ROLLOUT}.{names[0]}')}: one rollout engine takes "
            f"{engine} GPUs, which does not divide {gpus}. "
            f"Fix: {ROLLOUT}.tensor_model_parallel_size={' or '.join(divisors)}"
        )
    older = integer(config, "critic.ulysses_sequence_parallel_size", 1)
    if older > 1:
        key = "critic.fsdp.ulysses_sequence_parallel_size"
        yield Warn(f"critic.ulysses_sequence_parallel_size={older} is not read by verl. Fix: {key}={older}")


# ---------------------------------------------------------------------- 6. token limits


def check_tokens(config: DictConfig) -> Messages:
    """The longest trajectory fits each micro-batch, and the longest group of n + 1 that of D's update."""
    row = integer(config, "data.max_prompt_length") + integer(config, "data.max_response_length")
    n = integer(config, f"{ROLLOUT}.n")
    what = f"prompt + response = {row} tokens"
    dynamic = bool(get(config, f"{ACTOR}.use_dynamic_bsz"))
    limits = [(f"{ACTOR}.ppo", ACTOR, dynamic), (f"{ROLLOUT}.log_prob", ACTOR, dynamic)]
    if get(config, f"{ROLLOUT}.log_prob_use_dynamic_bsz") != dynamic:
        key = f"{ROLLOUT}.log_prob_use_dynamic_bsz"
        yield f"{key} must equal {ACTOR}.use_dynamic_bsz={dynamic}. Fix: {key}={dynamic}"
    if needs_reference(config):
        limits.append((f"{REF}.log_prob", REF, bool(get(config, f"{REF}.log_prob_use_dynamic_bsz"))))
    if has_discriminator(config):
        limits.append(("critic.forward", "critic", bool(get(config, "critic.use_dynamic_bsz"))))
    for prefix, role, by_tokens in limits:
        if by_tokens:
            yield from _token_limit(config, f"{prefix}_max_token_len_per_gpu", role, row, what)
        else:
            integer(config, f"{prefix}_micro_batch_size_per_gpu")
    if has_discriminator(config):
        group = f"the n + 1 = {n + 1} answers to one prompt, (n + 1) x (prompt + response) = {(n + 1) * row} tokens"
        if get(config, "critic.use_dynamic_bsz"):
            yield from _token_limit(config, "critic.ppo_max_token_len_per_gpu", "critic", (n + 1) * row, group)
        elif (rows := integer(config, "critic.ppo_micro_batch_size_per_gpu")) < n + 1:
            yield (
                f"critic.ppo_micro_batch_size_per_gpu={rows} rows, but the n + 1 = {n + 1} answers to one prompt are "
                f"never split. Fix: critic.ppo_micro_batch_size_per_gpu={n + 1} or a multiple"
            )
    key = f"{ROLLOUT}.max_model_len"
    if (longest := integer(config, key, row)) < row:
        yield f"{key}={longest} does not hold {what}. Fix: {key}={row}"


def _token_limit(config: DictConfig, key: str, role: str, needed: int, what: str) -> Messages:
    limit, sharing = integer(config, key), (parallelism(config, role) or (1, 1))[1]
    if limit * sharing < needed:
        over = f" x {sharing} GPUs that share a sequence" if sharing > 1 else ""
        yield f"{key}={limit}{over} does not hold {what}. Fix: {key}={-(-needed // sharing)} or more"


# ---------------------------------------------------------------------- 7. output folder


def check_output(config: DictConfig) -> Messages:
    """The output folder is new, or holds checkpoints of the same stage from which the run can resume."""
    key, stage, mode = "trainer.default_local_dir", get(config, "gad.stage"), get(config, "trainer.resume_mode")
    folder = get(config, key)
    if not isinstance(folder, str) or not folder or folder.startswith("~"):
        yield f"{key}={folder}: expected a path (verl does not expand ~). Fix: {key}=$HOME/checkpoints/gad"
        return
    if mode not in ("auto", "disable", "resume_path"):
        yield f"trainer.resume_mode={mode}: expected auto, disable or resume_path. Fix: trainer.resume_mode=auto"
        return
    try:
        check_folder(folder, stage, resume=mode == "auto", world_size=world_size(config))
        if mode == "resume_path":
            yield from _resume_path_messages(config, stage)
    except ConfigError:
        raise
    except ValueError as error:
        yield str(error)


def _resume_path_messages(config: DictConfig, stage: str) -> Messages:
    key, path = "trainer.resume_from_path", get(config, "trainer.resume_from_path")
    if not isinstance(path, str) or not re.fullmatch(r"global_step_\d+", Path(path).name) or path.endswith("/"):
        yield f"{key}={path}: expected the path of a global_step_N folder. Fix: {key}=DIR/global_step_N"
        return
    if not Path(path).is_dir():
        yield f"{key}={path}: no such folder. Fix: name an existing global_step_N folder"
    elif problems := resume_problems(Path(path), has_discriminator(config)):
        yield f"{key}={path} is not complete: {'; '.join(problems)}. Fix: name another global_step_N folder"
    elif (owner := stage_of(Path(path).parent)) not in (None, stage):
        yield (
            f"{key}={path} is of stage {owner}, and this run is of stage {stage}. "
            f"Fix: gad.stage={owner}, or start from its huggingface folders (run_gad.sh --warmup_dir)"
        )


# ---------------------------------------------------------------------- 8. Ray's logical CPUs


def required_ray_cpus(config: DictConfig) -> int:
    """Logical CPUs a run needs of Ray; with fewer, verl waits for ever without a message.

    Actors that name no num_cpus hold none while they run (task runner, reward and agent-loop workers, rollout servers),
    so only these count. Tried with Ray 2.60: one CPU less than the held ones and the placement group never comes up.
    """
    # TransferQueue: one CPU for the controller, and one for each storage actor of its in-memory backend
    cpus = 1
    if get(config, "transfer_queue.backend.storage_backend", "SimpleStorage") == "SimpleStorage":
        cpus += integer(config, "transfer_queue.backend.SimpleStorage.num_data_storage_units")
    # training workers: a placement-group bundle of 3 CPUs per GPU (ResourcePoolManager.max_colocate_count), for the
    # training pool and for the pools of their own that a reward model and verl's own distillation may have
    gpus = world_size(config)
    for pool, enabled in (("reward.reward_model", "enable_resource_pool"), ("distillation", "enabled")):
        if get(config, f"{pool}.{enabled}"):
            gpus += integer(config, f"{pool}.nnodes") * integer(config, f"{pool}.n_gpus_per_node")
    cpus += 3 * gpus
    # the "remote" reward manager: each reward worker starts reward.num_workers scoring actors of one CPU
    if get(config, "reward.reward_manager.name") == "remote":
        cpus += integer(config, "reward.num_workers") ** 2
    # one to spare: a plain Ray task takes one while it runs
    return cpus + 1


def _starts_ray(config: DictConfig) -> bool:
    """Does the run start a Ray cluster of its own, and not join one?"""
    address = get(config, "ray_kwargs.ray_init.address")
    if address is not None:
        return address == "local"
    return not (os.environ.get("RAY_ADDRESS") or RAY_STARTED.exists())


def _ray_cpus(config: DictConfig) -> tuple[int, str] | None:
    """(logical CPUs of Ray, where the number comes from); None if another cluster decides."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return int(ray.cluster_resources().get("CPU", 0)), "the Ray cluster"
    if not _starts_ray(config):
        return None
    if get(config, "ray_kwargs.ray_init.num_cpus") is not None:
        return integer(config, "ray_kwargs.ray_init.num_cpus"), "ray_kwargs.ray_init.num_cpus"
    return os.cpu_count() or 1, "ray_kwargs.ray_init.num_cpus=null, this machine's cores"


def check_ray(config: DictConfig) -> Messages:
    """Ray has enough logical CPUs for every actor."""
    available = _ray_cpus(config)
    needed = required_ray_cpus(config)
    if available is None or available[0] >= needed:
        return
    units = get(config, "transfer_queue.backend.SimpleStorage.num_data_storage_units")
    yield (
        f"Ray has {available[0]} logical CPUs ({available[1]}), but this run needs {needed}; verl would hang without a "
        f"message. Fix: ray_kwargs.ray_init.num_cpus={needed} (scheduling slots, not cores), or fewer "
        f"transfer_queue.backend.SimpleStorage.num_data_storage_units (now {units})"
    )


# ---------------------------------------------------------------------- 9. runs without a GPU


def check_device(config: DictConfig) -> Messages:
    """Device, platform and engines fit together."""
    device, rollout = get(config, "trainer.device"), get(config, f"{ROLLOUT}.name")
    ray = sys.modules.get("ray")
    in_worker = ray is not None and ray.is_initialized()  # Ray may set the variable to "" for workers without a GPU
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and not in_worker:
        yield "CUDA_VISIBLE_DEVICES is the empty string, which ends Ray's node process. Fix: unset CUDA_VISIBLE_DEVICES"
    lora = lora_rank(config, ACTOR_MODEL)
    if rollout == "hf" and lora > 0 and not get(config, f"{ACTOR_MODEL}.lora.merge"):
        yield (
            f"{ACTOR_MODEL}.lora.merge=False: the hf rollout takes whole weights, and the LoRA rank is {lora}. "
            f"Fix: {ACTOR_MODEL}.lora.merge=True"
        )
    platform = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if device != "cpu":
        if platform == "cpu":
            yield f"VERL_PLATFORM=cpu, but trainer.device={device}. Fix: device=cpu, or unset VERL_PLATFORM"
        return
    sets = "(device=cpu sets it)"
    if platform != "cpu":
        yield f"trainer.device=cpu, but VERL_PLATFORM={platform or 'is not set'}. Fix: export VERL_PLATFORM=cpu"
    if rollout != "hf":
        yield f"{ROLLOUT}.name={rollout} needs a GPU, and trainer.device=cpu. Fix: {ROLLOUT}.name=hf {sets}"
    critic = has_discriminator(config)
    for key in (ACTOR, REF, "critic") if critic else (ACTOR, REF):
        if (strategy := get(config, f"{key}.strategy")) != "fsdp2":
            yield f"{key}.strategy={strategy} needs a GPU, and trainer.device=cpu. Fix: {key}.strategy=fsdp2 {sets}"
    for key in (ACTOR_MODEL, "critic.model") if critic else (ACTOR_MODEL,):
        name = f"{key}.override_config.attn_implementation"
        if get(config, name, "flash_attention_2") == "flash_attention_2":
            yield f"{name}=flash_attention_2 (verl's default) needs a GPU. Fix: ++{name}=sdpa {sets}"
    key, gpus = "ray_kwargs.ray_init.num_gpus", world_size(config)
    if not in_worker and _ray_cpus(config) is not None and (slots := integer(config, key, 0, minimum=0)) < gpus:
        yield f"{key}={slots}: verl places its workers on {gpus} logical GPUs. Fix: ++{key}={gpus} {sets}"


CHECKS: tuple[Check, ...] = (
    check_plugin,
    check_stage,
    check_sampling,
    check_saving,
    check_device,
    check_batches,
    check_tokens,
    check_ray,
    check_output,
    check_models,
    check_critic_lora,
    check_tokenizers,
    check_data,
)


# ---------------------------------------------------------------------- command line


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def compose_config(overrides: list[str], name: str = "gad_trainer") -> DictConfig:
    """The configuration that ``verl.trainer.main_ppo --config-path pkg://recipe.gad.config`` composes.

    verl's YAML files are found without importing verl, which takes seconds.

    Raises:
        ValueError: verl is not installed, or an override does not fit the configuration.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    verl = find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        raise ValueError("the package verl is not installed. Fix: pip install -e .")
    folders = [Path(folder) / "trainer" / "config" for folder in verl.submodule_search_locations]
    searchpath = ",".join(f"'file://{folder}'" for folder in folders if folder.is_dir())
    try:
        with initialize_config_module("recipe.gad.config", version_base=None):
            return compose(name, [f"hydra.searchpath=[{searchpath}]", *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        cause = f" ({_one_line(error.__cause__)})" if error.__cause__ else ""
        raise ValueError(_one_line(error) + cause) from None


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code is 2 on errors."""
    parser = argparse.ArgumentParser(prog="python -m recipe.gad.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config-name", default="gad_trainer", help="configuration of recipe/gad/config")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration, check nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = compose_config(options.overrides, options.config_name)
        if options.print_config:
            print(OmegaConf.to_yaml(config, resolve=True))
            return 0
        errors, warnings = [], check_config(config)
    except ConfigError as error:
        errors, warnings = error.errors, error.warnings
    except (ValueError, OmegaConfBaseException) as error:
        errors, warnings = [_one_line(error)], []
    for warning in warnings:
        print(f"warning: {warning}")
    for message in errors:
        print(f"error: {_one_line(message)}")
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main())

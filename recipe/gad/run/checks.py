"""Checks of a GAD run before any model is loaded: configuration, data, model folders, output folder, Ray's CPUs.

The trainer calls :func:`check_config`. ``gad doctor`` runs these checks and slower ones (recipe/gad/doctor/checks.py).
Every check is a generator of findings that name the key, its value, what was expected, and the fix.
"""

import io
import os
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from omegaconf import DictConfig

from recipe.gad.run.checkpoint import (
    check_folder,
    check_models_of_run,
    check_workers,
    claim_folder,
    resume_problems,
    stage_of,
    tracked_step,
    verify_contents,
)
from recipe.gad.run.config import (
    ACTOR,
    ACTOR_MODEL,
    REF,
    ROLLOUT,
    files_of,
    get,
    has_discriminator,
    integer,
    lora_rank,
    needs_reference,
    neighbours,
    parallelism,
    resolved,
    start_models,
    world_size,
)
from recipe.gad.run.data_file import data_file_problems
from recipe.gad.run.findings import (
    Check,
    ConfigError,
    Finding,
    Findings,
    InputError,
    either,
    error,
    note,
    one_line,
    warning,
)
from recipe.gad.run.model_checks import check_critic_lora, check_models, check_tokenizers

STAGES = ("seqkd", "warmup", "gad")
OBJECTIVES = ("policy_gradient", "imitation")
RAY_STARTED = Path("/tmp/ray/ray_current_cluster")
"""`ray start` writes this file; ray.init() without an address then joins that cluster."""


def check_config(config: DictConfig) -> list[Finding]:
    """Check everything about a GAD run that can be known before models are loaded.

    Args:
        config: gad_trainer.yaml composed with overrides; it is not changed.

    Returns:
        Warnings; ``str`` gives their text.

    Raises:
        ConfigError: (a ValueError) lists every error found.
    """
    findings = run_checks(config, CHECKS)
    warnings = [finding for finding in findings if finding.level == "warning"]
    errors: dict[str, Finding] = {}
    for finding in findings:
        if finding.level == "error":
            errors.setdefault(str(finding), finding)  # two checks may read the same bad key
    if errors:
        raise ConfigError(list(errors.values()), warnings)
    return warnings


def run_checks(config: DictConfig, checks: Iterable[Check]) -> list[Finding]:
    """Findings of ``checks``, in their order; a check that finds nothing gives one finding of level ``ok``.

    Args:
        config: gad_trainer.yaml composed with overrides; it is not changed.
        checks: see :data:`recipe.gad.run.findings.Check`.
    """
    try:
        config = resolved(config)
    except InputError as problem:
        return [replace(problem.finding, where="configuration")]
    findings: list[Finding] = []
    for check in checks:
        found: list[Finding] = []
        try:
            for finding in check(config):
                found.append(finding)
        except InputError as problem:
            found.append(problem.finding)
        found = found or [note((check.__doc__ or "").split("\n")[0])]
        findings.extend(replace(finding, where=name_of(check)) for finding in dict.fromkeys(found))
    return findings


def name_of(check: Check) -> str:
    """``batches`` for ``check_batches``."""
    return check.__name__.removeprefix("check_")


# ---------------------------------------------------------------------- the overlay


def check_plugin(config: DictConfig) -> Findings:
    """Our changes to verl are active here and in every process that imports verl."""
    name = "recipe.gad.plugin"
    before_verl = "verl" not in sys.modules or name in sys.modules
    found = [entry.name for entry in entry_points(group="verl.plugins") if entry.value.partition(":")[0] == name]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if not found:
        yield error(
            f"no verl.plugins entry point {name} is installed: verl would run without GAD", fix="pip install -e ."
        )
    elif policy != "auto" and not set(found) & {part.strip() for part in policy.split(",")}:
        yield error(
            f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading the GAD plugin",
            fix="unset VERL_USE_EXTERNAL_PLUGINS",
        )
    try:
        with redirect_stderr(io.StringIO()) as printed:  # a plugin that fails prints its traceback
            from recipe.gad import plugin
    except PackageNotFoundError as problem:
        yield error(f"the package {problem.name} is not installed", fix="pip install -e .")
        return
    except Exception as problem:
        yield error(f"the GAD plugin cannot be loaded: {one_line(problem) or printed.getvalue().strip()}")
        return
    if version("verl") != plugin.VERL_VERSION:
        yield error(f"verl {version('verl')} is installed", fix=f"pip install verl=={plugin.VERL_VERSION}")
    elif not (before_verl and plugin.installed()):
        yield error("verl was imported without the GAD plugin", fix="pip install -e . and start Python again")


# ---------------------------------------------------------------------- stage and sampling


def check_stage(config: DictConfig) -> Findings:
    """Stage, objective and discriminator fit together."""
    stage, objective = get(config, "gad.stage"), get(config, "gad.actor_objective")
    critic = bool(get(config, "critic.enable"))
    if stage not in STAGES:
        yield error(f"gad.stage={stage}: expected one of {', '.join(STAGES)}", fix="gad.stage=gad")
        return
    if objective not in OBJECTIVES:
        yield error(f"gad.actor_objective={objective}: expected {either(OBJECTIVES)}", fix="set one of them")
        return
    if stage == "seqkd" and objective != "imitation":
        yield error(f"gad.actor_objective={objective}: stage seqkd only imitates", fix="gad.actor_objective=imitation")
    if stage == "seqkd" and critic:
        yield error("critic.enable=True: stage seqkd trains no discriminator", fix="critic.enable=False")
    if stage == "seqkd" and get(config, "trainer.rollout_data_dir"):
        folder = get(config, "trainer.rollout_data_dir")
        yield warning(f"trainer.rollout_data_dir={folder}: stage seqkd samples nothing, so no file is written")
    if stage != "seqkd" and not critic:
        yield error(
            f"critic.enable={get(config, 'critic.enable')}: stage {stage} trains a discriminator",
            fix="critic.enable=True",
        )
    if (stage, objective) in (("warmup", "policy_gradient"), ("gad", "imitation")):
        other = OBJECTIVES[objective == "policy_gradient"]
        yield warning(f"gad.actor_objective={objective} in stage {stage}: the paper uses {other}")
    if not get(config, "trainer.use_v1"):
        yield error("trainer.use_v1=False: GAD is a v1 trainer", fix="trainer.use_v1=True")
    if (mode := get(config, "trainer.v1.trainer_mode")) != "gad":
        yield error(f"trainer.v1.trainer_mode={mode}: the GAD trainer would not run", fix="trainer.v1.trainer_mode=gad")


def check_polling(config: DictConfig) -> Findings:
    """The trainer waits a positive time between two looks at the replay buffer."""
    poll = get(config, "gad.poll_interval")
    if isinstance(poll, bool) or not isinstance(poll, int | float) or poll <= 0:
        yield error(f"gad.poll_interval={poll}: expected a number of seconds above 0", fix="gad.poll_interval=0.1")


def check_stopping(config: DictConfig) -> Findings:
    """The run knows when to stop because it has broken."""
    integer(config, "gad.stop_after_bad_steps", minimum=0)
    yield from ()


def check_sampling(config: DictConfig) -> Findings:
    """The samples of one prompt differ, and GRPO has at least two to compare."""
    n = integer(config, f"{ROLLOUT}.n")
    temperature = get(config, f"{ROLLOUT}.temperature")
    policy_gradient = get(config, "gad.actor_objective") == "policy_gradient"
    if policy_gradient and get(config, "algorithm.adv_estimator") == "grpo" and n < 2:
        yield error(
            f"{ROLLOUT}.n={n}: GRPO normalizes over the samples of one prompt, expected at least 2",
            fix=f"{ROLLOUT}.n=8",
        )
    if get(config, "algorithm.filter_groups.enable"):
        yield error(
            "algorithm.filter_groups.enable=True: it filters by rewards at sampling time, when the discriminator has "
            "not scored yet, so it would drop every prompt and sample without end; expected False",
            fix="algorithm.filter_groups.enable=False",
        )
    fix = f"{ROLLOUT}.temperature=0.8"
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature < 0:
        yield error(f"{ROLLOUT}.temperature={temperature}: expected a number above 0", fix)
    elif n > 1 and temperature == 0:
        yield error(f"{ROLLOUT}.temperature={temperature}: the {n} samples of a prompt would be the same text", fix)


def check_saving(config: DictConfig) -> Findings:
    """A warmup run leaves checkpoints for the GAD stage."""
    if get(config, "gad.stage") != "warmup":
        return
    if (save_freq := integer(config, "trainer.save_freq", -1, minimum=-1)) <= 0:
        yield warning(
            f"trainer.save_freq={save_freq}: no checkpoint is saved for the GAD stage", fix="trainer.save_freq=50"
        )
    for role in (ACTOR, "critic"):
        if "hf_model" not in get(config, f"{role}.checkpoint.save_contents", []):
            yield warning(
                f"{role}.checkpoint.save_contents lacks hf_model, from which the GAD stage starts", fix="add hf_model"
            )


# ---------------------------------------------------------------------- data


def check_data(config: DictConfig) -> Findings:
    """Every row of every file has a prompt and a teacher answer; there are enough rows for one step."""
    prompt_key, teacher_key = get(config, "data.prompt_key"), get(config, "data.teacher_key")
    if teacher_key is None:
        yield error("data.teacher_key=null: GAD needs the teacher's answers", fix="data.teacher_key=teacher_response")
    if (truncation := get(config, "data.truncation")) not in ("error", "left", "right"):
        yield error(f"data.truncation={truncation}: expected error, left or right", fix="data.truncation=right")
    checked: dict[str, int | None] = {}
    for key in ("data.train_files", "data.val_files"):
        files = files_of(get(config, key))
        if not files:
            yield error(f"{key}={get(config, key)}: no file", fix=f"{key}=/path/to/file.parquet")
        for file in (file for file in files if file not in checked):
            if file.startswith("hdfs://"):
                checked[file] = None
                yield warning(f"{key}: {file} is not local and was not checked")
                continue
            if file.startswith("~"):
                yield error(f"{key}: verl does not expand ~ in {file}", fix=f"{Path(file).expanduser()}")
            checked[file], problems = data_file_problems(file, prompt_key, teacher_key)
            yield from (problem.about(key) for problem in problems)
    rows = [checked[file] for file in files_of(get(config, "data.train_files"))]
    if not rows or not all(rows):
        return
    limit = integer(config, "data.train_max_samples", -1, minimum=-1)
    total = sum(row for row in rows if row is not None)
    total = min(total, limit) if limit > 0 else total
    batch = integer(config, "data.train_batch_size")
    if total < batch:
        yield error(
            f"data.train_batch_size={batch}, but data.train_files has {total} rows (after data.train_max_samples): "
            "not one step",
            fix=f"data.train_batch_size={total} or less, or more data",
        )


def _valid_batches(key: str, batch: int, mini: int, ranks: int) -> str:
    """Values that fit ``ranks``: ``critic.ppo_mini_batch_size=16 or 24 with data.train_batch_size=32 or 48``."""
    minis = neighbours(mini, ranks)
    fix = f"{key}={either(minis)}"
    if all(batch % value == 0 for value in minis):
        return fix
    batches = [max(1, round(batch / value)) * value for value in minis]
    return f"{fix} with data.train_batch_size={either(batches)}"


def check_batches(config: DictConfig) -> Findings:
    """Batches split evenly into mini-batches, and those over the data-parallel ranks."""
    batch, gpus = integer(config, "data.train_batch_size"), world_size(config)
    for role in (ACTOR, "critic") if has_discriminator(config) else (ACTOR,):
        key = f"{role}.ppo_mini_batch_size"
        mini = integer(config, key)
        if batch % mini:
            yield error(
                f"data.train_batch_size={batch} is not a multiple of {key}={mini} (both count prompts)",
                fix=f"data.train_batch_size={either(neighbours(batch, mini))}, or {key}={batch}",
            )
        parallel = parallelism(config, role)
        if parallel is None:
            continue
        copy, where = parallel[0], "trainer.nnodes x trainer.n_gpus_per_node"
        if gpus % copy:
            yield error(
                f"{role}: its model parallelism takes {copy} GPUs, which does not divide the {gpus} of {where}",
                fix=f"{either(neighbours(gpus, copy))} GPUs, or less parallelism",
            )
        elif mini % (ranks := gpus // copy):
            yield error(
                f"{key}={mini} is not a multiple of the {ranks} data-parallel ranks ({where} = {gpus}, "
                f"{copy} per rank)",
                fix=f"{_valid_batches(key, batch, mini, ranks)}, "
                f"or {copy * max(r for r in range(1, ranks) if mini % r == 0)} GPUs",
            )
    names = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
    engine = 1
    for name in names:
        engine *= integer(config, f"{ROLLOUT}.{name}", 1)
    if gpus % engine:
        key = f"{ROLLOUT}.tensor_model_parallel_size"
        yield error(
            f"{key}={get(config, key)}: one rollout engine takes {engine} GPUs, which does not divide {gpus}",
            fix=f"{key}={either(size for size in range(1, gpus + 1) if gpus % size == 0)}",
        )
    older = integer(config, "critic.ulysses_sequence_parallel_size", 1)
    if older > 1:
        key = "critic.fsdp.ulysses_sequence_parallel_size"
        yield warning(f"critic.ulysses_sequence_parallel_size={older} is not read by verl", fix=f"{key}={older}")


# ---------------------------------------------------------------------- token limits


def check_tokens(config: DictConfig) -> Findings:
    """The longest trajectory fits each micro-batch; the longest group of n + 1 fits the discriminator's update."""
    row = integer(config, "data.max_prompt_length") + integer(config, "data.max_response_length")
    n = integer(config, f"{ROLLOUT}.n")
    what = f"prompt + response = {row} tokens"
    dynamic = bool(get(config, f"{ACTOR}.use_dynamic_bsz"))
    limits = [(f"{ACTOR}.ppo", ACTOR, dynamic), (f"{ROLLOUT}.log_prob", ACTOR, dynamic)]
    if get(config, f"{ROLLOUT}.log_prob_use_dynamic_bsz") != dynamic:
        key = f"{ROLLOUT}.log_prob_use_dynamic_bsz"
        yield error(f"{key} must equal {ACTOR}.use_dynamic_bsz={dynamic}", fix=f"{key}={dynamic}")
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
            yield error(
                f"critic.ppo_micro_batch_size_per_gpu={rows} rows, but the n + 1 = {n + 1} answers to one prompt are "
                "never split",
                fix=f"critic.ppo_micro_batch_size_per_gpu={n + 1} or a multiple",
            )
    key = f"{ROLLOUT}.max_model_len"
    if (longest := integer(config, key, row)) < row:
        yield error(f"{key}={longest} does not hold {what}", fix=f"{key}={row}")


def _token_limit(config: DictConfig, key: str, role: str, needed: int, what: str) -> Findings:
    limit, sharing = integer(config, key), (parallelism(config, role) or (1, 1))[1]
    if limit * sharing < needed:
        over = f" x {sharing} GPUs that share a sequence" if sharing > 1 else ""
        yield error(f"{key}={limit}{over} does not hold {what}", fix=f"{key}={-(-needed // sharing)} or more")


# ---------------------------------------------------------------------- output folder


def check_output(config: DictConfig) -> Findings:
    """The output folder is new, or holds checkpoints of the same stage from which the run can resume."""
    key, stage, mode = "trainer.default_local_dir", get(config, "gad.stage"), get(config, "trainer.resume_mode")
    folder = get(config, key)
    if not isinstance(folder, str) or not folder or folder.startswith("~"):
        yield error(f"{key}={folder}: expected a path (verl does not expand ~)", fix=f"{key}=$HOME/checkpoints/gad")
        return
    if mode not in ("auto", "disable", "resume_path"):
        yield error(
            f"trainer.resume_mode={mode}: expected auto, disable or resume_path", fix="trainer.resume_mode=auto"
        )
        return
    check_folder(folder, stage, resume=mode == "auto", world_size=world_size(config))
    if mode == "resume_path":
        yield from _resume_path_findings(config, stage)
    if (resumed := resumed_checkpoint(config)) is not None:
        check_models_of_run(resumed.parent, start_models(config))


def resumed_checkpoint(config: DictConfig) -> Path | None:
    """Folder ``global_step_N`` from which the run will resume; None if it starts from its models."""
    mode, folder = get(config, "trainer.resume_mode"), Path(get(config, "trainer.default_local_dir"))
    if mode == "auto":
        step = tracked_step(folder)
        return None if step is None else folder / f"global_step_{step}"
    path = get(config, "trainer.resume_from_path")
    return Path(path) if mode == "resume_path" and path is not None else None


def claim_output(config: DictConfig) -> None:
    """Make the output folder that of this run; call it when :func:`check_config` has passed.

    Raises:
        InputError: the folder holds another run's checkpoints, or the checkpoint to resume from is damaged.
    """
    if (resumed := resumed_checkpoint(config)) is not None:
        verify_contents(resumed, config.gad.stage)
    claim_folder(config.trainer.default_local_dir, config.gad.stage, start_models(config))


def _resume_path_findings(config: DictConfig, stage: str) -> Findings:
    key, path = "trainer.resume_from_path", get(config, "trainer.resume_from_path")
    if not isinstance(path, str) or not re.fullmatch(r"global_step_\d+", Path(path).name) or path.endswith("/"):
        yield error(f"{key}={path}: expected the path of a global_step_N folder", fix=f"{key}=DIR/global_step_N")
    elif not Path(path).is_dir():
        yield error(f"{key}={path}: no such folder", fix="name an existing global_step_N folder")
    elif problems := resume_problems(Path(path), has_discriminator(config)):
        yield error(f"{key}={path} is not complete: {'; '.join(problems)}", fix="name another global_step_N folder")
    elif (owner := stage_of(Path(path).parent)) not in (None, stage):
        yield error(
            f"{key}={path} is of stage {owner}, and this run is of stage {stage}",
            fix=f"gad.stage={owner}, or start from its huggingface folders (run_gad.sh --warmup_dir)",
        )
    else:
        check_workers(Path(path), world_size(config))


# ---------------------------------------------------------------------- Ray's logical CPUs


def required_ray_cpus(config: DictConfig) -> int:
    """Logical CPUs that a run needs of Ray; with fewer, verl hangs silently.

    Only actors that name num_cpus hold CPUs while they run. Task runner, reward and agent-loop workers and rollout
    servers name none. Tried with Ray 2.60: one CPU short, and the placement group never comes up.
    """
    # TransferQueue: one CPU for the controller, and one for each storage actor of its in-memory backend
    cpus = 1
    if get(config, "transfer_queue.backend.storage_backend", "SimpleStorage") == "SimpleStorage":
        cpus += integer(config, "transfer_queue.backend.SimpleStorage.num_data_storage_units")
    # training workers: a placement-group bundle of 3 CPUs per GPU (ResourcePoolManager.max_colocate_count), for the
    # training pool and for the separate pools that a reward model and verl's distillation may have
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
    """True if the run starts a Ray cluster; False if it joins one."""
    address = get(config, "ray_kwargs.ray_init.address")
    if address is not None:
        return address == "local"
    return not (os.environ.get("RAY_ADDRESS") or RAY_STARTED.exists())


def _ray_cpus(config: DictConfig) -> tuple[int, str] | None:
    """Logical CPUs of Ray, and where the number comes from; None if the run joins a cluster that is not known yet."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return int(ray.cluster_resources().get("CPU", 0)), "the Ray cluster"
    if not _starts_ray(config):
        return None
    if get(config, "ray_kwargs.ray_init.num_cpus") is not None:
        return integer(config, "ray_kwargs.ray_init.num_cpus"), "ray_kwargs.ray_init.num_cpus"
    return os.cpu_count() or 1, "ray_kwargs.ray_init.num_cpus=null, this machine's cores"


def check_ray(config: DictConfig) -> Findings:
    """Ray has enough logical CPUs for every actor."""
    available = _ray_cpus(config)
    needed = required_ray_cpus(config)
    if available is None or available[0] >= needed:
        return
    units = get(config, "transfer_queue.backend.SimpleStorage.num_data_storage_units")
    yield error(
        f"Ray has {available[0]} logical CPUs ({available[1]}), but this run needs {needed}; verl would hang silently",
        fix=f"ray_kwargs.ray_init.num_cpus={needed} (scheduling slots, not cores), or fewer "
        f"transfer_queue.backend.SimpleStorage.num_data_storage_units (now {units})",
    )


# ---------------------------------------------------------------------- runs without a GPU


def check_device(config: DictConfig) -> Findings:
    """Device, platform and engines fit together."""
    device, rollout = get(config, "trainer.device"), get(config, f"{ROLLOUT}.name")
    ray = sys.modules.get("ray")
    in_worker = ray is not None and ray.is_initialized()  # Ray may set the variable to "" for workers without a GPU
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and not in_worker:
        yield error(
            "CUDA_VISIBLE_DEVICES is the empty string, which ends Ray's node process", fix="unset CUDA_VISIBLE_DEVICES"
        )
    lora = lora_rank(config, ACTOR_MODEL)
    if rollout == "hf" and lora > 0 and not get(config, f"{ACTOR_MODEL}.lora.merge"):
        yield error(
            f"{ACTOR_MODEL}.lora.merge=False: the hf rollout takes whole weights, and the LoRA rank is {lora}",
            fix=f"{ACTOR_MODEL}.lora.merge=True",
        )
    platform = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if device == "cpu":
        yield from _cpu_findings(config, rollout, platform, in_worker)
    elif platform == "cpu":
        yield error(f"VERL_PLATFORM=cpu, but trainer.device={device}", fix="device=cpu, or unset VERL_PLATFORM")


def _cpu_findings(config: DictConfig, rollout: str, platform: str, in_worker: bool) -> Findings:
    """What does not work with trainer.device=cpu."""
    sets = "(device=cpu sets it)"
    if platform != "cpu":
        yield error(f"trainer.device=cpu, but VERL_PLATFORM={platform or 'is not set'}", fix="export VERL_PLATFORM=cpu")
    if rollout != "hf":
        yield error(f"{ROLLOUT}.name={rollout} needs a GPU, and trainer.device=cpu", fix=f"{ROLLOUT}.name=hf {sets}")
    critic = has_discriminator(config)
    for key in (ACTOR, REF, "critic") if critic else (ACTOR, REF):
        if (strategy := get(config, f"{key}.strategy")) != "fsdp2":
            yield error(
                f"{key}.strategy={strategy} needs a GPU, and trainer.device=cpu", fix=f"{key}.strategy=fsdp2 {sets}"
            )
    for key in (ACTOR_MODEL, "critic.model") if critic else (ACTOR_MODEL,):
        name = f"{key}.override_config.attn_implementation"
        if get(config, name, "flash_attention_2") == "flash_attention_2":
            yield error(f"{name}=flash_attention_2 (verl's default) needs a GPU", fix=f"++{name}=sdpa {sets}")
    key, gpus = "ray_kwargs.ray_init.num_gpus", world_size(config)
    if not in_worker and _ray_cpus(config) is not None and (slots := integer(config, key, 0, minimum=0)) < gpus:
        yield error(f"{key}={slots}: verl places its workers on {gpus} logical GPUs", fix=f"++{key}={gpus} {sets}")


CHECKS: tuple[Check, ...] = (
    check_plugin,
    check_stage,
    check_polling,
    check_stopping,
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

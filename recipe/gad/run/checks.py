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
from math import inf
from pathlib import Path

from omegaconf import DictConfig
from packaging.version import Version

from recipe.gad.run.checkpoint import (
    DPO_STAGES,
    WITHOUT_DISCRIMINATOR,
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
    LEAD_MEAN,
    REF,
    ROLLOUT,
    files_of,
    get,
    has_discriminator,
    integer,
    is_number,
    labelled_mini_batch,
    lora_rank,
    needs_reference,
    neighbours,
    number,
    parallelism,
    replayed_prompts,
    resolved,
    start_models,
    unlabelled_prompts,
    validates,
    world_size,
)
from recipe.gad.run.data_file import data_file_problems, joint_problem, teacher_columns
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
from recipe.gad.run.model_checks import check_fresh_discriminator, check_lora, check_models, check_tokenizers
from recipe.gad.run.refusals import (
    check_agents,
    check_choices,
    check_estimator,
    check_loggers,
    check_moved_keys,
    check_names,
    check_parameter_sync,
    check_quantized_rollout,
    check_ratios,
    check_reward_function,
    check_reward_model,
    check_router_replay,
    check_task_reward,
    check_teacher_answers,
    compared_answers,
)
from recipe.gad.run.safety import check_remote_code, check_secrets
from recipe.gad.run.thinking import check_score_span, check_thinking

STAGES = ("seqkd", "warmup", "gad", *DPO_STAGES)
OBJECTIVES = ("policy_gradient", "imitation", "dpo")
CREDITS = ("sequence", "token")
PEFT_WITHOUT_FSDP1 = Version("0.21.0")
"""The first release whose ``get_peft_model_state_dict`` finds no adapter in a model under FSDP1."""
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
    return [finding for check in checks for finding in run_check(config, check)]


def run_check(config: DictConfig, check: Check) -> list[Finding]:
    """Findings of one check, as in :func:`run_checks`; ``config`` has no references left."""
    found: list[Finding] = []
    try:
        for finding in check(config):
            found.append(finding)
    except InputError as problem:
        found.append(problem.finding)
    found = found or [note((check.__doc__ or "").split("\n")[0])]
    return [replace(finding, where=name_of(check)) for finding in dict.fromkeys(found)]


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
    if stage == "seqkd" and objective == "policy_gradient":
        yield error(f"gad.actor_objective={objective}: stage seqkd only imitates", fix="gad.actor_objective=imitation")
    if (objective == "dpo") != (stage in DPO_STAGES):
        fix = "dpo" if stage in DPO_STAGES else "imitation" if stage in ("seqkd", "warmup") else "policy_gradient"
        yield error(
            f"gad.actor_objective={objective}: dpo is for the stages {either(DPO_STAGES)}, and the stage is {stage}",
            fix=f"gad.actor_objective={fix}",
        )
    if stage in WITHOUT_DISCRIMINATOR and critic:
        yield error(f"critic.enable=True: stage {stage} trains no discriminator", fix="critic.enable=False")
    if stage in ("seqkd", "soda") and (folder := get(config, "trainer.rollout_data_dir")):
        yield warning(f"trainer.rollout_data_dir={folder}: no step of {stage} has rollouts, so no file is written")
    if stage not in WITHOUT_DISCRIMINATOR and not critic:
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


def check_objective(config: DictConfig) -> Findings:
    """Settings of the policy gradient have values that work, and a policy gradient."""
    on: dict[str, str] = {}
    objective = get(config, "gad.actor_objective")
    for key in ("gad.imitation_coef", "gad.policy_gate"):
        value = get(config, key)
        if not is_number(value) or not 0 <= value < inf:
            yield error(f"{key}={value}: expected a number of at least 0", fix=f"{key}=0")
        elif value and (key, objective) != ("gad.imitation_coef", "dpo"):
            on[f"{key}={value}"] = f"{key}=0"
    if (in_group := get(config, "gad.teacher_in_group")) not in (True, False):
        yield error(f"gad.teacher_in_group={in_group}: expected True or False", fix="gad.teacher_in_group=False")
    elif in_group:
        on["gad.teacher_in_group=True"] = "gad.teacher_in_group=False"
    if objective != "policy_gradient":
        for found, off in on.items():
            yield error(
                f"{found} belongs to the policy gradient, and gad.actor_objective={objective}",
                fix=f"{off}, or gad.actor_objective=policy_gradient in stage gad",
            )
    imitates = objective == "imitation" and get(config, "gad.stage") not in DPO_STAGES  # check_stage refuses both
    for key in (f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward") if imitates else ():
        if get(config, key):
            yield error(
                f"{key}=True: imitation has no KL term, so verl would load a reference that nothing uses",
                fix=f"{key}=False; the KL to the reference belongs to gad.actor_objective=policy_gradient",
            )


def check_teacher_terms(config: DictConfig) -> Findings:
    """Teacher rows can share a batch with the students' in the actor's update."""
    if get(config, "gad.actor_objective") != "policy_gradient":
        return
    found = [
        f"gad.{key}={value}" for key in ("imitation_coef", "teacher_in_group") if (value := get(config, f"gad.{key}"))
    ]
    if not found:
        return
    key, temperature = f"{ACTOR_MODEL}.use_fused_kernels", get(config, f"{ROLLOUT}.temperature")
    if get(config, key) and temperature != 1:
        yield error(
            f"{found[0]} takes log-probabilities of students at {ROLLOUT}.temperature={temperature} and of teachers "
            f"at 1 in one batch, which {key}=True cannot",
            fix=f"{key}=False, or {ROLLOUT}.temperature=1.0",
        )
    key = f"{ACTOR}.{get(config, f'{ACTOR}.strategy')}.router_replay.mode"
    if (mode := get(config, key, "disabled")) != "disabled":
        yield error(f"{found[0]} adds rows that have no routing to replay, and {key}={mode}", fix=f"{key}=disabled")
    if get(config, "gad.teacher_in_group") is not True:
        return
    if (estimator := get(config, "algorithm.adv_estimator")) != "grpo":
        yield error(
            f"gad.teacher_in_group=True needs groups, and algorithm.adv_estimator={estimator}",
            fix="algorithm.adv_estimator=grpo",
        )
    if get(config, "algorithm.use_kl_in_reward"):
        yield error(
            "gad.teacher_in_group=True compares the scores of a group, and algorithm.use_kl_in_reward=True would "
            "change the students' alone",
            fix=f"algorithm.use_kl_in_reward=False with {ACTOR}.use_kl_loss=True",
        )


def check_credit(config: DictConfig) -> Findings:
    """Credit per token finds a discriminator, and advantages that nothing else computes."""
    credit, gamma = get(config, "gad.credit"), get(config, "gad.credit_gamma")
    if credit not in CREDITS:
        yield error(f"gad.credit={credit}: expected {either(CREDITS)}", fix="gad.credit=sequence")
    if not is_number(gamma) or not 0 <= gamma <= 1:
        yield error(f"gad.credit_gamma={gamma}: expected a number from 0 to 1", fix="gad.credit_gamma=0.9")
    if credit != "token":
        return
    if (stage := get(config, "gad.stage")) in WITHOUT_DISCRIMINATOR:
        yield error(f"gad.credit=token: stage {stage} trains no discriminator", fix="gad.credit=sequence")
    if get(config, "gad.actor_objective") != "policy_gradient":
        return
    needed = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": False,
        "algorithm.use_kl_in_reward": False,
        "gad.teacher_in_group": False,
    }
    for key, value in needed.items():
        if (found := get(config, key)) != value:
            yield error(f"gad.credit=token would ignore {key}={found}", fix=f"{key}={value}")


def check_dpo(config: DictConfig) -> Findings:
    """DPO has a reference, one optimizer step a batch, and no settings that it would not read."""
    stage, batch = get(config, "gad.stage"), get(config, "data.train_batch_size")
    if stage not in DPO_STAGES:
        return
    beta = get(config, "gad.dpo_beta")
    if not is_number(beta) or beta <= 0:
        yield error(f"gad.dpo_beta={beta}: expected a number above 0", fix="gad.dpo_beta=0.1")
    if not get(config, f"{ACTOR}.use_kl_loss"):
        yield error(
            f"{ACTOR}.use_kl_loss=False: verl then loads no reference, which DPO compares with",
            fix=f"{ACTOR}.use_kl_loss=True",
        )
    one_step = "the gradient of DPO is exact for one optimizer step of the whole batch"
    for key, value in (("ppo_mini_batch_size", batch), ("ppo_epochs", 1)):
        if (found := get(config, f"{ACTOR}.{key}")) != value:
            yield error(f"{ACTOR}.{key}={found}: {one_step}", fix=f"{ACTOR}.{key}={value}")
    unread = {
        f"{ACTOR}.kl_loss_coef": 0,
        f"{ACTOR}.entropy_coeff": 0,
        f"{ACTOR}.policy_loss.loss_mode": "vanilla",
        "algorithm.use_kl_in_reward": False,
        "trainer.critic_warmup": 0,
    }
    for key, value in unread.items():
        if (found := get(config, key)) != value:
            yield error(f"{key}={found}: stage {stage} would not read it", fix=f"{key}={value}")


def check_polling(config: DictConfig) -> Findings:
    """The trainer waits a positive time between two looks at the replay buffer."""
    poll = get(config, "gad.poll_interval")
    if not is_number(poll) or poll <= 0:
        yield error(f"gad.poll_interval={poll}: expected a number of seconds above 0", fix="gad.poll_interval=0.1")


def check_lead(config: DictConfig) -> Findings:
    """The discriminator's lead can end before its last step, and only in a stage that it can precede."""
    key = "gad.discriminator_lead"
    steps = integer(config, f"{key}.max_steps", minimum=0)
    patience = integer(config, f"{key}.patience")
    number(config, f"{key}.min_delta", 0, 1)
    if not steps:
        return
    if (objective := get(config, "gad.actor_objective")) != "policy_gradient":
        yield error(
            f"{key}.max_steps={steps}, but gad.actor_objective={objective}: the lead is for the policy gradient",
            fix=f"{key}.max_steps=0, or trainer.critic_warmup={steps + 1}",
        )
    if warmup := integer(config, "trainer.critic_warmup", minimum=0):
        yield error(
            f"{key}.max_steps={steps} and trainer.critic_warmup={warmup}: both hold the actor back",
            fix=f"trainer.critic_warmup=0 or {key}.max_steps=0",
        )
    test_freq = integer(config, "trainer.test_freq", -1, minimum=-1)
    validates = bool(get(config, "gad.val_d_acc")) and test_freq > 0
    at_start = bool(validates and get(config, "trainer.val_before_train", True))
    every = test_freq if validates else LEAD_MEAN
    values = at_start + (steps - 1) // every
    if values <= patience:
        yield error(
            f"{key}.max_steps={steps} sees {values} accuracies (one every {every} steps), too few for "
            f"{key}.patience={patience}: the lead would always last {steps} steps",
            fix=f"{key}.max_steps={(patience + 1 - at_start) * every + 1} or more, or "
            f"trainer.critic_warmup={steps + 1} for a fixed number of steps",
        )


def check_average(config: DictConfig) -> Findings:
    """The average of the discriminator's weights has an engine that can keep it, and somebody follows its scores."""
    key = "gad.discriminator_ema"
    if not (decay := number(config, key, 0, 1)):
        return
    if (objective := get(config, "gad.actor_objective")) != "policy_gradient":
        yield error(
            f"{key}={decay}, but gad.actor_objective={objective}: no actor follows the scores of the average",
            fix=f"{key}=0",
        )
    if (strategy := get(config, "critic.strategy")) != "fsdp2":
        yield error(
            f"{key}={decay}, but critic.strategy={strategy}: the average is for FSDP2", fix="critic.strategy=fsdp2"
        )


def check_replay(config: DictConfig) -> Findings:
    """Replayed prompts split evenly over the data-parallel ranks, and the buffer holds those of one step."""
    key, mini_key = "gad.replay", "critic.ppo_mini_batch_size"
    capacity = integer(config, "gad.replay_capacity")
    if not (fraction := number(config, key, 0, 10)):
        return
    if not has_discriminator(config):
        stage = get(config, "gad.stage")
        yield error(f"{key}={fraction}: stage {stage} trains no discriminator", fix=f"{key}=0")
        return
    mini, prompts = labelled_mini_batch(config), replayed_prompts(config)
    copy, _ = parallelism(config, "critic") or (1, 1)
    ranks = max(1, world_size(config) // copy)
    if not prompts or prompts % ranks:
        fits = either(f"{n / mini:g}" for n in neighbours(prompts, ranks))
        yield error(
            f"{key}={fraction} x {mini} prompts of an optimizer step ({mini_key}) are {prompts} earlier prompts, "
            f"expected a multiple of the {ranks} data-parallel ranks",
            fix=f"{key}={fits}",
        )
    needed = prompts * (integer(config, "data.train_batch_size") // integer(config, mini_key))
    if capacity < needed:
        yield error(
            f"gad.replay_capacity={capacity} is less than the {needed} prompts that one step replays",
            fix=f"gad.replay_capacity={needed} or more",
        )


def check_label_smoothing(config: DictConfig) -> Findings:
    """Smoothed labels have a range in which the teacher is still preferred, and a discriminator."""
    key = "gad.label_smoothing"
    if (smoothing := number(config, key, 0, 0.5)) and not has_discriminator(config):
        yield error(f"{key}={smoothing}: stage {get(config, 'gad.stage')} trains no discriminator", fix=f"{key}=0")


def check_shortcuts(config: DictConfig) -> Findings:
    """Switches about what the discriminator reads need a discriminator, and one that judges whole answers."""
    for key in ("gad.retokenize", "gad.shortcut_probe"):
        if (value := get(config, key)) not in (True, False):
            yield error(f"{key}={value}: expected True or False", fix=f"{key}=False")
        elif value and not has_discriminator(config):
            yield error(f"{key}=True: stage {get(config, 'gad.stage')} trains no discriminator", fix=f"{key}=False")
    if get(config, "gad.retokenize") is True and get(config, "gad.credit") == "token":
        yield error(
            "gad.credit=token credits the tokens that were sampled, and gad.retokenize=True scores others",
            fix="gad.retokenize=False, or gad.credit=sequence",
        )


def check_unlabelled(config: DictConfig) -> Findings:
    """Prompts without teacher answers: files and share fit together, and the rest of a step suits the discriminator."""
    key, ratio = "gad.unlabelled_files", number(config, "gad.unlabelled_ratio", 0, 1)
    files = files_of(get(config, key))
    if bool(files) != bool(ratio):
        yield error(
            f"{key}={files}, but gad.unlabelled_ratio={ratio}: one is of no use without the other",
            fix=f"set both, or {key}=[] gad.unlabelled_ratio=0",
        )
        return
    if not files:
        return
    if (objective := get(config, "gad.actor_objective")) != "policy_gradient":
        yield error(
            f"{key}={files}, but gad.actor_objective={objective}: there is nothing to imitate on these prompts",
            fix=f"{key}=[] gad.unlabelled_ratio=0",
        )
        return
    for other, off in (("gad.imitation_coef", 0), ("gad.teacher_in_group", False), ("gad.credit", "sequence")):
        if (value := get(config, other)) not in (off, None):
            yield error(
                f"{other}={value} works on groups with a teacher answer, which the prompts of {key} lack",
                fix=f"{other}={off}, or {key}=[] gad.unlabelled_ratio=0",
            )
    for file in files:
        _, problems = data_file_problems(file, get(config, "data.prompt_key"), None)
        yield from (problem.about(key) for problem in problems)
    batch, mini = integer(config, "data.train_batch_size"), integer(config, "critic.ppo_mini_batch_size")
    labelled, steps = batch - unlabelled_prompts(config), max(1, batch // mini)
    copy, _ = parallelism(config, "critic") or (1, 1)
    share = steps * max(1, world_size(config) // copy)
    if labelled == batch or labelled == 0 or labelled % share:
        fits = either(f"{(batch - n) / batch:g}" for n in neighbours(labelled, share) if n < batch)
        yield error(
            f"gad.unlabelled_ratio={ratio} leaves {labelled} of data.train_batch_size={batch} prompts for the "
            f"discriminator, expected fewer than {batch} and a multiple of {share} (optimizer steps x data-parallel "
            "ranks)",
            fix=f"gad.unlabelled_ratio={fits}",
        )
    draws = "algorithm.filter_groups.enable", "trainer.v1.sampler.sync_refill_failed_groups", "data.gen_batch_size"
    for other in draws:
        if value := get(config, other):
            yield error(
                f"{other}={value} and {key} both decide how many prompts are drawn",
                fix=f"{other}={'null' if other == draws[-1] else False}, or {key}=[] gad.unlabelled_ratio=0",
            )


def check_stopping(config: DictConfig) -> Findings:
    """The run knows when to stop because it has broken."""
    integer(config, "gad.stop_after_bad_steps", minimum=0)
    timeout = get(config, "gad.step_timeout", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout < 0:
        yield error(f"gad.step_timeout={timeout}: expected null, or seconds, or 0", fix="gad.step_timeout=null")


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
    if not is_number(temperature) or temperature < 0:
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
    """Every row of every file has a prompt and a teacher answer; there are enough rows for the steps of the run."""
    prompt_key, teacher_key = get(config, "data.prompt_key"), get(config, "data.teacher_key")
    if teacher_key is None:
        yield error("data.teacher_key=null: GAD needs the teacher's answers", fix="data.teacher_key=teacher_response")
    teachers = teacher_columns(teacher_key)
    if teacher_key is not None and (not teachers or not all(teachers) or len(set(teachers)) < len(teachers)):
        yield error(
            f"data.teacher_key={teacher_key}: expected a column, or a list of different columns",
            fix="data.teacher_key=teacher_response",
        )
        return
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
        joined = [file for file in files if file.endswith(".parquet") and checked[file]]
        if len(joined) > 1 and (problem := joint_problem(joined)) is not None:
            what = f"{key}: verl cannot join {', '.join(joined)}: {problem.rstrip('.')}"
            yield error(what, fix="give the column the same type in all files, or drop it")
    train, val = (set(files_of(get(config, f"data.{name}_files"))) for name in ("train", "val"))
    if validates(config) and train & val:
        yield warning(
            f"data.val_files names a file of data.train_files ({', '.join(sorted(train & val))}): validation asks what "
            "training has taught",
            fix="name other rows with --val_files, such as the val.parquet of gad prepare",
        )
    rows = [checked[file] for file in files_of(get(config, "data.train_files"))]
    if not rows or not all(rows):
        return
    limit = integer(config, "data.train_max_samples", -1, minimum=-1)
    total = sum(row for row in rows if row is not None)
    total = min(total, limit) if limit > 0 else total
    check_steps(config, total)
    yield from _warmup_findings(config, total // integer(config, "data.train_batch_size"))


def _warmup_findings(config: DictConfig, per_epoch: int) -> Findings:
    """The student trains too. ``per_epoch``: steps of an epoch."""
    steps = integer(config, "trainer.total_training_steps", integer(config, "trainer.total_epochs") * per_epoch)
    warmup = integer(config, "trainer.critic_warmup", 0, minimum=0) if has_discriminator(config) else 0
    if steps < warmup and get(config, "gad.score_span") != "answer":  # a student that thinks must not imitate
        yield warning(
            f"the run has {steps} steps, and trainer.critic_warmup={warmup}: only the discriminator trains",
            fix="unless that is meant, raise trainer.total_epochs, or lower data.train_batch_size or "
            "trainer.critic_warmup",
        )


def check_steps(config: DictConfig, rows: int) -> None:
    """Check that rows of training data are enough for the steps of the run.

    verl counts epochs as well as steps, and saves and validates only in the last of ``total_training_steps``.

    Args:
        rows: the trainer counts them once more when it has left out overlong prompts.

    Raises:
        InputError: they give no whole step, or ``trainer.total_epochs`` of them end the run early.
    """
    batch = integer(config, "data.train_batch_size")
    if rows < batch:
        raise InputError(
            f"data.train_batch_size={batch}, but data.train_files has {rows} rows (data.train_max_samples and "
            "data.filter_overlong_prompts may leave some out): not one step",
            fix=f"data.train_batch_size={rows} or less, or more data",
        )
    if get(config, "trainer.total_training_steps") is None:
        return
    steps, epochs = (integer(config, f"trainer.total_{name}") for name in ("training_steps", "epochs"))
    per_epoch = rows // batch
    if (last := epochs * per_epoch) < steps:
        raise InputError(
            f"trainer.total_training_steps={steps}, but trainer.total_epochs={epochs} of {per_epoch} steps ({rows} "
            f"rows of data.train_files / data.train_batch_size={batch}) end the run after step {last}, without the "
            "checkpoint and the validation of the last step",
            fix=f"trainer.total_epochs={-(-steps // per_epoch)}, or trainer.total_training_steps={last}",
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
    """The longest trajectory fits each micro-batch; the longest group fits the discriminator's update."""
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
        teachers = compared_answers(config) or 1
        size, total = f"n + {teachers}", n + teachers
        group = f"the {size} = {total} answers to one prompt, ({size}) x (prompt + response) = {total * row} tokens"
        if get(config, "critic.use_dynamic_bsz"):
            yield from _token_limit(config, "critic.ppo_max_token_len_per_gpu", "critic", total * row, group)
        elif (rows := integer(config, "critic.ppo_micro_batch_size_per_gpu")) < total:
            yield error(
                f"critic.ppo_micro_batch_size_per_gpu={rows} rows, but the {size} = {total} answers to one prompt are "
                "never split",
                fix=f"critic.ppo_micro_batch_size_per_gpu={total} or a multiple",
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
    if (lora := lora_rank(config, ACTOR_MODEL)) > 0 and not get(config, f"{ACTOR_MODEL}.lora.merge"):
        yield from _adapter_transfer(config, rollout, lora)
    platform = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if device == "cpu":
        yield from _cpu_findings(config, rollout, platform, in_worker)
    elif platform == "cpu":
        yield error(f"VERL_PLATFORM=cpu, but trainer.device={device}", fix="device=cpu, or unset VERL_PLATFORM")


def _adapter_transfer(config: DictConfig, rollout: str, lora: int) -> Findings:
    """Adapters that go to the rollout engine by themselves arrive there."""
    key, merged = f"{ACTOR_MODEL}.lora.merge=False", f"{ACTOR_MODEL}.lora.merge=True"
    if rollout == "hf":
        yield error(f"{key}: the hf rollout takes whole weights, and the LoRA rank is {lora}", fix=merged)
    elif get(config, f"{ACTOR}.strategy") == "fsdp" and Version(version("peft")) >= PEFT_WITHOUT_FSDP1:
        yield error(
            f"{key}: with {ACTOR}.strategy=fsdp and peft {version('peft')}, verl finds no adapter to send, and the "
            f"first update of {rollout}'s weights hangs",
            fix=f"{merged}, or {ACTOR}.strategy=fsdp2",
        )


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
    check_secrets,
    check_stage,
    check_objective,
    check_teacher_terms,
    check_credit,
    check_dpo,
    check_polling,
    check_lead,
    check_average,
    check_label_smoothing,
    check_replay,
    check_teacher_answers,
    check_shortcuts,
    check_score_span,
    check_thinking,
    check_unlabelled,
    check_stopping,
    check_sampling,
    check_saving,
    check_device,
    check_batches,
    check_tokens,
    check_ray,
    check_output,
    check_models,
    check_remote_code,
    check_lora,
    check_tokenizers,
    check_data,
    check_fresh_discriminator,
    check_choices,
    check_loggers,
    check_estimator,
    check_parameter_sync,
    check_reward_model,
    check_quantized_rollout,
    check_router_replay,
    check_agents,
    check_names,
    check_moved_keys,
    check_ratios,
    check_task_reward,
    check_reward_function,
)

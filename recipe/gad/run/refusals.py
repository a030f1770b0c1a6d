"""Settings of verl that its configuration accepts and that a GAD run would ignore, or on which it would break.

:data:`recipe.gad.run.checks.CHECKS` lists these checks.
"""

import ast
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig

from recipe.gad.run.config import (
    ACTOR,
    ROLLOUT,
    files_of,
    get,
    has_discriminator,
    integer,
    is_number,
    leaf_keys,
    similar_keys,
)
from recipe.gad.run.data_file import NO_SOURCE, UNLABELLED, column_values, most_answers
from recipe.gad.run.findings import Findings, either, error, warning

ESTIMATORS = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "rloo",
    "rloo_vectorized",
    "opo",
    "gpg",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
)
"""verl's advantage estimators that need nothing but one score per answer."""
OTHER_ESTIMATORS = {
    "gae": "it needs a value of every token, and the discriminator gives one score per answer",
    "remax": "it needs the reward of a greedy answer, which nobody samples",
    "gdpo": "it needs several rewards per answer, and the discriminator gives one",
    "optimal_token_baseline": "it needs sum_pi_squared, which verl's v1 trainer does not hand over",
    "tir_optimal_token_baseline": "it needs sum_pi_squared, which verl's v1 trainer does not hand over",
}
"""Those that need more, and what."""
OLD_LOG_PROB_ESTIMATORS = ("optimal_token_baseline", "tir_optimal_token_baseline")
"""Advantage estimators that read old log-probabilities."""
GROUP_ESTIMATORS = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "reinforce_plus_plus_baseline")
"""Advantage estimators that compare an answer with the others to its prompt, and take one answer's score as it is."""
AGENT = "single_turn_agent"
TEACHER_ANSWERS = ("one", "all")
"""Values of gad.teacher_answers."""
COMBINE = ("normalized", "raw")
"""Values of gad.task_reward.combine."""
PACKAGED_REWARD = "pkg://recipe.gad.reward"
REWARD_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What verl's reward managers pass to a reward function, by name."""
CLIPPING = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}
"""verl's defaults of the keys that say when the loss clips."""
CLIP_RATIO = 0.2
"""verl's default of clip_ratio, which its losses read only where clip_ratio_low or clip_ratio_high is null."""
KL_TYPES = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
CHOICES = {
    f"{ACTOR}.loss_agg_mode": (
        "token-mean",
        "token-sum",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "seq-mean-token-mean",
    ),
    f"{ACTOR}.kl_loss_type": (*KL_TYPES, *(f"{name}+" for name in KL_TYPES)),
}
"""Keys for which verl knows these values alone."""
OPEN_CHOICES = {
    f"{ACTOR}.policy_loss.loss_mode": (
        "vanilla",
        "gspo",
        "gpg",
        "dppo_tv",
        "dppo_kl",
        "sapo",
        "clip_cov",
        "kl_cov",
        "geo_mean",
        "dro",
        "cispo",
        "bypass_mode",
    ),
    f"{ROLLOUT}.name": ("vllm", "sglang", "trtllm", "hf"),
}
"""Keys whose values can also be names that other code registers with verl."""
LOGGERS: dict[str, str | None] = {
    "console": None,
    "file": None,
    "tracking": "wandb",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "tensorboard": "tensorboard",
    "clearml": "clearml",
    "trackio": "trackio",
    "rl_insight": "rl_insight",
}
"""Values of trainer.logger, with the package that each needs beside verl's own."""
MOVED = {
    f"{ACTOR}.grad_clip": (1.0, f"{ACTOR}.optim.clip_grad"),
    "critic.grad_clip": (1.0, "critic.optim.clip_grad"),
    f"{ACTOR}.fsdp_config.strategy": ("fsdp", f"{ACTOR}.strategy"),
    "critic.fsdp.strategy": ("fsdp", "critic.strategy"),
}
"""Key that nothing reads -> verl's default of it, and the key that is read."""
TOP_GROUPS = ("algorithm", "data", "trainer")
"""Groups that verl's sources call by these names where they read them."""


def check_estimator(config: DictConfig) -> Findings:
    """The advantage estimator works on one score per answer."""
    key = "algorithm.adv_estimator"
    name = get(config, key)
    if not has_discriminator(config) or name in ESTIMATORS:
        return
    if name in OTHER_ESTIMATORS:
        yield error(f"{key}={name}: {OTHER_ESTIMATORS[name]}", fix=f"{key}=grpo")
        return
    verl = sys.modules.get("verl.trainer.ppo.core_algos")  # a module of the user's may have registered the name
    if verl is None:
        yield warning(f"{key}={name} is not one of verl's estimators ({', '.join(ESTIMATORS)}) and was not checked")
    elif name not in verl.ADV_ESTIMATOR_REGISTRY:
        yield error(f"{key}={name}: expected one of {', '.join(ESTIMATORS)}", fix=f"{key}=grpo")


def check_parameter_sync(config: DictConfig) -> Findings:
    """A step of the trainer is one batch."""
    key = "trainer.v1.sync.parameter_sync_step"
    if "parameter_sync_step" in get(config, "trainer.v1.sync", {}) and (steps := get(config, key)) != 1:
        yield error(
            f"{key}={steps}: it splits a batch, and the trainer pairs teacher and student over a whole one; expected 1",
            fix=f"{key}=1; for several optimizer steps per batch, lower actor_rollout_ref.actor.ppo_mini_batch_size",
        )


def check_reward_model(config: DictConfig) -> Findings:
    """No reward model shares the GPUs with the discriminator, which would overwrite its scores."""
    for group in ("reward.reward_model", "reward_model"):  # verl still takes the older name
        if get(config, f"{group}.enable") and not get(config, f"{group}.enable_resource_pool"):
            yield error(
                f"{group}.enable=True: this reward model would score every training sample, and the discriminator's "
                "score would replace the result",
                fix=f"{group}.enable=False",
            )


def compared_answers(config: DictConfig) -> int | None:
    """Most answers of a row with which the discriminator compares a student's; None if a file cannot be read."""
    if get(config, "gad.teacher_answers") != "all":
        return 1
    found = []
    for file in files_of(get(config, "data.train_files")):
        try:
            found.append(most_answers(file, get(config, "data.teacher_key")))
        except (ValueError, OSError):  # check_data reports files that cannot be read
            return None
    return max(found, default=None)


def check_teacher_answers(config: DictConfig) -> Findings:
    """All answers are compared only where there are several, by a discriminator whose loss takes them."""
    key = "gad.teacher_answers"
    value = get(config, key)
    if value not in TEACHER_ANSWERS:
        yield error(f"{key}={value}: expected {either(TEACHER_ANSWERS)}", fix=f"{key}=one")
    if value != "all":
        return
    if not has_discriminator(config):
        yield error(f"{key}=all: stage {get(config, 'gad.stage')} trains no discriminator", fix=f"{key}=one")
        return
    if get(config, "gad.credit") == "token":
        yield error(
            "gad.credit=token compares the prefixes of one teacher answer with the student's, and "
            f"{key}=all has several",
            fix=f"{key}=one, or gad.credit=sequence",
        )
    if replay := get(config, "gad.replay"):
        yield error(
            f"gad.replay={replay} keeps one teacher answer of an earlier prompt, and {key}=all compares several",
            fix=f"{key}=one, or gad.replay=0",
        )
    if compared_answers(config) == 1:
        yield error(
            f"{key}=all, but no row of data.train_files has several answers in data.teacher_key="
            f"{get(config, 'data.teacher_key')}",
            fix=f"{key}=one, or give rows a list of answers or several columns",
        )


def check_task_reward(config: DictConfig) -> Findings:
    """Training follows every reward that is configured, or the run says that it is for validation alone."""
    key, weight = "gad.task_reward.weight", get(config, "gad.task_reward.weight")
    weights = list(weight.values()) if isinstance(weight, Mapping) else [] if weight is None else [weight]
    if weight == {} or any(not is_number(value) or not 0 <= value < math.inf for value in weights):
        yield error(
            f"{key}={weight}: expected null, a number of at least 0, or one for each data_source", fix=f"{key}=0"
        )
        return
    if (combine := get(config, "gad.task_reward.combine")) not in COMBINE:
        similar = get_close_matches(str(combine), COMBINE, n=1) or COMBINE
        yield error(
            f"gad.task_reward.combine={combine}: expected {either(COMBINE)}",
            fix=f"gad.task_reward.combine={similar[0]}",
        )
    follows = get(config, "gad.actor_objective") == "policy_gradient"
    rewards = list(_own_rewards(config))
    if not weight:
        for setting, off in rewards if follows and weight is None else ():
            yield error(
                f"{setting}: training would ignore this reward, because it follows the discriminator's score",
                fix=f"{key}=0 to use it in validation alone, a weight above 0 to follow it too, or {off}",
            )
        return
    if not follows:
        stage = get(config, "gad.stage")
        yield error(f"{key}={weight}: stage {stage} follows no reward", fix=f"{key}=0")
        return
    if not rewards:
        yield error(
            f"{key}={weight}, but no reward of yours is configured: the packaged function is for validation",
            fix=f"set reward.custom_reward_function.path and name, or {key}=null",
        )
    for other, value in (("gad.teacher_in_group", False), ("gad.credit", "sequence")):
        if (found := get(config, other)) != value:
            yield error(
                f"{other}={found} takes advantages from the discriminator's scores alone, and {key}={weight}",
                fix=f"{other}={value}, or {key}=0",
            )
    if combine == "normalized" and (n := integer(config, f"{ROLLOUT}.n")) < 2:
        yield error(
            f"{ROLLOUT}.n={n}: gad.task_reward.combine=normalized compares the answers to a prompt",
            fix=f"{ROLLOUT}.n=2 or more, or gad.task_reward.combine=raw",
        )
    if isinstance(weight, Mapping):
        yield from _weights_of_sources(config, key, weight)


def _own_rewards(config: DictConfig) -> Iterator[tuple[str, str]]:
    """(setting, setting without it) of every reward besides the packaged one and the discriminator's."""
    for group in ("reward.custom_reward_function", "custom_reward_function"):  # verl still takes the older name
        path = get(config, f"{group}.path")
        if path not in (None, PACKAGED_REWARD) and Path(path).resolve() != Path(__file__).parents[1] / "reward.py":
            yield f"{group}.path={path}", f"reward.custom_reward_function.path={PACKAGED_REWARD}"
    for group in ("reward.reward_model", "reward_model"):
        if get(config, f"{group}.enable") and get(config, f"{group}.enable_resource_pool"):
            yield f"{group}.enable=True", f"{group}.enable=False"


def check_reward_function(config: DictConfig) -> Findings:
    """The file of an own reward function is there, and defines a function that takes what verl passes."""
    for group in ("reward.custom_reward_function", "custom_reward_function"):
        path, name = get(config, f"{group}.path"), get(config, f"{group}.name")
        if path is None or str(path).startswith("pkg://"):
            continue
        file = Path(str(path).removeprefix("file://"))
        if not file.is_file():
            yield error(f"{group}.path={path}: no such file", fix="correct the path")
            continue
        try:
            text = file.read_text(encoding="utf-8")
            functions = {
                s.name: s for s in ast.parse(text).body if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        except (SyntaxError, ValueError) as problem:  # ValueError: a NUL, or not UTF-8
            yield error(f"{group}.path={path} is not valid Python ({problem})", fix="correct the file")
            continue
        if (function := functions.get(str(name))) is not None:
            yield from (problem.about(path) for problem in _parameter_findings(function))
        elif str(name) not in re.findall(r"\w+", text) and "import *" not in text:
            yield error(
                f"{group}.name={name}: {path} defines {', '.join(functions) or 'no function'}",
                fix=f"set {group}.name to the function's name",
            )


def _parameter_findings(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Findings:
    """Can verl call the function? It passes :data:`REWARD_ARGUMENTS` by name."""
    parameters = function.args
    names = {parameter.arg for parameter in (*parameters.args, *parameters.kwonlyargs)}
    missing = [name for name in REWARD_ARGUMENTS if name not in names]
    if missing and parameters.kwarg is None:
        yield error(
            f"{function.name} does not take {', '.join(missing)}, which verl passes by name",
            fix=f"def {function.name}({', '.join(REWARD_ARGUMENTS)}, **kwargs)",
        )


def _weights_of_sources(config: DictConfig, key: str, weight: Mapping) -> Findings:
    """Every data source of the training data has a weight, and no other name has one."""
    found = {UNLABELLED} if files_of(get(config, "gad.unlabelled_files")) else set()
    for file in files_of(get(config, "data.train_files")):
        try:
            found |= {NO_SOURCE if source == "None" else source for source in column_values(file, "data_source")}
        except ValueError:  # no such column
            found.add(NO_SOURCE)
        except OSError:  # check_data reports files that cannot be read
            return
    named = {str(source) for source in weight}
    for problem, names in (("has no weight for", found - named), ("names", named - found)):
        if names:
            yield error(
                f"{key} {problem} data_source {', '.join(sorted(names))}; the training data has "
                f"{', '.join(sorted(found))}",
                fix="give each of these a weight, 0 for none",
            )


def check_quantized_rollout(config: DictConfig) -> Findings:
    """Samples of a quantized policy are corrected to the policy that is trained."""
    if get(config, "gad.actor_objective") != "policy_gradient":
        return
    engine = f"{ROLLOUT}.engine_kwargs.{get(config, f'{ROLLOUT}.name')}"
    keys = f"{ROLLOUT}.quantization", f"{engine}.quantization", f"{engine}.kv_cache_dtype"
    found = [f"{key}={value}" for key in keys if (value := get(config, key)) is not None]
    found = [setting for setting in found if "kv_cache_dtype" not in setting or "=fp8" in setting]
    if not found:
        return
    correction, log_probs = "algorithm.rollout_correction", f"{ROLLOUT}.calculate_log_probs"
    if not (get(config, f"{correction}.rollout_is") or get(config, f"{correction}.bypass_mode")):
        yield error(
            f"{found[0]}: the rollout engine samples from another policy than the one that is trained, and "
            f"{correction}.rollout_is=null corrects nothing",
            fix=f"{correction}.rollout_is=token",
        )
    elif not get(config, log_probs):
        yield error(f"{found[0]}: {correction} needs {log_probs}=True, which is False", fix=f"{log_probs}=True")


def check_moved_keys(config: DictConfig) -> Findings:
    """No setting is at a key that verl has, but that its engines no longer read."""
    for old, (default, new) in MOVED.items():
        if (value := get(config, old, default)) not in (default, get(config, new)):
            yield warning(f"{old}={value} is not read by verl", fix=f"{new}={value}")
    low, high = f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high"
    value, defaults = get(config, f"{ACTOR}.clip_ratio"), (CLIPPING["clip_ratio_low"], CLIPPING["clip_ratio_high"])
    if value != CLIP_RATIO and (get(config, low), get(config, high)) == defaults:
        yield warning(
            f"{ACTOR}.clip_ratio={value} is ignored: verl reads clip_ratio_low and clip_ratio_high, which keep their "
            "0.2",
            fix=f"{low}={value} {high}={value}",
        )


def check_router_replay(config: DictConfig) -> Findings:
    """Router replay is set where verl reads it."""
    for key in (f"{ACTOR}.router_replay", f"{ACTOR}.fsdp_config.router_replay"):
        if (mode := get(config, f"{key}.mode", "disabled")) != "disabled":
            yield error(
                f"{key}.mode={mode}: verl would not read it, because its FSDP engines cannot replay the routes of "
                "experts",
                fix=f"leave it out; with model_engine=megatron, set {ACTOR}.megatron.router_replay.mode",
            )


def check_agents(config: DictConfig) -> Findings:
    """A student answers its prompt in one turn, as the teacher did."""
    turn = "the teacher's answer is one turn, and the discriminator compares whole answers"
    off = {
        "multi_turn.enable": False,
        "multi_turn.tool_config_path": None,
        "multi_turn.function_tool_path": None,
        "agent.default_agent_loop": AGENT,
        "agent.agent_loop_config_path": None,
    }
    for name, value in off.items():
        if (found := get(config, f"{ROLLOUT}.{name}", value)) != value:
            expected = "null" if value is None else value
            yield error(f"{ROLLOUT}.{name}={found}: {turn}; expected {expected}", fix=f"{ROLLOUT}.{name}={expected}")
    for file in files_of(get(config, "data.train_files")) + files_of(get(config, "gad.unlabelled_files")):
        try:
            agents = column_values(file, "agent_name") - {AGENT}
        except (ValueError, OSError):  # no such column; check_data reports files that cannot be read
            continue
        if agents:
            yield error(
                f"{file}: column 'agent_name' names {', '.join(sorted(agents))}: {turn}; expected {AGENT}",
                fix="drop the column, or these rows",
            )


def check_choices(config: DictConfig) -> Findings:
    """Names of losses and engines are names that verl knows."""
    for choices, finding in ((CHOICES, error), (OPEN_CHOICES, warning)):
        for key, names in choices.items():
            if (found := get(config, key)) not in names:
                similar = get_close_matches(str(found), names, n=1)
                yield finding(
                    f"{key}={found} is none of verl's ({', '.join(names)})", fix=f"{key}={(similar or names)[0]}"
                )


def check_loggers(config: DictConfig) -> Findings:
    """The loggers can start: stock verl starts them when all models are loaded."""
    chosen = get(config, "trainer.logger")
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    for name in chosen:
        if name not in LOGGERS:
            similar = get_close_matches(str(name), LOGGERS, n=1)
            yield error(
                f"trainer.logger names {name}, which is none of verl's ({', '.join(LOGGERS)})",
                fix=f"write {similar[0]}" if similar else "leave it out",
            )
        elif (package := LOGGERS[name]) and find_spec(package) is None:
            yield error(
                f"trainer.logger names {name}, and the package {package} is not installed",
                fix=f"pip install {package.replace('_', '-')}, or leave {name} out",
            )
    if {"wandb", "tracking"} & set(chosen) and not _has_wandb_key():
        yield warning(
            "trainer.logger names wandb, and there is no API key: a run without a terminal fails once its models are "
            "loaded",
            fix="set WANDB_API_KEY, or run wandb login; or set WANDB_MODE=offline",
        )


def _has_wandb_key() -> bool:
    """Can wandb start without asking? ``wandb login`` leaves its key in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, NetrcParseError):
        return False


def check_ratios(config: DictConfig) -> Findings:
    """Settings of the loss that act on probability ratios meet ratios other than 1."""
    batch = get(config, "data.train_batch_size")
    one_step = get(config, f"{ACTOR}.ppo_mini_batch_size") == batch and get(config, f"{ACTOR}.ppo_epochs") == 1
    bypass = get(config, "algorithm.rollout_correction.bypass_mode")  # ratios to the rollout engine's probabilities
    if get(config, "gad.actor_objective") != "policy_gradient" or not one_step or bypass:
        return
    found = [
        f"{ACTOR}.{key}={value}" for key, off in CLIPPING.items() if (value := get(config, f"{ACTOR}.{key}")) != off
    ]
    if get(config, f"{ACTOR}.policy_loss.loss_mode") == "gspo":
        found.insert(0, f"{ACTOR}.policy_loss.loss_mode=gspo")
    if found:
        yield warning(
            f"{' '.join(found)} changes nothing: a batch is one optimizer step, so every probability ratio is 1. "
            "Nothing is clipped, pg_clipfrac and ppo_kl are not logged, and loss_mode=gspo equals vanilla",
            fix=f"run_gad.sh --ppo_mini_batches 2, or {ACTOR}.ppo_mini_batch_size below data.train_batch_size={batch}",
        )


def check_names(config: DictConfig) -> Findings:
    """verl or verl-gad reads every key that was added to the configuration."""
    known = _default_keys()
    for key in leaf_keys(config):
        if key in known or re.search("kwargs|override|runtime_env", key):  # verl hands these to other libraries
            continue
        if ".router_replay." in key:  # check_router_replay says where it belongs
            continue
        if key.startswith("gad."):
            if not any(key.startswith(f"{one}.") for one in known):  # a key whose value is a mapping
                yield error(f"{key}: verl-gad has no such key, so nothing reads it", fix=_likelier(config, key))
        elif unknown := _unknown_field(config, key):
            yield error(f"{key}: {unknown}, so verl fails when it starts its workers", fix=_likelier(config, key))
        elif not _is_read(key):
            yield warning(
                f"{key} is read neither by verl nor by verl-gad: it has no effect, unless your own code reads it",
                fix=_likelier(config, key),
            )


def _likelier(config: DictConfig, key: str) -> str:
    """The fix for a key that nothing reads: the key that was meant is in the same group, or else in another."""
    known = [one for one in leaf_keys(config) if one in _default_keys()]
    group = key.partition(".")[0]
    similar = similar_keys(key, (one for one in known if one.startswith(f"{group}."))) or similar_keys(key, known)
    return f"write {either(similar)}, or leave it out" if similar else "correct the key, or leave it out"


def _unknown_field(config: DictConfig, key: str) -> str:
    """What verl cannot convert of a key of the actor, the critic or the rollout engine; empty if it can."""
    group, *names = key.split(".")
    node = get(config, group)
    if group not in ("actor_rollout_ref", "critic"):
        return ""
    for name in names:
        if not isinstance(node, DictConfig):
            return ""
        package, _, target = str(node.get("_target_", "")).rpartition(".")
        fields = _dataclass_fields().get(target, {name}) if package.startswith("verl.") else {name}
        if name not in fields:
            return f"verl's {target} has no field {name}"
        node = node.get(name)
    return ""


def _is_read(key: str) -> bool:
    """Does any source read the key's last name, from the key's own group if other groups have that name too?"""
    group, _, name = key.rpartition(".")
    words, of_group = _words_read()
    if group in TOP_GROUPS and any(one.endswith(f".{name}") for one in _default_keys()):
        return (group, name) in of_group
    return set(re.findall(r"\w+", name)) <= words


def _verl_folders() -> list[Path]:
    verl = find_spec("verl")  # importing verl takes seconds
    return [Path(folder) for folder in (verl and verl.submodule_search_locations) or ()]


@lru_cache
def _default_keys() -> frozenset[str]:
    """Dotted keys of verl's default configurations, one for each kind of engine, and of verl-gad's."""
    import yaml

    files = [file for folder in _verl_folders() for file in folder.glob("trainer/config/_generated_*.yaml")]
    files += (Path(__file__).parents[1] / "config").rglob("*.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it
    return frozenset(key for file in files for key in leaf_keys(yaml.load(file.read_text(), loader) or {}))


@lru_cache
def _dataclass_fields() -> dict[str, set[str]]:
    """Name of each dataclass of verl's configuration -> its fields, those of its base classes included."""
    own, bases = dict[str, set[str]](), dict[str, list[str]]()
    for folder in _verl_folders():
        for pattern in ("base_config.py", "workers/config/*.py", "trainer/config/*.py", "utils/profiler/config.py"):
            for file in folder.glob(pattern):
                for node in ast.parse(file.read_text(encoding="utf-8")).body:
                    if isinstance(node, ast.ClassDef):
                        lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                        own[node.name] = {line.target.id for line in lines if isinstance(line.target, ast.Name)}
                        bases[node.name] = [ast.unparse(base) for base in node.bases]

    def fields(name: str) -> set[str]:
        return own.get(name, set()).union(*(fields(base) for base in bases.get(name, ())))

    return {name: fields(name) for name in own}


@lru_cache
def _words_read() -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Names that verl's and verl-gad's sources read.

    Returns:
        Every attribute, field and text that is a name; (group, name) where the group stands before the name.
    """
    words, of_group = set[str]().union(*_dataclass_fields().values()), set[tuple[str, str]]()
    before = rf"\b({'|'.join(TOP_GROUPS)})(?:_config|_cfg)?(?:\.get\(\s*[\"']|\[[\"']|\.)(\w+)"
    for folder in (*_verl_folders(), Path(__file__).parents[1]):
        for file in folder.rglob("*.py"):
            text = file.read_text(errors="replace")
            words.update(re.findall(r"\.(\w+)", text), re.findall(r"[\"'](\w+)[\"']", text))
            of_group.update(re.findall(before, text))
    return frozenset(words), frozenset(of_group)

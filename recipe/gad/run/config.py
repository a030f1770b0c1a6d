"""Composing a run's configuration with Hydra, reading its dotted keys, and what follows from them."""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.gad.run.checkpoint import WITHOUT_DISCRIMINATOR
from recipe.gad.run.findings import InputError, either, one_line

ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
ACTOR_MODEL = "actor_rollout_ref.model"
LEAD_MEAN = 10
"""Without validation, gad.discriminator_lead looks at means of so many training steps: one step is too noisy."""
SIMILAR = 0.65
"""A key may be a misspelling of one whose last name has this share of equal characters (difflib)."""
PASSED_ON = frozenset(
    "ray_init engine_kwargs apply_chat_template_kwargs mm_processor_kwargs reward_kwargs sampler_kwargs "
    "override_config override_optimizer_config".split()
)
"""Groups that verl hands on whole, to Ray, an engine or a model: these take more keys than the configuration has."""
LORA_KEYS = ("lora_rank", "lora.rank")


def get(config: DictConfig, key: str, default: Any = None) -> Any:
    """Value of a dotted key; ``default`` if the key is absent or null."""
    value = OmegaConf.select(config, key)
    return default if value is None else value


def integer(config: DictConfig, key: str, default: int | None = None, minimum: int = 1) -> int:
    """Whole number of a dotted key.

    Raises:
        InputError: the value is no whole number, or below ``minimum``.
    """
    value = get(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{key}={value}: expected a whole number of at least {minimum}", fix=f"set {key} to one")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """An int or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(config: DictConfig, key: str, low: float, below: float) -> float:
    """Number of a dotted key, from ``low`` to less than ``below``.

    Raises:
        InputError: the value is no number, or outside.
    """
    value = get(config, key)
    if not is_number(value) or not low <= value < below:
        raise InputError(f"{key}={value}: expected a number from {low} to below {below}", fix=f"set {key} to one")
    return value


def neighbours(value: int, step: int) -> list[int]:
    """The positive multiples of ``step`` next to ``value``, one on each side: 8 and 16 for 10 in steps of 8."""
    below = value // step * step
    return [below, below + step] if below else [step]


def unlabelled_prompts(config: DictConfig) -> int:
    """Prompts of a step that have no teacher answer (gad.unlabelled_files)."""
    return round(number(config, "gad.unlabelled_ratio", 0, 1) * integer(config, "data.train_batch_size"))


def labelled_mini_batch(config: DictConfig) -> int:
    """Fresh prompts in one optimizer step of the discriminator: those that have a teacher answer."""
    batch, mini = integer(config, "data.train_batch_size"), integer(config, "critic.ppo_mini_batch_size")
    return (batch - unlabelled_prompts(config)) // max(1, batch // mini)


def replayed_prompts(config: DictConfig) -> int:
    """Prompts of earlier steps in one optimizer step of the discriminator (gad.replay)."""
    return round(number(config, "gad.replay", 0, 10) * labelled_mini_batch(config))


def has_discriminator(config: DictConfig) -> bool:
    return get(config, "gad.stage") not in WITHOUT_DISCRIMINATOR


def validates(config: DictConfig) -> bool:
    """Does the run sample validation answers, before the first step or later?"""
    return get(config, "trainer.test_freq", -1) > 0 or bool(get(config, "trainer.val_before_train"))


def start_models(config: DictConfig) -> dict[str, str]:
    """Role -> folder or hub id of the model that the run starts from."""
    keys = {"actor": f"{ACTOR_MODEL}.path", "critic": "critic.model.path"}
    return {role: str(get(config, key)) for role, key in keys.items() if role == "actor" or has_discriminator(config)}


def tokenizer_key(config: DictConfig, model: str = ACTOR_MODEL) -> str:
    """Key whose value names the tokenizer of a model (ACTOR_MODEL or "critic.model")."""
    return f"{model}.tokenizer_path" if get(config, f"{model}.tokenizer_path") else f"{model}.path"


def needs_reference(config: DictConfig) -> bool:
    return bool(get(config, f"{ACTOR}.use_kl_loss")) or bool(get(config, "algorithm.use_kl_in_reward"))


def lora_rank(config: DictConfig, model: str) -> int:
    """Rank of LoRA on a model (ACTOR_MODEL or "critic.model"), 0 without LoRA. verl reads two keys."""
    return max(integer(config, f"{model}.{name}", 0, minimum=0) for name in LORA_KEYS)


def world_size(config: DictConfig) -> int:
    return integer(config, "trainer.nnodes") * integer(config, "trainer.n_gpus_per_node")


def parallelism(config: DictConfig, role: str) -> tuple[int, int] | None:
    """How the actor or ``critic`` splits its work over GPUs; None for engines that GAD was never tried with.

    Returns:
        GPUs that form one data-parallel rank; GPUs that share one sequence.
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


def leaf_keys(config: DictConfig | dict) -> Iterator[str]:
    """Dotted keys of all values that are no groups of keys themselves."""

    def keys(group: dict, prefix: str) -> Iterator[str]:
        for name, value in group.items():
            if isinstance(value, dict) and value:
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    groups: Any = config if isinstance(config, dict) else OmegaConf.to_container(config)
    return keys(groups, "")


def similar_keys(key: str, known: Iterable[str]) -> list[str]:
    """At most two of the ``known`` dotted keys, the likeliest first: their last name is that of ``key``, or similar."""
    by_name = dict[str, list[str]]()
    for one in known:
        by_name.setdefault(one.rpartition(".")[2], []).append(one)
    names = get_close_matches(key.rpartition(".")[2], by_name, cutoff=SIMILAR)
    return get_close_matches(key, [one for name in names for one in by_name[name]], n=2, cutoff=0)


def files_of(value: Any) -> list[str]:
    """Files of a data key: one path, a list of paths, or none."""
    return [str(value)] if isinstance(value, str | Path) else [str(file) for file in value or []]


def compose_config(overrides: list[str], name: str = "gad_trainer") -> DictConfig:
    """The configuration that ``verl.trainer.main_ppo --config-path pkg://recipe.gad.config`` composes.

    Args:
        overrides: as on the command line: ``key=value``, ``+key=value``.
        name: a file of recipe/gad/config, without its ending.

    Raises:
        ValueError: verl is not installed, or an override does not fit the configuration.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    verl = find_spec("verl")  # importing verl takes seconds
    if verl is None or not verl.submodule_search_locations:
        raise InputError("the package verl is not installed", fix="pip install -e .")
    folders = [Path(folder) / "trainer" / "config" for folder in verl.submodule_search_locations]
    searchpath = ",".join(f"'file://{folder}'" for folder in folders if folder.is_dir())
    with initialize_config_module("recipe.gad.config", version_base=None):
        search = f"hydra.searchpath=[{searchpath}]"
        try:
            return compose(name, [search, *overrides])
        except (HydraException, OmegaConfBaseException) as error:
            if unknown := re.match(r"Could not override '(.+?)'", str(error)):
                raise _unknown_key(unknown[1], leaf_keys(compose(name, [search]))) from None
            if unparsed := re.match(r"Error parsing override '(.*)'\nmissing EQUAL", str(error)):
                raise InputError(f"{unparsed[1]} is no override", fix="write key=value, without spaces") from None
            cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
            raise ValueError(one_line(error) + cause) from None


def _unknown_key(key: str, known: Iterator[str]) -> InputError:
    """The error for an override of a key that the configuration does not have."""
    group = key.rpartition(".")[0]
    passed_on = not PASSED_ON.isdisjoint(group.split("."))
    similar = similar_keys(key, (one for one in known if not passed_on or one.startswith(f"{group}.")))
    if passed_on and not similar:
        return InputError(f"there is no key {key} yet", fix=f"add it: write +{key}=...")
    fix = f"write {either(similar)}" if similar else "look it up in docs/configuration.md"
    return InputError(f"there is no key {key}", fix=f"{fix}, or +{key} for a key that your own code reads")


def resolved(config: DictConfig) -> DictConfig:
    """A copy of ``config`` in which every ``${...}`` is replaced by its value.

    Raises:
        InputError: a reference names a missing key.
    """
    try:
        return OmegaConf.create(OmegaConf.to_container(config, resolve=True))  # type: ignore[return-value]
    except OmegaConfBaseException as problem:
        what = f"the configuration does not resolve: {one_line(problem)}"
        raise InputError(what, fix="correct the reference, or set the key that it names") from None

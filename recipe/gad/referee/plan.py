"""The plan of ``gad referee``: arms, seeds and data sizes, read from a YAML file and checked before anything runs.

An arm is a chain of stages. Every step of a stage uses one batch of teacher answers, for the student, for the
discriminator or for both, so the steps of a chain are its teacher batches. Arms that are compared must have the same
number of them. docs/referee.md explains every key.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from recipe.gad.run.config import is_number
from recipe.gad.run.findings import InputError

DEVICES = ("gpu", "cpu")
CHOICES = ("two_sample", "rouge_l")
ALL_ROWS = "all"
Parsed = TypeVar("Parsed")


class Kind(NamedTuple):
    """What the referee knows of a kind of stage."""

    script: str
    """Launch script in examples/gad."""
    trains_student: bool
    leaves_discriminator: bool
    needs_discriminator: bool = False
    flags: tuple[str, ...] = ()
    """Flags of the script that make it this kind."""


KINDS = {
    "seqkd": Kind("run_seqkd.sh", trains_student=True, leaves_discriminator=False),
    "warmup": Kind("run_warmup.sh", trains_student=True, leaves_discriminator=True),
    "discriminator": Kind("run_warmup.sh", trains_student=False, leaves_discriminator=True),
    "gad": Kind("run_gad.sh", trains_student=True, leaves_discriminator=True, needs_discriminator=True),
    "soda": Kind("run_soda.sh", trains_student=True, leaves_discriminator=False),
    "online_dpo": Kind("run_soda.sh", trains_student=True, leaves_discriminator=False, flags=("--online",)),
}
"""Kinds of stages; "discriminator" is a warmup in which the student is never updated."""

OWN_KEYS = {
    "data.train_batch_size": "train_batch_size of the plan",
    "data.train_max_samples": "train_rows of the plan",
    "data.seed": "seeds of the plan",
    "actor_rollout_ref.rollout.seed": "seeds of the plan",
    "critic.fsdp.seed": "seeds of the plan",
    "trainer.total_training_steps": "steps of the stage",
    "trainer.total_epochs": "steps of the stage",
    "trainer.save_freq": "save_every of the stage",
    "trainer.max_actor_ckpt_to_keep": "nothing: every checkpoint is kept until it is evaluated",
    "trainer.max_critic_ckpt_to_keep": "nothing: every checkpoint is kept until it is evaluated",
    "trainer.default_local_dir": "--output_dir",
    "gad.stage": "the kind of the stage",
}
"""Hydra keys that the referee sets, and what to use instead of an override."""

EVALUATION_KEYS = (
    *("backend", "temperature", "max_prompt_length", "max_response_length", "n", "seed", "prompt_key", "teacher_key"),
    *("chat_template_kwargs", "gpu_memory_utilization", "kv_cache_gib", "enforce_eager"),
    *("two_sample_model", "two_sample_seeds", "two_sample_lr", "two_sample_epochs", "two_sample_batch"),
)
"""Options of ``gad eval`` that a plan may set."""


@dataclass(frozen=True)
class Stage:
    """One training run of a chain.

    Raises:
        ValueError: a value is out of its range.
    """

    kind: str
    steps: int
    save_every: int | None = None
    """Steps between two checkpoints, all of which are evaluated; None: only the last one."""
    reward_model: str | None = None
    """Initial discriminator (warmup and discriminator); None: that of the stage before, else the student."""
    overrides: tuple[str, ...] = ()
    seconds_per_step: float | None = None
    """For the cost of a dry run, as long as no run of this stage has been measured."""

    def __post_init__(self) -> None:
        check_count(self, "steps", "save_every")
        _check_overrides(self.overrides)
        if self.reward_model is not None and self.kind not in ("warmup", "discriminator"):
            raise ValueError(f"reward_model {self.reward_model!r}: only warmup and discriminator take one")
        if self.kind == "discriminator" and _sets(self.overrides, "trainer.critic_warmup"):
            raise ValueError("overrides set trainer.critic_warmup, which the referee sets for a discriminator stage")
        check_positive(self, "seconds_per_step")

    def saved_steps(self) -> list[int]:
        """Steps whose checkpoint is saved, the last step included."""
        every = self.save_every or self.steps
        return [*range(every, self.steps, every), self.steps]


@dataclass(frozen=True)
class Arm:
    """A named recipe.

    Raises:
        ValueError: its chain of stages cannot be trained.
    """

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        before: Stage | None = None
        for number, stage in enumerate(self.stages, start=1):
            if KINDS[stage.kind].needs_discriminator and not (before and KINDS[before.kind].leaves_discriminator):
                place = f"follows {before.kind}, which leaves no discriminator" if before else "comes first"
                raise InputError(
                    f"stage {number} ({stage.kind}) {place}, but needs a trained discriminator",
                    fix="put {discriminator: {steps: ...}} or {warmup: {steps: ...}} before it",
                )
            before = stage
        if before and not KINDS[before.kind].trains_student:
            raise InputError(f"the last stage ({before.kind}) does not train the student", fix="add a stage that does")

    @property
    def teacher_batches(self) -> int:
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True)
class Plan:
    """A whole comparison.

    Raises:
        ValueError: a value is out of its range, or arms that are compared differ in their teacher batches.
    """

    model: str
    train_files: str
    val_files: str
    train_batch_size: int
    control: str
    arms: dict[str, Arm]
    seeds: tuple[int, ...] = (0, 1, 2)
    train_rows: tuple[int | str, ...] = (ALL_ROWS,)
    device: str = "gpu"
    overrides: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    """Arms that are shown without being compared; an arm without stages is one as well."""
    choose_by: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_path(self, "model", "train_files", "val_files")
        check_count(self, "train_batch_size")
        check_one_of("device", self.device, DEVICES)
        _check_overrides(self.overrides)
        check_seeds(self.seeds)
        _check_rows(self.train_rows, self.train_batch_size)
        _check_keys("evaluation", self.evaluation, EVALUATION_KEYS)
        self._check_choice()
        self._check_arms()

    def _check_choice(self) -> None:
        if self.choose_by is not None:
            check_one_of("choose_by", self.choose_by, CHOICES)
        if self.choose_by == "two_sample" and "two_sample_model" not in self.evaluation:
            raise InputError("choose_by two_sample needs evaluation.two_sample_model", fix="name the untrained student")

    def _check_arms(self) -> None:
        check_one_of("control", self.control, tuple(self.arms))
        check_names("references", self.references, tuple(self.arms))
        if self.is_reference(self.control):
            raise ValueError(f"control {self.control!r} is a reference: it has no stages, or references names it")
        wanted = self.arms[self.control].teacher_batches
        for arm in self.compared():
            if arm.teacher_batches != wanted:
                raise InputError(
                    f"arm {arm.name!r} uses {arm.teacher_batches} teacher batches and the control {self.control!r} "
                    f"{wanted}: they cannot be compared",
                    fix=f"change the steps of one of them, or list {arm.name!r} under references to show it without a "
                    "comparison",
                )

    def is_reference(self, name: str) -> bool:
        """Is the arm shown without being compared with the control?"""
        return name in self.references or not self.arms[name].stages

    def compared(self) -> list[Arm]:
        """Arms that are compared with the control."""
        return [arm for name, arm in self.arms.items() if name != self.control and not self.is_reference(name)]

    @property
    def measure(self) -> str:
        """What checkpoints are chosen by and the verdict rests on: "two_sample" or "rouge_l"."""
        return self.choose_by or ("two_sample" if "two_sample_model" in self.evaluation else "rouge_l")


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML file; raises what :func:`read_yaml` does."""
    return read_yaml(path, parse_plan)


def read_yaml(path: str | Path, parse: Callable[[Any], Parsed]) -> Parsed:
    """What ``parse`` makes of a YAML file.

    Raises:
        ValueError: names the file, the place in it, what was found and what was expected.
        OSError: there is no such file.
    """
    import yaml

    path = Path(path)
    try:
        return parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML ({' '.join(str(error).split())})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_plan(value: Any) -> Plan:
    """The plan in what a YAML file holds. ValueError: the first mistake in it."""
    values = values_of(Plan, value, "the plan")
    arms = values["arms"]
    if not isinstance(arms, dict) or not arms:
        raise ValueError(f"arms: found {arms!r}, expected names with a list of stages each")
    values["arms"] = {str(name): _arm(str(name), stages) for name, stages in arms.items()}
    return Plan(**values)


def _arm(name: str, stages: Any) -> Arm:
    if not isinstance(stages, list):
        raise ValueError(f"arm {name!r}: found {stages!r}, expected a list of stages such as {{seqkd: {{steps: 100}}}}")
    parsed = tuple(_stage(stage, f"arm {name!r}, stage {number}") for number, stage in enumerate(stages, start=1))
    try:
        return Arm(name, parsed)
    except ValueError as error:
        raise ValueError(f"arm {name!r}: {error}") from None


def _stage(value: Any, where: str) -> Stage:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise ValueError(f"{where}: found {value!r}, expected one of {', '.join(KINDS)} with its settings")
    [(kind, settings)] = value.items()
    try:
        return Stage(kind=kind, **values_of(Stage, settings, kind, given=("kind",)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# ---------------------------------------------------------------------- checks


def values_of(cls: type, value: Any, where: str, given: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keyword arguments of a dataclass, without those ``given``, from a YAML mapping; lists become tuples."""
    fields = [entry for entry in dataclasses.fields(cls) if entry.name not in given]
    _check_keys(where, value, tuple(entry.name for entry in fields))
    no_default = dataclasses.MISSING
    required = [e.name for e in fields if e.default is no_default and e.default_factory is no_default]
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}


def _check_keys(where: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {value!r}, expected a mapping with keys of {', '.join(known)}")
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}. Known keys: {', '.join(known)}")


def _is_whole(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _given(owner: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Name and value of the fields ``names`` of a dataclass, without a None that is the field's default."""
    for name in names:
        value = getattr(owner, name)
        if value is not None or getattr(type(owner), name, "") is not None:
            yield name, value


def check_count(owner: Any, *names: str) -> None:
    for name, value in _given(owner, names):
        if not _is_whole(value, 1):
            raise ValueError(f"{name} {value!r}: expected a whole number of at least 1")


def check_positive(owner: Any, *names: str) -> None:
    for name, value in _given(owner, names):
        if not (is_number(value) and value > 0):
            raise ValueError(f"{name} {value!r}: expected a number above 0")


def check_path(owner: Any, *names: str) -> None:
    for name in names:
        if not isinstance(value := getattr(owner, name), str):
            raise ValueError(f"{name} {value!r}: expected one path")


def check_names(key: str, names: Any, known: tuple[str, ...]) -> None:
    if not isinstance(names, tuple):
        raise ValueError(f"{key} {names!r}: expected a list of {', '.join(known)}")
    for name in names:
        check_one_of(key, name, known)


def check_one_of(key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key} {value!r}: expected one of {', '.join(known)}")


def _check_different(key: str, values: Any) -> None:
    if not isinstance(values, tuple) or not values or any(values.count(value) > 1 for value in values):
        raise ValueError(f"{key} {values!r}: expected a list of different values, at least one")


def check_seeds(seeds: Any) -> None:
    _check_different("seeds", seeds)
    if wrong := [seed for seed in seeds if not _is_whole(seed, 0)]:
        raise ValueError(f"seeds {wrong[0]!r}: expected whole numbers of at least 0")


def _check_rows(train_rows: Any, batch: int) -> None:
    _check_different("train_rows", train_rows)
    if wrong := [rows for rows in train_rows if rows != ALL_ROWS and not _is_whole(rows, batch)]:
        raise ValueError(f"train_rows {wrong[0]!r}: expected {ALL_ROWS!r} or at least train_batch_size ({batch}) rows")


def _sets(overrides: tuple[str, ...], key: str) -> bool:
    return any(text.lstrip("+~").partition("=")[0] == key for text in overrides)


def _check_overrides(overrides: Any) -> None:
    if not isinstance(overrides, tuple) or not all(isinstance(text, str) and "=" in text for text in overrides):
        raise ValueError(
            f"overrides {overrides!r}: expected a list of Hydra overrides such as data.max_prompt_length=512"
        )
    for key, instead in OWN_KEYS.items():
        if _sets(overrides, key):
            raise ValueError(f"overrides set {key}, which the referee sets. Use {instead}")

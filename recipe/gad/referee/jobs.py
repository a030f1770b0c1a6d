"""From a plan to jobs: the trainings of every arm, seed and data size, and an evaluation of every checkpoint they save.

Chains that begin with equal stages share the trainings of those stages. A job's folder carries a hash of all that its
result depends on: after an edit of the plan only what has changed runs again.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recipe.gad.evaluation.sampling import Settings
from recipe.gad.evaluation.scores import read_scores
from recipe.gad.referee.plan import ALL_ROWS, KINDS, Arm, Plan, Stage
from recipe.gad.referee.schedule import Job
from recipe.gad.run.checkpoint import TRACKER, step_folders, verify_hf_folder
from recipe.gad.run.findings import InputError

SHARDS = "*_world_size_*.pt"
"""Files of a checkpoint that only a resumed run reads: weights and optimizer state of every worker."""
MEMORY_KEYS = ("gpu_memory_utilization", "kv_cache_gib", "enforce_eager")
"""Settings of an evaluation without influence on its results."""
SAME_FOR_ALL = ("temperature", "max_prompt_length", "max_response_length", "prompt_key", "teacher_key")
"""Settings that must agree between the models of a comparison."""
SCRIPTS = Path(__file__).resolve().parents[3] / "examples/gad"
"""Launch scripts of the checkout."""


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Training:
    """One stage of one seed and data size; ``before`` is the stage that it continues."""

    plan: Plan
    output_dir: Path
    stage: Stage
    rows: int | str
    seed: int
    before: "Training | None" = None

    @property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        plan, stage = self.plan, asdict(self.stage)
        del stage["seconds_per_step"]
        settings = [plan.model, plan.train_files, plan.device, plan.train_batch_size, plan.overrides]
        before = self.before.identity if self.before else None
        return {"plan": settings, "rows": self.rows, "seed": self.seed, "stage": stage, "before": before}

    @cached_property
    def name(self) -> str:
        number = len(self.chain)
        return f"{self.rows}-seed{self.seed}-{number}-{self.stage.kind}-{short_hash(self.identity)}"

    @property
    def chain(self) -> list["Training"]:
        """The trainings of the chain up to this one."""
        return [*(self.before.chain if self.before else []), self]

    @property
    def folder(self) -> Path:
        return self.output_dir / "train" / self.name

    @property
    def teacher_batches(self) -> int:
        """Teacher batches of the whole chain up to the last step of this stage."""
        return sum(training.stage.steps for training in self.chain)

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"global_step_{step}"

    def is_finished(self) -> bool:
        """Is the last step saved?"""
        tracker = self.folder / TRACKER
        if not tracker.is_file() or tracker.read_text(errors="replace").strip() != str(self.stage.steps):
            return False
        return not verify_hf_folder(self.checkpoint(self.stage.steps) / "actor/huggingface")

    def drop_shards(self) -> None:
        """Delete what only a resumed run reads: most of a checkpoint's size."""
        for folder in step_folders(self.folder).values():
            for shard in folder.glob(f"*/{SHARDS}"):
                shard.unlink()

    def start(self) -> list[str]:
        """Flags that name the models to start from."""
        before, kind = self.before, self.stage.kind
        if before is None:
            flags = ["--model", self.plan.model]
        elif kind == "gad":
            return ["--warmup_dir", str(before.folder), "--resume_step", str(before.stage.steps)]
        else:
            flags = ["--model", str(before.checkpoint(before.stage.steps) / "actor/huggingface")]
        discriminator = self.stage.reward_model
        if before and discriminator is None and KINDS[before.stage.kind].leaves_discriminator:
            discriminator = str(before.checkpoint(before.stage.steps) / "critic/huggingface")
        takes_it = KINDS[kind].leaves_discriminator
        return flags + (["--reward_model", discriminator] if discriminator and takes_it else [])

    def overrides(self) -> list[str]:
        """Hydra overrides; the plan's and the stage's come after the referee's."""
        steps = self.stage.steps
        texts = [
            f"data.train_batch_size={self.plan.train_batch_size}",
            # the seed also draws the rows of a smaller data size, so all stages of a chain have the same
            f"data.seed={self.seed}",
            f"actor_rollout_ref.rollout.seed={self.seed}",
            f"critic.fsdp.seed={self.seed}",
            f"trainer.total_training_steps={steps}",
            f"trainer.total_epochs={steps}",
            f"trainer.save_freq={self.stage.save_every or steps}",
            "trainer.max_actor_ckpt_to_keep=null",
            "trainer.max_critic_ckpt_to_keep=null",
            # the checkpoints are evaluated afterwards
            "trainer.test_freq=-1",
            "trainer.val_before_train=False",
            "trainer.logger=[file]",
            f"+ray_kwargs.ray_init._temp_dir={self.ray_dir}",
        ]
        if self.rows != ALL_ROWS:
            texts.append(f"data.train_max_samples={self.rows}")
        if self.stage.kind == "discriminator":
            texts.append(f"trainer.critic_warmup={steps + 1}")
        return [*texts, *self.plan.overrides, *self.stage.overrides]

    @property
    def ray_dir(self) -> Path:
        """Folder of the training's own Ray cluster; short, since the paths of sockets are limited to 107 bytes."""
        return Path("/tmp") / f"gad-{short_hash(str(self.folder.absolute()))}"

    def job(self, scripts: Path) -> Job:
        plan = self.plan
        flags = ["--device", plan.device, "--train_files", plan.train_files, "--val_files", plan.val_files]
        flags += ["--output_dir", str(self.folder.absolute()), "--exp_name", self.name, "--skip-doctor"]
        return Job(
            name=self.name,
            command=(
                *("bash", str(scripts / KINDS[self.stage.kind].script), *KINDS[self.stage.kind].flags),
                *(*self.start(), *flags, *self.overrides()),
            ),
            needs=(self.before.name,) if self.before else (),
            log=self.output_dir / "logs" / f"{self.name}.log",
            is_finished=self.is_finished,
            on_success=self.drop_shards,
            metrics=self.folder / "metrics.jsonl",
            steps=self.stage.steps,
            scratch=self.ray_dir,
        )


@dataclass(frozen=True)
class Evaluation:
    """``gad eval`` of one checkpoint, or of the untrained student (``training`` None)."""

    plan: Plan
    output_dir: Path
    training: Training | None = None
    step: int = 0

    @property
    def name(self) -> str:
        return "eval-" + (f"{self.training.name}-step{self.step}" if self.training else "base")

    @property
    def folder(self) -> Path:
        settings = {key: value for key, value in self.plan.evaluation.items() if key not in MEMORY_KEYS}
        name = short_hash([settings, self.plan.val_files, self.plan.model])
        return self.output_dir / f"eval-{name}" / self.name.removeprefix("eval-")

    @property
    def model(self) -> str:
        return str(self.training.checkpoint(self.step)) if self.training else self.plan.model

    @property
    def teacher_batches(self) -> int:
        """Teacher batches that the checkpoint has seen."""
        return self.training.teacher_batches - self.training.stage.steps + self.step if self.training else 0

    def is_finished(self) -> bool:
        wanted = {"text", *(["two_sample"] if "two_sample_model" in self.plan.evaluation else [])}
        if not (self.folder / "answers.jsonl").is_file():
            return False
        return wanted <= set(read_scores(self.folder))

    def job(self) -> Job:
        return Job(
            name=self.name,
            command=(
                *(sys.executable, "-m", "recipe.gad.cli", "eval", "--model", self.model),
                *("--val_files", self.plan.val_files, "--output_dir", str(self.folder)),
                *eval_options(self.plan.evaluation),
            ),
            needs=(self.training.name,) if self.training else (),
            log=self.output_dir / "logs" / f"{self.name}.log",
            is_finished=self.is_finished,
        )


def eval_options(settings: dict[str, Any]) -> list[str]:
    """Options of ``gad eval`` from the plan's ``evaluation``.

    What the plan leaves out gets the default of ``gad eval``: not all models have a run whose settings could count.
    """
    defaults = {name: getattr(Settings, name) for name in SAME_FOR_ALL}
    options = []
    for key, value in {**defaults, "chat_template_kwargs": {}, **settings}.items():
        if isinstance(value, bool):
            options += [f"--{key}"] if value else []
            continue
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        options += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return options


@dataclass(frozen=True)
class Run:
    """An arm with one seed and one data size: its trainings, and the evaluations among which a checkpoint is chosen."""

    arm: Arm
    rows: int | str
    seed: int
    trainings: tuple[Training, ...]
    evaluations: tuple[Evaluation, ...]
    """Of all checkpoints of the chain, in the order of training; of the untrained student for an arm without stages."""

    @property
    def candidates(self) -> list[Evaluation]:
        """Evaluations of the last stage's checkpoints."""
        last = self.trainings[-1] if self.trainings else None
        return [evaluation for evaluation in self.evaluations if evaluation.training == last]


def expand(plan: Plan, output_dir: Path) -> list[Run]:
    """Every arm with every data size and seed. Equal beginnings of chains are equal trainings, of the same name."""
    return [
        _run(plan, output_dir, arm, rows, seed)
        for rows in plan.train_rows
        for seed in plan.seeds
        for arm in plan.arms.values()
    ]


def _run(plan: Plan, output_dir: Path, arm: Arm, rows: int | str, seed: int) -> Run:
    trainings: list[Training] = []
    for stage in arm.stages:
        trainings.append(Training(plan, output_dir, stage, rows, seed, trainings[-1] if trainings else None))
    evaluations = [
        Evaluation(plan, output_dir, training, step)
        for training in trainings
        if KINDS[training.stage.kind].trains_student
        for step in training.stage.saved_steps()
    ]
    return Run(arm, rows, seed, tuple(trainings), tuple(evaluations or [Evaluation(plan, output_dir)]))


def jobs_of(runs: list[Run], scripts: Path = SCRIPTS) -> list[Job]:
    """Jobs of the runs, every one once: the trainings of a run, then its evaluations."""
    jobs: dict[str, Job] = {}
    for run in runs:
        for training in run.trainings:
            jobs.setdefault(training.name, training.job(scripts))
        for evaluation in run.evaluations:
            jobs.setdefault(evaluation.name, evaluation.job())
    return list(jobs.values())


def check_files(plan: Plan, scripts: Path = SCRIPTS) -> int:
    """Rows of the training file.

    Raises:
        ValueError: the training or validation file has a mistake in it or too few rows, or a launch script is missing.
        OSError: a file is missing.
    """
    from recipe.gad.run.data_file import check_data_file

    prompt_key = plan.evaluation.get("prompt_key", "content")
    teacher_key = plan.evaluation.get("teacher_key", "teacher_response")
    for kind in {stage.kind for arm in plan.arms.values() for stage in arm.stages}:
        if not (scripts / KINDS[kind].script).is_file():
            raise InputError(
                f"{scripts / KINDS[kind].script} is missing", fix="--scripts_dir with the folder examples/gad"
            )
    check_data_file(plan.val_files, prompt_key, teacher_key)
    rows = check_data_file(plan.train_files, prompt_key, teacher_key)
    if too_many := [size for size in plan.train_rows if size != ALL_ROWS and int(size) > rows]:
        raise InputError(f"train_rows {too_many[0]}: {plan.train_files} has {rows} rows", fix=f"at most {rows}, or all")
    return rows

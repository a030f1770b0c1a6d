"""``gad.replay``: student answers of earlier steps, with their teacher answers, as extra groups in D's updates."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transfer_queue as tq
from omegaconf import DictConfig

from recipe.gad.run.config import replayed_prompts
from recipe.gad.training.rows import Group, Row, Trajectory, Update, filler, spread
from recipe.gad.training.trajectory import build_teacher_trajectory
from verl.trainer.ppo.core_algos import compute_grouped_discriminator_loss


class PastGroup(NamedTuple):
    """Token ids of one prompt of an earlier step, each 1-D int32: the prompt, the teacher's answer, the students'."""

    prompt: torch.Tensor
    teacher: torch.Tensor
    students: list[torch.Tensor]

    @classmethod
    def of(cls, prompt: torch.Tensor, teacher: torch.Tensor, students: Sequence[torch.Tensor]) -> "PastGroup":
        prompt, teacher, *answers = (ids.to(torch.int32, copy=True) for ids in (prompt, teacher, *students))
        return cls(prompt, teacher, answers)


@dataclass
class Replay:
    """A uniform sample of all groups seen so far (reservoir sampling, Vitter 1985), bounded by ``capacity``.

    Attributes:
        count: groups to replay in one step; 0: off.
        capacity: most groups kept, at least ``count``.
        seed: together with the step it determines every draw.
        groups, seen: the sample, and the size of what it was drawn from; all that a resumed run needs.
    """

    count: int
    capacity: int
    seed: int
    groups: list[PastGroup] = field(default_factory=list)
    seen: int = 0

    @classmethod
    def of(cls, config: DictConfig) -> "Replay":
        """The replay of a run's configuration."""
        steps = config.data.train_batch_size // config.critic.ppo_mini_batch_size
        count = replayed_prompts(config) * steps if config.gad.replay else 0
        return cls(count, config.gad.replay_capacity, config.critic.data_loader_seed)

    def add(self, step: int, groups: Sequence[PastGroup]) -> None:
        """Offer the groups of a step; every group ever offered is kept with the same probability."""
        rng = random.Random(f"{self.seed}-{step}-add")
        for group in groups:
            self.seen += 1
            place = len(self.groups) if len(self.groups) < self.capacity else rng.randrange(self.seen)
            if place < self.capacity:
                self.groups[place : place + 1] = [group]

    def draw(self, step: int) -> list[PastGroup]:
        """``count`` different groups, or none while there are fewer."""
        if len(self.groups) < self.count:
            return []
        return random.Random(f"{self.seed}-{step}-draw").sample(self.groups, self.count)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: plain data."""
        return {"groups": [tuple(group) for group in self.groups], "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""
        self.groups = [PastGroup(*group) for group in state["groups"]]
        self.seen = state["seen"]


def fresh_groups(groups: Sequence[Group], partition_id: str) -> list[PastGroup]:
    """Token ids of a step's groups, read from TransferQueue, for later steps."""
    groups = [group for group in groups if group.students]
    keys = [row.key for group in groups for row in (group.teacher, *group.students)]
    data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["prompts", "responses"])
    ids = dict(zip(keys, zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True), strict=True))
    return [
        PastGroup.of(*ids[group.teacher.key], [ids[row.key][1] for row in group.students if len(ids[row.key][1])])
        for group in groups
    ]


def past_rows(past: Sequence[PastGroup], n: int, eos_token_id: int) -> tuple[list[Group], dict[str, Trajectory]]:
    """Groups of n + 1 rows, and key -> trajectory of these rows, fillers included."""
    groups: list[Group] = []
    rows: dict[str, Trajectory] = {}
    for number, (prompt, teacher, students) in enumerate(past):
        group = Group(f"replay-{number}", n, teacher_tokens=len(prompt) + len(teacher))
        rows[group.teacher.key] = build_teacher_trajectory(prompt, teacher)
        for i, answer in enumerate(students):
            row = Row(f"{group.uid}_{i}_0", len(prompt) + len(answer))
            group.students.append(row)
            rows[row.key] = build_teacher_trajectory(prompt, answer)
        rows |= {row.key: filler(eos_token_id) for row in group.rows() if row.key not in rows}
        groups.append(group)
    return groups, rows


def spread_both(sizes: Sequence[int], n_fresh: int, update: Update, n_ranks: int, step: int) -> list[list[list[int]]]:
    """:func:`spread` of fresh groups, with the past ones after them shared evenly among the same optimizer steps.

    Args: ``sizes``: tokens of the ``n_fresh`` fresh groups, then of the past ones; the rest as in :func:`spread`.
    """
    fresh = spread(sizes[:n_fresh], update, n_ranks, step)
    if len(sizes) == n_fresh:
        return fresh
    per_step = (len(sizes) - n_fresh) // len(fresh[0])
    past = spread(sizes[n_fresh:], SimpleNamespace(ppo_mini_batch_size=per_step, shuffle=False), n_ranks, step)
    return [
        [[*now, *(n_fresh + i for i in then)] for now, then in zip(*parts, strict=True)]
        for parts in zip(fresh, past, strict=True)
    ]


def pair_metrics(groups: Sequence[Group], score_of: dict[str, float]) -> dict[str, float]:
    """Metrics of D's loss (:func:`compute_grouped_discriminator_loss`) over the real pairs of ``groups``.

    ``score_of``: key of a row -> its score.
    """
    pairs = [(score_of[row.key], score_of[group.teacher.key]) for group in groups for row in group.students]
    return metrics_of_pairs(pairs)


def metrics_of_pairs(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The same for scores (student, teacher) of pairs."""
    student, teacher = torch.tensor(pairs).unbind(-1)
    _, metrics = compute_grouped_discriminator_loss(student.unsqueeze(-1), teacher)
    return {name: float(metric.aggregate()) for name, metric in metrics.items()}

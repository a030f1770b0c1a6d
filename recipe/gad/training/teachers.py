"""Several teacher answers to a prompt: one of them is drawn for every prompt of a step, with the same probability each.

The draw depends on seed, step and row alone, so a resumed run draws the same. With ``gad.teacher_answers=all``, the
discriminator compares the other answers too. A group of its update then has as many teacher rows as the row of the data
with the most answers: the drawn answer, the others, and fillers.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow.compute as pc
import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from recipe.gad.training.answers import ANSWERS
from recipe.gad.training.replay import metrics_of_pairs
from recipe.gad.training.rows import Group, Row, Trajectory, filler
from recipe.gad.training.trajectory import (
    PAIR_WEIGHT,
    ROW_NUMBER,
    TEACHER_IDS,
    TEACHER_TEXT,
    build_teacher_trajectory,
    teacher_key,
)
from verl.trainer.ppo.core_algos import compute_grouped_discriminator_loss
from verl.utils import tensordict_utils as tu
from verl.workers.critic.dp_critic import discriminator_loss, last_token_scores


def all_pairs_loss(n_teachers: int, group_size: int, model_output: dict, data: TensorDict, dp_group=None):
    """``discriminator_loss`` over all pairs of a teacher answer and a student answer to the same prompt.

    L_D = - sum_p sum_j sum_i u_pj w_pi log sigmoid( t_pj - s_pi ), u and w the weights of the rows.

    Args:
        n_teachers: teacher rows of a group, fillers included; they come first.
        group_size: n_teachers + n.
        model_output, data, dp_group: as in ``discriminator_loss``, except for the pair_weight of a teacher row: one
            over the number of teacher answers to its prompt (:meth:`Teachers.shares`), and 0 for a filler.

    Returns:
        loss and metrics as in ``discriminator_loss``; d_acc and the others weigh a pair as the loss does.
    """
    scores = last_token_scores(model_output["values"])
    weights_PG = data[PAIR_WEIGHT].to(scores.device).view(-1, group_size)
    teacher_PM, student_PN = scores.view(-1, group_size).tensor_split([n_teachers], dim=1)
    share_PM, weight_PN = weights_PG.tensor_split([n_teachers], dim=1)
    weights_PMN = share_PM.unsqueeze(-1) * weight_PN.unsqueeze(1) * data["dp_size"]
    students = student_PN.repeat_interleave(n_teachers, dim=0)
    loss, metrics = compute_grouped_discriminator_loss(students, teacher_PM.flatten(), weights_PMN.flatten(0, 1))
    return loss, {**metrics, "row_scores": list(zip(data[ROW_NUMBER].tolist(), scores.tolist(), strict=True))}


@dataclass
class Teachers:
    """The teacher answers of a step.

    Attributes:
        dataset: the training data, of the class of this project's ``RLHFDataset``.
        seed: with step and row, it determines every draw.
        named: does each teacher have a column?
        most: teacher rows of a group in D's update; 1 unless several answers are compared.
        step: the step of the last draw.
        drawn: uid -> column of the answer that was drawn for the current step.
        others: uid -> the answers that are compared beside it, {teacher, text, ids} each.
        rows: uid -> rows of these answers, and fillers after them.
    """

    dataset: Any
    seed: int | None
    named: bool
    most: int = 1
    step: int | None = None
    drawn: dict[str, str] = field(default_factory=dict)
    others: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: DictConfig, dataset: Any) -> "Teachers":
        """The teachers of a run's training data."""
        several = config.gad.teacher_answers == "all" and ANSWERS in dataset.dataframe.column_names
        most = pc.max(pc.list_value_length(dataset.dataframe.data.column(ANSWERS))).as_py() if several else 1
        return cls(dataset, config.data.seed, named=not isinstance(config.data.teacher_key, str), most=most)

    @property
    def loss(self) -> Callable:
        """D's loss, an engine loss as ``discriminator_loss``."""
        return partial(all_pairs_loss, self.most) if self.most > 1 else discriminator_loss

    def draw(self, batch: TensorDict, step: int) -> TensorDict:
        """A batch of the training data with the answers of this step; one of single answers stays as it is."""
        frame = self.dataset.dataframe
        if ANSWERS not in frame.column_names:
            return batch
        if step != self.step:
            self.step, self.drawn, self.others, self.rows = step, {}, {}, {}
        rows = [frame[int(index)][ANSWERS] for index in batch["index"]]
        answers = [
            random.Random(f"{self.seed}-{step}-{int(index)}").choice(row)
            for index, row in zip(batch["index"], rows, strict=True)
        ]
        self.drawn |= {uid: answer["teacher"] for uid, answer in zip(batch["uid"], answers, strict=True)}
        if self.most > 1:
            columns = zip(batch["uid"], answers, rows, strict=True)
            self.others |= {uid: [other for other in row if other is not answer] for uid, answer, row in columns}
        tu.assign_non_tensor_stack(batch, TEACHER_TEXT, [answer["text"] for answer in answers])
        tu.assign_non_tensor_stack(batch, TEACHER_IDS, [answer["ids"] for answer in answers])
        rewards = [
            {**reward, "ground_truth": answer["text"]} if reward.get("style") == "teacher" else reward
            for reward, answer in zip(batch["reward_model"], answers, strict=True)
        ]
        tu.assign_non_tensor_stack(batch, "reward_model", rewards)
        return batch

    def other_rows(
        self, groups: Sequence[Group], drawn: Mapping[str, Trajectory], eos_token_id: int
    ) -> dict[str, Trajectory]:
        """Key -> trajectory of the teacher rows beside the drawn answers, fillers included.

        Args:
            groups: of the step.
            drawn: key -> trajectory, at least those of the groups' drawn answers.
            eos_token_id: what fillers consist of.
        """
        rows: dict[str, Trajectory] = {}
        for group in groups:
            prompt, others = drawn[group.teacher.key]["prompts"], self.others.get(group.uid, [])
            of_group = [build_teacher_trajectory(prompt, torch.tensor(other["ids"])) for other in others]
            of_group += [filler(eos_token_id) for _ in range(self.most - 1 - len(others))]
            of_key = {teacher_key(group.uid, i): row for i, row in enumerate(of_group, 1)}
            self.rows[group.uid] = [Row(key, row["input_ids"].numel()) for key, row in of_key.items()]
            rows |= of_key
        return rows

    def with_others(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with all their teacher rows, for D's update."""
        return [replace(group, others=self.rows.get(group.uid, [])) for group in groups]

    def shares(self, groups: Sequence[Group]) -> dict[str, float]:
        """Key of a teacher row -> its share of each student's pairs; nothing unless several answers are compared.

        The shares of a prompt's answers are equal and add up to 1: the prompt weighs the same, whatever their number.
        A filler has 0.

        Args:
            groups: of :meth:`with_others`.
        """
        shares: dict[str, float] = {}
        for group in groups if self.most > 1 else ():
            n_real = 1 + len(self.others.get(group.uid, []))
            keys = [group.teacher.key, *(row.key for row in group.others)]
            shares |= {key: 1.0 / n_real if i < n_real else 0.0 for i, key in enumerate(keys)}
        return shares

    def metrics(self, groups: Sequence[Group], score_of: Mapping[str, float]) -> dict[str, float]:
        """``critic/d_acc/TEACHER`` of every teacher with a column whose answers were compared: D's accuracy on them.

        Args:
            groups: of the step.
            score_of: key of a row -> D's score.
        """
        pairs: dict[str, list[tuple[float, float]]] = {}
        for group in (group for group in groups if self.named and group.students and group.uid in self.drawn):
            teachers = [self.drawn[group.uid], *(other["teacher"] for other in self.others.get(group.uid, []))]
            for i, teacher in enumerate(teachers):
                score = score_of[teacher_key(group.uid, i)]
                pairs.setdefault(teacher, []).extend((score_of[row.key], score) for row in group.students)
        return {f"critic/d_acc/{teacher}": metrics_of_pairs(pairs[teacher])["d_acc"] for teacher in sorted(pairs)}

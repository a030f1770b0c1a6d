"""Several teacher answers to a prompt: one of them is drawn for every prompt of a step, with the same probability each.

The draw depends on seed, step and row alone, so a resumed run draws the same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig
from tensordict import TensorDict

from recipe.gad.training.answers import ANSWERS
from recipe.gad.training.replay import pair_metrics
from recipe.gad.training.rows import Group
from recipe.gad.training.trajectory import TEACHER_IDS, TEACHER_TEXT
from verl.utils import tensordict_utils as tu


@dataclass
class Teachers:
    """Draws the teacher answer of every prompt of a step.

    Attributes:
        dataset: the training data, of the class of this project's ``RLHFDataset``.
        seed: with step and row, it determines every draw.
        named: does each teacher have a column?
        drawn: uid -> column of the answer that was drawn for the current step.
    """

    dataset: Any
    seed: int | None
    named: bool
    drawn: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: DictConfig, dataset: Any) -> "Teachers":
        """The teachers of a run's training data."""
        return cls(dataset, config.data.seed, named=not isinstance(config.data.teacher_key, str))

    def draw(self, batch: TensorDict, step: int) -> TensorDict:
        """A batch of the training data with the answers of this step; one of single answers stays as it is."""
        frame = self.dataset.dataframe
        if ANSWERS not in frame.column_names:
            return batch
        rows = [frame[int(index)][ANSWERS] for index in batch["index"]]
        answers = [
            random.Random(f"{self.seed}-{step}-{int(index)}").choice(row)
            for index, row in zip(batch["index"], rows, strict=True)
        ]
        self.drawn = {uid: answer["teacher"] for uid, answer in zip(batch["uid"], answers, strict=True)}
        tu.assign_non_tensor_stack(batch, TEACHER_TEXT, [answer["text"] for answer in answers])
        tu.assign_non_tensor_stack(batch, TEACHER_IDS, [answer["ids"] for answer in answers])
        rewards = [
            {**reward, "ground_truth": answer["text"]} if reward.get("style") == "teacher" else reward
            for reward, answer in zip(batch["reward_model"], answers, strict=True)
        ]
        tu.assign_non_tensor_stack(batch, "reward_model", rewards)
        return batch

    def metrics(self, groups: Sequence[Group], score_of: dict[str, float]) -> dict[str, float]:
        """``critic/d_acc/TEACHER`` of every teacher with a column whose answers were drawn: D's accuracy on them.

        Args:
            groups: of the step.
            score_of: key of a row -> D's score.
        """
        found = {}
        for teacher in sorted(set(self.drawn.values())) if self.named else ():
            of_it = [group for group in groups if group.students and self.drawn.get(group.uid) == teacher]
            if of_it:
                found[f"critic/d_acc/{teacher}"] = pair_metrics(of_it, score_of)["d_acc"]
        return found

"""What can tell a teacher's answer from a student's although their texts do not: tokenization and length.

A sampled answer need not consist of the tokens that its text has: "the" may come as "t" + "he". A teacher's answer
always does, since it comes as text. :class:`ShortcutProbe` measures how far tokenization alone, or length alone, leads;
:func:`canonical_ids` removes the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from transformers import PreTrainedTokenizerBase

from recipe.gad.training.replay import PastGroup
from recipe.gad.training.rows import Group, Row, Trajectory
from recipe.gad.training.trajectory import build_teacher_trajectory, tokenize_teacher

WINDOW = 20
"""Steps whose pairs a probe is fitted to."""
RIDGE = 1e-3
"""Weight of the squared norm beside the mean loss of a probe, for features in units of their root mean square."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no character."""

Features = dict[str, np.ndarray]
"""Probe -> features of answers, (answers, features) in float64."""


def canonical_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The tokens that the text of ``ids`` has, as :func:`tokenize_teacher` makes them.

    Special tokens, such as the end of the turn, stay where they are, and what is between them is tokenized anew. The
    ids come back as they are if they are no whole characters (an answer that is cut inside one), or if the tokens of
    their text decode to another text.
    """
    special, canonical, run = set(tokenizer.all_special_ids), [], []
    for token in [*ids, None]:
        if token is not None and token not in special:
            run.append(token)
            continue
        if run:
            canonical += tokenize_teacher(tokenizer, [text_of(tokenizer, run)], [])[0]
            run = []
        if token is not None:
            canonical.append(token)
    text = text_of(tokenizer, ids)
    return canonical if BROKEN not in text and text_of(tokenizer, canonical) == text else list(ids)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens and spaces included."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def replaced_rows(
    keys: Sequence[str], prompts: Sequence, responses: Sequence, read: Sequence[Sequence[int]]
) -> tuple[dict[str, Row], dict[str, Trajectory]]:
    """Rows that D reads in place of those of the students.

    Args:
        keys, prompts, responses: of the students' rows; ids as 1-D tensors.
        read: the ids that D reads in place of each response; a row whose ids are the same is not replaced.

    Returns:
        key of an answer -> the row that replaces it, and key of that row -> its trajectory.
    """
    replaced, rows = {}, {}
    for key, prompt, response, ids in zip(keys, prompts, responses, read, strict=True):
        if list(ids) != response.tolist():
            replaced[key] = Row(f"{key}_read", len(prompt) + len(ids))
            rows[replaced[key].key] = build_teacher_trajectory(prompt, torch.tensor(ids))
    return replaced, rows


def read_as(groups: Sequence[Group], replaced: dict[str, Row]) -> list[Group]:
    """Groups with the replaced students."""
    return [replace(group, students=[replaced.get(row.key, row) for row in group.students]) for group in groups]


def answer_features(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> Features:
    """What the probes see of answers (token ids).

    length: log(1 + tokens) and its square, so that a probe can prefer a middle. tokens: 1 if the tokens are not those
    of the text, else 0.
    """
    length = np.log1p([len(ids) for ids in answers])
    other = [float(canonical_ids(tokenizer, ids) != list(ids)) for ids in answers]
    return {"length": np.stack([length, length**2], axis=-1), "tokens": np.array(other).reshape(-1, 1)}


def fit_probe(differences: np.ndarray) -> np.ndarray:
    """Weights w that minimize mean log(1 + exp(-w d)) + ridge: a linear Bradley-Terry model.

    Args:
        differences: features of the teacher's answer less those of the student's, (pairs, features).

    Returns:
        (features,); 0 for a feature that does not differ within any pair.
    """
    scale = np.sqrt((differences**2).mean(axis=0))
    unit = np.where(scale > 0, scale, np.inf)
    scaled = differences / unit

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = scaled @ w
        slope = -np.exp(-np.logaddexp(0, margin))  # of log(1 + exp(-margin))
        return np.logaddexp(0, -margin).mean() + RIDGE * w @ w, slope @ scaled / len(scaled) + 2 * RIDGE * w

    w = minimize(objective, np.zeros(scaled.shape[1]), jac=True, method="L-BFGS-B").x
    return w / unit


@dataclass
class ShortcutProbe:
    """Probes that see one shortcut each, fitted to the pairs of earlier steps and tried on those of the current one.

    Attributes:
        tokenizer: the student's.
        past: probe -> differences (pairs, features) of each of the last :data:`WINDOW` steps. All that a resumed run
            needs.
    """

    tokenizer: PreTrainedTokenizerBase
    past: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def note(self, groups: Sequence[PastGroup]) -> dict[str, float]:
        """Metrics of a step, whose pairs are kept for the next ones.

        Returns:
            ``critic/shortcut_length_acc`` and ``critic/shortcut_tokens_acc``: share of pairs in which the probe prefers
            the teacher, a tie counts one half; absent at the first step. ``critic/student_noncanonical``: share of
            student answers whose tokens are not those of their text.
        """
        students = [answer.tolist() for group in groups for answer in group.students]
        teachers = [group.teacher.tolist() for group in groups]
        of_student, of_teacher = (answer_features(self.tokenizer, answers) for answers in (students, teachers))
        prompt: np.ndarray = np.repeat(np.arange(len(groups)), [len(group.students) for group in groups])
        metrics = {"critic/student_noncanonical": float(of_student["tokens"].mean())}
        for name, features in of_student.items():
            differences = of_teacher[name][prompt] - features
            past = self.past.setdefault(name, [])
            if past:
                margin = differences @ fit_probe(np.concatenate(past))
                metrics[f"critic/shortcut_{name}_acc"] = float(np.mean((np.sign(margin) + 1) / 2))
            self.past[name] = [*past, differences][-WINDOW:]
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: plain data."""
        return {name: [torch.from_numpy(step) for step in steps] for name, steps in self.past.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""
        self.past = {name: [step.numpy() for step in steps] for name, steps in state.items()}

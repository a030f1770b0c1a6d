"""The rows of one GAD step as plain data. The trainer reads and writes TransferQueue; this file computes.

    student keys -> groups [teacher, s_1, ..., s_n] -> ranks and mini-batches -> a weight for every pair

It is apart from the trainer so that the rules about rows can be tested without Ray.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig

from recipe.gad.run.findings import InputError
from recipe.gad.training import trajectory as names
from recipe.gad.training.trajectory import build_teacher_trajectory, split_key
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

Trajectory = dict[str, torch.Tensor]
Update = DictConfig | SimpleNamespace
"""``config.critic``, the actor's config, or a part of one."""


class Row(NamedTuple):
    """A row of TransferQueue: its key and its length in tokens, prompt and answer."""

    key: str
    tokens: int


@dataclass
class Group:
    """One prompt of a step: [teacher, s_1, ..., s_n]; a filler row replaces a student that the rollout did not return.

    ``teacher_tokens`` is 0 until the teacher's trajectory is built, which takes a student's prompt ids. ``others`` are
    the rows of further teacher answers, which only D's update has (recipe/gad/training/teachers.py).
    """

    uid: str
    n: int
    students: list[Row] = field(default_factory=list)
    teacher_tokens: int = 0
    others: list[Row] = field(default_factory=list)

    @property
    def teacher(self) -> Row:
        return Row(names.teacher_key(self.uid), self.teacher_tokens)

    def rows(self) -> list[Row]:
        """n + 1 rows, the teacher first; with ``others``, these come next."""
        fillers = [Row(names.filler_key(self.uid, i), 2) for i in range(self.n - len(self.students))]
        return [self.teacher, *self.others, *self.students, *fillers]

    @property
    def tokens(self) -> int:
        """Of all its rows."""
        return sum(row.tokens for row in self.rows())


def sample_order(key: str, submitted: dict[str, int]) -> tuple[int, int, int]:
    """Sort key of a student's row: place of its prompt (uid -> place; unknown prompts come last), sample, output."""
    uid, sample, output = split_key(key)
    return submitted.get(uid, len(submitted)), sample, output


def group_rows(students: Sequence[Row], submitted: Iterable[str], n: int, n_prompts: int) -> list[Group]:
    """Groups of a step, ``n_prompts`` at most. A prompt whose rollouts all failed is a group of fillers, at the end.

    Args:
        students: student rows in the order of the data, at most ``n`` per prompt (else ValueError).
        submitted: uids of the prompts sent to the rollout.
    """
    groups: dict[str, Group] = {}
    for row in students:
        uid = split_key(row.key)[0]
        groups.setdefault(uid, Group(uid, n)).students.append(row)
    for group in groups.values():
        if len(group.students) > n:
            raise InputError(
                f"prompt {group.uid}: {len(group.students)} student rows, expected at most "
                f"actor_rollout_ref.rollout.n={n}. The agent loop returned several outputs for one sample, and the "
                "discriminator scores one answer per sample",
                fix="use an agent loop with one output per sample, such "
                "as actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
            )
    for uid in submitted:
        groups.setdefault(uid, Group(uid, n))
    return list(groups.values())[:n_prompts]


def teacher_rows(uids: Iterable[str], prompts: Iterable, teacher_ids: Iterable) -> dict[str, Trajectory]:
    """Key -> trajectory of the teacher's row of every prompt, from the ids of prompt (a tensor) and answer (a list)."""
    columns = zip(uids, prompts, teacher_ids, strict=True)
    return {names.teacher_key(uid): build_teacher_trajectory(ids, torch.tensor(answer)) for uid, ids, answer in columns}


def rows_from_messages(tokenizer, data: DictConfig, uids: Iterable[str], messages: Iterable, teacher_ids: Iterable):
    """:func:`teacher_rows` of prompts that no rollout has turned into token ids; ``data`` is ``config.data``."""
    kwargs = data.get("apply_chat_template_kwargs", {})
    prompts = (names.build_prompt_ids(tokenizer, list(chat), kwargs)[-data.max_prompt_length :] for chat in messages)
    return teacher_rows(uids, map(torch.tensor, prompts), teacher_ids)


def filler(eos_token_id: int) -> Trajectory:
    """A trajectory of two tokens that no loss sees."""
    eos, zero = torch.tensor([eos_token_id]), torch.zeros(1, dtype=torch.int64)
    return {**build_teacher_trajectory(eos, eos), "response_mask": zero, "loss_mask": zero.clone()}


def spread(sizes: Sequence[int], update: Update, n_ranks: int, step: int) -> list[list[list[int]]]:
    """Which unit (a group, or a row) goes to which rank and optimizer step.

    Mini-batches are cut in the order of the data, or shuffled anew at every step, so they do not depend on the number
    of ranks. The units of one mini-batch are balanced over the ranks by their tokens.

    Args:
        sizes: tokens of every unit.
        update: ``config.critic`` or the actor's config: ppo_mini_batch_size, shuffle, data_loader_seed.
        n_ranks: data-parallel ranks.
        step: the global step; seeds the shuffle together with data_loader_seed.

    Returns:
        [rank][mini-batch] -> indices into ``sizes``; a worker group hands every rank an equal, contiguous share.
    """
    indices = list(range(len(sizes)))
    if update.shuffle:
        random.Random(f"{update.data_loader_seed}-{step}").shuffle(indices)
    ranks: list[list[list[int]]] = [[] for _ in range(n_ranks)]
    for start in range(0, len(indices), update.ppo_mini_batch_size):
        mini_batch = indices[start : start + update.ppo_mini_batch_size]
        workload = calculate_workload(torch.tensor([sizes[i] for i in mini_batch])).tolist()
        parts = get_seqlen_balanced_partitions(workload, k_partitions=n_ranks, equal_size=True)
        for rank, part in zip(ranks, parts, strict=True):
            rank.append([mini_batch[i] for i in part])
    return ranks


def pair_weights(groups: Sequence[Group], ranks: list[list[list[int]]]) -> dict[str, float]:
    """Key -> weight in D's loss, in the order in which the rows go to the ranks (:func:`spread` of the groups).

    A student weighs one over the real pairs of its optimizer step, over all ranks; teachers and fillers weigh 0.
    ``verl.workers.critic.dp_critic.discriminator_loss`` reads the weights.
    """
    pairs = [sum(len(groups[i].students) for part in parts for i in part) for parts in zip(*ranks, strict=True)]
    weights: dict[str, float] = {}
    for rank in ranks:
        for indices, n_pairs in zip(rank, pairs, strict=True):
            for group in (groups[i] for i in indices):
                weights |= {row.key: 1.0 / n_pairs if row in group.students else 0.0 for row in group.rows()}
    return weights


def update_fields(weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """Fields of the rows of D's update, in the order of :func:`pair_weights`."""
    return {names.PAIR_WEIGHT: torch.tensor(list(weights.values())), names.ROW_NUMBER: torch.arange(len(weights))}


def without_lone_answers(scores: torch.Tensor, uids: Sequence[str], n: int) -> torch.Tensor:
    """Scores with 0 for an answer that is the only one left of the n > 1 to its prompt.

    D's loss leaves its scores free up to a constant. The mean of a group removes it, but stock estimators take the
    score of a single answer as its advantage.

    Args:
        scores: of the rows, (rows,).
        uids: prompts of the rows; "" for a row that is no answer.
        n: samples per prompt.
    """
    answers = Counter(uids)
    return scores.masked_fill(torch.tensor([uid != "" and answers[uid] == 1 < n for uid in uids]), 0.0)


def teacher_length_metrics(teachers: dict[str, Trajectory], limit: int) -> dict[str, float]:
    """Mean, max, min of the teachers' answers in tokens, and the share that reached ``limit`` tokens."""
    lengths = [row["responses"].numel() for row in teachers.values()]
    cut_ratio = float(np.mean([length >= limit for length in lengths]))
    return length_statistics("teacher_response_length", lengths) | {"teacher_response_length/cut_ratio": cut_ratio}


def length_statistics(name: str, lengths: Sequence[int]) -> dict[str, float]:
    """``name/mean``, ``name/max`` and ``name/min`` of lengths in tokens."""
    statistics = {"mean": np.mean(lengths), "max": np.max(lengths), "min": np.min(lengths)}
    return {f"{name}/{key}": float(value) for key, value in statistics.items()}


def step_metrics(timing_raw: dict[str, float], global_steps: int, epoch: int) -> dict[str, float]:
    """What stock verl logs of every step, for the stages whose batches lack the fields of its other metrics."""
    timing = {f"timing_s/{name}": seconds for name, seconds in timing_raw.items()}
    return timing | {"training/global_step": global_steps, "training/epoch": epoch}


def deviations(values: torch.Tensor, uids: Sequence[str]) -> torch.Tensor:
    """Values less their mean over the answers to the same prompt, (..., rows) in float64.

    Args: ``values``, (..., rows), and ``uids``, the prompts of the rows.
    """
    groups = torch.tensor(np.unique(uids, return_inverse=True)[1])
    counts = torch.bincount(groups)
    sums = torch.zeros(*values.shape[:-1], len(counts), dtype=torch.double).index_add_(-1, groups, values.double())
    return values.double() - (sums / counts)[..., groups]


def correlation_within_prompts(a: torch.Tensor, b: torch.Tensor, uids: Sequence[str]) -> float | None:
    """Pearson correlation of two columns among the answers to one prompt, over all prompts.

    With D's scores and the answers' lengths: near 1 (or -1) the policy is mainly rewarded for longer (shorter) answers.

    Args: ``a``, ``b`` and the prompts of the rows, (rows,) each.

    Returns:
        in [-1, 1]; None if one of the two does not differ within any prompt.
    """
    first, second = deviations(torch.stack([a.double(), b.double()]), uids)
    norm = (first.norm() * second.norm()).item()
    return float(first @ second) / norm if norm > 0 else None

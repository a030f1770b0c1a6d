"""Accuracies on validation prompts: the discriminator's, which never trains on their teacher answers, and that of
fresh discriminators, which train on nothing else (``gad.fresh_discriminator``).

Stock validation removes its rows as soon as their text is read, so :class:`SeenRows` notes token ids on the way.
"""

import logging
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from recipe.gad.run.log import VAL_TWO_SAMPLE
from recipe.gad.run.two_sample import MIN_PROMPTS, fresh_settings
from recipe.gad.training import fresh
from recipe.gad.training.rows import Trajectory, filler
from recipe.gad.training.shortcuts import canonical_ids
from recipe.gad.training.trajectory import TEACHER_IDS, build_teacher_trajectory

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Token ids of one validation sample: its prompt, the student's answer and the teacher's."""

    prompt: list[int]
    student: list[int]
    teacher: list[int]


class SeenRows:
    """A replay buffer whose samples leave their token ids in :attr:`pairs`; a student's empty answer is left out.

    Samples arrive in any order. They are handed on in the order of their token ids: stock's means add them up, and the
    last digit of a sum depends on the order.
    """

    def __init__(self, replay_buffer: Any):
        self._replay_buffer = replay_buffer
        self.pairs: list[Pair] = []

    def sample(self, **arguments: Any) -> tuple[Any, dict]:
        """Stock ``sample``."""
        batch, metrics = self._replay_buffer.sample(**arguments)
        fields = ["prompts", "responses", TEACHER_IDS]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        columns = zip(data["prompts"].unbind(), data["responses"].unbind(), list(data[TEACHER_IDS]), strict=True)
        pairs = [Pair(prompt.tolist(), response.tolist(), list(teacher)) for prompt, response, teacher in columns]
        batch.reorder(sorted(range(len(pairs)), key=pairs.__getitem__))
        self.pairs.extend(pair for pair in pairs if pair.student)
        return batch, metrics


def pair_rows(pairs: Sequence[Pair], n_ranks: int, eos_token_id: int) -> dict[str, Trajectory]:
    """Key -> trajectory: rows of the students, as many of their teachers, and fillers up to a multiple of ``n_ranks``.

    Rows are in the order of their token ids, since validation samples arrive in any order and a run repeats itself.
    """
    ordered = sorted(pairs)
    sides = {"student": [pair.student for pair in ordered], "teacher": [pair.teacher for pair in ordered]}
    rows = {
        f"validation_{side}_{i}": build_teacher_trajectory(torch.tensor(pair.prompt), torch.tensor(ids))
        for side, answers in sides.items()
        for i, (pair, ids) in enumerate(zip(ordered, answers, strict=True))
    }
    fillers = {f"validation_filler_{i}": filler(eos_token_id) for i in range(-len(rows) % n_ranks)}
    return rows | fillers


def fresh_accuracy(
    config: DictConfig, critic_wg: Any, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """:data:`VAL_TWO_SAMPLE`, if ``gad.fresh_discriminator`` wants it; a warning if the pairs have too few prompts.

    As in ``gad eval``, the discriminators read both sides as the tokens of their text. They are trained on the GPUs of
    the critic's workers, which share the seeds.
    """
    if (settings := fresh_settings(config)) is None:
        return {}
    if (prompts := len({tuple(pair.prompt) for pair in pairs})) < MIN_PROMPTS:
        files = config.data.val_files
        logger.warning("no %s: the answers are to %d different prompts of %s", VAL_TWO_SAMPLE, prompts, files)
        return {}
    read = [
        fresh.Pair(str(prompt), prompt + canonical_ids(tokenizer, student), prompt + teacher)
        for prompt, student, teacher in sorted(pairs)
    ]
    by_rank = critic_wg.fresh_accuracies(read, settings)
    return {VAL_TWO_SAMPLE: fmean(accuracy for rank in by_rank for accuracy in rank)}

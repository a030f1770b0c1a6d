"""Preference learning in place of a discriminator: DPO (arXiv 2305.18290) of the teacher's answer, which is preferred,
against the student's own answers. The parts that work without Ray; recipe/gad/training/preference_trainer.py uses them.

The loss of a pair needs the log-probabilities of two whole answers, which may be on two ranks or in two micro-batches.
So a step has two passes. The first one finds them for all rows, without gradients. :func:`compute_dpo_loss` and
autograd turn them into one coefficient per row, its derivative. The second pass trains on :func:`coefficient_loss`, a
sum over rows with the same gradient. This is exact as long as a batch is one optimizer step.

Suffixes: P prompts, N student answers of one prompt, R = P (N + 1) rows with the teacher first in each group.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict

from recipe.gad.training.rows import Trajectory
from recipe.gad.training.trajectory import TEACHER_IDS, build_teacher_trajectory, split_key
from verl.trainer.ppo.core_algos import compute_grouped_discriminator_loss
from verl.utils.metric import Metric
from verl.workers.utils.padding import no_padding_2_padding

COEFFICIENT = "coefficient"
"""Field of a row: the derivative of the batch's loss by the log-probability of the row's answer."""


def compute_dpo_loss(
    policy_R: torch.Tensor, reference_R: torch.Tensor, weights_R: torch.Tensor, n: int, beta: float
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """DPO loss of every pair of the teacher's answer and one of the student's n answers (arXiv 2305.18290, eq. 7).

    L = -sum_i w_i log sigmoid(r(teacher) - r(student_i)) with the implicit reward r(y) = beta log(pi(y|x) / ref(y|x)).
    It is D's loss with the implicit rewards as scores.

    Args:
        policy_R: log-probabilities of whole answers, sums over their tokens at temperature 1, (R,).
        reference_R: the same under the reference, (R,).
        weights_R: weight of the pair of a student's row, (R,); those of teachers are not read. They add up to 1 for the
            mean over pairs.
        n: student answers of one prompt, at least 1.
        beta: above 0; the larger, the closer the policy stays to the reference.

    Returns:
        The weighted sum over pairs, and as weighted sums dpo_loss, dpo_acc (share of pairs in which the implicit reward
        prefers the teacher, a tie counts one half) and dpo_margin (r(teacher) - r(student)).
    """
    rewards = (beta * (policy_R - reference_R)).view(-1, n + 1)
    loss, found = compute_grouped_discriminator_loss(rewards[:, 1:], rewards[:, 0], weights_R.view(-1, n + 1)[:, 1:])
    return loss, {"dpo_loss": found["d_loss"], "dpo_acc": found["d_acc"], "dpo_margin": found["score_gap"]}


def imitation_loss(policy_R: torch.Tensor, tokens_R: torch.Tensor, n: int) -> torch.Tensor:
    """Mean over the tokens of the teachers' answers of -log pi, the term of gad.imitation_coef, at temperature 1.

    Args:
        policy_R, n: as in :func:`compute_dpo_loss`.
        tokens_R: tokens of the answers, (R,); those of students are not read.
    """
    return -policy_R.view(-1, n + 1)[:, 0].sum() / tokens_R.view(-1, n + 1)[:, 0].sum()


def sequence_log_probs(log_probs: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of whole answers, (R,) in float64.

    Args:
        log_probs: of the answers' tokens, jagged (R, response).
        response_mask: 1 on tokens that the policy chose, jagged (R, response).
    """
    return torch.stack(
        [(row.double() * mask).sum() for row, mask in zip(log_probs.unbind(), response_mask.unbind(), strict=True)]
    )


def coefficient_loss(
    config: Any, model_output: dict, data: TensorDict, dp_group: Any = None
) -> tuple[torch.Tensor, dict]:
    """sum_i c_i log pi(y_i | x_i) over the rows of a micro-batch, as a stock engine loss function.

    Args:
        config: unused, part of the actor's loss interface.
        model_output: ``log_probs``, jagged (rows, prompt + response).
        data: one micro-batch with prompts, responses, response_mask (jagged), :data:`COEFFICIENT` (rows,) and the
            scalar dp_size that the engine adds.
        dp_group: unused, part of the engine's loss interface.

    Returns:
        The loss, times dp_size since engines average gradients over ranks; and no metrics, for its value means nothing.
    """
    log_prob_BT = no_padding_2_padding(model_output["log_probs"], data)
    mask_BT = data.select("response_mask").to_padded_tensor()["response_mask"].bool()
    sums_B = log_prob_BT.masked_fill(~mask_BT, 0.0).sum(dim=-1)
    return (sums_B * data[COEFFICIENT].to(sums_B)).sum() * data["dp_size"], {}


# ---------------------------------------------------------------------- answers of the start policy


def start_key(settings: Sequence[Any], messages: Sequence[dict]) -> str:
    """Under what the start policy's answers to a prompt are stored: a hash of all that they depend on."""
    return hashlib.sha256(json.dumps([list(settings), list(messages)], default=str).encode()).hexdigest()


def start_records(wanted: dict[str, str], rows: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> list[dict[str, Any]]:
    """What is stored of sampled rows: {key, prompt, answers} with token ids, without ids if all rollouts failed.

    Args:
        wanted: uid of a sampled prompt -> its :func:`start_key`.
        rows: key of a student's row -> ids of prompt and answer.
    """
    records: dict[str, dict[str, Any]] = {uid: {"key": key, "prompt": [], "answers": []} for uid, key in wanted.items()}
    for row in sorted(rows, key=split_key):
        prompt, answer = rows[row]
        record = records[split_key(row)[0]]
        record["prompt"] = prompt.tolist()
        if answer.numel():
            record["answers"].append(answer.tolist())
    return list(records.values())


def start_rows(uid: str, record: dict[str, Any], teacher_ids: list[int]) -> dict[str, Trajectory]:
    """Student rows of a prompt from a stored record: key, as a rollout writes it, -> trajectory and teacher ids."""
    prompt = torch.tensor(record["prompt"])
    return {
        f"{uid}_{sample}_0": {**build_teacher_trajectory(prompt, torch.tensor(answer)), TEACHER_IDS: teacher_ids}
        for sample, answer in enumerate(record["answers"])
    }

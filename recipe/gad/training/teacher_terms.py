"""The teacher's answers in the actor's update, beside the students': what the rows weigh, and the group's advantages.

    loss = policy gradient on [s_1, ..., s_n] (with the teacher: gad.teacher_in_group)
           + gad.imitation_coef * mean over the teacher's tokens of -log pi(y_teacher | x)

Each mean is over the tokens of one optimizer step, all micro-batches and ranks together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict

from recipe.gad.training.rows import Group, Trajectory, spread
from recipe.gad.training.trajectory import IMITATION_WEIGHT, POLICY_WEIGHT, TEMPERATURE
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.padding import no_padding_2_padding

PER_TOKEN_FIELDS = ("advantages", "old_log_probs", "ref_log_prob", "rollout_log_probs", "rollout_is_weights")
"""What the policy loss may read of a student row and a teacher's trajectory lacks."""


class RowWeights(NamedTuple):
    """Weights of a row: of a token's -log pi in the imitation term, and of the advantage in the policy term."""

    imitation: float
    policy: float


def actor_row_weights(
    groups: Sequence[Group],
    ranks: list[list[list[int]]],
    tokens: Mapping[str, int],
    loss_agg_mode: str,
    teacher_in_group: bool,
) -> dict[str, RowWeights]:
    """Key -> weights of its row, in the order in which the rows go to the ranks (``rows.spread`` of the groups).

    A teacher's token weighs one over the teachers' tokens of its optimizer step in the imitation term. Stock's policy
    loss divides by the students' tokens, or by their number of answers; with the teacher in the group, the policy
    weight turns this into a mean over the n + 1 answers of every group.

    Args:
        groups: groups of the step.
        ranks: [rank][mini-batch] -> indices into ``groups``.
        tokens: key of every row -> tokens of its answer that count, 0 for a filler.
        loss_agg_mode: one of stock ``agg_loss``.
        teacher_in_group: is the teacher's answer part of the policy term?
    """
    of_step: list[RowWeights] = []
    for parts in zip(*ranks, strict=True):
        members = [groups[i] for part in parts for i in part]
        teachers = [tokens[group.teacher.key] for group in members]
        students = [tokens[row.key] for group in members for row in group.rows()[1:]]
        in_group = [tokens[group.teacher.key] for group in members if group.students and teacher_in_group]
        share = 1.0
        if loss_agg_mode == "token-mean":
            share = 1.0 - sum(in_group) / max(sum(students) + sum(in_group), 1)
        elif loss_agg_mode != "token-sum":
            share = len(students) / (len(students) + len(in_group))
        of_step.append(RowWeights(1.0 / max(sum(teachers), 1), share))
    weights: dict[str, RowWeights] = {}
    for rank in ranks:
        for indices, step in zip(rank, of_step, strict=True):
            for group in (groups[i] for i in indices):
                weights |= {row.key: step._replace(imitation=0.0) for row in group.rows()}
                if tokens[group.teacher.key]:
                    weights[group.teacher.key] = step
    return weights


def group_advantages(groups: Sequence[Group], scores: Mapping[str, float], by_std: bool) -> dict[str, float]:
    """GRPO's advantages with the teacher's answer as one more sample of its prompt's group.

    Args:
        groups: groups of the step; those without students have no advantages.
        scores: key -> D's score of every answer, teachers included.
        by_std: divide by the group's standard deviation, as stock GRPO (unbiased, plus 1e-6)?

    Returns:
        key of every answer, teachers included -> its score minus the mean of the group.
    """
    advantages: dict[str, float] = {}
    for group in (group for group in groups if group.students):
        keys = [group.teacher.key, *(row.key for row in group.students)]
        values = torch.tensor([scores[key] for key in keys], dtype=torch.float64)
        centred = values - values.mean()
        if by_std:
            centred /= values.std() + 1e-6
        advantages |= dict(zip(keys, centred.tolist(), strict=True))
    return advantages


def blank_fields(loss_mask: torch.Tensor, student: Mapping[str, torch.Tensor], advantage: float = 0.0) -> dict:
    """What a teacher's row or a filler needs beside its trajectory to share a batch with student rows.

    Args:
        loss_mask: the row's mask, (answer,).
        student: a student row; tells which of :data:`PER_TOKEN_FIELDS` the students have, and their dtypes.
        advantage: of the row.

    Returns:
        those fields, all 0 but the advantages, and a loss_mask of 0: the engine counts student tokens only. (answer,)
    """
    names = [name for name in PER_TOKEN_FIELDS if name in student]
    fields = {name: torch.zeros(len(loss_mask), dtype=student[name].dtype) for name in names}
    fields["advantages"] += advantage * loss_mask
    return {**fields, "loss_mask": torch.zeros_like(loss_mask)}


class GroupUpdate(NamedTuple):
    """An actor's update on whole groups.

    Attributes:
        keys: of its rows, in the order in which they go to the ranks.
        blanks: key of a teacher's row or a filler -> what it lacks beside the students' rows (:func:`blank_fields`).
        fields: of every row, (rows,) each.
        per_token: names of the fields that the students' rows have among :data:`PER_TOKEN_FIELDS`.
        extra_info: what the engine needs to know.
    """

    keys: list[str]
    blanks: dict[str, Trajectory]
    fields: TensorDict
    per_token: list[str]
    extra_info: dict[str, Any]


def group_update(
    groups: Sequence[Group], config: DictConfig, n_ranks: int, step: int, advantages: Mapping[str, float]
) -> GroupUpdate:
    """The update on groups [teacher, s_1, ..., s_n], spread over ranks and mini-batches like D's.

    Reads the rows' masks from TransferQueue.

    Args:
        groups: of the step; at least one has a student.
        config: of the run.
        n_ranks: data-parallel ranks of the actor.
        step: the global step.
        advantages: of the teachers' rows, by key; 0 for a key that is missing.
    """
    actor, temperature = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.temperature
    ranks = spread([group.tokens for group in groups], actor, n_ranks, step)
    keys = [row.key for rank in ranks for part in rank for i in part for row in groups[i].rows()]
    masks = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["loss_mask"])["loss_mask"].unbind()
    mask_of = dict(zip(keys, masks, strict=True))
    tokens = {key: int(mask.sum()) for key, mask in mask_of.items()}
    weights = actor_row_weights(groups, ranks, tokens, actor.loss_agg_mode, config.gad.teacher_in_group)
    students = {row.key for group in groups for row in group.students}
    student = tq.kv_batch_get(keys=[min(students)], partition_id="train")
    blanks = {
        key: blank_fields(mask, student, advantages.get(key, 0.0))
        for key, mask in mask_of.items()
        if key not in students
    }
    fields = {
        IMITATION_WEIGHT: torch.tensor([weights[key].imitation for key in keys]),
        POLICY_WEIGHT: torch.tensor([weights[key].policy for key in keys]),
    }
    extra_info: dict[str, Any] = {"calculate_entropy": actor.calculate_entropy or actor.entropy_coeff != 0.0}
    if temperature == 1.0:  # one number: fused kernels know nothing else
        extra_info["temperature"] = 1.0
    else:
        fields[TEMPERATURE] = torch.tensor([temperature if key in students else 1.0 for key in keys])
    per_token = [name for name in PER_TOKEN_FIELDS if name in student]
    return GroupUpdate(keys, blanks, TensorDict(fields, batch_size=len(keys)), per_token, extra_info)


def loss_with_teacher(
    config: ActorConfig,
    model_output: dict,
    data: TensorDict,
    dp_group=None,
    *,
    policy_loss: Callable,
    imitation_coef: float = 0.0,
    teacher_in_group: bool = False,
):
    """A policy loss on student rows, plus terms on the teacher rows of the same micro-batch.

    Args:
        config: the actor's configuration.
        model_output: ``log_probs``, jagged (rows, prompt + response); teacher rows at temperature 1.
        data: one micro-batch with what ``policy_loss`` reads; imitation_weight (rows,): for teacher rows one over the
            teachers' tokens of the optimizer step, else 0; policy_weight (rows,): factor of the advantages. The
            engine's batch_num_tokens counts student tokens.
        dp_group: part of the engine's loss interface.
        policy_loss: stock ``ppo_loss`` or ``dp_actor.on_policy_loss``; the teacher rows are masked out for it.
        imitation_coef: weight of the mean of -log pi over the teachers' tokens.
        teacher_in_group: do the teacher rows' advantages count? Their ratio is 1, so the gradient is that of
            advantage * log pi.

    Returns:
        loss and metrics of ``policy_loss``, and in nats per token imitation_loss (before the coefficient), and
        teacher_pg_loss, the teachers' share of the policy loss; both only if their term is there (SUM).
    """
    mask = data["response_mask"]
    is_teacher = data[IMITATION_WEIGHT] > 0

    offsets = mask.offsets()
    lengths = offsets.diff()

    def per_token(rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat_interleave(lengths)

    def with_values(values: torch.Tensor) -> torch.Tensor:
        longest = int(lengths.max())  # else it is padded to the sum of the lengths
        return torch.nested.nested_tensor_from_jagged(values, offsets, max_seqlen=longest)

    advantages = with_values(data["advantages"].values() * per_token(data[POLICY_WEIGHT]))
    students = data.copy()
    students["advantages"] = advantages
    students["response_mask"] = with_values(mask.values() * per_token(~is_teacher))
    n_tokens = max(data["batch_num_tokens"], 1)  # 0 if all rollouts of the optimizer step failed
    tu.assign_non_tensor(students, batch_num_tokens=n_tokens)
    loss, metrics = policy_loss(config, model_output, students, dp_group)

    teachers = with_values(mask.values() * per_token(is_teacher)).to_padded_tensor(0).bool()
    log_prob_BT = no_padding_2_padding(model_output["log_probs"], data)
    if imitation_coef:
        token_loss_BT = -log_prob_BT * data[IMITATION_WEIGHT].unsqueeze(-1)
        imitation = token_loss_BT.masked_fill(~teachers, 0.0).sum() * data["dp_size"]
        loss = loss + imitation_coef * imitation
        metrics["imitation_loss"] = Metric(AggregationType.SUM, imitation)
    if teacher_in_group:
        ratio_BT = (log_prob_BT - log_prob_BT.detach()).exp()
        teacher_loss = agg_loss(
            loss_mat=-advantages.to_padded_tensor(0.0) * ratio_BT,
            loss_mask=teachers,
            loss_agg_mode=config.loss_agg_mode,
            dp_size=data["dp_size"],
            batch_num_tokens=n_tokens,
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=config.loss_scale_factor,
        )
        loss = loss + teacher_loss
        metrics["teacher_pg_loss"] = Metric(AggregationType.SUM, teacher_loss)
    return loss, metrics

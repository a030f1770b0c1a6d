"""Extends stock ``verl.trainer.ppo.core_algos`` with the losses of GAD.

They stand beside verl's losses, where readers and engines look for them. The discriminator D gives one score to a whole
response. A loss takes tensors and returns ``(loss, metrics)``; each metric carries its reduction.

Suffixes: B responses, T response tokens, P prompts, N student samples of one prompt.
Goes when: verl has a pairwise discriminator loss, or the losses move to ``recipe/gad``.
"""

from typing import Any

import torch
import torch.nn.functional as F

from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric

__all__ = [
    "compute_discriminator_accuracy",
    "compute_discriminator_loss",
    "compute_grouped_discriminator_loss",
    "compute_sft_loss",
]


def _sequence_scores(vpreds_BT: torch.Tensor, mask_BT: torch.Tensor, name: str) -> torch.Tensor:
    """Masked sum of token values in float32, shape (B,)."""
    if vpreds_BT.shape != mask_BT.shape:
        raise ValueError(
            f"{name}_vpreds has shape {tuple(vpreds_BT.shape)} but its mask has shape {tuple(mask_BT.shape)}; "
            "both must be (batch, response_length)"
        )
    mask_BT = mask_BT.bool()
    empty = (~mask_BT.any(dim=-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"{name} mask selects no token in rows {empty}; drop responses without tokens before the loss")
    return vpreds_BT.float().masked_fill(~mask_BT, 0.0).sum(dim=-1)


def compute_discriminator_accuracy(student_scores: torch.Tensor, teacher_scores: torch.Tensor) -> torch.Tensor:
    """Share of pairs in which D prefers the teacher; a tie counts one half.

    ``teacher_scores`` broadcast to ``student_scores`` (any shape); 1.0, 0.5 or 0.0 for every pair, of that shape.
    """
    gap = teacher_scores - student_scores
    return (gap > 0).float() + 0.5 * (gap == 0).float()


def compute_discriminator_loss(
    student_vpreds: torch.Tensor,
    teacher_vpreds: torch.Tensor,
    response_mask: torch.Tensor,
    teacher_response_mask: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Bradley-Terry loss of the discriminator, one teacher response per student response.

    L_D = -E[ log sigmoid( D(x, y_teacher) - D(x, y_student) ) ]          (arXiv 2511.10643)

    The score of a response is the masked sum of its token values; with a sequence-level reward only the last response
    token carries a value. Computed in float32; stable for any finite score.

    Args:
        student_vpreds: D's values on student tokens, (B, T_student).
        teacher_vpreds: D's values on teacher tokens, (B, T_teacher); row i is paired with student row i.
        response_mask: 1 on student response tokens, (B, T_student).
        teacher_response_mask: 1 on teacher response tokens, (B, T_teacher).

    Returns:
        The mean loss over pairs, and the metrics d_loss, d_acc, student_value_mean, teacher_value_mean, score_gap
        (all MEAN over pairs).

    Raises:
        ValueError: shapes do not match, or a mask selects no token in some row.
    """
    student_scores = _sequence_scores(student_vpreds, response_mask, "student")
    teacher_scores = _sequence_scores(teacher_vpreds, teacher_response_mask, "teacher")
    if student_scores.shape != teacher_scores.shape:
        raise ValueError(
            f"{student_scores.shape[0]} student rows but {teacher_scores.shape[0]} teacher rows; "
            "pass one teacher row per student row, or use compute_grouped_discriminator_loss"
        )
    loss, metrics = compute_grouped_discriminator_loss(student_scores.unsqueeze(-1), teacher_scores)
    return loss, {key: Metric(AggregationType.MEAN, metric.aggregate()) for key, metric in metrics.items()}


def compute_grouped_discriminator_loss(
    student_scores_PN: torch.Tensor, teacher_scores_P: torch.Tensor, weights_PN: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """The same loss for N student responses that share one teacher response: D runs on the teacher once, not N times.

    Loss and gradient equal those of :func:`compute_discriminator_loss` on the P x N pairs written out.

    Args:
        student_scores_PN: scores of the student responses, (P, N).
        teacher_scores_P: scores of the teacher responses, (P,).
        weights_PN: weight of every pair, (P, N); the loss is the weighted SUM. A missing sample has weight 0. Over one
            optimizer step, all micro-batches and ranks together, the weights add up to 1. None: the mean over pairs.

    Returns:
        The weighted sum over pairs, and the metrics of :func:`compute_discriminator_loss` as partial sums (SUM: they
        add up to the mean over the real pairs).

    Raises ValueError if shapes do not match.
    """
    if student_scores_PN.dim() != 2 or teacher_scores_P.shape != student_scores_PN.shape[:1]:
        raise ValueError(
            f"student scores {tuple(student_scores_PN.shape)} and teacher scores {tuple(teacher_scores_P.shape)} "
            "do not form groups; expected (prompts, samples) and (prompts,)"
        )
    student = student_scores_PN.float()
    teacher = teacher_scores_P.float().unsqueeze(-1).expand_as(student)
    if weights_PN is None:
        weights = torch.full_like(student, 1.0 / max(student.numel(), 1))
    elif weights_PN.shape == student.shape:
        weights = weights_PN.float()
    else:
        raise ValueError(f"weights {tuple(weights_PN.shape)} must have the shape of the scores {tuple(student.shape)}")

    def weighted_sum(values: torch.Tensor) -> torch.Tensor:
        return (values * weights).sum()

    loss = weighted_sum(-F.logsigmoid(teacher - student))
    with torch.no_grad():
        metrics = {
            "d_loss": loss,
            "d_acc": weighted_sum(compute_discriminator_accuracy(student, teacher)),
            "student_value_mean": weighted_sum(student),
            "teacher_value_mean": weighted_sum(teacher),
            "score_gap": weighted_sum(teacher - student),
        }
    return loss, {key: Metric(AggregationType.SUM, value) for key, value in metrics.items()}


def compute_sft_loss(
    log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    **global_batch_info: Any,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Next-token imitation of the teacher's response: -log pi(y_teacher | x), aggregated like verl's policy losses.

    Args:
        log_prob: log-probabilities of the teacher tokens under the policy, (B, T).
        response_mask: 1 on teacher response tokens, (B, T).
        loss_agg_mode: one of verl's modes, see :func:`agg_loss`.
        global_batch_info: dp_size, batch_num_tokens, global_batch_size, loss_scale_factor of :func:`agg_loss`.

    Returns:
        The loss, and the metric sft_loss: SUM when the loss is normalised over the global batch, else MEAN.

    Raises:
        ValueError: shapes do not match, or no token is selected and no global token count is given.
    """
    if log_prob.shape != response_mask.shape:
        raise ValueError(f"log_prob {tuple(log_prob.shape)} and response_mask {tuple(response_mask.shape)} differ")
    if global_batch_info.get("batch_num_tokens") is None and not response_mask.any():
        raise ValueError("response_mask selects no token; drop teacher responses without tokens before the loss")
    loss = agg_loss(loss_mat=-log_prob, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **global_batch_info)
    is_partial = any(value is not None for value in global_batch_info.values())
    aggregation = AggregationType.SUM if is_partial else AggregationType.MEAN
    return loss, {"sft_loss": Metric(aggregation, loss.detach())}

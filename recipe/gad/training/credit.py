"""``gad.credit=token``: the discriminator judges prefixes, and each token of a student gets its own advantage.

Bradley-Terry between prefixes of equal length t has its optimum at D(y_<=t) = log p_T(y_<=t|x) / p_S(y_<=t|x) + c_t.
The difference of neighbouring values is then log p_T(y_t|.) / p_S(y_t|.) up to an offset of each t, which the mean over
the answers of a group removes.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch.nn.utils.rnn import pad_sequence

from recipe.gad.training.rows import Group
from recipe.gad.training.trajectory import PAIR_WEIGHT
from verl.trainer.ppo.core_algos import compute_discriminator_accuracy
from verl.utils.metric import AggregationType, Metric
from verl.workers.critic.dp_critic import discriminator_loss


def compute_prefix_loss(
    values_GRT: torch.Tensor, lengths_GR: torch.Tensor, weights_GN: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Bradley-Terry loss of a teacher's prefixes against a student's of the same length.

    A pair's loss is the mean over t = 1 ... min(its two lengths) of -log sigmoid( D(y_T,<=t) - D(y_S,<=t) ).

    Args:
        values_GRT: D's values at the answers' tokens, (groups, n + 1 answers with the teacher first, tokens).
        lengths_GR: tokens of the answers, at least 1.
        weights_GN: weight of every pair; the loss is the weighted sum.

    Returns:
        the loss, and the metrics d_prefix_loss and d_prefix_acc as partial sums (SUM).
    """
    values = values_GRT.float()
    shorter_GN = torch.minimum(lengths_GR[:, :1], lengths_GR[:, 1:])
    tokens_T = torch.arange(values.shape[-1], device=values.device)
    share_GNT = (tokens_T < shorter_GN.unsqueeze(-1)) * (weights_GN / shorter_GN).unsqueeze(-1)
    loss = (F.softplus(values[:, 1:] - values[:, :1]) * share_GNT).sum()
    with torch.no_grad():
        accuracy = (compute_discriminator_accuracy(values[:, 1:], values[:, :1]) * share_GNT).sum()
    metrics = {"d_prefix_loss": loss, "d_prefix_acc": accuracy}
    return loss, {name: Metric(AggregationType.SUM, value) for name, value in metrics.items()}


def prefix_discriminator_loss(group_size: int, model_output: dict, data: TensorDict, dp_group=None):
    """:func:`discriminator_loss` and the same over prefixes, in equal parts: an engine loss of the same interface.

    Returns:
        loss and metrics as there, where d_loss and d_acc are those of whole answers; and the metrics of
        :func:`compute_prefix_loss`.
    """
    loss, metrics = discriminator_loss(group_size, model_output, data, dp_group)
    lengths = data["responses"].offsets().diff()
    rows = zip(model_output["values"].unbind(), lengths.tolist(), strict=True)
    values = pad_sequence([row[len(row) - length :] for row, length in rows], batch_first=True)
    weights = data[PAIR_WEIGHT].to(values.device).view(-1, group_size)[:, 1:] * data["dp_size"]
    groups = values.view(-1, group_size, values.shape[-1]), lengths.to(values.device).view(-1, group_size)
    prefix_loss, prefix_metrics = compute_prefix_loss(*groups, weights)
    return (loss + prefix_loss) / 2, {**metrics, **prefix_metrics}


def token_credit(groups: Sequence[Group], values: Mapping[str, torch.Tensor], gamma: float) -> dict[str, torch.Tensor]:
    """Advantage of every token of the students: the discounted sum of what this and later tokens add to D's value.

    A_t = sum over k >= t of gamma^(k - t) delta_k, where delta_k is D(y_<=k) - D(y_<k) minus its mean over those
    answers of the group that have a k-th token.

    Args:
        groups: groups of the step.
        values: key of a student's row -> D's values after the prompt and after each of its tokens, (tokens + 1,).
        gamma: discount per token, in [0, 1].

    Returns:
        key of a student's row -> advantages, (tokens,) in float32.
    """
    rows = [(number, row.key) for number, group in enumerate(groups) for row in group.students]
    group_R = torch.tensor([number for number, _ in rows])
    delta_RT = pad_sequence([values[key].double().diff() for _, key in rows], batch_first=True)
    lengths_R = torch.tensor([len(values[key]) - 1 for _, key in rows])
    mask_RT = torch.arange(delta_RT.shape[1]) < lengths_R.unsqueeze(-1)
    sums_GT, counts_GT = (
        torch.zeros(len(groups), delta_RT.shape[1], dtype=torch.double).index_add_(0, group_R, part.double())
        for part in (delta_RT, mask_RT)
    )
    delta_RT = (delta_RT - (sums_GT / counts_GT.clamp(min=1))[group_R]) * mask_RT
    advantages_RT, later_R = torch.empty_like(delta_RT), torch.zeros(len(rows), dtype=torch.double)
    for t in reversed(range(delta_RT.shape[1])):
        later_R = delta_RT[:, t] + gamma * later_R
        advantages_RT[:, t] = later_R
    columns = zip(rows, advantages_RT.float(), lengths_R.tolist(), strict=True)
    return {key: advantages[:length] for (_, key), advantages, length in columns}

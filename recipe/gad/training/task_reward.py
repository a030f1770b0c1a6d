"""``gad.task_reward``: a reward of the user's beside the discriminator's score, such as one for the answer's format.

    normalized   reward = (s - mean s) / std s + weight * (r - mean r) / std r     over the answers to one prompt
    raw          reward = s + weight * r

s is D's score and r what ``reward.custom_reward_function`` returns. The standard deviations are those of stock GRPO:
unbiased, plus 1e-6. A part that does not differ among the answers adds nothing.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from recipe.gad.run.findings import InputError
from recipe.gad.training.rows import correlation_within_prompts, deviations

FIELDS = ("rm_scores", "data_source")
"""What a row holds of its task reward: the reward at its last token, and the data source, which decides the weight."""


def normalized(values: torch.Tensor, uids: Sequence[str]) -> torch.Tensor:
    """(v - mean) / (std + 1e-6) over the answers to one prompt, (rows,) in float64; 0 for a lone answer."""
    answers = Counter(uids)
    counts = torch.tensor([answers[uid] for uid in uids])
    deviation = deviations(values, uids)
    squares = deviation.square()
    variance = (squares - deviations(squares, uids)) * counts / (counts - 1).clamp(min=1)  # unbiased
    return deviation / (variance.sqrt() + 1e-6)


def combine(
    scores: torch.Tensor, rewards: torch.Tensor, uids: Sequence[str], weights: torch.Tensor, mode: str
) -> torch.Tensor:
    """Rewards of answers from both parts, (rows,) in float64.

    Args:
        scores, rewards: s and r of the answers, (rows,) each.
        uids: prompts of the answers.
        weights: of r, (rows,); the answers to one prompt have the same.
        mode: normalized or raw.
    """
    if mode == "normalized":
        return normalized(scores, uids) + weights * normalized(rewards, uids)
    return scores.double() + weights * rewards.double()


def add_task_reward(
    config: DictConfig, scores: torch.Tensor, uids: Sequence[str], data: Any, metrics: dict[str, float]
) -> torch.Tensor:
    """The rewards of a batch, and the metrics of both parts.

    Args:
        config: ``gad.task_reward``; its weight is not 0.
        scores: D's scores, (rows,).
        uids: prompts of the rows; "" for a row that is no answer, whose score stays as it is.
        data: the rows' :data:`FIELDS`.
        metrics: gets ``critic/task_reward_mean``, ``critic/task_reward_std`` (within prompts) and
            ``critic/score_task_corr``, the correlation of both parts among the answers to one prompt, if there is one.

    Raises:
        InputError: the user's function returned NaN or an infinite number.
    """
    rewards = torch.stack([row.sum() for row in data["rm_scores"].unbind()]).double()
    weight = config.weight
    of_source = {str(source): value for source, value in weight.items()} if isinstance(weight, Mapping) else {}
    weights = [of_source[str(source)] if of_source else weight for source in data["data_source"]]
    real = torch.tensor([uid != "" for uid in uids])
    of_real = [uid for uid in uids if uid]
    for uid, reward in zip(of_real, rewards[real].tolist(), strict=True):
        if not math.isfinite(reward):
            raise InputError(
                f"reward.custom_reward_function returned {reward} for an answer to prompt {uid}",
                fix="return a finite number for every answer",
            )
    s, r, w = scores[real], rewards[real], torch.tensor(weights, dtype=torch.float64)[real]
    metrics["critic/task_reward_mean"] = r.mean().item()
    metrics["critic/task_reward_std"] = deviations(r, of_real).square().mean().sqrt().item()
    correlation = correlation_within_prompts(s, r, of_real)
    if correlation is not None:
        metrics["critic/score_task_corr"] = correlation
    result = scores.clone()
    result[real] = combine(s, r, of_real, w, config.combine).to(result.dtype)
    return result

"""A reward beside the discriminator's score (recipe/gad/training/task_reward.py): by hand, and against stock GRPO."""

import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import pearsonr, zscore

from recipe.gad.training.task_reward import add_task_reward, combine, normalized

UIDS = ["a", "b", "a", "b", "a", "c"]  # c has one answer left
SCORES = torch.tensor([1.0, 50.0, 2.0, 50.0, 6.0, -7.0])  # b: D cannot tell its answers apart
REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])


def test_each_part_is_normalized_over_the_answers_to_a_prompt():
    expected = np.zeros(6)
    for places in ([0, 2, 4], [1, 3]):
        expected[places] = np.nan_to_num(zscore(SCORES[places].double().numpy(), ddof=1))
    assert normalized(SCORES, UIDS).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    # by hand: a has 1, 2, 6 with mean 3 and variance (4 + 1 + 9) / 2
    assert normalized(SCORES, UIDS)[0].item() == pytest.approx(-2 / math.sqrt(7), abs=1e-5)
    assert normalized(SCORES, UIDS)[5] == 0.0


def test_a_part_of_any_size_counts_by_its_weight_alone():
    weights = torch.full((6,), 0.7, dtype=torch.float64)
    whole = combine(SCORES, REWARDS, UIDS, weights, "normalized")
    assert whole.tolist() == pytest.approx((normalized(SCORES, UIDS) + 0.7 * normalized(REWARDS, UIDS)).tolist())
    louder = combine(SCORES * 1000 + 5, REWARDS * 100 - 3, UIDS, weights, "normalized")
    assert louder.tolist() == pytest.approx(whole.tolist(), abs=1e-4)
    assert whole[3] == pytest.approx(0.7 / math.sqrt(2), abs=1e-5), "where D ties, the task decides: 0 and 1"
    raw = combine(SCORES, REWARDS, UIDS, weights, "raw")
    assert raw.tolist() == pytest.approx([1.7, 50.0, 2.7, 50.7, 6.0, -6.3])


def batch(rewards, sources):
    rows = [torch.tensor([0.0, 0.0, reward]) for reward in rewards]
    return {"rm_scores": torch.nested.as_nested_tensor(rows, layout=torch.jagged), "data_source": sources}


def settings(weight, combine="raw"):
    return OmegaConf.create({"weight": weight, "combine": combine})


def test_each_data_source_has_its_weight_and_rows_that_are_no_answers_keep_their_score():
    uids, scores = ["a", "b", "a", "b", ""], torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    data = batch([1.0, 1.0, 0.0, 3.0, 9.0], ["math", "chat", "math", "chat", "math"])
    got = add_task_reward(settings({"math": 0.5, "chat": 0}), scores, uids, data, metrics := {})
    assert got.tolist() == [1.5, 2.0, 3.0, 4.0, 0.0] and got.dtype == torch.float32
    assert metrics["critic/task_reward_mean"] == 5 / 4
    # around the means 0.5 and 2 of both prompts
    assert metrics["critic/task_reward_std"] == pytest.approx(math.sqrt((0.25 + 1 + 0.25 + 1) / 4))
    correlation = pearsonr([-1, -1, 1, 1], [0.5, -1, -0.5, 1]).statistic
    assert metrics["critic/score_task_corr"] == pytest.approx(correlation)


def test_a_data_source_may_be_a_number():
    data, metrics = batch([1.0, 1.0], [1, "2"]), {}
    got = add_task_reward(settings({1: 0.5, "2": 0.25}), torch.zeros(2), ["a", "b"], data, metrics)
    assert got.tolist() == [0.5, 0.25]


def test_a_reward_that_is_the_same_for_all_answers_leaves_the_order_to_the_discriminator():
    uids, scores = ["a", "a", "a"], torch.tensor([1.0, 2.0, 6.0])
    metrics = {}
    got = add_task_reward(settings(0.7, "normalized"), scores, uids, batch([1.0] * 3, ["x"] * 3), metrics)
    assert got.tolist() == pytest.approx(normalized(scores, uids).tolist())
    assert "critic/score_task_corr" not in metrics and metrics["critic/task_reward_std"] == 0.0


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_stops_the_run(reward):
    with pytest.raises(ValueError, match=rf"returned {reward} for an answer to prompt b.*Fix: return a finite"):
        add_task_reward(settings(0.7), torch.zeros(2), ["a", "b"], batch([0.0, reward], ["x", "x"]), {})

"""Correlation of D's scores with answer lengths within groups, against hand computations and NumPy."""

import numpy as np
import pytest
import torch

from verl.trainer.ppo.v1.trainer_gad import score_length_correlation


def correlation(scores, lengths, uids):
    return score_length_correlation(torch.tensor(scores), torch.tensor(lengths), uids)


def test_prompts_of_different_length_and_level_do_not_matter():
    # deviations from the means of the groups: scores (-1, 1, 1, -1), lengths (-2, 2, 1, -1) -> 6 / sqrt(4 * 10)
    value = correlation([0.0, 2.0, 101.0, 99.0], [1, 5, 902, 900], ["a", "a", "b", "b"])
    assert value == pytest.approx(6 / np.sqrt(40))
    assert correlation([0.0, 2.0], [5, 1], ["a", "a"]) == pytest.approx(-1.0)


def test_one_group_is_pearson_in_any_order_of_rows():
    rng = np.random.default_rng(0)
    scores, lengths = rng.normal(size=24), rng.integers(1, 256, size=24)
    assert correlation(scores, lengths, ["a"] * 24) == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    uids = [f"p{i % 3}" for i in range(24)]
    order = rng.permutation(24)
    shuffled = correlation(scores[order], lengths[order], [uids[i] for i in order])
    assert shuffled == pytest.approx(correlation(scores, lengths, uids))


@pytest.mark.parametrize(
    ("scores", "lengths", "uids"),
    [
        ([0.5, 0.5], [1, 9], ["a", "a"]),  # D sees no difference
        ([0.1, 0.9], [4, 4], ["a", "a"]),
        ([0.1, 0.9], [4, 9], ["a", "b"]),  # nothing to compare within a prompt
        ([0.1], [4], ["a"]),
    ],
)
def test_undefined_without_differences(scores, lengths, uids):
    assert correlation(scores, lengths, uids) is None

"""Intervals and p-values of the referee, and its fixed rules."""

import itertools

import numpy as np
import pytest

from recipe.gad.evaluation import intervals
from recipe.gad.evaluation.intervals import Estimate, cross_fitted_mean
from recipe.gad.referee.differences import Difference, difference, mean_estimate, widened
from recipe.gad.referee.verdict import METRICS, headline, judge, losses


def test_the_interval_of_one_seed_is_that_of_the_prompts():
    values = np.random.default_rng(0).normal(size=200)
    estimate = mean_estimate([values])
    half = 1.96 * values.std() / 200**0.5
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_the_interval_of_several_seeds_holds_the_spread_of_the_seeds():
    prompts = np.random.default_rng(0).normal(size=500) * 0.01
    table = np.array([[-1.0], [0.0], [1.0]]) + prompts
    estimate = mean_estimate(table)
    # three equally likely rows are drawn three times: the mean is -1 in one of 27 cases, more than 2.5 %
    assert (estimate.low, estimate.high) == pytest.approx((-1.0, 1.0), abs=0.01)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    def holds(seed, spread):
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=(3, 60)) + 0.5 * rng.normal(size=(1, 60)) + spread * rng.normal(size=(3, 1))
        estimate = mean_estimate(noise, seed)
        return estimate.low <= 0 <= estimate.high

    for spread in (0.0, 0.1):
        assert np.mean([holds(seed, spread) for seed in range(60)]) >= 0.9


def test_equal_values_have_no_width():
    assert mean_estimate([[0.25] * 5] * 2) == Estimate(0.25, 0.25, 0.25)
    assert difference([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]).estimate == intervals.TestedEstimate(0.0, 0.0, 0.0, 1.0)


def test_the_p_value_is_the_share_of_swaps_of_whole_prompts():
    first, second = np.array([[0.3, 0.2, 0.5, 0.0, 0.1, 0.2], [0.3, 0.0, 0.3, -0.1, 0.3, 0.1]]), np.zeros((2, 6))
    prompts = first.mean(axis=0)  # both seeds of a prompt are swapped together
    sums = [abs(sum(s * d for s, d in zip(signs, prompts, strict=True)))
            for signs in itertools.product((1, -1), repeat=6)]  # fmt: skip
    exact = np.mean([value >= abs(prompts.sum()) - 1e-12 for value in sums])
    assert difference(first, second).estimate.p_value == pytest.approx(exact)


def test_two_sample_accuracy_takes_the_wider_interval_and_the_tests_own_p_value():
    wins = np.random.default_rng(0).integers(0, 2, size=(3, 80)).astype(float)
    tested = cross_fitted_mean(range(80), wins, null=0.5)
    narrow = Estimate(float(wins.mean()), 0.5, 0.51)
    assert widened(narrow, wins, null=0.5) == intervals.TestedEstimate(
        narrow.value, tested.low, tested.high, tested.p_value
    )
    wide = Estimate(float(wins.mean()), 0.1, 0.9)
    assert widened(wide, wins, null=0.5) == intervals.TestedEstimate(wide.value, 0.1, 0.9, tested.p_value)
    found = difference([wins.mean(axis=0)], np.zeros((1, 80)), wins)
    assert found.estimate.p_value == cross_fitted_mean(range(80), wins, null=0.0).p_value


def test_a_difference_is_paired_by_prompt_and_seed():
    rng = np.random.default_rng(0)
    control = rng.normal(size=(2, 50)) * 5
    found = difference((control + 0.1 + rng.normal(size=(2, 50)) * 0.01).tolist(), control.tolist())
    assert found.estimate.value == pytest.approx(0.1, abs=0.01)
    assert found.estimate.low > 0.09 and found.estimate.high < 0.11  # the prompts' own spread is gone
    assert found.by_seed == pytest.approx((0.1, 0.1), abs=0.01)
    assert found.estimate.p_value < 0.001


# ---------------------------------------------------------------------- verdicts


def made(value, low, high, seeds=(1.0, 1.0, -1.0)):
    return Difference(intervals.TestedEstimate(value, low, high, 0.01), tuple(value * s for s in seeds))


EVEN = {"rouge_l": made(0.0, -0.01, 0.01), "cut": made(0.0, -0.01, 0.01), "repetition": made(0.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"two_sample": made(-0.05, -0.08, -0.02)}, "better", "gad is better than seqkd: two-sample accuracy -0.050 ["),
        ({"two_sample": made(0.05, 0.02, 0.08)}, "worse", "seqkd is ahead of gad: two-sample accuracy +0.050 ["),
        ({"two_sample": made(-0.05, -0.11, 0.01)}, "undecided", "Nothing here says that gad is better or worse"),
        ({"two_sample": made(-0.01, -0.015, -0.005)}, "undecided", "by less than the margin of 0.02"),
        (
            {"two_sample": made(-0.05, -0.08, -0.02), "rouge_l": made(-0.005, -0.009, -0.001)},
            "undecided",
            "but pays for it: ROUGE-L -0.005 [-0.009, -0.001]",
        ),
        (
            {"two_sample": made(-0.05, -0.08, -0.02), "cut": made(0.02, -0.01, 0.05)},
            "undecided",
            "but pays for it: cut answers +0.020",
        ),
    ],
    ids=["better", "worse", "interval over 0", "under the margin", "ROUGE-L lower", "more cut answers"],
)  # fmt: skip
def test_verdicts_follow_fixed_rules(changes, level, words):
    verdict = judge("gad", "seqkd", {**EVEN, **changes}, "two_sample")
    assert (verdict.level, words in verdict.text) == (level, True), verdict.text
    assert f"ahead in {1 if level == 'worse' else 2} of 3 training seeds" in verdict.text


def test_with_rouge_as_the_measure_more_is_better():
    verdict = judge("gad", "seqkd", {**EVEN, "rouge_l": made(0.03, 0.01, 0.05)}, "rouge_l")
    assert verdict.level == "better" and verdict.text.endswith("cut answers, repetition no worse.")
    assert judge("gad", "seqkd", {**EVEN, "rouge_l": made(-0.03, -0.05, -0.01)}, "rouge_l").level == "worse"


def test_less_of_a_bad_thing_is_no_loss():
    better = {"rouge_l": made(0.1, 0.05, 0.2), "cut": made(-0.1, -0.2, -0.05), "repetition": made(-0.1, -0.2, -0.05)}
    assert losses(better, "two_sample") == []
    worse = {name: made(-d.estimate.value, -d.estimate.high, -d.estimate.low) for name, d in better.items()}
    assert [text.split(" +")[0].split(" -")[0] for text in losses(worse, "two_sample")] == [
        METRICS[name].title for name in worse
    ]


def test_the_headline_says_when_nothing_is_better():
    better, worse, even = (judge("gad", "seqkd", {**EVEN, "two_sample": made(*d)}, "two_sample")
                           for d in ((-0.05, -0.08, -0.02), (0.05, 0.02, 0.08), (0.0, -0.1, 0.1)))  # fmt: skip
    assert headline([("a", better), ("b", worse)], "seqkd") == "a is better than seqkd. seqkd is ahead of b."
    assert headline([("a", even)], "seqkd") == "Nothing here says that an arm is better than seqkd."
    assert headline([("a", worse), ("b", even)], "seqkd") == (
        "seqkd is ahead of a. Nothing here says that an arm is better than seqkd."
    )
    assert headline([], "seqkd") == "No arm could be compared with seqkd."

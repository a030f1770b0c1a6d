"""recipe/gad/evaluation/intervals.py: coverage in simulations, and scipy as reference."""

import numpy as np
import pytest
from scipy import stats

from recipe.gad.evaluation.intervals import bootstrap_means, cross_fitted_mean, paired_difference


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=(150, 2))
    for column, found in enumerate(bootstrap_means(values, seed=0)):
        sample = values[:, column]
        expected = stats.bootstrap((sample,), np.mean, n_resamples=20000, method="percentile", rng=1)
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert found.value == pytest.approx(sample.mean())
        assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.08 * width)
        assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.08 * width)


def test_bootstrap_is_seeded():
    values = np.random.default_rng(0).normal(size=(20, 1))
    assert bootstrap_means(values, seed=0) == bootstrap_means(values, seed=0)
    assert bootstrap_means(values, seed=0) != bootstrap_means(values, seed=1)


def test_one_prompt_has_no_spread():
    [estimate] = bootstrap_means([[2.0]])
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 2.0, 2.0)
    assert paired_difference([0], [2.0], seed=0).p_value == 1.0


def test_a_paired_difference_agrees_with_the_paired_t_test():
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    second = first + rng.normal(0.05, 0.3, size=200)
    found = paired_difference(range(200), second - first, seed=0)
    expected = stats.ttest_rel(second, first)
    interval = expected.confidence_interval()
    assert found.value == pytest.approx((second - first).mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.01)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)
    assert found == paired_difference(range(200), second - first, seed=0)


# ---------------------------------------------------------------------- halves that judge each other

PROMPTS, WORDS, ANSWER_WORDS, DATA_SETS = 100, 40, 12, 4000


def linear_discriminator_wins(rng, *favours: float, seeds: int = 3) -> np.ndarray:
    """(students, DATA_SETS, seeds, PROMPTS): verdicts of linear discriminators on word counts.

    They stand for fine-tuned models: a random start, then gradient steps on the Bradley-Terry loss over half of the
    prompts, then verdicts on the other half, and the reverse. The teacher uses a quarter of the words more often than a
    student, by the factor ``1 + favour``. All students share the prompts, the teacher's answers and the halves.
    """

    def answers(favour):
        words = np.where(np.arange(WORDS) < WORDS // 4, 1.0, 1 + favour) / np.arange(1, WORDS + 1)
        return rng.multinomial(ANSWER_WORDS, words / words.sum(), size=(DATA_SETS, PROMPTS)).astype(np.float32)

    teacher = answers(0.0)
    gaps = [teacher - answers(favour) for favour in favours]
    wins = np.zeros((len(favours), DATA_SETS, seeds, PROMPTS), dtype=np.float32)
    for seed in range(seeds):
        order = rng.permutation(PROMPTS)
        halves = order[: PROMPTS // 2], order[PROMPTS // 2 :]
        for train, test in (halves, halves[::-1]):
            start = rng.normal(0, 0.02, size=(DATA_SETS, WORDS)).astype(np.float32)
            for student, gap in enumerate(gaps):
                weights, learned = start, gap[:, train]
                for _ in range(5):
                    lost = 1 / (1 + np.exp(np.einsum("rnd,rd->rn", learned, weights)))
                    weights = weights + 0.3 / len(train) * np.einsum("rnd,rn->rd", learned, lost)
                scores = np.einsum("rnd,rd->rn", gap[:, test], weights)
                wins[student, :, seed, test] = ((scores > 0) + 0.5 * (scores == 0)).T
    return wins


@pytest.mark.parametrize(("favour", "accuracy"), [(0.0, 0.5), (0.7, 0.66)])
def test_the_interval_of_cross_fitted_wins_holds_the_truth(favour, accuracy):
    [wins] = linear_discriminator_wins(np.random.default_rng(0), favour)
    truth = 0.5 if favour == 0 else wins.mean()
    assert truth == pytest.approx(accuracy, abs=0.015)
    found = [cross_fitted_mean(range(PROMPTS), table, null=0.5) for table in wins]
    assert 0.93 <= np.mean([estimate.low <= truth <= estimate.high for estimate in found]) <= 0.97
    # the interval and the p-value agree
    assert all((e.p_value < 0.05) == (not e.low <= 0.5 <= e.high) for e in found)
    if favour == 0:  # a bootstrap over prompts is too narrow
        means = wins.mean(axis=1)
        half_width = 1.96 * means.std(axis=1, ddof=1) / PROMPTS**0.5
        assert np.mean(abs(means.mean(axis=1) - 0.5) <= half_width) < 0.9


def test_the_interval_of_the_difference_of_two_models_holds_zero():
    """Two students of one quality; it errs on the wide side."""
    first, second = linear_discriminator_wins(np.random.default_rng(2), 0.7, 0.7)
    found = [cross_fitted_mean(range(PROMPTS), table, null=0.0) for table in second - first]
    assert 0.94 <= np.mean([estimate.low <= 0 <= estimate.high for estimate in found]) <= 0.99


def test_easy_prompts_count_once_and_one_seed_is_the_widest():
    rng = np.random.default_rng(0)
    easy = np.tile((rng.random(200) < 0.8).astype(float), (3, 1))  # every discriminator says the same
    found = cross_fitted_mean(range(200), easy, null=0.5)
    t = stats.t(199).ppf(0.975)
    error = easy[0].std(ddof=1) / 200**0.5
    assert found.value == pytest.approx(easy.mean())
    assert found.high - found.value == pytest.approx(t * error)
    assert found.p_value == pytest.approx(stats.ttest_1samp(easy[0], 0.5).pvalue)
    alone = cross_fitted_mean(range(200), easy[:1], null=0.5)
    assert alone.high - alone.value == pytest.approx(t * error * 2**0.5)


def test_rows_of_one_prompt_count_as_one():
    wins = np.random.default_rng(0).integers(0, 2, size=(3, 40)).astype(float)
    prompts = np.arange(40) // 2
    means = wins.reshape(3, 20, 2).mean(axis=2)
    assert cross_fitted_mean(prompts, wins, null=0.5) == cross_fitted_mean(range(20), means, null=0.5)
    assert paired_difference(prompts, wins[0], seed=0) == paired_difference(range(20), means[0], seed=0)


@pytest.mark.parametrize(("win", "p_value"), [(0.5, 1.0), (1.0, 0.0)])
def test_equal_wins_have_no_spread(win, p_value):
    found = cross_fitted_mean(range(4), [[win] * 4] * 3, null=0.5)
    assert (found.value, found.low, found.high, found.p_value) == (win, win, win, p_value)

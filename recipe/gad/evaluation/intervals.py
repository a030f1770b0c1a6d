"""95 % confidence intervals and p-values; the independent unit is always the prompt, never the answer."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Bootstrap resamples: each end of a 95 % interval then rests on 50 of them."""
PERMUTATIONS = 9999
BATCH = 1000
"""Resamples that scipy holds in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TestedEstimate(Estimate):
    """An estimate with the two-sided p-value of a null hypothesis."""

    p_value: float


def by_key(keys: Iterable[Hashable], items: Iterable[T]) -> list[list[T]]:
    """Group the items by their key, in the order in which the keys first appear."""
    groups: dict[Hashable, list[T]] = {}
    for key, item in zip(keys, items, strict=True):
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def mean_by_prompt(prompts: Sequence[Hashable], values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Mean of every column over the rows of each prompt: (rows, metrics) -> (prompts, metrics)."""
    return [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in by_key(prompts, values)]


def bootstrap_means(values: Sequence[Sequence[float]], seed: int = 0) -> list[Estimate]:
    """Mean of every column with its percentile bootstrap interval; whole rows (prompts) are resampled.

    Args:
        values: (prompts, metrics); a prompt with several answers holds their mean.
        seed: of the resampling; the same seed gives the same intervals.
    """
    import numpy as np
    from scipy import stats

    table = np.asarray(values, dtype=np.float64)
    means = table.mean(axis=0)
    low, high = means, means
    if len(table) > 1:
        result = stats.bootstrap(
            (table,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", batch=BATCH,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        low, high = result.confidence_interval
    return [Estimate(*map(float, triple)) for triple in zip(means, low, high, strict=True)]


def prompt_means(prompts: Sequence[Hashable], values: Sequence[Sequence[float]], seed: int) -> list[Estimate]:
    """Mean over prompts of their mean values, column by column, with bootstrap intervals over prompts.

    Args:
        prompts: the prompt of every row, (rows,).
        values: (rows, metrics).
        seed: of the bootstrap.
    """
    return bootstrap_means(mean_by_prompt(prompts, values), seed)


def paired_difference(prompts: Sequence[Hashable], differences: Sequence[float], seed: int) -> TestedEstimate:
    """Mean difference of two models that answered the same prompts.

    The interval is the percentile bootstrap's over prompts. The p-value of no difference is that of a permutation test
    that swaps the two models prompt by prompt; it is at least 0.0001.

    Args:
        prompts: the prompt of every row, (rows,).
        differences: value of one model minus value of the other, (rows,).
        seed: of resamples and permutations.
    """
    import numpy as np
    from scipy import stats

    means = np.asarray(mean_by_prompt(prompts, [(difference,) for difference in differences]))
    [estimate] = bootstrap_means(means, seed)
    p_value = 1.0
    if len(means) > 1:
        test = stats.permutation_test(
            (means[:, 0],),
            np.mean,
            permutation_type="samples",
            n_resamples=PERMUTATIONS,
            batch=BATCH,
            rng=np.random.default_rng(seed),
        )
        p_value = float(test.pvalue)
    return TestedEstimate(estimate.value, estimate.low, estimate.high, p_value)


def cross_fitted_mean(prompts: Sequence[Hashable], wins: Sequence[Sequence[float]], null: float) -> TestedEstimate:
    """Mean over prompts and seeds of held-out verdicts, where each half of the prompts judges the other.

    A bootstrap over prompts is too narrow here. A prompt is judged by what the other half taught, and it teaches the
    discriminator that judges the other half; if the features of both halves happen to deviate the same way, both
    halves win. With nothing to find, the variance is twice what the bootstrap sees (exactly so if the verdict on one
    prompt is a sum of what single prompts taught). No unbiased estimate of it exists (Bengio and Grandvalet 2004). The
    part that comes from prompts which are easy or hard for every discriminator counts once. With S seeds, n prompts,
    and variances over prompts,

        V_mean = variance of the mean over seeds / n                what a bootstrap over prompts sees
        V_one  = mean over seeds of the variance of one seed / n
        C      = (S V_mean - V_one) / (S - 1)                       covariance of two seeds / n
        V_easy = (C - V_one / 3) / (1 - 1/3), kept within [0, V_mean]; 0 for one seed
        se^2   = 2 V_mean - V_easy

    The 1/3: two random halves share half of their prompts, so without easy prompts two seeds' verdicts have the sign
    of normal variables with correlation 1/2, hence the correlation (2 / pi) arcsin(1/2) = 1/3.

    Coverage of the 95 % interval, three seeds:

        a true mean of            0.5           0.66
        tiny Llama, 60 prompts    93.5 % (520)  94.9 % (410)    data sets in brackets; a bootstrap: 84 % and 89 %
        tiny Llama, 200 prompts   98 % (100)
        linear discriminators     94 - 98 %     93 - 98 %       words, normal features, a tell-tale; 60 - 600 prompts
        heavy-tailed features     98 %          91 - 94 %

    What the formula leaves out makes 0.66 the lower of the two: how much the choice of the training prompts changes the
    accuracy on all others. The interval of the difference of two models holds the truth in 96 to 99 %.

    Args:
        prompts: the prompt of every row, (rows,); at least two different ones.
        wins: (seeds, rows): 1 for a right verdict, 0 for a wrong one; or differences of two models' wins.
        null: the mean under the null hypothesis of the p-value.

    Returns:
        The mean with the interval mean -+ t se, and the two-sided p-value, both by Student's t with n - 1 degrees of
        freedom.
    """
    import numpy as np
    from scipy import stats

    table = np.transpose(mean_by_prompt(prompts, list(zip(*wins, strict=True))))
    seeds, count = table.shape
    mean = float(table.mean())
    seen = table.mean(axis=0).var(ddof=1) / count
    easy = 0.0
    if seeds > 1:
        one = table.var(axis=1, ddof=1).mean() / count
        covariance = (seeds * seen - one) / (seeds - 1)
        easy = min(max((covariance - one / 3) / (1 - 1 / 3), 0.0), seen)
    error = float((2 * seen - easy) ** 0.5)
    half_width = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    gap = abs(mean - null)
    p_value = 2 * float(stats.t.sf(gap / error, count - 1)) if error > 0 else float(gap == 0)
    return TestedEstimate(mean, mean - half_width, mean + half_width, p_value)

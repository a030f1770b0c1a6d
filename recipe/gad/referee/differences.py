"""Differences between two arms on the same prompts: interval and p-value, both by scipy.

A table of results has a row per training seed and a column per prompt. Two arms are compared by the table of their
differences, prompt by prompt and seed by seed.

- *Interval*: bootstrap over prompts AND seeds. Prompts and seeds are drawn with replacement, each independently, and
  the mean is taken over all pairs of what was drawn. It says what another training and other prompts may give. With
  one seed only prompts are drawn, and the interval says nothing about another training. Few seeds are few: three
  cannot show how far a fourth may be off, so every seed's own difference is reported beside the interval.
- *p-value*: a permutation test over prompts. A prompt's results are averaged over the seeds first, since answers to one
  prompt are not independent; then the names of the two arms are swapped prompt by prompt. It asks whether THESE
  trainings differ on prompts of this kind; it knows nothing of other trainings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipe.gad.evaluation.text_metrics import CONFIDENCE, RESAMPLES, Estimate

PERMUTATIONS = 9999
"""Of the permutation test: the smallest p-value is 0.0001."""
BATCH = 100
"""Resamples held in memory at a time."""


@dataclass(frozen=True)
class Difference:
    """Arm minus control."""

    estimate: Estimate
    p: float
    by_seed: tuple[float, ...]
    prompts: int


def mean_estimate(table: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Mean of a table with its 95 % interval over prompts and seeds.

    Args:
        table: (training seeds, prompts); one seed: only prompts are resampled. At least two prompts.
        seed: of the resampling.
    """
    import numpy as np
    from scipy.stats import bootstrap

    values = np.asarray(table, dtype=np.float64)
    seeds, prompts = values.shape
    if np.all(values == values.flat[0]):  # scipy warns of a distribution without width
        return Estimate(*[float(values.flat[0])] * 3)

    def mean(prompt: Any, chosen: Any = None, axis: int = -1) -> Any:
        """Means of the resampled columns ``prompt`` (..., prompts) and rows ``chosen`` (..., seeds)."""
        rows = np.zeros((*prompt.shape[:-1], 1), int) if chosen is None else chosen
        return values[rows[..., :, None], prompt[..., None, :]].mean(axis=(-2, -1))

    result = bootstrap(
        (np.arange(prompts), np.arange(seeds))[: 2 if seeds > 1 else 1],
        mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        paired=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Estimate(float(values.mean()), float(low), float(high))


def permutation_p(arm: Sequence[float], control: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the mean paired difference of two arms, a value per prompt each."""
    import numpy as np
    from scipy.stats import permutation_test

    if np.array_equal(arm, control):
        return 1.0
    result = permutation_test(
        (np.asarray(arm, dtype=np.float64), np.asarray(control, dtype=np.float64)),
        lambda first, second, axis: np.mean(first - second, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=BATCH,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def difference(arm: Sequence[Sequence[float]], control: Sequence[Sequence[float]], seed: int = 0) -> Difference:
    """Arm minus control.

    Args:
        arm, control: (training seeds, prompts), the same seeds and prompts in the same order.
        seed: of resampling and permutations.
    """
    import numpy as np

    first, second = np.asarray(arm, dtype=np.float64), np.asarray(control, dtype=np.float64)
    table = first - second
    return Difference(
        mean_estimate(table.tolist(), seed),
        permutation_p(first.mean(axis=0).tolist(), second.mean(axis=0).tolist(), seed),
        tuple(table.mean(axis=1).tolist()),
        table.shape[1],
    )

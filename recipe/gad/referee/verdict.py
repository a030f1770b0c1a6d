"""What a comparison with the control says in words, from fixed rules.

An arm is *better* than the control if all of this holds, on the half of the prompts on which no checkpoint was chosen:

1. the measure (two-sample accuracy, else ROUGE-L) is better by at least its margin, and its interval is off 0;
2. ROUGE-L is not lower, and cut answers and repetition are not higher. A difference counts as such if its interval is
   off 0, or if it is as large as the tolerance.

It is *worse* if the interval of the measure is off 0 on the other side. Everything else is *undecided*, and the text
says which rule was missed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from recipe.gad.referee.differences import Difference


class Metric(NamedTuple):
    """A column of the page; ``sign`` is +1 if more is better, -1 if less is, 0 if neither."""

    title: str
    sign: int
    digits: int = 3


METRICS = {
    "two_sample": Metric("two-sample accuracy", -1),
    "rouge_l": Metric("ROUGE-L", 1),
    "cut": Metric("cut answers", -1),
    "repetition": Metric("repetition", -1),
    "length": Metric("tokens", 0, 1),
}
MARGINS = {"two_sample": 0.02, "rouge_l": 0.01}
"""Smallest difference of the measure that counts."""
TOLERANCE = 0.01
"""From here on a loss of ROUGE-L, cut answers or repetition counts even if its interval holds 0."""
GUARDS = ("rouge_l", "cut", "repetition")


@dataclass(frozen=True)
class Verdict:
    """``level`` is "better", "worse" or "undecided", of the arm against the control."""

    level: str
    text: str


def difference_text(metric: str, difference: Difference) -> str:
    """``two-sample accuracy -0.031 [-0.052, -0.011]``."""
    title, _, digits = METRICS[metric]
    estimate = difference.estimate
    return f"{title} {estimate.value:+.{digits}f} [{estimate.low:+.{digits}f}, {estimate.high:+.{digits}f}]"


def p_text(p: float) -> str:
    """``p = 0.0123``, or ``p < 0.0001``."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"


def gain(metric: str, difference: Difference) -> tuple[float, float, float]:
    """Difference and ends of its interval with the sign turned so that more is better."""
    estimate, sign = difference.estimate, METRICS[metric].sign
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    return sign * estimate.value, low, high


def losses(differences: dict[str, Difference], measure: str) -> list[str]:
    """Texts of the guards in which the arm is worse than the control."""
    lost = []
    for metric in GUARDS:
        if metric == measure or metric not in differences:
            continue
        value, _, high = gain(metric, differences[metric])
        if high < 0 or value <= -TOLERANCE:
            lost.append(difference_text(metric, differences[metric]))
    return lost


def judge(arm: str, control: str, differences: dict[str, Difference], measure: str) -> Verdict:
    """The verdict on an arm.

    Args:
        arm, control: names.
        differences: metric -> arm minus control, with the measure and the guards.
        measure: "two_sample" or "rouge_l".
    """
    main = differences[measure]
    value, low, high = gain(measure, main)
    evidence = f"{difference_text(measure, main)}, {_seeds(measure, main)}"
    if high < 0:
        return Verdict("worse", f"{control} is ahead of {arm}: {evidence}.")
    if low <= 0:
        return Verdict("undecided", f"Nothing here says that {arm} is better or worse than {control}: {evidence}.")
    if value < MARGINS[measure]:
        return Verdict(
            "undecided", f"{arm} is ahead of {control} by less than the margin of {MARGINS[measure]}: {evidence}."
        )
    if lost := losses(differences, measure):
        return Verdict("undecided", f"{arm} is ahead of {control} ({evidence}), but pays for it: {'; '.join(lost)}.")
    return Verdict("better", f"{arm} is better than {control}: {evidence}; {_kept(differences, measure)}.")


def headline(verdicts: Sequence[tuple[str, Verdict]], control: str) -> str:
    """One sentence on all arms of a data size, each given with its verdict."""
    better, worse = ([name for name, v in verdicts if v.level == level] for level in ("better", "worse"))
    if not verdicts:
        return f"No arm could be compared with {control}."
    parts = [f"{' and '.join(better)} {'is' if len(better) == 1 else 'are'} better than {control}."] if better else []
    if worse:
        parts.append(f"{control} is ahead of {' and '.join(worse)}.")
    if not better:
        parts.append(f"Nothing here says that an arm is better than {control}.")
    return " ".join(parts)


def _seeds(measure: str, difference: Difference) -> str:
    ahead = sum(METRICS[measure].sign * value > 0 for value in difference.by_seed)
    return f"ahead in {ahead} of {len(difference.by_seed)} training seeds, {p_text(difference.estimate.p_value)}"


def _kept(differences: dict[str, Difference], measure: str) -> str:
    names = [METRICS[metric].title for metric in GUARDS if metric in differences and metric != measure]
    return f"{', '.join(names)} no worse"

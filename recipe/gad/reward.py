"""Reward function of validation: ROUGE-L of the student's answer against the teacher's.

In training the reward comes from the discriminator. The rows that it will score get 0 here, to save time.
"""

import re
from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer


def words(text: str) -> list[str]:
    """Words of ASCII text as rouge-score splits them; in scripts that it drops, every character is a word."""
    return re.findall(r"[a-z0-9]+|[^\W_a-z0-9]", text.lower())


class _UnicodeTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=1)
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_UnicodeTokenizer())


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **_) -> dict:
    """ROUGE-L F1 in [0, 1] as {"score", "rouge_l"} (verl's ``reward.custom_reward_function`` interface).

    Args:
        data_source: unused.
        solution_str: the student's answer as text.
        ground_truth: the teacher's answer as text.
        extra_info: a row with ``scored_by_discriminator`` gets 0.
    """
    if (extra_info or {}).get("scored_by_discriminator", False):
        return {"score": 0.0, "rouge_l": 0.0}
    rouge_l = float(_scorer().score(ground_truth, solution_str)["rougeL"].fmeasure)
    return {"score": rouge_l, "rouge_l": rouge_l}

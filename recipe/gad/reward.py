"""Reward function of validation: ROUGE-L of the student's answer against the teacher's.

In training the discriminator is the reward: rows that it will score get 0 here, so that no time goes into ROUGE-L.
"""

import re
from functools import lru_cache

from rouge_score.rouge_scorer import RougeScorer


def words(text: str) -> list[str]:
    """rouge-score's own words for ASCII text; other scripts, which it drops, count character by character."""
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
        extra_info: rows marked ``scored_by_discriminator`` are not compared and get 0.
    """
    if (extra_info or {}).get("scored_by_discriminator", False):
        return {"score": 0.0, "rouge_l": 0.0}
    rouge_l = float(_scorer().score(ground_truth, solution_str)["rougeL"].fmeasure)
    return {"score": rouge_l, "rouge_l": rouge_l}

"""Metrics of answers as text, with confidence intervals over prompts.

Words are those of the ROUGE-L reward: lower case, no punctuation, single characters in scripts without spaces.

    rouge_l      ROUGE-L F1 of the student's answer against the teacher's
    length       tokens of an answer, the end token included
    cut          share of answers that were cut at max_response_length
    distinct_1   different words of all answers together / words of all answers (Li et al., arXiv 1510.03055)
    distinct_2   the same for pairs of neighboring words inside an answer
    repetition   share of the 4-grams of an answer that an earlier 4-gram of the same answer equals; mean over answers

distinct falls as answers get longer or more numerous, so compare models on the same data only.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from recipe.gad.evaluation.intervals import Estimate, by_key, prompt_means
from recipe.gad.reward import compute_score, words

REPETITION_ORDER = 4
Z = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


def ngrams(tokens: Sequence[str], order: int) -> list[tuple[str, ...]]:
    """All runs of ``order`` neighboring tokens, in order."""
    return list(zip(*(tokens[start:] for start in range(order)), strict=False))


def repetition_rate(text: str) -> float:
    """Share in [0, 1] of the 4-grams of words that equal an earlier one; 0 for fewer than four words."""
    grams = ngrams(words(text), REPETITION_ORDER)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts_by_prompt: Sequence[Sequence[str]], order: int) -> Estimate:
    """Different n-grams / n-grams over all answers, in [0, 1]; 0 if no answer is long enough.

    The interval is value +- 1.96 jackknife standard errors (one prompt left out at a time): a bootstrap
    resample holds some prompts twice, which alone lowers distinct.
    """
    grams = [Counter(itertools.chain(*(ngrams(words(t), order) for t in texts))) for texts in texts_by_prompt]
    prompts_with = Counter(itertools.chain(*grams))
    different, total, prompts = len(prompts_with), sum(gram.total() for gram in grams), len(grams)
    value = different / total if total else 0.0
    left_out = []
    for gram in grams:
        rest = total - gram.total()
        left_out.append((different - sum(prompts_with[g] == 1 for g in gram)) / rest if rest else value)
    mean = sum(left_out) / prompts
    error = ((prompts - 1) / prompts * sum((other - mean) ** 2 for other in left_out)) ** 0.5
    return Estimate(value, value - Z * error, value + Z * error)


def rouge_l(answer: dict[str, Any]) -> float:
    """ROUGE-L F1 in [0, 1] of a line of ``answers.jsonl``: the student's answer against the teacher's."""
    return compute_score(answer["data_source"], answer["student"], answer["teacher"])["rouge_l"]


def answer_metrics(answer: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(metric, side) -> value of one answer."""
    metrics = {("rouge_l", "student"): rouge_l(answer)}
    for side in ("student", "teacher"):
        metrics["length", side] = answer[f"{side}_tokens"]
        metrics["cut", side] = float(answer[f"{side}_cut"])
        metrics["repetition", side] = repetition_rate(answer[side])
    return metrics


def text_metrics(answers: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, dict[str, Estimate]]:
    """Metric -> side ("student", and "teacher" where it has one) -> estimate, from the lines of ``answers.jsonl``."""
    prompts = [answer["index"] for answer in answers]
    rows = [answer_metrics(answer) for answer in answers]
    estimates = prompt_means(prompts, [list(row.values()) for row in rows], seed)
    metrics: dict[str, dict[str, Estimate]] = {}
    for (name, side), estimate in zip(rows[0], estimates, strict=True):
        metrics.setdefault(name, {})[side] = estimate
    groups = by_key(prompts, answers)
    for order in (1, 2):
        metrics[f"distinct_{order}"] = {
            # the teacher's answer is the same for every sample of a prompt
            "student": distinct([[answer["student"] for answer in group] for group in groups], order),
            "teacher": distinct([[group[0]["teacher"]] for group in groups], order),
        }
    return metrics

"""Classifier two-sample test: can a FRESH discriminator tell the student's answers from the teacher's?

The discriminator of training is not a neutral judge: the student was optimized against it. Here a new one starts from
a base model with a random score head, learns on half of the prompts and is measured on the other half
(recipe/gad/training/fresh.py): a held-out accuracy of 0.5 means that it cannot tell them apart, 1.0 that it always can.

The interval is for the expected accuracy of a discriminator trained on half as many prompts as there are, over the
choice of prompts, halves and seeds. It is wider than a bootstrap's, because each half trains the judge of the other:
:func:`recipe.gad.evaluation.intervals.cross_fitted_mean` holds the formula and its coverage.

D reads prompt and answer as in training: the chat template's prompt, the tokens of the text, and the end token unless
the answer was cut; its score is the value at the last token. Both sides are tokenized from text by the base model's
tokenizer, and padding follows the last token, so equal texts get equal scores.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from recipe.gad.evaluation.intervals import cross_fitted_mean
from recipe.gad.run.progress import progress
from recipe.gad.run.two_sample import MIN_PROMPTS, TwoSampleSettings
from recipe.gad.training.fresh import Pair, held_out, load_base


def run_two_sample_test(answers: Sequence[dict[str, Any]], settings: TwoSampleSettings) -> dict[str, Any]:
    """Held-out accuracy and AUC of fresh discriminators on the lines of ``answers.jsonl``.

    Args:
        answers: lines of the file.
        settings: base model, seeds and training of the discriminators.

    Returns:
        ``accuracy`` (mean over prompts and seeds, with its 95 % interval kept within [0, 1], and the two-sided p-value
        of accuracy 0.5), ``auc`` (mean over seeds), ``accuracy_std`` and ``auc_std`` (sample standard deviations over
        seeds, 0 for one seed), ``by_seed``, ``pairs``, the ``settings``, ``wins_by_seed``
        (per seed a list over ``answers``: 1 where the teacher's answer scored higher, 0.5 for a tie, else 0), and
        ``wins`` (their mean over seeds).

    Raises:
        ValueError: fewer than two different prompts, or the base model has no chat template.
    """
    pairs = tokenize_pairs(answers, settings.model)
    if len({pair.prompt for pair in pairs}) < MIN_PROMPTS:
        raise ValueError("the two-sample test needs at least two different prompts: one to learn from, one to hold out")
    base = load_base(settings.model)
    prompts, wins, by_seed = [pair.prompt for pair in pairs], [], []
    for seed in progress(settings.seeds, desc="two-sample test", unit=" seeds"):
        correct, auc = held_out(base, pairs, settings, seed)
        by_seed.append({"seed": seed, "accuracy": statistics.fmean(correct), "auc": auc})
        wins.append(correct)
    accuracy = cross_fitted_mean(prompts, wins, null=0.5)
    return {
        "accuracy": asdict(replace(accuracy, low=max(accuracy.low, 0.0), high=min(accuracy.high, 1.0))),
        "accuracy_std": _spread([row["accuracy"] for row in by_seed]),
        "auc": statistics.fmean(row["auc"] for row in by_seed),
        "auc_std": _spread([row["auc"] for row in by_seed]),
        "by_seed": by_seed,
        "pairs": len(pairs),
        "settings": asdict(settings),
        "wins": [statistics.fmean(column) for column in zip(*wins, strict=True)],
        "wins_by_seed": wins,
    }


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def tokenize_pairs(answers: Sequence[dict[str, Any]], model: str) -> list[Pair]:
    """Tokenize answers for the base model: prompt, text, and the end of turn unless the answer was cut."""
    import recipe.gad.plugin  # noqa: F401  (activates the overlay)
    from recipe.gad.training.trajectory import (
        build_prompt_ids,
        end_of_turn_ids,
        stop_token_ids,
        tokenize_teacher,
    )
    from verl.utils import hf_tokenizer

    tokenizer = hf_tokenizer(model)
    end_ids = end_of_turn_ids(tokenizer, stop_token_ids(tokenizer))
    prompts = [build_prompt_ids(tokenizer, answer["messages"]) for answer in answers]

    def sequences(side: str) -> list[list[int]]:
        texts = tokenize_teacher(tokenizer, [answer[side] for answer in answers], [])
        return [
            prompt + ids + ([] if answer[f"{side}_cut"] else end_ids)
            for prompt, ids, answer in zip(prompts, texts, answers, strict=True)
        ]

    keys = [json.dumps(answer["messages"], sort_keys=True) for answer in answers]
    return [Pair(*row) for row in zip(keys, sequences("student"), sequences("teacher"), strict=True)]

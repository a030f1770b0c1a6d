"""Classifier two-sample test: can a FRESH discriminator tell the student's answers from the teacher's?

The discriminator of training is not a neutral judge: the student was optimized against it. Here a new one starts from
a base model with a random score head, learns on half of the prompts by the Bradley-Terry loss of training

    L_D = -E[ log sigmoid( D(x, y_teacher) - D(x, y_student) ) ]          (arXiv 2511.10643)

and is measured on the pairs of the other half: a held-out accuracy of 0.5 means that it cannot tell them apart, 1.0
that it always can. Then the halves swap, so that every pair is held out once. The seed decides the halves.

The interval is for the expected accuracy of a discriminator trained on half as many prompts as there are, over the
choice of prompts, halves and seeds. It is wider than a bootstrap's, because each half trains the judge of the other:
:func:`recipe.gad.evaluation.intervals.cross_fitted_mean` holds the formula and its coverage.

D reads prompt and answer as in training: the chat template's prompt, the tokens of the text, and the end token unless
the answer was cut; its score is the value at the last token. Both sides are tokenized from text by the base model's
tokenizer, and padding follows the last token, so equal texts get equal scores.
"""

import copy
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from recipe.gad.evaluation.intervals import cross_fitted_mean
from recipe.gad.run.checkpoint import actor_folder, has_score_head
from recipe.gad.run.findings import InputError
from recipe.gad.run.progress import progress

WARMUP_SHARE = 0.1
"""Share of the optimizer steps in which the learning rate rises; after them it falls linearly to 0."""
GRAD_CLIP = 1.0
HEAD_STD = 0.02
"""Standard deviation of a new head's weights: the usual initializer_range of transformers."""
MAX_BATCH_TOKENS = 16384
"""Largest number of padded tokens in a forward pass; larger optimizer batches accumulate gradients."""


@dataclass(frozen=True)
class TwoSampleSettings:
    """How the test's discriminators are trained.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    """Base model (Hugging Face folder or hub id) of every discriminator; use one for all students you compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 2e-5
    epochs: int = 3
    batch_pairs: int = 8
    """Pairs per optimizer step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", actor_folder(self.model))
        if not self.seeds:
            raise ValueError("the two-sample test needs at least one seed")
        if not 0 < self.lr < math.inf or self.epochs < 1 or self.batch_pairs < 1:
            raise ValueError(
                f"two-sample test with lr {self.lr}, {self.epochs} epochs and batches of {self.batch_pairs} pairs: "
                "expected all of them to be above 0"
            )
        if has_score_head(self.model):
            raise InputError(
                f"{self.model} has a score head, so it is a trained discriminator and not neutral",
                fix="pass a base model",
            )


@dataclass(frozen=True)
class Pair:
    """Token ids (prompt and answer) of a student's and the teacher's answer; ``prompt`` identifies the prompt."""

    prompt: str
    student: list[int]
    teacher: list[int]


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
    if len({pair.prompt for pair in pairs}) < 2:
        raise ValueError("the two-sample test needs at least two different prompts: one to learn from, one to hold out")
    base = load_base(settings.model)
    prompts, wins, by_seed = [pair.prompt for pair in pairs], [], []
    for seed in progress(settings.seeds, desc="two-sample test", unit=" seeds"):
        correct, auc = _held_out(base, pairs, settings, seed)
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


def halves(pairs: Sequence[Pair], seed: int) -> tuple[list[int], list[int]]:
    """Split the pairs (their positions) into random halves by prompt: all pairs of a prompt are in the same half."""
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    first = set(prompts[: len(prompts) // 2])
    positions = range(len(pairs))
    return [i for i in positions if pairs[i].prompt in first], [i for i in positions if pairs[i].prompt not in first]


def area_under_curve(student_scores, teacher_scores) -> float:
    """Probability that a teacher's answer scores above a student's of any prompt; ties count one half."""
    import torch

    students = student_scores.sort().values
    below = torch.searchsorted(students, teacher_scores)
    below_or_equal = torch.searchsorted(students, teacher_scores, right=True)
    return float((below + below_or_equal).double().mean() / 2 / len(students))


def _held_out(base, pairs: Sequence[Pair], settings: TwoSampleSettings, seed: int) -> tuple[list[float], float]:
    """Verdicts (1.0, 0.5 or 0.0) on all pairs by the discriminator that did not see their prompt; and the mean AUC."""
    from verl.trainer.ppo.core_algos import compute_discriminator_accuracy

    first, second = halves(pairs, seed)
    correct, areas = [0.0] * len(pairs), []
    for train, test in ((first, second), (second, first)):
        model = fresh_discriminator(base, seed)
        train_discriminator(model, [pairs[i] for i in train], settings, seed)
        student = score(model, [pairs[i].student for i in test])
        teacher = score(model, [pairs[i].teacher for i in test])
        for i, value in zip(test, compute_discriminator_accuracy(student, teacher).tolist(), strict=True):
            correct[i] = value
        areas.append(area_under_curve(student, teacher))
    return correct, statistics.fmean(areas)


# ---------------------------------------------------------------------- the discriminator


def load_base(model: str):
    """The base model with a score head, built as the critic of training is: float32 weights, no dropout, on the CPU."""
    import torch
    from transformers import AutoConfig

    from verl.utils.model import load_valuehead_model

    config = AutoConfig.from_pretrained(model, num_labels=1, attn_implementation="sdpa")
    config.classifier_dropout = 0.0
    config.float32_score_head = True
    return load_valuehead_model(model, torch.float32, config, trust_remote_code=False)


def fresh_discriminator(base, seed: int):
    """A copy of the base model with a score head drawn by ``seed``, on the GPU if there is one."""
    import torch

    model = copy.deepcopy(base)
    random_numbers = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.score.weight, std=HEAD_STD, generator=random_numbers)
    torch.nn.init.zeros_(model.score.bias)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def last_token_values(model, sequences: Sequence[Sequence[int]]):
    """Scores (B,) in float32; padding is on the right, where a causal model does not see it."""
    import torch

    width = max(map(len, sequences))
    input_ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences], device=model.device)
    lengths = torch.tensor([len(ids) for ids in sequences], device=model.device)
    mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        values = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
    return values.gather(1, lengths[:, None] - 1).squeeze(1).float()


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[range]:
    """Runs of neighboring items whose padded size (items x longest) stays within ``max_tokens``; at least one item."""
    start, longest = 0, 0
    for position, length in enumerate(lengths):
        longest = max(longest, length)
        if position > start and (position - start + 1) * longest > max_tokens:
            yield range(start, position)
            start, longest = position, length
    if start < len(lengths):
        yield range(start, len(lengths))


def score(model, sequences: Sequence[Sequence[int]]):
    """Scores of token sequences as a float32 tensor (len(sequences),) on the CPU."""
    import torch

    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    model.eval()
    for batch in batches_by_tokens([len(sequences[i]) for i in order], MAX_BATCH_TOKENS):
        rows = [order[i] for i in batch]
        with torch.inference_mode():
            scores[rows] = last_token_values(model, [sequences[i] for i in rows]).cpu()
    return scores


def train_discriminator(model, pairs: Sequence[Pair], settings: TwoSampleSettings, seed: int) -> None:
    """AdamW on the Bradley-Terry loss over shuffled pairs, in place.

    Args:
        model: from :func:`fresh_discriminator`.
        pairs: training pairs, at least one.
        settings: lr, epochs and batch_pairs are used.
        seed: of the order of the pairs.
    """
    import torch
    from transformers import get_linear_schedule_with_warmup

    from verl.trainer.ppo.core_algos import compute_discriminator_loss

    steps = settings.epochs * -(-len(pairs) // settings.batch_pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * steps), steps)
    rng = random.Random(seed)
    model.train()
    for _ in range(settings.epochs):
        shuffled = rng.sample(pairs, len(pairs))
        for start in range(0, len(pairs), settings.batch_pairs):
            batch = shuffled[start : start + settings.batch_pairs]
            lengths = [max(len(pair.student), len(pair.teacher)) for pair in batch]
            for part in batches_by_tokens(lengths, MAX_BATCH_TOKENS // 2):  # a pair is two rows
                rows = [batch[i] for i in part]
                values = last_token_values(model, [pair.student for pair in rows] + [pair.teacher for pair in rows])
                student, teacher = values[: len(rows), None], values[len(rows) :, None]
                loss, _ = compute_discriminator_loss(
                    student, teacher, torch.ones_like(student), torch.ones_like(teacher)
                )
                (loss * len(rows) / len(batch)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

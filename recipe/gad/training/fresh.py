"""Fresh discriminators: trained anew on pairs of a student's and the teacher's answers, measured on other prompts.

Each starts from a base model with a random score head, learns on half of the prompts by the Bradley-Terry loss of
training

    L_D = -E[ log sigmoid( D(x, y_teacher) - D(x, y_student) ) ]          (arXiv 2511.10643)

and is measured on the pairs of the other half. Then the halves swap, so that every pair is held out once. The seed
decides the halves. D's score is the value at the last token; padding follows it, so equal answers get equal scores.

``gad eval`` (recipe/gad/evaluation/two_sample.py) trains them on answers that it samples. With
``gad.fresh_discriminator``, validation trains them on the answers of the running stage.
"""

import copy
import gc
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipe.gad.run.two_sample import TwoSampleSettings

WARMUP_SHARE = 0.1
"""Share of the optimizer steps in which the learning rate rises; after them it falls linearly to 0."""
GRAD_CLIP = 1.0
HEAD_STD = 0.02
"""Standard deviation of a new head's weights: the usual initializer_range of transformers."""
MAX_BATCH_TOKENS = 16384
"""Largest number of padded tokens in a forward pass; larger optimizer batches accumulate gradients."""


@dataclass(frozen=True)
class Pair:
    """Token ids (prompt and answer) of a student's and the teacher's answer; ``prompt`` identifies the prompt."""

    prompt: str
    student: list[int]
    teacher: list[int]


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


def held_out(base, pairs: Sequence[Pair], settings: TwoSampleSettings, seed: int) -> tuple[list[float], float]:
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


def accuracies(pairs: Sequence[Pair], settings: TwoSampleSettings, seeds: Sequence[int]) -> list[float]:
    """Held-out accuracy of fresh discriminators, one for each of ``seeds``, inside a process that trains.

    The process's random numbers stay as they are, and the memory of its GPU is free again afterwards. Activations are
    recomputed where the family can, for there is less room than in ``gad eval``.
    """
    import torch

    if not seeds:
        return []
    found = []
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        base = load_base(settings.model)
        if base.supports_gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        for seed in seeds:
            torch.manual_seed(seed)  # of the dropout that some families have
            found.append(statistics.fmean(held_out(base, pairs, settings, seed)[0]))
    del base
    gc.collect()
    torch.cuda.empty_cache()
    return found


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

"""D's scores and its engine loss (verl/workers/critic/dp_critic.py): jagged tensors by hand, and a real small model."""

import copy

import numpy as np
import pytest
import torch
from scipy.special import log_expit
from tensordict import TensorDict
from transformers import AutoModelForTokenClassification

from recipe.gad.quickstart.problem import tiny_llama
from recipe.gad.training.trajectory import (
    build_prompt_ids,
    build_teacher_trajectory,
    end_of_turn_ids,
    stop_token_ids,
    tokenize_teacher,
)
from verl.utils.metric import Metric
from verl.workers.critic.dp_critic import discriminator_loss, largest_divisor, last_token_scores


def jagged(rows):
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def micro_batch(weights, dp_size=1):
    fields = {"pair_weight": torch.tensor(weights, dtype=torch.float32), "row": 7 + torch.arange(len(weights))}
    data = TensorDict(fields, batch_size=len(weights))
    data.set_non_tensor("dp_size", dp_size)
    return data


# ---------------------------------------------------------------------- by hand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_score_is_the_value_at_the_last_token(dtype):
    rows = [[9.0, 9.0, 1.0], [2.0], [9.0, 9.0, 9.0, 9.0, -3.0]]
    scores = last_token_scores(jagged([torch.tensor(row, dtype=dtype) for row in rows]))
    assert scores.tolist() == [1.0, 2.0, -3.0] and scores.dtype == torch.float32


def test_gradient_of_a_score_reaches_its_last_token_only():
    flat = torch.randn(6, requires_grad=True)
    scores = last_token_scores(torch.nested.nested_tensor_from_jagged(flat, torch.tensor([0, 4, 6])))
    (scores * torch.tensor([2.0, 3.0])).sum().backward()
    assert flat.grad.tolist() == [0, 0, 0, 2, 0, 3]


@pytest.mark.parametrize(
    ("total", "limit", "expected"), [(8, 8, 8), (8, 7, 4), (9, 8, 3), (7, 6, 1), (12, 100, 12), (1, 1, 1), (6, 5, 3)]
)
def test_largest_divisor(total, limit, expected):
    assert largest_divisor(total, limit) == expected


STUDENTS = np.array([[0.5, -1.0, 2.0], [0.0, 4.0, 1.0]])
TEACHERS = np.array([1.0, 0.5])
REAL = np.array([[1, 1, 1], [1, 1, 0]], dtype=bool)
"""Two prompts with three samples; the last sample of the second one is missing."""


def engine_rows(prompts):
    """values (the score last, noise before it) and pair weights of the rows [teacher, s_1, s_2, s_3] of prompts."""
    values, weights = [], []
    for prompt in prompts:
        for column, score in enumerate([TEACHERS[prompt], *STUDENTS[prompt]]):
            values.append([77.0] * (prompt + column) + [score])
            weights.append(1 / 5 if column and REAL[prompt, column - 1] else 0.0)
    return jagged([torch.tensor(row, dtype=torch.float32) for row in values]), weights


def expected_metrics():
    gaps = (TEACHERS[:, None] - STUDENTS)[REAL]
    return {
        "d_loss": -log_expit(gaps).mean(),
        "d_acc": (gaps > 0).mean(),
        "student_value_mean": STUDENTS[REAL].mean(),
        "teacher_value_mean": STUDENTS[REAL].mean() + gaps.mean(),
        "score_gap": gaps.mean(),
    }


def test_discriminator_loss_reads_groups_with_the_teacher_first():
    values, weights = engine_rows([0, 1])
    loss, metrics = discriminator_loss(4, {"values": values}, micro_batch(weights))
    assert loss.item() == pytest.approx(expected_metrics()["d_loss"], rel=1e-6)
    last = [row[-1].item() for row in values.unbind()]
    assert metrics.pop("row_scores") == [(7 + row, pytest.approx(score)) for row, score in enumerate(last)]
    assert {name: metric.aggregate() for name, metric in metrics.items()} == pytest.approx(expected_metrics(), rel=1e-6)


def test_micro_batches_of_one_rank_add_up():
    total, sums = 0.0, dict.fromkeys(expected_metrics(), 0.0)
    for prompt in (0, 1):
        values, weights = engine_rows([prompt])
        loss, metrics = discriminator_loss(4, {"values": values}, micro_batch(weights))
        total += loss.item()
        metrics.pop("row_scores")
        sums = {name: sums[name] + metric.aggregate() for name, metric in metrics.items()}
    assert total == pytest.approx(expected_metrics()["d_loss"], rel=1e-6)
    assert sums == pytest.approx(expected_metrics(), rel=1e-6)


def test_two_ranks_average_to_the_loss_and_the_metrics_of_the_whole_batch():
    """Engines average gradients over ranks; verl averages a metric over ranks, then reduces it (aggregate_dp)."""
    losses, by_rank = [], []
    for prompt in (0, 1):
        values, weights = engine_rows([prompt])
        loss, metrics = discriminator_loss(4, {"values": values}, micro_batch(weights, dp_size=2))
        losses.append(loss.item())
        metrics.pop("row_scores")
        by_rank.append(metrics)
    assert np.mean(losses) == pytest.approx(expected_metrics()["d_loss"], rel=1e-6)
    reduced = {name: Metric.aggregate_dp([metrics[name] for metrics in by_rank]) for name in by_rank[0]}
    assert reduced == pytest.approx(expected_metrics(), rel=1e-6)


def test_a_micro_batch_of_fillers_adds_nothing():
    loss, metrics = discriminator_loss(2, {"values": jagged([[1.0], [5.0]])}, micro_batch([0.0, 0.0]))
    metrics.pop("row_scores")
    assert loss.item() == 0.0 and all(metric.aggregate() == 0.0 for metric in metrics.values())


# ---------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def model(byte_tokenizer):
    torch.manual_seed(0)
    config = tiny_llama(byte_tokenizer(), num_attention_heads=4, num_labels=1, initializer_range=0.3)
    return AutoModelForTokenClassification.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module", params=["pad != eos", "pad == eos"])
def tokenizer(request, byte_tokenizer):
    return byte_tokenizer(pad="<|im_end|>" if request.param == "pad == eos" else "<|endoftext|>")


@pytest.fixture
def rows(tokenizer):
    """Sequences of different lengths: question and answer, each answer with its end of turn."""
    end_ids = end_of_turn_ids(tokenizer, stop_token_ids(tokenizer))
    answers = ["hello", "hello world", "h", "hello hello hello hello"]
    questions = ["say hello", "well", "say hello world please", "?"]
    prompts = [build_prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    return [a + b for a, b in zip(prompts, tokenize_teacher(tokenizer, answers, end_ids), strict=True)]


@torch.no_grad()
def score_alone(model, ids):
    """Reference: one unpadded row, the value of its last token."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1, 0].item()


@torch.no_grad()
def score_padded(model, rows, pad_id, side):
    """Scores through one padded forward whose padding is taken out again, as an engine does."""
    width = max(map(len, rows)) + 3
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    values = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[..., 0]
    return last_token_scores(jagged([value[m.bool()] for value, m in zip(values, mask, strict=True)])).tolist()


def test_the_small_model_tells_texts_apart(model, rows):
    scores = [score_alone(model, row) for row in rows]
    assert np.diff(sorted(scores)).min() > 1e-2, "otherwise the tests below would pass for any scoring"


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_do_not_depend_on_padding_order_or_micro_batches(model, tokenizer, rows, side):
    expected = [score_alone(model, row) for row in rows]
    pad = tokenizer.pad_token_id
    assert score_padded(model, rows, pad, side) == pytest.approx(expected, abs=1e-5)
    assert score_padded(model, rows[::-1], pad, side)[::-1] == pytest.approx(expected, abs=1e-5)
    in_parts = score_padded(model, rows[:1], pad, side) + score_padded(model, rows[1:], pad, side)
    assert in_parts == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_in_an_update_are_those_of_a_pass_without_one(model, rows, checkpointing):
    """D scores while it trains, where gradients are kept or computed again. verl sets the head's dropout to 0."""
    training = copy.deepcopy(model).train()
    training.dropout = torch.nn.Identity()
    if checkpointing:
        training.gradient_checkpointing_enable()
    scores = [training(input_ids=torch.tensor([row])).logits[0, -1, 0] for row in rows]
    assert [score.item() for score in scores] == pytest.approx([score_alone(model, row) for row in rows], abs=1e-6)
    sum(scores).backward()
    assert all(parameter.grad is not None for parameter in training.parameters())


@pytest.mark.parametrize("limit", [None, 3], ids=["whole", "cut"])
def test_same_text_same_score(model, tokenizer, limit):
    """A rollout that says the teacher's text gets the teacher's score, cut or not, also inside a mixed batch."""
    text = "hello world"
    messages = [{"role": "user", "content": "say it"}]
    prompt = build_prompt_ids(tokenizer, messages)
    # the student's side: what a server returns for this answer, up to its stop token or the limit
    chat = [*messages, {"role": "assistant", "content": text}]
    finished = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    rollout = finished[len(prompt) : finished.index(tokenizer.eos_token_id, len(prompt)) + 1][:limit]

    end_ids = end_of_turn_ids(tokenizer, stop_token_ids(tokenizer))
    teacher = tokenize_teacher(tokenizer, [text], end_ids)[0][:limit]
    trajectory = build_teacher_trajectory(torch.tensor(prompt), torch.tensor(teacher))
    batch = [prompt + rollout, prompt + rollout[:1], trajectory["input_ids"].tolist(), prompt * 2]
    for side in ("left", "right"):
        student_score, other, teacher_score, _ = score_padded(model, batch, tokenizer.pad_token_id, side)
        assert student_score == pytest.approx(teacher_score, abs=1e-6)
        assert abs(other - teacher_score) > 1e-2


def test_losing_the_end_token_would_change_the_score(model, tokenizer, rows):
    """Why the end token matters: without it, equal texts score apart."""
    assert abs(score_alone(model, rows[0]) - score_alone(model, rows[0][:-1])) > 1e-2

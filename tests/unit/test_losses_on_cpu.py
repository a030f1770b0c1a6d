"""Losses of verl/trainer/ppo/core_algos.py against float64 numbers that other code computed."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import log_expit
from tensordict import TensorDict

from verl.trainer.ppo.core_algos import (
    compute_discriminator_accuracy,
    compute_discriminator_loss,
    compute_grouped_discriminator_loss,
    compute_sft_loss,
    kl_penalty,
)
from verl.utils.metric import AggregationType, Metric
from verl.workers.actor.dp_actor import imitation_loss

GAD_METRICS = {"d_loss", "d_acc", "student_value_mean", "teacher_value_mean", "score_gap"}


def pairwise(student, teacher, dtype=torch.float32):
    """compute_discriminator_loss on scores, one token per response."""
    student, teacher = (torch.as_tensor(scores, dtype=dtype).unsqueeze(-1) for scores in (student, teacher))
    return compute_discriminator_loss(student, teacher, torch.ones_like(student), torch.ones_like(teacher))


def values(metrics):
    return {name: metric.aggregate() for name, metric in metrics.items()}


# ---------------------------------------------------------------------- discriminator


def test_discriminator_loss_equals_hand_computed_values():
    # gaps 0, ln 3, -ln 3: sigmoid = 1/2, 3/4, 1/4, so the losses are ln 2, ln 4/3, ln 4
    loss, metrics = pairwise([1.0, 0.0, math.log(3)], [1.0, math.log(3), 0.0])
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3, rel=1e-6)
    expected = {
        "d_loss": (math.log(2) + math.log(4 / 3) + math.log(4)) / 3,
        "d_acc": 0.5,  # a tie, a win, a defeat
        "student_value_mean": (1 + math.log(3)) / 3,
        "teacher_value_mean": (1 + math.log(3)) / 3,
        "score_gap": 0.0,
    }
    assert values(metrics) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
def test_discriminator_loss_equals_scipy(scale):
    rng = np.random.default_rng(int(scale * 10))
    student, teacher = rng.normal(scale=scale, size=(2, 64))
    loss, metrics = pairwise(student, teacher)
    assert loss.item() == pytest.approx(-log_expit(teacher - student).mean(), rel=1e-5)
    assert values(metrics)["d_acc"] == pytest.approx((teacher > student).mean(), rel=1e-6)
    assert values(metrics)["score_gap"] == pytest.approx((teacher - student).mean(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_discriminator_loss_is_stable_for_extreme_scores(dtype):
    student = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4], [1e4], [0.0]], dtype=dtype, requires_grad=True)
    ones = torch.ones(3, 1)
    loss, metrics = compute_discriminator_loss(student, teacher, ones, ones)
    assert loss.dtype == torch.float32
    big = student[0].double().item()  # 1e4 as the dtype stores it
    assert loss.item() == pytest.approx((2 * big + 0.0 + math.log(2)) / 3, rel=1e-6)
    loss.backward()
    assert student.grad.flatten().tolist() == pytest.approx([1 / 3, 0.0, 1 / 6], rel=1e-2, abs=1e-8)
    assert teacher.grad.flatten().tolist() == pytest.approx([-1 / 3, 0.0, -1 / 6], rel=1e-2, abs=1e-8)
    assert all(math.isfinite(value) for value in values(metrics).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_subtracted_and_averaged_in_float32(dtype):
    student, teacher = torch.linspace(-3, 3, 41), torch.linspace(2, -2, 41).flip(0) + 0.37
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss, _ = pairwise(student, teacher, dtype)
    expected = -log_expit(teacher.double().numpy() - student.double().numpy()).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_score_is_the_masked_sum_and_nothing_leaks_from_outside_the_mask():
    student = torch.tensor([[0.5, 9.0, -1.0], [2.0, math.nan, math.inf]], requires_grad=True)
    teacher = torch.tensor([[math.nan, 1.0], [3.0, -math.inf]], requires_grad=True)
    student_mask, teacher_mask = torch.tensor([[1, 0, 1], [1, 0, 0]]), torch.tensor([[0, 1], [1, 0]])
    loss, metrics = compute_discriminator_loss(student, teacher, student_mask, teacher_mask)
    expected = -log_expit(np.array([1.0 - (0.5 - 1.0), 3.0 - 2.0]))
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-6)
    assert values(metrics)["student_value_mean"] == pytest.approx((-0.5 + 2.0) / 2)
    loss.backward()
    slope = 1 - np.exp(-expected)  # d loss / d student score = 1 - sigmoid(gap)
    expected_grad = np.array([[slope[0], 0, slope[0]], [slope[1], 0, 0]]) / 2
    np.testing.assert_allclose(student.grad.numpy(), expected_grad, rtol=1e-5)
    assert (teacher.grad[~teacher_mask.bool()] == 0).all() and torch.isfinite(teacher.grad).all()


def test_ties_count_one_half():
    accuracy = compute_discriminator_accuracy(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert accuracy.tolist() == [1.0, 0.5, 0.0]
    assert values(pairwise([3.0, 3.0], [3.0, 3.0])[1])["d_acc"] == 0.5


@pytest.mark.parametrize(
    ("student", "teacher", "student_mask", "teacher_mask", "message"),
    [
        ((2, 2), (2, 2), [[1, 1], [0, 0]], [[1, 0], [1, 0]], r"student mask selects no token in rows \[1\]"),
        ((1, 2), (1, 2), [[1, 1]], [[0, 0]], r"teacher mask selects no token in rows \[0\]"),
        ((1, 2), (1, 2), [[1, 1, 1]], [[1, 1]], "student_vpreds has shape .* but its mask"),
        ((1, 2), (1, 2), [[1, 1]], [[1]], "teacher_vpreds has shape .* but its mask"),
        ((2, 1), (1, 1), [[1], [1]], [[1]], "2 student rows but 1 teacher rows"),
    ],
)
def test_discriminator_loss_refuses_what_does_not_fit(student, teacher, student_mask, teacher_mask, message):
    with pytest.raises(ValueError, match=message):
        compute_discriminator_loss(
            torch.zeros(student), torch.zeros(teacher), torch.tensor(student_mask), torch.tensor(teacher_mask)
        )


@pytest.mark.parametrize(
    ("student", "teacher", "weights", "message"),
    [
        ((2, 3), (3,), None, "do not form groups"),
        ((2, 3), (2, 1), None, "do not form groups"),
        ((6,), (6,), None, "do not form groups"),
        ((2, 3), (2,), (2,), "must have the shape of the scores"),
    ],
)
def test_grouped_loss_refuses_what_does_not_fit(student, teacher, weights, message):
    weights = None if weights is None else torch.zeros(weights)
    with pytest.raises(ValueError, match=message):
        compute_grouped_discriminator_loss(torch.zeros(student), torch.zeros(teacher), weights)


class Scorer(torch.nn.Module):
    """A small nonlinear D: (rows, 5) -> (rows, tokens=3), float64; counts the rows that it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
        self.rows = 0

    def forward(self, features):
        self.rows += len(features)
        return self.net(features)

    def gradient(self, loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.parameters()))])


@pytest.mark.parametrize(("prompts", "samples"), [(1, 1), (4, 3), (2, 8)])
def test_grouped_loss_and_gradient_equal_the_pairwise_ones(prompts, samples):
    torch.manual_seed(prompts)
    student = torch.randn(prompts, samples, 5, dtype=torch.float64)
    teacher = torch.randn(prompts, 5, dtype=torch.float64)

    naive = Scorer()
    teacher_rows = teacher.repeat_interleave(samples, dim=0)  # the teacher once for every sample
    mask = torch.ones(prompts * samples, 3)
    loss, metrics = compute_discriminator_loss(naive(student.flatten(0, 1)), naive(teacher_rows), mask, mask)
    gradient = naive.gradient(loss)

    grouped = Scorer()
    student_scores = grouped(student.flatten(0, 1)).sum(-1).view(prompts, samples)
    grouped_loss, grouped_metrics = compute_grouped_discriminator_loss(student_scores, grouped(teacher).sum(-1))
    torch.testing.assert_close(grouped_loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grouped.gradient(grouped_loss), gradient, rtol=1e-5, atol=1e-7)
    assert values(grouped_metrics) == pytest.approx(values(metrics), rel=1e-5, abs=1e-7)
    assert (naive.rows, grouped.rows) == (2 * prompts * samples, prompts * samples + prompts)

    gaps = Scorer()(teacher_rows).sum(-1) - Scorer()(student.flatten(0, 1)).sum(-1)
    assert loss.item() == pytest.approx(-log_expit(gaps.detach().numpy()).mean(), rel=1e-6)


def test_weight_zero_leaves_out_a_missing_sample_and_partial_sums_add_up():
    torch.manual_seed(3)
    real = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weights = real.double() / real.sum()

    gaps = (teacher.unsqueeze(-1) - student).detach().numpy()[real.numpy()]
    expected = -log_expit(gaps).mean()
    total, sums = 0.0, dict.fromkeys(GAD_METRICS, 0.0)
    for rows in (slice(0, 1), slice(1, 4)):  # micro-batches
        loss, metrics = compute_grouped_discriminator_loss(student[rows], teacher[rows], weights[rows])
        total = total + loss
        for name, metric in metrics.items():
            sums[name] += metric.aggregate()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    student_mean = student.detach().numpy()[real.numpy()].mean()
    expected_metrics = {
        "d_loss": expected,
        "d_acc": (gaps > 0).mean(),
        "score_gap": gaps.mean(),
        "student_value_mean": student_mean,
        "teacher_value_mean": student_mean + gaps.mean(),
    }
    assert sums == pytest.approx(expected_metrics, rel=1e-5)

    total.backward()
    slopes = np.zeros((4, 3))
    slopes[real.numpy()] = (1 - np.exp(log_expit(gaps))) / real.sum().item()
    np.testing.assert_allclose(student.grad.numpy(), slopes, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(teacher.grad.numpy(), -slopes.sum(-1), rtol=1e-5, atol=1e-9)


def test_metrics_carry_their_reduction():
    _, metrics = pairwise([0.0], [1.0])
    assert {name: metric.aggregation for name, metric in metrics.items()} == dict.fromkeys(
        GAD_METRICS, AggregationType.MEAN
    )
    _, metrics = compute_grouped_discriminator_loss(torch.zeros(1, 2), torch.ones(1))
    assert {name: metric.aggregation for name, metric in metrics.items()} == dict.fromkeys(
        GAD_METRICS, AggregationType.SUM
    )
    for info, aggregation in (({}, "MEAN"), ({"dp_size": 1, "batch_num_tokens": 2}, "SUM")):
        _, metrics = compute_sft_loss(torch.zeros(1, 2), torch.ones(1, 2), **info)
        assert metrics["sft_loss"].aggregation is AggregationType[aggregation]


# ---------------------------------------------------------------------- imitation

LOG_PROB = np.array([[-0.5, -1.5, -9.0], [-2.0, -7.0, -8.0], [-0.25, -0.5, -1.0]])
MASK = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
NLL = [[0.5, 1.5], [2.0], [0.25, 0.5, 1.0]]
"""-log_prob inside the mask, row by row."""


def sft_by_hand(mode, rows, dp_size=1, tokens=None, sequences=None, scale=None):
    """The aggregation modes written out over lists of token losses."""
    tokens = sum(map(len, rows)) if tokens is None else tokens
    sequences = len(rows) if sequences is None else sequences
    return (
        dp_size
        * {
            "token-mean": sum(map(sum, rows)) / tokens,
            "token-sum": sum(map(sum, rows)),
            "seq-mean-token-sum": sum(map(sum, rows)) / sequences,
            "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / sequences,
            "seq-mean-token-sum-norm": sum(map(sum, rows)) / sequences / (scale or MASK.shape[1]),
        }[mode]
    )


MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@pytest.mark.parametrize("mode", MODES)
def test_sft_loss_equals_hand_computed_values(mode):
    log_prob = torch.tensor(LOG_PROB, requires_grad=True)
    loss, metrics = compute_sft_loss(log_prob, torch.tensor(MASK), mode)
    assert loss.item() == pytest.approx(sft_by_hand(mode, NLL), rel=1e-6)
    assert metrics["sft_loss"].aggregate() == pytest.approx(loss.item())
    loss.backward()
    assert (log_prob.grad.numpy()[MASK == 0] == 0).all() and (log_prob.grad.numpy()[MASK == 1] < 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [None, 7])
def test_sft_loss_of_two_ranks_averages_to_the_loss_of_the_whole_batch(mode, scale):
    info = {"dp_size": 2, "batch_num_tokens": 6, "global_batch_size": 3, "loss_scale_factor": scale}
    losses, metrics = [], []
    for rank in (slice(0, 1), slice(1, 3)):
        loss, metric = compute_sft_loss(torch.tensor(LOG_PROB[rank]), torch.tensor(MASK[rank]), mode, **info)
        expected = sft_by_hand(mode, NLL[rank], dp_size=2, tokens=6, sequences=3, scale=scale)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        losses.append(loss.item())
        metrics.append(metric["sft_loss"])
    whole = sft_by_hand(mode, NLL, scale=scale)
    assert np.mean(losses) == pytest.approx(whole, rel=1e-6)  # engines average gradients over ranks
    assert Metric.aggregate_dp(metrics) == pytest.approx(whole, rel=1e-6)


def test_sft_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="selects no token"):
        compute_sft_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="differ"):
        compute_sft_loss(torch.zeros(2, 3), torch.ones(2, 2))
    # one micro-batch of a larger step may be empty (filler rows): it adds nothing
    loss, _ = compute_sft_loss(torch.zeros(2, 3), torch.zeros(2, 3), batch_num_tokens=4)
    assert loss.item() == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_imitation_loss_reads_the_response_tokens_of_jagged_rows(mode):
    """log_probs[t] of the engine is the log-probability of token t+1; only the teacher's answer counts."""
    prompt_lengths, poison = [2, 4, 3], -100.0
    log_probs = [
        torch.tensor([poison] * (prompt - 1) + [-nll for nll in row] + [poison])
        for prompt, row in zip(prompt_lengths, NLL, strict=True)
    ]

    def jagged(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = TensorDict(
        {
            "prompts": jagged([torch.zeros(n, dtype=torch.int64) for n in prompt_lengths]),
            "responses": jagged([torch.zeros(len(row), dtype=torch.int64) for row in NLL]),
            "response_mask": jagged([torch.ones(len(row), dtype=torch.int64) for row in NLL]),
        },
        batch_size=3,
    )
    data.set_non_tensor("dp_size", 1)
    data.set_non_tensor("batch_num_tokens", 6)
    data.set_non_tensor("global_batch_size", 3)
    config = type("Config", (), {"loss_agg_mode": mode, "loss_scale_factor": None})
    loss, metrics = partial(imitation_loss, config=config)(model_output={"log_probs": jagged(log_probs)}, data=data)
    assert loss.item() == pytest.approx(sft_by_hand(mode, NLL), rel=1e-6)
    assert metrics["sft_loss"].aggregate() == pytest.approx(loss.item())


# ---------------------------------------------------------------------- KL (stock)

KL_BY_HAND = {
    ("kl", "k1"): lambda gap: gap,
    ("abs",): np.abs,
    ("mse", "k2"): lambda gap: gap**2 / 2,
    ("low_var_kl", "k3"): lambda gap: np.exp(-gap) - 1 + gap,
}


@pytest.mark.parametrize("names", KL_BY_HAND, ids="/".join)
def test_kl_penalty_correct_for_each_type(names):
    rng = np.random.default_rng(5)
    policy, reference = -rng.exponential(size=(2, 4, 6))
    expected = KL_BY_HAND[names](policy - reference)
    for name in names:
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            policy_t = torch.tensor(policy, dtype=dtype, requires_grad=True)
            penalty = kl_penalty(policy_t, torch.tensor(reference, dtype=dtype), name)
            np.testing.assert_allclose(penalty.detach().numpy(), expected, rtol=tolerance, atol=tolerance)
            # a "+" keeps the value and takes the gradient of k2
            straight = kl_penalty(policy_t, torch.tensor(reference, dtype=dtype), name + "+")
            np.testing.assert_allclose(straight.detach().numpy(), expected, rtol=tolerance, atol=tolerance)
            if name not in ("mse", "k2"):
                (gradient,) = torch.autograd.grad(straight.sum(), policy_t)
                np.testing.assert_allclose(gradient.numpy(), policy - reference, rtol=tolerance, atol=tolerance)
    with pytest.raises(NotImplementedError):
        kl_penalty(torch.zeros(1), torch.zeros(1), "unknown")

"""gad.label_smoothing (recipe/gad/training/smoothing.py) against float64 loops over the pairs of every loss of D."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from recipe.gad.training.credit import prefix_discriminator_loss
from recipe.gad.training.smoothing import loss_of
from recipe.gad.training.teachers import all_pairs_loss
from verl.workers.critic.dp_critic import discriminator_loss

E = 0.2
N = 2
"""Students of a prompt."""


def loss_with(smoothing, credit="sequence", teachers=1):
    loss = partial(all_pairs_loss, teachers) if teachers > 1 else discriminator_loss
    return loss_of(OmegaConf.create({"label_smoothing": smoothing, "credit": credit}), SimpleNamespace(loss=loss))


def rows_of(seed, n_rows):
    """Values (float64) after the prompt's two tokens, of rows with one to five tokens."""
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.normal(size=rng.integers(1, 6)), requires_grad=True) for _ in range(n_rows)]


def micro_batch(rows, weights, dp_size=1):
    def jagged(parts):
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    data = TensorDict(
        {
            "responses": jagged([torch.zeros(len(row), dtype=torch.int64) for row in rows]),
            "pair_weight": torch.tensor(weights),
            "row": torch.arange(len(rows)),
        },
        batch_size=len(rows),
    )
    data.set_non_tensor("dp_size", dp_size)
    values = jagged([torch.cat([torch.full((2,), 100.0), row.float()]) for row in rows])
    return {"model_output": {"values": values}, "data": data}


def pair_loss(gap):
    """-(1 - e) log sigmoid(gap) - e log sigmoid(-gap)."""
    return (1 - E) * torch.log1p((-gap).exp()) + E * torch.log1p(gap.exp())


def whole(teacher, student):
    return pair_loss(teacher[-1] - student[-1])


def prefixes(teacher, student):
    """Of prefixes of equal length and of whole answers, in equal parts."""
    shorter = min(len(teacher), len(student))
    return (pair_loss(teacher[:shorter] - student[:shorter]).mean() + whole(teacher, student)) / 2


CASES = {
    "whole answers": ({}, whole),
    "prefixes": ({"credit": "token"}, prefixes),
    "two teacher answers": ({"teachers": 2}, whole),
}


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_those_of_smoothed_pairs(case, dp_size):
    switches, of_pair = CASES[case]
    teachers = switches.get("teachers", 1)
    size = teachers + N
    rows = rows_of(7, 2 * size)
    students = {0: [0.3, 0.5], 1: [0.2, 0.0]}  # weights of the pairs; the last student is a filler
    shares = {0: [0.5, 0.5], 1: [1.0, 0.0]} if teachers > 1 else {0: [1.0], 1: [1.0]}  # the second has one answer
    weights, expected = [], 0.0
    for group in (0, 1):
        weights += [*(shares[group] if teachers > 1 else [0.0]), *students[group]]
        of_group = rows[group * size : (group + 1) * size]
        for j, share in enumerate(shares[group]):
            for i, weight in enumerate(students[group]):
                expected = expected + share * weight * of_pair(of_group[j], of_group[teachers + i])
    expected.backward()
    wanted = [row.grad for row in rows]
    for row in rows:
        row.grad = None

    loss, metrics = loss_with(E, **switches)(group_size=size, **micro_batch(rows, weights, dp_size))
    (loss / dp_size).backward()
    assert loss.item() / dp_size == pytest.approx(expected.item(), rel=1e-6)
    for row, gradient in zip(rows, wanted, strict=True):
        torch.testing.assert_close(row.grad, gradient, rtol=1e-5, atol=1e-7)

    plain, same = loss_with(0.0, **switches)(group_size=size, **micro_batch(rows, weights, dp_size))
    assert metrics.pop("row_scores") == same.pop("row_scores")
    values = {name: metric.aggregate() for name, metric in metrics.items()}
    assert values == {name: metric.aggregate() for name, metric in same.items()}, "the metrics are without smoothing"
    gap = values["score_gap"] / dp_size
    if "credit" not in switches:  # loss = loss without smoothing + e * gap
        assert loss.item() / dp_size == pytest.approx(plain.item() / dp_size + E * gap, rel=1e-6)


def test_without_smoothing_the_loss_is_the_same_function():
    assert loss_with(0.0) is discriminator_loss
    assert loss_with(0.0, credit="token") is prefix_discriminator_loss
    assert loss_with(0, teachers=3).func is all_pairs_loss


def test_the_gap_at_which_a_pair_has_its_least_loss():
    gap = math.log((1 - E) / E)  # sigmoid(gap) = 1 - e
    rows = [torch.tensor([gap / 2]).requires_grad_(), torch.tensor([-gap / 2]).requires_grad_()]
    loss, metrics = loss_with(E)(group_size=2, **micro_batch(rows, [0.0, 1.0]))
    loss.backward()
    assert all(row.grad.item() == pytest.approx(0.0, abs=1e-7) for row in rows)
    assert loss.item() == pytest.approx(-(1 - E) * math.log(1 - E) - E * math.log(E), rel=1e-6)
    assert metrics["d_loss"].aggregate() == pytest.approx(-math.log(1 - E), rel=1e-6)

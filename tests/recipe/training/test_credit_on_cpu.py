"""Credit per token (recipe/gad/training/credit.py) against slow float64 loops over pairs, prefixes and tokens."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from recipe.gad.training.credit import prefix_discriminator_loss, token_credit
from recipe.gad.training.rows import Group, Row
from verl.utils import tensordict_utils as tu

N = 3


def answers(rng, n_groups):
    """Rows of a D update: prompt length and values (float64, with gradients) after each token, per answer."""
    rows = []
    for _ in range(n_groups):
        prompt = int(rng.integers(1, 4))
        for _ in range(N + 1):
            values = torch.tensor(rng.normal(size=int(rng.integers(1, 7))), requires_grad=True)
            rows.append((prompt, values))
    return rows


def micro_batch(rows, weights, dp_size):
    def jagged(parts):
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    # what D says at the prompt's tokens is in no loss
    values = jagged([torch.cat([torch.full((prompt,), 100.0), answer.float()]) for prompt, answer in rows])
    data = {
        "responses": jagged([torch.zeros(len(answer), dtype=torch.int64) for _, answer in rows]),
        "pair_weight": torch.tensor(weights),
        "row": torch.arange(len(rows)),
    }
    data = TensorDict(data, batch_size=len(rows))
    tu.assign_non_tensor(data, dp_size=dp_size)
    return {"values": values}, data


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_loss_is_that_of_equal_prefixes_and_of_ends_in_equal_parts(n_ranks):
    rng = np.random.default_rng(0)
    groups = [answers(rng, 1) for _ in range(4)]
    missing = {(1, 2), (3, 1), (3, 2), (3, 3)}  # (group, answer) that the rollout did not return
    n_pairs = 4 * N - len(missing)
    prefix, ends, wins = 0.0, 0.0, 0.0
    for number, group in enumerate(groups):
        teacher = group[0][1]
        for i, (_, student) in enumerate(group[1:], start=1):
            if (number, i) not in missing:
                shorter = min(len(teacher), len(student))
                for t in range(shorter):
                    prefix = prefix + torch.log1p((student[t] - teacher[t]).exp()) / shorter / n_pairs
                    wins += float(teacher[t] > student[t]) / shorter / n_pairs
                ends = ends + torch.log1p((student[-1] - teacher[-1]).exp()) / n_pairs
    ((prefix + ends) / 2).backward()
    wanted = [[values.grad for _, values in group] for group in groups]

    total, metrics = 0.0, {}
    for group in groups:
        for _, values in group:
            values.grad = None
    loss = partial(prefix_discriminator_loss, N + 1)
    for number, group in enumerate(groups):  # a micro-batch each, on one rank or the other
        weights = [0.0] + [0.0 if (number, i) in missing else 1 / n_pairs for i in range(1, N + 1)]
        part, found = loss(*micro_batch(group, weights, n_ranks))
        (part / n_ranks).backward()
        total += part.item() / n_ranks
        found.pop("row_scores")
        for name, metric in found.items():
            metrics[name] = metrics.get(name, 0.0) + metric.aggregate() / n_ranks
    assert total == pytest.approx(((prefix + ends) / 2).item(), rel=1e-5)
    for group, gradients in zip(groups, wanted, strict=True):
        for (_, values), gradient in zip(group, gradients, strict=True):
            gradient = torch.zeros_like(values) if gradient is None else gradient
            got = torch.zeros_like(values) if values.grad is None else values.grad
            torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-7)
    assert metrics["d_prefix_loss"] == pytest.approx(prefix.item(), rel=1e-5)
    assert metrics["d_prefix_acc"] == pytest.approx(wins, rel=1e-6)
    assert metrics["d_loss"] == pytest.approx(ends.item(), rel=1e-5)  # of whole answers, as with gad.credit=sequence


def test_prefixes_of_one_micro_batch_of_several_groups():
    rng = np.random.default_rng(1)
    rows = answers(rng, 3)
    weights = ([0.0] + [1 / 9] * N) * 3
    together, _ = prefix_discriminator_loss(N + 1, *micro_batch(rows, weights, 1))
    apart = [prefix_discriminator_loss(N + 1, *micro_batch(rows[i : i + 4], weights[:4], 1))[0] for i in (0, 4, 8)]
    assert together.item() == pytest.approx(sum(apart).item(), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_token_credit_equals_a_loop_over_tokens(gamma):
    rng = np.random.default_rng(2)
    sizes = {"a": [4, 1, 6], "b": [3], "c": [], "d": [2, 5]}  # tokens of the answers; c failed entirely
    groups = [Group(uid, 3, [Row(f"{uid}_{i}_0", 9) for i in range(len(part))]) for uid, part in sizes.items()]
    values = {f"{uid}_{i}_0": rng.normal(size=size + 1) for uid, part in sizes.items() for i, size in enumerate(part)}
    got = token_credit(groups, {key: torch.tensor(part) for key, part in values.items()}, gamma)
    assert set(got) == set(values)
    for uid, part in sizes.items():
        delta = [
            [values[f"{uid}_{i}_0"][k + 1] - values[f"{uid}_{i}_0"][k] for k in range(s)] for i, s in enumerate(part)
        ]
        centred = [
            [row[k] - np.mean([other[k] for other in delta if len(other) > k]) for k in range(len(row))]
            for row in delta
        ]
        for i, row in enumerate(centred):
            expected = [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
            assert got[f"{uid}_{i}_0"].tolist() == pytest.approx(expected, abs=1e-6)
            assert got[f"{uid}_{i}_0"].dtype == torch.float32


def test_credit_of_two_answers_by_hand():
    groups = [Group("u", 2, [Row("u_0_0", 3), Row("u_1_0", 2)])]
    # deltas (1, 2) and (3,): centred at the first token by 2 -> (-1, 0) and (1,); the second has one answer
    values = {"u_0_0": torch.tensor([5.0, 6.0, 8.0]), "u_1_0": torch.tensor([5.0, 8.0])}
    got = token_credit(groups, values, gamma=0.5)
    assert got["u_0_0"].tolist() == [-1.0, 0.0] and got["u_1_0"].tolist() == [1.0]


def test_an_offset_of_each_position_changes_no_advantage():
    rng = np.random.default_rng(3)
    groups = [Group("u", 2, [Row("u_0_0", 9), Row("u_1_0", 9)])]
    values = {key: torch.tensor(rng.normal(size=size)) for key, size in (("u_0_0", 5), ("u_1_0", 7))}
    offsets = torch.tensor(rng.normal(size=7))
    moved = {key: part + offsets[: len(part)] for key, part in values.items()}
    plain, shifted = (token_credit(groups, part, 0.9) for part in (values, moved))
    alone = slice(4, None)  # from the fifth token on, one answer is alone and has no credit
    assert not shifted["u_1_0"][alone].any() and math.isfinite(float(plain["u_1_0"].sum()))
    for key in values:
        torch.testing.assert_close(plain[key], shifted[key], rtol=0, atol=1e-6)

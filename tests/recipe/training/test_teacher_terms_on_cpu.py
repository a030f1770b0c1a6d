"""The teacher's answers in the actor's update (recipe/gad/training/teacher_terms.py): expected values by hand or
in float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from recipe.gad.training.rows import Group, Row
from recipe.gad.training.teacher_terms import actor_row_weights, blank_fields, group_advantages, loss_with_teacher
from verl.utils import tensordict_utils as tu
from verl.workers.actor.dp_actor import on_policy_loss
from verl.workers.config import ActorConfig

# ---------------------------------------------------------------------- rows


def groups_and_tokens():
    """Three prompts with two samples each, and the tokens of the answers; b lacks a sample, c failed entirely."""
    groups = [Group("a", 2, [Row("a_0_0", 9), Row("a_1_0", 9)], 9), Group("b", 2, [Row("b_1_0", 9)], 9), Group("c", 2)]
    tokens = {
        **{"a_teacher_0": 4, "a_0_0": 3, "a_1_0": 5},
        **{"b_teacher_0": 6, "b_1_0": 2, "b_filler_0": 0},
        **{"c_teacher_0": 0, "c_filler_0": 0, "c_filler_1": 0},
    }
    return groups, tokens


def test_a_teachers_token_weighs_one_over_the_teachers_tokens_of_its_optimizer_step():
    groups, tokens = groups_and_tokens()
    weights = actor_row_weights(groups, [[[0, 1], [2]]], tokens, "token-mean", teacher_in_group=False)
    assert list(weights) == list(tokens)
    assert {key: row.imitation for key, row in weights.items() if row.imitation} == {
        "a_teacher_0": 1 / 10,
        "b_teacher_0": 1 / 10,
    }
    assert {row.policy for row in weights.values()} == {1.0}


def test_the_weights_do_not_depend_on_how_an_optimizer_step_is_spread_over_ranks():
    groups, tokens = groups_and_tokens()
    one = actor_row_weights(groups, [[[0, 1], [2]]], tokens, "token-mean", teacher_in_group=True)
    two = actor_row_weights(groups, [[[1], [2]], [[0], []]], tokens, "token-mean", teacher_in_group=True)
    assert one == two
    assert list(two)[0] == "b_teacher_0" and list(two)[-1] == "a_1_0"  # rank 0 first


@pytest.mark.parametrize(
    ("mode", "share"),
    [
        ("token-mean", 10 / 20),  # 3 + 5 + 2 students' tokens, 4 + 6 teachers'
        ("seq-mean-token-mean", 4 / 6),  # stock counts n answers per prompt, missing ones included
        ("seq-mean-token-sum", 4 / 6),
        ("seq-mean-token-sum-norm", 4 / 6),
        ("token-sum", 1.0),
    ],
)
def test_with_the_teacher_in_the_group_the_policy_term_is_a_mean_over_all_its_answers(mode, share):
    groups, tokens = groups_and_tokens()
    weights = actor_row_weights(groups, [[[0, 1], [2]]], tokens, mode, teacher_in_group=True)
    assert {weights[key].policy for key in tokens if key[0] in "ab"} == {share}


def test_a_teacher_whose_prompt_has_no_students_is_imitated_but_in_no_group():
    groups, tokens = groups_and_tokens()
    tokens["c_teacher_0"] = 5
    weights = actor_row_weights(groups, [[[0, 1, 2]]], tokens, "token-mean", teacher_in_group=True)
    assert weights["c_teacher_0"] == (1 / 15, 10 / 20)
    weights = actor_row_weights(groups, [[[0, 1, 2]]], tokens, "seq-mean-token-mean", teacher_in_group=True)
    assert weights["c_teacher_0"] == (1 / 15, 6 / 8)


@pytest.mark.parametrize("by_std", [True, False])
def test_group_advantages_are_those_of_grpo_with_one_more_sample(by_std):
    groups, _ = groups_and_tokens()
    scores = {"a_teacher_0": 1000.5, "a_0_0": 1000.0, "a_1_0": 998.5, "b_teacher_0": 2.0, "b_1_0": 1.0}
    got = group_advantages(groups, {**scores, "b_filler_0": 9.0, "c_teacher_0": 7.0}, by_std)
    # a: mean 999 2/3, deviations 5/6, 1/3, -7/6, variance (25 + 4 + 49) / 36 / 2 = 13/12; b: +-1/2, variance 1/2
    a, b = (math.sqrt(13 / 12) + 1e-6, math.sqrt(1 / 2) + 1e-6) if by_std else (1.0, 1.0)
    assert list(got) == list(scores)
    assert list(got.values()) == pytest.approx([5 / 6 / a, 1 / 3 / a, -7 / 6 / a, 0.5 / b, -0.5 / b], rel=1e-9)


def test_blank_fields_follow_the_students_and_count_no_token():
    student = {"advantages": torch.ones(2), "old_log_probs": torch.ones(2, dtype=torch.bfloat16), "uid": "u"}
    got = blank_fields(torch.tensor([1, 1, 0]), student, advantage=-0.5)
    assert {name: values.tolist() for name, values in got.items()} == {
        "advantages": [-0.5, -0.5, 0.0],
        "old_log_probs": [0.0, 0.0, 0.0],
        "loss_mask": [0, 0, 0],
    }
    assert got["old_log_probs"].dtype == torch.bfloat16 and got["loss_mask"].dtype == torch.int64


# ---------------------------------------------------------------------- the loss


def teacher_batch(seed=0, roles="TSSSTSSS-", n_ranks=1):
    """Rows of an optimizer step: teachers T, students S, fillers -; on 1 or 2 ranks with 2 micro-batches each.

    Returns (float64 log-probs that carry gradients, rows as dicts, micro-batches as lists of rows, per rank).
    """
    rng = np.random.default_rng(seed)
    rows, log_probs = [], []
    for role in roles:
        prompt, answer = rng.integers(1, 4), rng.integers(2, 6)
        rows.append({"role": role, "prompt": prompt, "answer": answer, "advantage": rng.normal(), "ref": -1.3})
        log_probs.append(torch.tensor(-rng.random(answer) * 3, dtype=torch.float64, requires_grad=True))
    order = list(rng.permutation(len(rows)))
    cut = -(-len(order) // (2 * n_ranks))
    micro = [order[i : i + cut] for i in range(0, len(order), cut)]
    return log_probs, rows, [micro[i::n_ranks] for i in range(n_ranks)]


def micro_batch(rows, indices, log_probs, policy_weight, dp_size):
    """A micro-batch as the engine makes it: (model_output, data), jagged, float32."""
    picked = [rows[i] for i in indices]
    teacher_tokens = sum(row["answer"] for row in rows if row["role"] == "T")
    student_tokens = sum(row["answer"] for row in rows if row["role"] == "S")

    def jagged(values):
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    # the value at a position is the log-probability of the next token, so an answer's begin at the prompt's last one
    output = [
        torch.cat([torch.zeros(row["prompt"] - 1), log_probs[i].float(), torch.zeros(1)])
        for i, row in zip(indices, picked, strict=True)
    ]
    masks = [torch.full((row["answer"],), int(row["role"] != "-")) for row in picked]
    data = {
        "prompts": jagged([torch.zeros(row["prompt"], dtype=torch.int64) for row in picked]),
        "responses": jagged([torch.zeros_like(mask) for mask in masks]),
        "response_mask": jagged(masks),
        "advantages": jagged([row["advantage"] * mask.float() for row, mask in zip(picked, masks, strict=True)]),
        "ref_log_prob": jagged([row["ref"] * mask.float() for row, mask in zip(picked, masks, strict=True)]),
        "imitation_weight": torch.tensor([(row["role"] == "T") / teacher_tokens for row in picked]),
        "policy_weight": torch.full((len(picked),), policy_weight),
    }
    data = TensorDict(data, batch_size=len(picked))
    counts = {"dp_size": dp_size, "batch_num_tokens": student_tokens, "global_batch_size": 6}
    tu.assign_non_tensor(data, **counts)
    return {"log_probs": jagged(output)}, data


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("coef", [0.0, 0.4])
def test_loss_with_teacher_equals_float64_sums_over_each_terms_own_tokens(coef, in_group, n_ranks):
    log_probs, rows, ranks = teacher_batch(n_ranks=n_ranks)
    students = [i for i, row in enumerate(rows) if row["role"] == "S"]
    teachers = [i for i, row in enumerate(rows) if row["role"] == "T"]
    n_students, n_teachers = (sum(rows[i]["answer"] for i in part) for part in (students, teachers))
    n_policy = n_students + (n_teachers if in_group else 0)
    expected = sum(
        -rows[i]["advantage"] * (log_probs[i] - log_probs[i].detach()).exp().sum() / n_policy
        for i in students + (teachers if in_group else [])
    )
    for i in students:  # the KL stays a mean over the students' tokens
        gap = rows[i]["ref"] - log_probs[i]
        expected = expected + 0.3 * (gap.exp() - gap - 1).sum() / n_students
    nll = -sum(log_probs[i].sum() for i in teachers) / n_teachers
    expected = expected + coef * nll
    expected.backward()
    gradients = [values.grad.clone() if values.grad is not None else None for values in log_probs]

    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=3,
        ppo_micro_batch_size_per_gpu=1,
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="low_var_kl",
    )
    loss = partial(
        loss_with_teacher, config, policy_loss=on_policy_loss, imitation_coef=coef, teacher_in_group=in_group
    )
    for values in log_probs:
        values.grad = None
    total, metrics = 0.0, {}
    for micro_batches in ranks:
        for indices in micro_batches:
            part, found = loss(*micro_batch(rows, indices, log_probs, n_students / n_policy, n_ranks))
            (part / n_ranks).backward()  # engines average gradients over ranks
            total += part.item() / n_ranks
            for name, metric in found.items():
                metrics[name] = metrics.get(name, 0.0) + getattr(metric, "aggregate", lambda: 0.0)() / n_ranks
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for i, (values, wanted) in enumerate(zip(log_probs, gradients, strict=True)):
        if wanted is None:
            assert values.grad is None or not values.grad.any(), rows[i]
        else:
            torch.testing.assert_close(values.grad, wanted, rtol=1e-5, atol=1e-7)
    assert ("imitation_loss" in metrics, "teacher_pg_loss" in metrics) == (coef > 0, in_group)
    if coef:
        assert metrics["imitation_loss"] == pytest.approx(nll.item(), rel=1e-6)
    if in_group:
        wanted = -sum(rows[i]["advantage"] * rows[i]["answer"] for i in teachers) / n_policy
        assert metrics["teacher_pg_loss"] == pytest.approx(wanted, rel=1e-5)

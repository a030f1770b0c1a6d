"""All teacher answers of a prompt in D's update (recipe/gad/training/teachers.py), against a loop over pairs."""

import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from recipe.gad.training import rows as gad_rows
from recipe.gad.training.rows import Group, Row
from recipe.gad.training.teachers import Teachers
from recipe.gad.training.trajectory import build_teacher_trajectory
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.critic.dp_critic import discriminator_loss

ANSWERS = [["a0"], ["b0", "b1", "b2"], ["c0", "c1"], ["d0", "d1", "d2"]]
"""Teacher answers of four prompts."""
STUDENTS = [2, 2, 1, 0]
"""Student answers that the rollout has delivered, of n = 2."""


def teachers(compare, answers=ANSWERS):
    """Teachers of rows with ``answers``; answer "b1" has the token ids [98, 1] and the column "one"."""
    names = ["zero", "one", "two"]
    cells = [[{"teacher": names[int(a[1])], "text": a, "ids": [ord(a[0]), int(a[1])]} for a in row] for row in answers]
    dataset = SimpleNamespace(dataframe=datasets.Dataset.from_dict({"teacher_answers": cells}))
    config = {"gad": {"teacher_answers": compare}, "data": {"seed": 3, "teacher_key": names}}
    return Teachers.of(OmegaConf.create(config), dataset)


def drawn_step(compare, step=1):
    """Teachers after the draw of a step, their groups, and key -> trajectory of the drawn answers."""
    found = teachers(compare)
    batch = tu.get_tensordict({"index": np.arange(4), "uid": np.array(list("abcd"), dtype=object)})
    tu.assign_non_tensor_stack(batch, "reward_model", [{"style": "teacher", "ground_truth": ""}] * 4)
    batch = found.draw(batch, step)
    ids = [torch.tensor(list(answer)) for answer in batch["teacher_response_ids"]]
    drawn = gad_rows.teacher_rows("abcd", [torch.tensor([5, 6])] * 4, [answer.tolist() for answer in ids])
    groups = [
        Group(uid, 2, [Row(f"{uid}_{i}_0", 9) for i in range(count)], teacher_tokens=4)
        for uid, count in zip("abcd", STUDENTS, strict=True)
    ]
    return found, groups, drawn, list(batch["teacher_response"])


def test_one_answer_is_compared_by_default_as_if_the_others_were_not_there():
    found, groups, drawn, _ = drawn_step("one")
    assert found.most == 1 and found.loss is discriminator_loss
    assert found.other_rows(groups, drawn, 0) == {} and found.others == {}
    assert found.with_others(groups) == groups and found.shares(groups) == {}
    single = teachers("all", [["a0"], ["b0"]])
    assert single.most == 1 and single.loss is discriminator_loss


def test_the_draw_is_the_same_whether_one_answer_is_compared_or_all():
    for step in range(1, 9):
        assert drawn_step("one", step)[3] == drawn_step("all", step)[3]


def test_a_group_has_the_drawn_answer_then_the_others_then_fillers():
    found, groups, drawn, texts = drawn_step("all")
    rows = drawn | found.other_rows(groups, drawn, eos_token_id=7)
    for group, answers, text in zip(found.with_others(groups), ANSWERS, texts, strict=True):
        keys = [row.key for row in group.rows()]
        assert keys[:3] == [f"{group.uid}_teacher_{i}" for i in range(3)] and len(keys) == 5
        assert [row.key for row in group.students] == keys[3 : 3 + len(group.students)]
        expected = [text, *(answer for answer in answers if answer != text)]
        for i, answer in enumerate(expected):
            trajectory = build_teacher_trajectory(torch.tensor([5, 6]), torch.tensor([ord(answer[0]), int(answer[1])]))
            assert all(torch.equal(rows[keys[i]][name], value) for name, value in trajectory.items())
        for key in keys[len(expected) : 3]:
            assert rows[key]["input_ids"].tolist() == [7, 7] and not rows[key]["loss_mask"].any()
        assert [row.tokens for row in group.others] == [4] * (len(expected) - 1) + [2] * (3 - len(expected))
        assert group.tokens == sum(row.tokens for row in group.rows())


def reference(score_of):
    """Loss, metrics and gradient in float64: a loop over pairs. A prompt's weight is its share of the real students."""
    names = ("d_loss", "d_acc", "score_gap", "student_value_mean", "teacher_value_mean")
    sums, gradient = dict.fromkeys(names, 0.0), dict.fromkeys(score_of, 0.0)
    for uid, answers, count in zip("abcd", ANSWERS, STUDENTS, strict=True):
        for j in range(len(answers)):
            for i in range(count):
                teacher, student = f"{uid}_teacher_{j}", f"{uid}_{i}_0"
                gap, weight = score_of[teacher] - score_of[student], count / sum(STUDENTS) / (len(answers) * count)
                sums["d_loss"] += weight * math.log1p(math.exp(-gap))
                sums["d_acc"] += weight * (gap > 0)
                sums["score_gap"] += weight * gap
                sums["student_value_mean"] += weight * score_of[student]
                sums["teacher_value_mean"] += weight * score_of[teacher]
                gradient[student] += weight / (1 + math.exp(gap))
                gradient[teacher] -= weight / (1 + math.exp(gap))
    return sums, gradient


@pytest.mark.parametrize("layout", ["one micro-batch", "micro-batches", "two ranks"])
def test_weights_are_exact_for_prompts_with_different_numbers_of_answers(layout):
    found, groups, drawn, _ = drawn_step("all")
    found.other_rows(groups, drawn, eos_token_id=7)
    groups = found.with_others(groups)
    ranks = [[[0, 3]], [[1, 2]]] if layout == "two ranks" else [[[0, 1, 2, 3]]]
    weights = gad_rows.pair_weights(groups, ranks) | found.shares(groups)
    keys = [row.key for rank in ranks for part in rank for i in part for row in groups[i].rows()]
    assert list(weights) == keys, "the order in which rows go to the ranks"
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(keys), generator=generator)
    expected, expected_gradient = reference(dict(zip(keys, scores.double().tolist(), strict=True)))

    fields = TensorDict(gad_rows.update_fields(weights), batch_size=len(keys))
    size = {"one micro-batch": 20, "micro-batches": 5, "two ranks": 10}[layout]
    losses, by_micro_batch, gradients, seen = [], [], [], []
    for start in range(0, len(keys), size):
        part, data = scores[start : start + size].clone().requires_grad_(), fields[start : start + size]
        data.set_non_tensor("dp_size", len(ranks))
        values = torch.nested.as_nested_tensor([torch.stack([torch.tensor(9.0), x]) for x in part], layout=torch.jagged)
        loss, metrics = found.loss(group_size=5, model_output={"values": values}, data=data)
        gradients += (torch.autograd.grad(loss, part)[0] / len(ranks)).tolist()
        seen += metrics.pop("row_scores")
        losses.append(loss.item() / len(ranks))
        by_micro_batch.append(metrics)
    assert sum(losses) == pytest.approx(expected["d_loss"], rel=1e-6)
    assert gradients == pytest.approx([expected_gradient[key] for key in keys], rel=1e-5, abs=1e-8)
    assert seen == [(row, pytest.approx(score)) for row, score in enumerate(scores.tolist())]
    for name, value in expected.items():
        of_it = [metrics[name] for metrics in by_micro_batch]
        got = Metric.aggregate_dp(of_it) if layout == "two ranks" else sum(metric.aggregate() for metric in of_it)
        assert got == pytest.approx(value, rel=1e-5), name


def test_the_accuracy_of_each_teacher_is_over_all_its_pairs():
    found, groups, drawn, _ = drawn_step("all")
    found.other_rows(groups, drawn, eos_token_id=7)
    groups = found.with_others(groups)
    keys = [row.key for group in groups for row in group.rows()]
    score_of = dict(zip(keys, torch.randn(len(keys), generator=torch.Generator().manual_seed(1)).tolist(), strict=True))
    wins = {"zero": [], "one": [], "two": []}
    for group, answers in zip(groups, ANSWERS, strict=True):
        texts = [found.drawn[group.uid], *(other["teacher"] for other in found.others[group.uid])]
        assert sorted(texts) == sorted(list(wins)[int(answer[1])] for answer in answers)
        for i, teacher in enumerate(texts):
            wins[teacher] += [score_of[f"{group.uid}_teacher_{i}"] > score_of[row.key] for row in group.students]
    expected = {f"critic/d_acc/{teacher}": np.mean(of_it) for teacher, of_it in wins.items()}
    assert found.metrics(groups, score_of) == pytest.approx(expected)


def test_a_step_that_draws_twice_keeps_what_it_has_drawn():
    found = teachers("all")
    for uid, index in (("a", 0), ("b", 1)):
        batch = tu.get_tensordict({"index": np.array([index]), "uid": np.array([uid], dtype=object)})
        tu.assign_non_tensor_stack(batch, "reward_model", [{}])
        found.draw(batch, 1)
    assert set(found.drawn) == set(found.others) == {"a", "b"}
    assert len(found.others["a"]) == 0 and len(found.others["b"]) == 2

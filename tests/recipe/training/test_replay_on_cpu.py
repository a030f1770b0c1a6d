"""Groups of earlier steps in D's updates (recipe/gad/training/replay.py): by hand, by counting, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from recipe.gad.training import rows as gad_rows
from recipe.gad.training.replay import PastGroup, Replay, pair_metrics, past_rows, spread_both
from recipe.gad.training.rows import Group, Row
from recipe.gad.training.state import load_state, save_state


def ids(*numbers):
    return torch.tensor(numbers)


def group(number):
    return PastGroup.of(ids(number), ids(number, 1), [ids(number, 2, 3), ids(number, 4)])


def numbers(groups):
    return [int(group.prompt) for group in groups]


def test_a_group_becomes_rows_and_a_missing_student_a_filler():
    past = [group(7), PastGroup.of(ids(8), ids(8, 1), [ids(8, 2)])]
    groups, rows = past_rows(past, n=2, eos_token_id=0)
    assert [row.tokens for row in groups[0].rows()] == [3, 4, 3]
    assert [row.tokens for row in groups[1].rows()] == [3, 3, 2]
    assert [row.key for past_group in groups for row in past_group.rows()] == list(rows)
    assert [row["input_ids"].tolist() for row in rows.values()] == [
        *([7, 7, 1], [7, 7, 2, 3], [7, 7, 4]),
        *([8, 8, 1], [8, 8, 2], [0, 0]),
    ]
    assert all(row["input_ids"].dtype == torch.int64 for row in rows.values())
    weights = gad_rows.pair_weights(groups, [[[0, 1]]])
    assert list(weights.values()) == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3, 0])


def test_past_groups_join_every_optimizer_step_of_the_fresh_ones():
    update = SimpleNamespace(ppo_mini_batch_size=4, shuffle=False)
    sizes = [10] * 8 + [10] * 4  # fresh, past
    assert spread_both(sizes[:8], 8, update, 2, 1) == gad_rows.spread(sizes[:8], update, 2, 1)  # off
    ranks = spread_both(sizes, 8, update, 2, 1)
    for mini_batch, fresh, past in ((0, {0, 1, 2, 3}, {8, 9}), (1, {4, 5, 6, 7}, {10, 11})):
        parts = [rank[mini_batch] for rank in ranks]
        assert [len(part) for part in parts] == [3, 3]
        assert {i for part in parts for i in part} == fresh | past
        assert all(len(past & set(part)) == 1 for part in parts)


def test_the_buffer_is_a_uniform_sample_of_all_steps():
    kept = torch.zeros(40)
    for seed in range(2000):
        replay = Replay(2, 10, seed)
        for step in range(8):
            replay.add(step, [group(5 * step + i) for i in range(5)])
        assert len(set(numbers(replay.groups))) == 10 and replay.seen == 40
        kept[numbers(replay.groups)] += 1
    # each of 40 is kept with probability 1/4: 500 times, standard deviation 19.4
    assert (kept - 500).abs().max() < 4 * 19.4


def test_a_draw_holds_different_groups_of_earlier_steps_and_depends_on_seed_and_step_alone():
    replay, same, other = (Replay(3, 100, seed) for seed in (1, 1, 2))
    assert replay.draw(1) == []
    for buffer in (replay, same, other):
        buffer.add(1, [group(i) for i in range(2)])
        assert buffer.draw(2) == [], "fewer than a step replays"
        buffer.add(2, [group(i) for i in range(2, 50)])
    drawn = numbers(replay.draw(3))
    assert len(set(drawn)) == 3 and drawn == numbers(same.draw(3)) == numbers(replay.draw(3))
    assert drawn != numbers(other.draw(3)) and drawn != numbers(replay.draw(4))


def test_a_resumed_run_keeps_and_draws_the_same(tmp_path):
    replay, resumed = Replay(3, 10, 1), Replay(3, 10, 1)
    replay.add(1, [group(i) for i in range(30)])
    save_state(tmp_path, {"replay": replay.state_dict()})
    resumed.load_state_dict(load_state(tmp_path, {"replay"})["replay"])
    for buffer in (replay, resumed):
        buffer.add(2, [group(i) for i in range(30, 60)])
    assert numbers(replay.groups) == numbers(resumed.groups) and replay.seen == resumed.seen == 60
    assert numbers(replay.draw(3)) == numbers(resumed.draw(3))
    assert resumed.groups[0].students[0].tolist() == replay.groups[0].students[0].tolist()


def test_metrics_of_pairs_leave_out_other_groups():
    groups = [Group("a", 2, [Row("a_0_0", 3), Row("a_1_0", 3)]), Group("b", 2, [Row("b_0_0", 3)]), Group("c", 2)]
    scores = {"a_teacher_0": 1.0, "a_0_0": 0.5, "a_1_0": 1.0, "b_teacher_0": 0.0, "b_0_0": 2.0, "x_0_0": 9.0}
    metrics = pair_metrics(groups, scores)
    loss = sum(math.log1p(math.exp(-gap)) for gap in (0.5, 0.0, -2.0)) / 3
    assert metrics["d_acc"] == pytest.approx(1.5 / 3) and metrics["d_loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["score_gap"] == pytest.approx(-0.5) and metrics["teacher_value_mean"] == pytest.approx(2 / 3)

"""The rows of a GAD step (recipe/gad/training/rows.py): expected values by hand, nothing of Ray."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from recipe.gad.training import rows as gad_rows
from recipe.gad.training.rows import Group, Row
from recipe.gad.training.trajectory import filler_key, split_key, teacher_key
from verl.trainer.ppo.v1 import trainer_gad


def update(mini_batch, shuffle=False, seed=1):
    return SimpleNamespace(ppo_mini_batch_size=mini_batch, shuffle=shuffle, data_loader_seed=seed)


def students(*keys):
    """Rows of 10, 11, 12, ... tokens."""
    return [Row(key, 10 + i) for i, key in enumerate(keys)]


# ---------------------------------------------------------------------- keys and order


def test_a_key_names_prompt_sample_and_output_even_if_the_uid_has_underscores():
    assert split_key("a_b_3_0") == ("a_b", 3, 0)
    assert len({"u_0_0", teacher_key("u"), filler_key("u", 0), filler_key("u", 1)}) == 4
    assert teacher_key("u") == "u_teacher_0"


def test_rows_are_in_the_order_of_the_data_then_of_the_samples():
    submitted = {"b": 0, "a": 1}
    keys = ["a_10_0", "a_2_0", "x_0_0", "b_1_0", "b_0_1", "b_0_0"]
    ordered = sorted(keys, key=lambda key: gad_rows.sample_order(key, submitted))
    assert ordered == ["b_0_0", "b_0_1", "b_1_0", "a_2_0", "a_10_0", "x_0_0"]


# ---------------------------------------------------------------------- groups


def test_a_group_is_the_teacher_then_its_students_then_fillers_of_two_tokens():
    group = Group("u", 3, [Row("u_0_0", 7), Row("u_2_0", 9)], teacher_tokens=5)
    assert group.rows() == [("u_teacher_0", 5), ("u_0_0", 7), ("u_2_0", 9), ("u_filler_0", 2)]


def test_every_prompt_has_a_group_and_failed_ones_come_last():
    rows = students("b_0_0", "b_1_0", "c_1_0")
    groups = gad_rows.group_rows(rows, {"a": 0, "b": 1, "c": 2}, n=2, n_prompts=3)
    assert [group.uid for group in groups] == ["b", "c", "a"]
    assert [group.students for group in groups] == [rows[:2], rows[2:], []]
    assert groups[2].rows() == [("a_teacher_0", 0), ("a_filler_0", 2), ("a_filler_1", 2)]


def test_the_number_of_groups_is_that_of_the_batch_even_if_more_prompts_were_sent():
    groups = gad_rows.group_rows(students("b_0_0"), ["a", "b", "c"], n=1, n_prompts=2)
    assert [group.uid for group in groups] == ["b", "a"]


def test_several_outputs_for_one_sample_are_refused_with_a_fix():
    with pytest.raises(ValueError, match=r"prompt u: 3 student rows.*rollout\.n=2.*Fix:.*single_turn_agent"):
        gad_rows.group_rows(students("u_0_0", "u_0_1", "u_1_0"), ["u"], n=2, n_prompts=1)


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred D", "shifted D"])
def test_the_only_student_left_of_a_prompt_gets_no_advantage_and_the_others_keep_their_digits(offset):
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    uids = np.array(["a", "a", "a", "b", "c", "c"])  # of three samples b kept one and c two
    scores = torch.tensor([-7.0, -7.5, -6.5, -7.0, -7.25, -6.0]) + offset

    def advantages(scores):
        return compute_grpo_outcome_advantage(scores.clone().unsqueeze(-1), torch.ones(6, 1), uids)[0].squeeze(-1)

    got, stock = (advantages(s) for s in (gad_rows.without_lone_answers(scores, uids.tolist(), 3), scores))
    assert got[3] == 0.0 and stock[3].item() == pytest.approx(-7.0 + offset, rel=1e-5)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(got[others], stock[others])
    for members in ([0, 1, 2], [4, 5]):  # by hand, in float64
        group = scores[members].double()
        torch.testing.assert_close(got[members].double(), (group - group.mean()) / group.std(), rtol=1e-5, atol=1e-5)


def test_with_one_sample_a_prompt_every_score_stays():
    scores = torch.tensor([-7.0, 3.0])
    assert torch.equal(gad_rows.without_lone_answers(scores, ["a", "b"], n=1), scores)
    assert gad_rows.without_lone_answers(scores, ["a", ""], n=2).tolist() == [0.0, 3.0], "padding stays as it is"


def test_a_filler_is_seen_by_no_loss():
    row = gad_rows.filler(eos_token_id=9)
    assert row["input_ids"].tolist() == [9, 9] and row["position_ids"].tolist() == [0, 1]
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [0]
    assert row["response_mask"] is not row["loss_mask"]


def test_teacher_rows_have_the_prompt_of_the_student_and_the_answer_of_the_teacher():
    rows = gad_rows.teacher_rows(["a", "b"], [torch.tensor([1, 2]), torch.tensor([3])], [[4], [5, 6]])
    assert {key: row["input_ids"].tolist() for key, row in rows.items()} == {
        "a_teacher_0": [1, 2, 4],
        "b_teacher_0": [3, 5, 6],
    }
    with pytest.raises(ValueError):
        gad_rows.teacher_rows(["a"], [torch.tensor([1])], [])


# ---------------------------------------------------------------------- ranks, optimizer steps, weights


def test_one_rank_gets_the_mini_batches_in_the_order_of_the_data():
    assert gad_rows.spread([5, 5, 5, 5, 5], update(2), n_ranks=1, step=1) == [[[0, 1], [2, 3], [4]]]


def test_ranks_share_a_mini_batch_equally_and_balance_its_tokens():
    ranks = gad_rows.spread([100, 1, 1, 100, 3, 3, 3, 3], update(4), n_ranks=2, step=1)
    assert [[len(part) for part in rank] for rank in ranks] == [[2, 2], [2, 2]]
    for mini_batch, expected in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        assert sorted(i for rank in ranks for i in rank[mini_batch]) == expected
    assert all(len({0, 3} & set(rank[0])) == 1 for rank in ranks), "each rank has one of the two long units"


def test_shuffled_mini_batches_depend_on_seed_and_step_and_not_on_the_ranks():
    def mini_batches(n_ranks, **kwargs):
        ranks = gad_rows.spread([4] * 12, update(4, shuffle=True, seed=kwargs.get("seed", 1)), n_ranks, kwargs["step"])
        return [sorted(i for rank in ranks for i in rank[k]) for k in range(3)]

    assert mini_batches(1, step=1) == mini_batches(2, step=1) == mini_batches(4, step=1)
    assert sorted(sum(mini_batches(1, step=1), [])) == list(range(12))
    others = [mini_batches(1, step=2), mini_batches(1, step=1, seed=2), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]
    assert mini_batches(1, step=1) not in others


def test_a_pair_weighs_one_over_the_real_pairs_of_its_optimizer_step_over_all_ranks():
    groups = gad_rows.group_rows(students("a_0_0", "a_1_0", "b_1_0", "c_0_0"), "abcd", n=2, n_prompts=4)
    # the first optimizer step is a on rank 0 and b on rank 1: 3 pairs; the second is c and d: 1 pair
    weights = gad_rows.pair_weights(groups, [[[0], [2]], [[1], [3]]])
    assert list(weights.items()) == [
        *[("a_teacher_0", 0.0), ("a_0_0", 1 / 3), ("a_1_0", 1 / 3)],
        *[("c_teacher_0", 0.0), ("c_0_0", 1.0), ("c_filler_0", 0.0)],
        *[("b_teacher_0", 0.0), ("b_1_0", 1 / 3), ("b_filler_0", 0.0)],
        *[("d_teacher_0", 0.0), ("d_filler_0", 0.0), ("d_filler_1", 0.0)],
    ]


def test_an_optimizer_step_without_any_pair_weighs_nothing():
    groups = gad_rows.group_rows(students("a_0_0"), "ab", n=1, n_prompts=2)
    assert list(gad_rows.pair_weights(groups, [[[0], [1]]]).values()) == [0.0, 1.0, 0.0, 0.0]


def test_update_fields_follow_the_order_of_the_weights():
    fields = gad_rows.update_fields({"u_teacher_0": 0.0, "u_0_0": 0.5})
    assert {name: value.tolist() for name, value in fields.items()} == {"pair_weight": [0.0, 0.5], "row": [0, 1]}


# ---------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("stage", "objective", "name"),
    [
        ("seqkd", "imitation", "PPOTrainerSeqKD"),
        ("soda", "dpo", "PPOTrainerSODA"),
        ("online_dpo", "dpo", "PPOTrainerOnlineDPO"),
        ("warmup", "imitation", "PPOTrainerWarmup"),
        ("gad", "policy_gradient", "PPOTrainerGAD"),
        ("gad", "imitation", "PPOTrainerWarmup"),
        ("warmup", "policy_gradient", "PPOTrainerGAD"),
    ],
)
def test_stage_and_objective_choose_the_class(stage, objective, name):
    config = OmegaConf.create({"gad": {"stage": stage, "actor_objective": objective}})
    assert type(trainer_gad.PPOTrainerGAD.__new__(trainer_gad.PPOTrainerGAD, config)).__name__ == name
    subclass = type("Derived", (trainer_gad.PPOTrainerGAD,), {})
    assert type(subclass.__new__(subclass, config)) is subclass, "a derived class is asked for by name"


def test_advantages_without_old_log_probs_leave_the_configuration_as_it_is(monkeypatch):
    algorithm = {"rollout_correction": {"rollout_is": None}, "gamma": 1.0}
    config = OmegaConf.create({"algorithm": algorithm, "gad": {"teacher_in_group": False, "credit": "sequence"}})
    trainer = trainer_gad.PPOTrainerGAD.__new__(trainer_gad.PPOTrainerGAD, config)
    trainer.config, seen = config, []
    monkeypatch.setattr(trainer_gad.PPOTrainerSync, "_compute_advantage", lambda self, *_: seen.append(self.config))
    for skips in (True, False):
        monkeypatch.setattr(trainer_gad.PPOTrainerGAD, "_skips_old_log_prob", lambda self, skips=skips: skips)
        trainer._compute_advantage(None, {})
    assert [view.algorithm.rollout_correction for view in seen] == [None, {"rollout_is": None}]
    assert seen[0].algorithm.gamma == 1.0 and seen[1] is config is trainer.config


# ---------------------------------------------------------------------- statistics


def test_teacher_lengths_count_answers_and_the_share_that_reached_the_limit():
    rows = gad_rows.teacher_rows("abcd", [torch.tensor([1, 1, 1])] * 4, [[2], [2, 2], [2] * 4, [2] * 5])
    assert gad_rows.teacher_length_metrics(rows, limit=4) == {
        "teacher_response_length/mean": 3.0,
        "teacher_response_length/max": 5.0,
        "teacher_response_length/min": 1.0,
        "teacher_response_length/cut_ratio": 0.5,
    }


def correlation(scores, lengths, uids):
    return gad_rows.correlation_within_prompts(torch.tensor(scores), torch.tensor(lengths), uids)


def test_prompts_of_different_length_and_level_do_not_matter():
    # deviations from the means of the groups: scores (-1, 1, 1, -1), lengths (-2, 2, 1, -1) -> 6 / sqrt(4 * 10)
    value = correlation([0.0, 2.0, 101.0, 99.0], [1, 5, 902, 900], ["a", "a", "b", "b"])
    assert value == pytest.approx(6 / np.sqrt(40))
    assert correlation([0.0, 2.0], [5, 1], ["a", "a"]) == pytest.approx(-1.0)


def test_one_group_is_pearson_in_any_order_of_rows():
    rng = np.random.default_rng(0)
    scores, lengths = rng.normal(size=24), rng.integers(1, 256, size=24)
    assert correlation(scores, lengths, ["a"] * 24) == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    uids = [f"p{i % 3}" for i in range(24)]
    order = rng.permutation(24)
    shuffled = correlation(scores[order], lengths[order], [uids[i] for i in order])
    assert shuffled == pytest.approx(correlation(scores, lengths, uids))


@pytest.mark.parametrize(
    ("scores", "lengths", "uids"),
    [
        ([0.5, 0.5], [1, 9], ["a", "a"]),  # D sees no difference
        ([0.1, 0.9], [4, 4], ["a", "a"]),
        ([0.1, 0.9], [4, 9], ["a", "b"]),  # nothing to compare within a prompt
        ([0.1], [4], ["a"]),
    ],
)
def test_undefined_without_differences(scores, lengths, uids):
    assert correlation(scores, lengths, uids) is None

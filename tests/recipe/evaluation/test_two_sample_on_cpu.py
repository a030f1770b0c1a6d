"""recipe/gad/evaluation/two_sample.py: known outcomes on synthetic answers, a real tiny model."""

import itertools
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy import stats

from recipe.gad.evaluation.intervals import cross_fitted_mean
from recipe.gad.evaluation.two_sample import run_two_sample_test, tokenize_pairs
from recipe.gad.quickstart.problem import LETTERS, STYLES, answer
from recipe.gad.run.two_sample import TwoSampleSettings
from recipe.gad.training.fresh import (
    Pair,
    accuracies,
    area_under_curve,
    batches_by_tokens,
    fresh_discriminator,
    halves,
    load_base,
    score,
)

PROMPTS = [" ".join(letters) for letters in itertools.permutations(LETTERS, 3)]
BATCH = 16


def answers_of(student_style: str, teacher_style: str, count: int, swap: bool = False) -> list[dict]:
    """``count`` prompts of the toy problem, answered by two independent draws."""
    rng = random.Random(1)
    rows = []
    for index, prompt in enumerate(random.Random(0).sample(PROMPTS, count)):
        texts = {"student": answer(prompt, student_style, rng), "teacher": answer(prompt, teacher_style, rng)}
        if swap:
            texts = {"student": texts["teacher"], "teacher": texts["student"]}
        rows.append(row(index, prompt, **texts))
    return rows


def row(index: int, prompt: str, student: str, teacher: str, student_cut=False, teacher_cut=False) -> dict:
    return {
        "index": index,
        "messages": [{"role": "user", "content": prompt}],
        "student": student,
        "teacher": teacher,
        "student_cut": student_cut,
        "teacher_cut": teacher_cut,
    }


@pytest.fixture(scope="module")
def model(tiny_problem):
    return str(tiny_problem / "model")


def run(answers, model, seeds=(0, 1, 2), **kwargs):
    options = {"lr": 3e-3, "epochs": 3, "batch_pairs": BATCH, **kwargs}
    return run_two_sample_test(answers, TwoSampleSettings(model=model, seeds=seeds, **options))


def test_two_draws_of_one_distribution_cannot_be_told_apart(model):
    count = 400
    result = run(answers_of("teacher", "teacher", count), model)
    bound = 3 * 0.5 / count**0.5  # three standard errors of a fair coin
    assert abs(result["accuracy"]["value"] - 0.5) < bound
    assert abs(result["auc"] - 0.5) < bound
    assert result["pairs"] == count


def test_two_styles_are_told_apart_whichever_is_called_the_teacher(model):
    forward = run(answers_of("base", "teacher", 200), model, seeds=(0,))
    backward = run(answers_of("base", "teacher", 200, swap=True), model, seeds=(0,))
    for result in (forward, backward):
        assert result["accuracy"]["low"] > 0.95
        assert result["auc"] > 0.97


def test_equal_texts_tie_at_one_half_exactly(model):
    answers = answers_of("teacher", "teacher", 60)
    for line in answers:
        line["student"] = line["teacher"]
    assert run(answers, model, seeds=(0,))["by_seed"] == [{"seed": 0, "accuracy": 0.5, "auc": pytest.approx(0.5)}]


def test_same_seed_same_numbers_and_the_spread_is_over_seeds(model):
    answers = answers_of("base", "teacher", 40)
    short = {"lr": 3e-4, "epochs": 1}
    first, second = run(answers, model, **short), run(answers, model, **short)
    assert first == second
    values = [line["accuracy"] for line in first["by_seed"]]
    assert first["accuracy"]["value"] == pytest.approx(np.mean(values))
    assert first["accuracy"]["low"] <= first["accuracy"]["value"] <= first["accuracy"]["high"]
    assert first["accuracy_std"] == pytest.approx(np.std(values, ddof=1))
    wins = np.array(first["wins_by_seed"])
    assert wins.shape == (3, 40) and wins.mean(axis=1) == pytest.approx(values)
    assert first["accuracy"] == asdict(cross_fitted_mean(range(40), wins, null=0.5))
    assert first["wins"] == pytest.approx(wins.mean(axis=0))
    assert len(set(values)) > 1


def test_inside_a_process_that_trains_the_numbers_are_the_same_and_its_random_state_stays(model):
    lines = answers_of("base", "teacher", 40)
    settings = TwoSampleSettings(model=model, seeds=(4, 5, 6), lr=3e-4, epochs=1)
    expected = [row["accuracy"] for row in run_two_sample_test(lines, settings)["by_seed"]]
    pairs = tokenize_pairs(lines, model)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    ranks = [accuracies(pairs, settings, settings.seeds[rank::2]) for rank in (0, 1)]
    assert ranks == [[pytest.approx(expected[0]), pytest.approx(expected[2])], [pytest.approx(expected[1])]]
    assert accuracies(pairs, settings, ()) == []
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_rows_of_one_prompt_count_as_one(model):
    """Every answer twice: the same verdicts, and no narrower interval than one verdict per prompt gives."""
    once = answers_of("base", "teacher", 20)
    result = run([line for line in once for _ in range(2)], model, seeds=(0, 1), lr=3e-4, epochs=1)
    wins = np.array(result["wins_by_seed"])
    assert wins.shape == (2, 40) and (wins[:, ::2] == wins[:, 1::2]).all()
    expected = cross_fitted_mean(range(20), wins[:, ::2], null=0.5)
    assert result["accuracy"]["p_value"] == pytest.approx(expected.p_value)
    assert result["accuracy"]["high"] == pytest.approx(min(expected.high, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("student", "truth"), [("teacher", 0.5), ("near", None)])
def test_the_interval_holds_the_truth(model, monkeypatch, student, truth):
    """40 data sets; the bound is the 1 % quantile of a binomial with probability 0.95, which 0.82 would miss."""
    mixed = {
        slot: [0.8 * t + 0.2 * b for t, b in zip(STYLES["teacher"][slot], STYLES["base"][slot], strict=True)]
        for slot in ("opener", "joiner", "filler", "closer")
    }
    monkeypatch.setitem(STYLES, "near", {**mixed, "in_order": 0.93})
    found = []
    for data_set in range(40):
        rng = random.Random(data_set)
        rows = [
            row(index, prompt, answer(prompt, student, rng), answer(prompt, "teacher", rng))
            for index, prompt in enumerate(rng.sample(PROMPTS, 60))
        ]
        found.append(run(rows, model)["accuracy"])
    mean = np.mean([accuracy["value"] for accuracy in found])
    assert mean == pytest.approx(truth or 0.66, abs=0.03)  # three standard errors: 0.063 / sqrt(40) each
    truth = truth or mean
    held = sum(accuracy["low"] <= truth <= accuracy["high"] for accuracy in found)
    assert held >= stats.binom.ppf(0.01, len(found), 0.95)


def test_scores_depend_neither_on_padding_nor_on_neighbours(model):
    discriminator = fresh_discriminator(load_base(model), seed=0)
    sequences = [pair.student for pair in tokenize_pairs(answers_of("base", "teacher", 30), model)]
    alone = torch.cat([score(discriminator, [ids]) for ids in sequences])
    assert len({len(ids) for ids in sequences}) > 1
    torch.testing.assert_close(score(discriminator, sequences), alone, rtol=0, atol=1e-6)
    assert alone.std() > 1e-3


def test_the_score_is_the_value_at_the_last_token(model):
    discriminator = fresh_discriminator(load_base(model), seed=0)
    [pair] = tokenize_pairs([row(0, "c a f", "well um c", "so a then f right")], model)
    values = discriminator(input_ids=torch.tensor([pair.student])).logits[0, :, 0]
    assert float(score(discriminator, [pair.student, pair.teacher])[0]) == pytest.approx(
        float(values[-1].detach()), abs=1e-6
    )


def test_answers_end_as_in_training(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    [whole, cut] = tokenize_pairs([row(0, "c a", "well", "so"), row(1, "c a", "well", "so", True, True)], model)
    assert tokenizer.convert_ids_to_tokens(whole.student) == "<bos> <user> c a <end> <assistant> well <end>".split()
    assert tokenizer.convert_ids_to_tokens(whole.teacher) == "<bos> <user> c a <end> <assistant> so <end>".split()
    assert (cut.student, cut.teacher) == (whole.student[:-1], whole.teacher[:-1])


def test_a_new_head_is_drawn_for_every_seed_and_the_base_stays(model):
    base = load_base(model)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    heads = [fresh_discriminator(base, seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_halves_share_no_prompt():
    pairs = [Pair(prompt=str(number // 3), student=[number], teacher=[]) for number in range(31)]
    first, second = halves(pairs, seed=0)
    assert {pairs[i].prompt for i in first}.isdisjoint(pairs[i].prompt for i in second)
    assert sorted(first + second) == list(range(31))
    assert len({pairs[i].prompt for i in first}) == 5  # of 11 prompts
    assert halves(pairs, seed=0) == (first, second)
    assert halves(pairs, seed=1) != (first, second)


def test_area_under_curve_counts_pairs():
    rng = np.random.default_rng(0)
    student, teacher = rng.integers(0, 5, 40), rng.integers(1, 7, 30)
    gap = teacher[:, None] - student[None, :]
    expected = (gap > 0).mean() + 0.5 * (gap == 0).mean()
    assert area_under_curve(torch.tensor(student).float(), torch.tensor(teacher).float()) == pytest.approx(expected)


def test_batches_stay_within_the_token_limit():
    lengths = [5, 3, 9, 2, 20, 1, 1]
    found = [list(batch) for batch in batches_by_tokens(lengths, max_tokens=10)]
    assert found == [[0, 1], [2], [3], [4], [5, 6]]  # 2 x 5; 9; 2; 20 alone above the limit; 2 x 1
    assert list(batches_by_tokens([], 10)) == []


def test_one_prompt_is_not_enough(model):
    with pytest.raises(ValueError, match="two different prompts"):
        run([row(0, "c a", "so", "well"), row(1, "c a", "so", "well")], model)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"epochs": 0}, {"batch_pairs": 0}, {"seeds": ()}])
def test_settings_out_of_range_are_refused(model, wrong):
    with pytest.raises(ValueError, match="two-sample test"):
        TwoSampleSettings(model=model, **wrong)


def test_a_trained_discriminator_is_no_base(model, tmp_path):
    load_base(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="score head"):
        TwoSampleSettings(model=str(tmp_path))

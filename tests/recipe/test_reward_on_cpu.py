"""ROUGE-L of validation (recipe/gad/reward.py)."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from recipe.gad.reward import compute_score


def rouge_l(answer, teacher, **extra_info):
    return compute_score("any", answer, teacher, extra_info or None)


def lcs_f1(a, b):
    """ROUGE-L by its definition: F1 of the longest common subsequence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


@pytest.mark.parametrize(
    ("answer", "teacher", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the dog sat", "the cat sat", 2 / 3),
        ("the cat", "the cat sat on the mat", 2 * (2 / 2) * (2 / 6) / (2 / 2 + 2 / 6)),
        ("sat cat the", "the cat sat", 1 / 3),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("dogs", "the cat sat", 0.0),
        ("", "the cat sat", 0.0),
        ("... !", "the cat sat", 0.0),
        ("今天天气好", "今天天气很好", 2 * 5 / (5 + 6)),  # character by character
        ("天", "今天天气很好", 2 * 1 / (1 + 6)),
        ("用 python3 写", "用 Python3 写的", 2 * 3 / (3 + 4)),
        ("мир", "мiр", 2 * 2 / (3 + 3)),
        ("こんにちは。", "こんにちは", 1.0),
    ],
)
def test_rouge_l_equals_hand_computed_values(answer, teacher, expected):
    assert rouge_l(answer, teacher) == {"score": pytest.approx(expected), "rouge_l": pytest.approx(expected)}


def test_ascii_text_equals_the_default_tokenizer_of_rouge_score():
    rng = random.Random(0)
    alphabet = "aB c 1_-.,'\n\t  de"
    stock = RougeScorer(["rougeL"])
    for _ in range(200):
        answer, teacher = ("".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(2))
        assert rouge_l(answer, teacher)["score"] == pytest.approx(stock.score(teacher, answer)["rougeL"].fmeasure)


def test_cjk_text_equals_the_definition():
    rng = random.Random(1)
    for _ in range(50):
        answer, teacher = ("".join(rng.choices("天地人你我他", k=rng.randint(1, 12))) for _ in range(2))
        assert rouge_l(answer, teacher)["score"] == pytest.approx(lcs_f1(answer, teacher))


def test_rows_that_the_discriminator_scores_get_zero():
    assert rouge_l("same", "same", scored_by_discriminator=True) == {"score": 0.0, "rouge_l": 0.0}
    assert rouge_l("same", "same", scored_by_discriminator=False)["score"] == 1.0
    assert rouge_l("same", "same", index=3)["score"] == 1.0


def test_the_score_is_a_plain_float():
    assert type(rouge_l("a b", "a c")["score"]) is float

"""recipe/gad/evaluation/text_metrics.py: hand-computed values."""

import numpy as np
import pytest
from scipy import stats

from recipe.gad.evaluation.text_metrics import Z, distinct, ngrams, repetition_rate, text_metrics


def line(index, sample, student, teacher, student_tokens=3, teacher_tokens=4, student_cut=False, teacher_cut=False):
    return {
        "index": index,
        "sample": sample,
        "data_source": "any",
        "student": student,
        "teacher": teacher,
        "student_tokens": student_tokens,
        "teacher_tokens": teacher_tokens,
        "student_cut": student_cut,
        "teacher_cut": teacher_cut,
    }


def test_ngrams():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a"], 2) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b c d e", 0.0),
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("A, b! a b a b", 1 / 3),  # abab baba abab
        ("no no no no no no", 2 / 3),  # one 4-gram, three times
        ("a a a", 0.0),  # no 4-gram
        ("", 0.0),
    ],
)
def test_repetition_rate(text, expected):
    assert repetition_rate(text) == pytest.approx(expected)


def test_distinct_counts_over_all_answers_and_not_across_their_ends():
    texts = [["a b a", "a b"], ["c b"]]
    assert distinct(texts, 1).value == pytest.approx(3 / 7)
    assert distinct(texts, 2).value == pytest.approx(3 / 4)  # ab ba ab cb
    assert distinct([["a"], ["b"]], 2).value == 0.0


def test_the_interval_of_distinct_is_the_jackknife_of_its_definition():
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 6)))] for _ in range(9)]

    def by_definition(groups):
        grams = [pair for [text] in groups for pair in zip(text.split()[:-1], text.split()[1:], strict=True)]
        return len(set(grams)) / len(grams)

    left_out = np.array([by_definition(texts[:i] + texts[i + 1 :]) for i in range(9)])
    error = np.sqrt((9 - 1) * np.mean((left_out - left_out.mean()) ** 2))
    found = distinct(texts, 2)
    assert found.value == pytest.approx(by_definition(texts))
    assert (found.low, found.high) == pytest.approx((found.value - Z * error, found.value + Z * error))
    assert Z == pytest.approx(stats.norm.ppf(0.975), abs=1e-6)


def test_samples_of_one_prompt_count_as_one():
    answers = [
        line(0, 0, "the cat sat", "the cat sat", student_tokens=4, student_cut=True),
        line(0, 1, "dogs", "the cat sat", student_tokens=2),
        line(1, 0, "a b c d a b c d", "x", student_tokens=9, teacher_tokens=2, teacher_cut=True),
        line(1, 1, "x", "x", student_tokens=2, teacher_tokens=2, teacher_cut=True),
    ]
    metrics = text_metrics(answers)
    values = {(name, side): e.value for name, sides in metrics.items() for side, e in sides.items()}
    assert values == pytest.approx(
        {
            ("rouge_l", "student"): ((1 + 0) / 2 + (0 + 1) / 2) / 2,
            ("length", "student"): ((4 + 2) / 2 + (9 + 2) / 2) / 2,
            ("length", "teacher"): (4 + 2) / 2,
            ("cut", "student"): 1 / 4,
            ("cut", "teacher"): 1 / 2,
            ("repetition", "student"): (0 + (1 / 5 + 0) / 2) / 2,
            ("repetition", "teacher"): 0.0,
            ("distinct_1", "student"): 9 / 13,  # the cat sat dogs a b c d x
            ("distinct_1", "teacher"): 4 / 4,
            ("distinct_2", "student"): 6 / 9,  # the-cat cat-sat ab bc cd da | ab bc cd again
            ("distinct_2", "teacher"): 2 / 2,
        }
    )
    for sides in metrics.values():
        for estimate in sides.values():
            assert estimate.low <= estimate.value <= estimate.high
    # two prompts: the resamples are the first twice, the second twice, or both
    assert (metrics["length"]["student"].low, metrics["length"]["student"].high) == (3.0, 5.5)

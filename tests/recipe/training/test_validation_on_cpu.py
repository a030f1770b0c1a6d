"""The rows that the discriminator scores in validation (recipe/gad/training/validation.py)."""

from recipe.gad.training.validation import Pair, pair_rows


def test_rows_do_not_depend_on_the_order_in_which_samples_arrive_and_the_sides_match():
    pairs = [Pair([2, 1], [9], [8, 7]), Pair([1], [5, 6], [4])]
    rows, again = pair_rows(pairs, 1, 9), pair_rows(pairs[::-1], 1, 9)
    ids = {key: row["input_ids"].tolist() for key, row in rows.items()}
    assert list(ids.values()) == [[1, 5, 6], [2, 1, 9], [1, 4], [2, 1, 8, 7]]  # students, then their teachers
    assert ids == {key: row["input_ids"].tolist() for key, row in again.items()} and list(rows) == list(again)


def test_fillers_make_the_rows_a_multiple_of_the_ranks():
    pair = Pair([1], [2], [3])
    rows = pair_rows([pair] * 3, 4, eos_token_id=9)
    assert list(rows)[6:] == ["validation_filler_0", "validation_filler_1"] and len(rows) == 8
    assert rows["validation_filler_1"]["input_ids"].tolist() == [9, 9]
    assert len(pair_rows([pair] * 3, 3, eos_token_id=9)) == 6

"""The rows that the discriminator scores in validation (recipe/gad/training/validation.py)."""

import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from recipe.gad.training import validation
from recipe.gad.training.validation import Pair, SeenRows, pair_rows


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


def test_samples_are_handed_on_in_the_order_of_their_ids_whatever_order_they_arrive_in(monkeypatch):
    rows = {"c": ([2], [5], [7]), "a": ([1, 2], [4], [7]), "b": ([1], [], [7])}

    def get(keys, partition_id, select_fields):
        prompts, responses, teachers = zip(*(rows[key] for key in keys), strict=True)
        tensors = [[torch.tensor(ids, dtype=torch.long) for ids in side] for side in (prompts, responses)]
        nested = [torch.nested.nested_tensor(side, layout=torch.jagged) for side in tensors]
        return dict(zip(select_fields, [*nested, teachers], strict=True))

    class Arriving:
        def __init__(self, keys):
            self.batch = KVBatchMeta(partition_id="val", keys=list(keys), tags=[{"of": key} for key in keys])

        def sample(self):
            return self.batch, {}

    monkeypatch.setattr(validation.tq, "kv_batch_get", get)
    for keys in ("cab", "bca"):
        seen = SeenRows(Arriving(keys))
        batch, _ = seen.sample()
        assert batch.keys == ["b", "a", "c"] and [tag["of"] for tag in batch.tags] == ["b", "a", "c"]
        assert sorted(seen.pairs) == [Pair([1, 2], [4], [7]), Pair([2], [5], [7])]


def test_validation_answers_to_one_prompt_have_no_fresh_discriminator_and_a_warning(tiny_problem, caplog):
    fresh = {"fresh_discriminator": {"model": f"{tiny_problem}/model"}}
    config = OmegaConf.create({"gad": fresh, "data": {"val_files": "val.parquet"}})
    assert validation.fresh_accuracy(config, None, [Pair([5, 6], [7], [8]), Pair([5, 6], [9], [8])], None) == {}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "no val-aux/two_sample: the answers are to 1 different prompts of val.parquet"

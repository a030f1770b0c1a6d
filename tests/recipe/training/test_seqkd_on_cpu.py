"""The batches of stage seqkd, which go to the actor's workers past the queue."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipe.gad.training import seqkd_trainer
from recipe.gad.training.seqkd_trainer import COLUMNS, PPOTrainerSeqKD, batch_of, collate
from recipe.gad.training.trajectory import TEACHER_IDS, build_teacher_trajectory
from verl.protocol import BatchData
from verl.utils import tensordict_utils as tu


def trajectory(prompt, answer):
    return build_teacher_trajectory(torch.tensor(prompt), torch.tensor(answer))


@pytest.mark.parametrize("answers", [([3], [4, 5]), ([3, 6], [4, 5])], ids=["lengths differ", "lengths are equal"])
def test_a_batch_is_jagged_and_knows_what_the_workers_must_know(answers):
    rows = [trajectory([1, 2], answer) for answer in answers]
    batch = batch_of(rows, {"epochs": 3, "dataloader_kwargs": {"shuffle": False}})
    assert batch["input_ids"].layout == torch.jagged
    assert [ids.tolist() for ids in batch["input_ids"].unbind()] == [[1, 2, *answer] for answer in answers]
    assert [ids.tolist() for ids in batch["responses"].unbind()] == [list(answer) for answer in answers]
    assert set(batch.keys()) == {*rows[0], "epochs", "dataloader_kwargs"}
    assert tu.pop(batch, key="epochs") == 3 and tu.pop(batch, key="dataloader_kwargs") == {"shuffle": False}


def test_each_rank_gets_its_share_of_a_batch():
    rows = [trajectory([1], [2] * n) for n in (1, 2, 3, 4)]
    shares = BatchData(batch_of(rows, {"mini_batch_size": 2})).chunk(2)
    assert [[len(ids) for ids in share["responses"].unbind()] for share in shares] == [[1, 2], [3, 4]]
    assert [tu.get(share, key="mini_batch_size") for share in shares] == [2, 2]


def test_only_the_columns_that_a_step_reads_are_collated():
    row = {"raw_prompt": [{"role": "user", "content": "a"}], TEACHER_IDS: [1], "index": 0, "reward_model": {}}
    batch = collate([{**row, "data_source": "toy"}, {**row, "data_source": "toy", "index": 1}])
    assert set(batch) == set(COLUMNS) and np.asarray(batch["index"]).tolist() == [0, 1]


@pytest.mark.parametrize(("loss", "stored"), [(0.5, []), (float("nan"), ["a", "b"])])
def test_the_queue_holds_the_rows_of_a_broken_step_alone(monkeypatch, loss, stored):
    rows = {key: trajectory([1], [2, 3]) for key in ("a", "b")}
    known, put = [], []
    monkeypatch.setattr(seqkd_trainer.tq, "kv_batch_put", lambda keys, partition_id, tags: known.extend(keys))
    trainer = PPOTrainerSeqKD.__new__(PPOTrainerSeqKD)
    trainer.config = SimpleNamespace(data=SimpleNamespace(max_response_length=4))
    trainer.on_sample_end = lambda: None
    trainer._next_train_batch = lambda count: {"uid": ["a", "b"], "raw_prompt": [[], []], TEACHER_IDS: [[], []]}
    trainer._rows_from_data = lambda *columns: rows
    trainer._imitate = lambda teachers, metrics: metrics.update({"actor/loss": loss})
    trainer._put_rows = lambda partition_id, rows: put.extend(rows)
    batch = trainer._step_once(metrics := {}, {}, 2)
    assert put == stored and put + known == ["a", "b"] == batch.keys
    assert metrics["teacher_response_length/mean"] == 2

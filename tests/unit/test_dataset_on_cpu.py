"""RLHFDataset with the teacher's answers (verl/utils/dataset/rl_dataset.py), on real parquet files."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import chisquare
from torchdata.stateful_dataloader import StatefulDataLoader

from recipe.gad.quickstart.problem import build_tokenizer
from recipe.gad.training.teachers import Teachers
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, get_dataset_class
from verl.utils.tensordict_utils import get_tensordict

PROMPTS = ["c a f", "b d e", "a b c d e f g h i j a b c d e f", "j i h", "d d d"]
ANSWERS = ["well um c then a then f right", "so b and d and e see", "okay", "sure j i h done", "well d d d bye"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def parquet(tmp_path):
    """Function that writes rows (defaults: the table above) to a file and returns its path."""

    def parquet(name="data.parquet", teacher=lambda text: text, indices=(0, 1, 2, 3, 4), **columns):
        rows = [
            {"content": [{"role": "user", "content": PROMPTS[i]}], "teacher_response": teacher(ANSWERS[i])}
            | {column: value(i) for column, value in columns.items()}
            for i in indices
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        return str(tmp_path / name)

    return parquet


def config(tmp_path, **values):
    defaults = {
        "prompt_key": "content",
        "teacher_key": "teacher_response",
        "max_prompt_length": 32,
        "max_response_length": 16,
        "truncation": "error",
        "cache_dir": str(tmp_path / "cache"),
        "filter_overlong_prompts": True,
        "filter_overlong_prompts_workers": 1,
    }
    return OmegaConf.create({**defaults, **values})


def ids_of(tokenizer, text):
    """Expected ids of an answer, written out with the vocabulary of the word tokenizer."""
    vocab = tokenizer.get_vocab()
    return [*(vocab[word] for word in text.split()), vocab["<end>"]]


@pytest.mark.parametrize("teacher", [str, lambda text: {"role": "assistant", "content": text}], ids=["text", "message"])
def test_rows_carry_prompt_and_teacher(tokenizer, parquet, tmp_path, capsys, teacher):
    dataset = RLHFDataset(parquet(teacher=teacher), tokenizer, config(tmp_path))
    assert len(dataset) == 5
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        row = dataset[i]
        assert row["raw_prompt"] == [{"role": "user", "content": prompt}]
        assert row["teacher_response"] == answer
        assert row["teacher_response_ids"] == ids_of(tokenizer, answer)
        assert row["reward_model"] == {"style": "teacher", "ground_truth": answer}
        assert row["data_source"] == "gad"
        assert row["index"] == i, "the seeds of a row's samples depend on it"
    # 9, 8, 2, 6 and 6 tokens
    assert "teacher answers: 5, mean 6.2 tokens, longest 9; 0 longer than" in capsys.readouterr().out


def test_the_overlay_is_what_verl_loads():
    assert get_dataset_class(OmegaConf.create({})) is RLHFDataset
    assert RLHFDataset.__mro__[1].__name__ == "RLHFDataset" and not hasattr(RLHFDataset.__mro__[1], "_tokenize_teacher")


def test_columns_of_the_file_win_over_what_is_filled_in(tokenizer, parquet, tmp_path):
    reward = {"style": "rule", "ground_truth": "42"}
    path = parquet(data_source=lambda i: f"source {i}", reward_model=lambda i: reward)
    row = RLHFDataset(path, tokenizer, config(tmp_path))[3]
    assert row["data_source"] == "source 3" and row["reward_model"] == reward


def test_columns_with_the_names_of_our_own_are_replaced(tokenizer, parquet, tmp_path):
    own = {
        "teacher_response_ids": str,
        "teacher_response_length": lambda i: f"{i} words",
        "teacher_answers": lambda i: {"text": "x"},
    }
    path, mixed = parquet(**own), tmp_path / "mixed.jsonl"
    rows = pq.read_table(path).to_pylist()
    mixed.write_text(
        "\n".join(json.dumps({**row, "teacher_response_length": [{}, 5][i % 2]}) for i, row in enumerate(rows))
    )
    plain = RLHFDataset(parquet("plain.parquet"), tokenizer, config(tmp_path))
    for file in (path, str(mixed)):
        dataset = RLHFDataset(file, tokenizer, config(tmp_path))
        assert dataset.dataframe.column_names == plain.dataframe.column_names
        assert [row["teacher_response_ids"] for row in dataset] == [row["teacher_response_ids"] for row in plain]
        batch = object()
        assert Teachers(dataset, 7, named=False).draw(batch, 1) is batch


def test_another_teacher_column_is_read(tokenizer, parquet, tmp_path):
    path = parquet(gold=lambda i: ANSWERS[-1 - i])
    row = RLHFDataset(path, tokenizer, config(tmp_path, teacher_key="gold"))[0]
    assert row["teacher_response"] == ANSWERS[-1]
    assert row["teacher_response_ids"] == ids_of(tokenizer, ANSWERS[-1])


def test_rows_with_several_answers_carry_the_first_and_keep_the_others(tokenizer, parquet, tmp_path, capsys):
    path = parquet(teacher=lambda text: [text, "okay", text])
    dataset = RLHFDataset(path, tokenizer, config(tmp_path, max_response_length=6, truncation="right"))
    for i, answer in enumerate(ANSWERS):
        row, ids = dataset[i], ids_of(tokenizer, answer)[:6]
        assert row["teacher_response"] == row["reward_model"]["ground_truth"] == answer
        assert row["teacher_response_ids"] == ids and "teacher_answers" not in row
        assert dataset.dataframe[i]["teacher_answers"] == [
            {"teacher": "teacher_response", "text": text, "ids": expected}
            for text, expected in ((answer, ids), ("okay", ids_of(tokenizer, "okay")), (answer, ids))
        ]
    # twice 9, 8, 2, 6 and 6 tokens, and five times 2
    assert "teacher answers: 15, mean 4.8 tokens, longest 9; 4 longer than" in capsys.readouterr().out


def test_a_column_for_each_teacher(tokenizer, parquet, tmp_path):
    path = parquet(gpt=lambda i: None if i == 2 else ANSWERS[i], claude=lambda i: ANSWERS[4 - i] if i > 1 else None)
    dataset = RLHFDataset(path, tokenizer, config(tmp_path, teacher_key=["gpt", "claude"]))
    found = [[(a["teacher"], a["text"]) for a in answers] for answers in dataset.dataframe["teacher_answers"]]
    assert found == [
        [("gpt", ANSWERS[0])],
        [("gpt", ANSWERS[1])],
        [("claude", ANSWERS[2])],
        [("gpt", ANSWERS[3]), ("claude", ANSWERS[1])],
        [("gpt", ANSWERS[4]), ("claude", ANSWERS[0])],
    ]
    assert [row["teacher_response"] for row in dataset] == ANSWERS
    other = parquet("long.parquet", gpt=lambda i: "okay", claude=lambda i: ANSWERS[0] if i == 3 else None)
    with pytest.raises(ValueError, match=r"long\.parquet, row 3: .* 9 tokens .*max_response_length=8"):
        RLHFDataset(other, tokenizer, config(tmp_path, teacher_key=["gpt", "claude"], max_response_length=8))


def test_a_step_draws_one_answer_per_prompt_by_seed_step_and_row(tokenizer, parquet, tmp_path):
    path = parquet(
        gpt=lambda i: ANSWERS[i],
        claude=lambda i: ["okay", "sure"] if i else None,
        reward_model=lambda i: {"style": "rule", "ground_truth": "42"} if i == 4 else None,
    )
    dataset = RLHFDataset(path, tokenizer, config(tmp_path, teacher_key=["gpt", "claude"], max_response_length=20))
    words = {row: [ANSWERS[row], *(["okay", "sure"] if row else [])] for row in range(5)}

    def draw(step, order=(0, 1, 2, 3, 4), seed=7):
        teachers = Teachers(dataset, seed, named=True)
        batch = collate_fn([dataset[i] for i in order])
        batch["uid"] = np.array([f"u{i}" for i in order], dtype=object)
        batch = teachers.draw(get_tensordict(batch), step)
        texts, ids = list(batch["teacher_response"]), list(batch["teacher_response_ids"])
        assert [list(of_it) for of_it in ids] == [ids_of(tokenizer, text) for text in texts]
        truths = [reward["ground_truth"] for reward in batch["reward_model"]]
        assert truths == ["42" if i == 4 else text for i, text in zip(order, texts, strict=True)]
        rows = list(zip(order, texts, strict=True))
        # "okay" of row 2 is both teachers'
        assert all(text in words[i] for i, text in rows)
        assert {uid: who for uid, who in teachers.drawn.items() if uid != "u2"} == {
            f"u{i}": "gpt" if text == ANSWERS[i] else "claude" for i, text in rows if i != 2
        }
        return dict(rows)

    steps = [draw(step) for step in range(90)]
    assert draw(17) == steps[17] and draw(17, (3, 1)) == {i: steps[17][i] for i in (3, 1)}
    assert [draw(step, seed=8) for step in range(9)] != steps[:9]
    assert {step[0] for step in steps} == {ANSWERS[0]}
    for i in (1, 4):
        counts = Counter(step[i] for step in steps)
        assert set(counts) == set(words[i]) and chisquare(list(counts.values())).pvalue > 0.01


def test_a_file_of_single_answers_is_left_alone_by_the_draw(tokenizer, parquet, tmp_path):
    dataset, batch = RLHFDataset(parquet(), tokenizer, config(tmp_path)), object()
    assert Teachers(dataset, 7, named=False).draw(batch, 1) is batch


def test_long_prompts_are_dropped_and_rows_stay_aligned(tokenizer, parquet, tmp_path):
    dataset = RLHFDataset(parquet(), tokenizer, config(tmp_path, max_prompt_length=10))
    kept = [0, 1, 3, 4]  # row 2 has 16 letters
    assert [row["raw_prompt"][0]["content"] for row in dataset] == [PROMPTS[i] for i in kept]
    assert [row["teacher_response_ids"] for row in dataset] == [ids_of(tokenizer, ANSWERS[i]) for i in kept]


def test_no_row_left_is_an_error_that_says_why(tokenizer, parquet, tmp_path):
    with pytest.raises(ValueError, match=r"data\.parquet is left: .*max_prompt_length=3"):
        RLHFDataset(parquet(), tokenizer, config(tmp_path, max_prompt_length=3))


@pytest.mark.parametrize("truncation", ["right", "left"])
def test_long_answers_are_cut_and_counted(tokenizer, parquet, tmp_path, capsys, truncation):
    dataset = RLHFDataset(parquet(), tokenizer, config(tmp_path, truncation=truncation, max_response_length=6))
    for i, answer in enumerate(ANSWERS):
        ids = ids_of(tokenizer, answer)
        assert dataset[i]["teacher_response_ids"] == (ids[:6] if truncation == "right" else ids[-6:])
        assert dataset[i]["teacher_response"] == answer
    expected = f"longest 9; 2 longer than data.max_response_length=6, cut by data.truncation={truncation}"
    assert expected in capsys.readouterr().out


def test_a_long_answer_with_truncation_error_names_file_and_row(tokenizer, parquet, tmp_path):
    """The row of the file, not of what is left after filtering: row 2 of two.parquet has a long prompt."""
    files = [parquet("one.parquet", indices=[2, 3]), parquet("two.parquet", indices=[3, 4, 2, 0])]
    with pytest.raises(ValueError, match=r"(?s)two\.parquet, row 3: .* 9 tokens .*max_response_length=8"):
        RLHFDataset(files, tokenizer, config(tmp_path, max_response_length=8, max_prompt_length=10))


@pytest.mark.parametrize(
    ("bad", "problem"),
    [(None, "null"), ("", "empty"), ("  \n", "whitespace"), ({"role": "assistant", "content": None}, "null")],
    ids=["null", "empty", "blank", "message without content"],
)
def test_a_row_without_teacher_names_file_and_row(tokenizer, parquet, tmp_path, bad, problem):
    def teacher(text):
        if isinstance(bad, dict):
            return bad if text == ANSWERS[3] else {"role": "assistant", "content": text}
        return bad if text == ANSWERS[3] else text

    path = parquet("bad.parquet", teacher)
    with pytest.raises(ValueError, match=rf"bad\.parquet, row 3: .*'teacher_response' .*{problem}"):
        RLHFDataset(path, tokenizer, config(tmp_path))


def test_a_file_without_the_teacher_column_names_the_columns(tokenizer, parquet, tmp_path):
    with pytest.raises(ValueError, match=r"data\.parquet: has no column 'gold'.*'teacher_response'"):
        RLHFDataset(parquet(), tokenizer, config(tmp_path, teacher_key="gold"))


def test_files_are_concatenated_in_order_and_max_samples_takes_the_first(tokenizer, parquet, tmp_path):
    files = [parquet("one.parquet", indices=[3, 4]), parquet("two.parquet", indices=[0, 1])]
    dataset = RLHFDataset(files, tokenizer, config(tmp_path))
    assert [row["teacher_response"] for row in dataset] == [ANSWERS[i] for i in (3, 4, 0, 1)]
    few = RLHFDataset(files, tokenizer, config(tmp_path), max_samples=3)
    assert [row["teacher_response_ids"] for row in few] == [ids_of(tokenizer, ANSWERS[i]) for i in (3, 4, 0)]


def test_pickled_and_resumed_dataset_has_the_same_rows(tokenizer, parquet, tmp_path):
    dataset = RLHFDataset(parquet(), tokenizer, config(tmp_path))
    copy = pickle.loads(pickle.dumps(dataset))
    assert type(copy) is RLHFDataset
    copy.resume_dataset_state()  # the stock way: the rows themselves are not pickled
    assert [comparable(row) for row in copy] == [comparable(row) for row in dataset]


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_pass_through_the_data_loader(tokenizer, parquet, tmp_path, workers):
    dataset = RLHFDataset(parquet(), tokenizer, config(tmp_path))
    loader = StatefulDataLoader(dataset, batch_size=2, num_workers=workers, drop_last=True, collate_fn=collate_fn)
    batches = list(loader)
    assert len(batches) == 2
    for start, batch in zip((0, 2), batches, strict=True):
        expected = [ids_of(tokenizer, answer) for answer in ANSWERS[start : start + 2]]
        assert [list(ids) for ids in batch["teacher_response_ids"]] == expected
        assert list(batch["teacher_response"]) == ANSWERS[start : start + 2]
        assert batch["teacher_response_ids"].dtype == object


def test_teacher_tensors_of_a_row(tokenizer, parquet, tmp_path):
    tensors = RLHFDataset(parquet(), tokenizer, config(tmp_path)).teacher_tensors(0)
    vocab = tokenizer.get_vocab()
    prompt = [vocab[token] for token in ["<bos>", "<user>", "c", "a", "f", "<end>", "<assistant>"]]
    expected = prompt + ids_of(tokenizer, ANSWERS[0])
    assert tensors["teacher_input_ids"].tolist() == expected
    assert tensors["teacher_attention_mask"].tolist() == [1] * len(expected)
    assert tensors["teacher_position_ids"].tolist() == list(range(len(expected)))


# ---------------------------------------------------------------------- without teacher_key


def comparable(row):
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in row.items()}


STOCK = """
import json, sys
from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import RLHFDataset
from recipe.gad.quickstart.problem import build_tokenizer
assert "OverlayFinder" not in [type(finder).__name__ for finder in sys.meta_path]
path, config = sys.argv[1:]
rows = list(RLHFDataset(path, build_tokenizer(), OmegaConf.create(json.loads(config))))
print(json.dumps([{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in rows]))
"""


@pytest.mark.slow  # imports stock verl in a fresh process
def test_without_teacher_key_the_class_is_the_stock_one_row_for_row(tokenizer, parquet, tmp_path):
    path = parquet(extra_info=lambda i: {"index": i})
    null = config(tmp_path, teacher_key=None, max_prompt_length=10)
    absent = OmegaConf.create({key: value for key, value in null.items() if key != "teacher_key"})
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, path, json.dumps(OmegaConf.to_container(null))],
        env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_PLATFORM": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stock.returncode == 0, stock.stderr
    expected = json.loads(stock.stdout.splitlines()[-1])
    assert len(expected) == 4
    for data_config in (null, absent):
        assert [comparable(row) for row in RLHFDataset(path, tokenizer, data_config)] == expected

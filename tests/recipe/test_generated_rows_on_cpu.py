"""Generated rows of which a test knows what must become of them: no traceback, and none is lost without being counted.

hypothesis chooses the rows, the same ones in every run, and shrinks a case that fails. ``GAD_CASES=200`` runs 200 times
as many cases: more than 100,000 rows.
"""

import gzip
import io
import json
import random
import re
from contextlib import redirect_stdout
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from tempfile import mkdtemp

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipe.gad.quickstart.problem import build_tokenizer
from recipe.gad.run.data_file import data_file_problems
from tests.generated import cases
from tests.recipe.conftest import Reply
from tests.recipe.test_bad_input_on_cpu import damaged_value, gad
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

rows_from = given(rng=st.randoms(use_true_random=False))
"""The test's argument ``rng`` makes its choices."""


def lines_of(file: Path) -> list:
    """The rows of a file that is written only if there are some."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


# ---------------------------------------------------------------------- prepare


def good_row(rng: random.Random, i: int):
    """A row in a random layout, and the prompt and answers that it holds."""
    question, answers = f"q {i} {rng.choice(['', 'é', '日本', 'a|b,c', 'x' * 300])}".strip(), [f"answer {i}"]
    prompt = [say("user", question)]
    kind = rng.randrange(7)
    if kind == 0:
        return {"messages": [*prompt, say("assistant", answers[0])]}, prompt, answers
    if kind == 1:
        turns = [("system", "be brief"), ("human", question), ("gpt", answers[0])]
        row = {"conversations": [{"from": name, "value": text} for name, text in turns]}
        return row, [say("system", "be brief"), *prompt], answers
    if kind == 2:
        row = {"instruction": question, "input": "more", "output": answers[0], "history": [["hi", "hello"]]}
        return row, [say("user", "hi"), say("assistant", "hello"), say("user", f"{question}\n\nmore")], answers
    if kind == 3:
        return {"question": question, "answer": answers[0]}, prompt, answers
    if kind == 4:
        answers += [f"another {i}"]
        return {"content": prompt, "teacher_response": answers}, prompt, answers
    if kind == 5:  # OpenAI's parts, and turns after the answer
        parts = [{"type": "text", "text": question}]
        turns = [{"role": "user", "content": parts}, say("assistant", answers[0]), say("user", "thanks")]
        return {"messages": turns}, prompt, answers
    return {"prompt": question, "response": say("assistant", answers[0])}, prompt, answers


NO_JSON = ["{", '{"prompt": "q"', "x", "[" * 5000]


def bad_line(rng: random.Random, i: int) -> str:
    """A line that holds no usable row."""
    rows = [
        {"prompt": f"q {i}"},
        {"response": "an answer"},
        {"prompt": None, "response": "an answer"},
        {"prompt": f"q {i}", "response": rng.choice([None, "", " \n", 5, True, {}, [], [None], ["a", ""]])},
        {"prompt": rng.choice(["", " ", [], [5], [{}], {}, 0, [say("user", " ")]]), "response": "an answer"},
        {"messages": [say("user", f"q {i}"), say(rng.choice(["User", "", "bot"]), "an answer")]},
        {"messages": [say("assistant", "an answer")]},
        {"messages": [say("user", f"q {i}"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        {"prompt": f"q {i} \ud83d", "response": "an answer"},
        {"prompt": f"q {i}", "response": "an answer \udc00"},
        {"instruction": f"q {i}", "history": [["only one"]], "output": "an answer"},
        rng.choice([None, 5, "text", [], [1]]),
    ]
    return rng.choice([*map(json.dumps, rows), *NO_JSON])


@cases(5)
@rows_from
def test_prepare_keeps_good_rows_as_they_are_and_counts_all_others(tmp_path, rng):
    lines, good, bad, copies = [], {}, set(), 0
    for i in range(40):
        fate = rng.choice(["good", "good", "good", "bad", "copy", "any"]) if i else "good"
        row, prompt, answers = good_row(rng, i)
        if fate == "bad":
            bad.add(i)
            lines.append(bad_line(rng, i))
        elif fate == "copy":
            copies += 1
            *before, last = json.loads(rng.choice(list(good)))
            turns = [*before, say("user", f"  {last['content']}\n"), say("assistant", "another answer")]
            lines.append(json.dumps({"messages": turns}))
        elif fate == "any":
            lines.append(json.dumps(damaged_value(rng, row)))
        else:
            good[json.dumps(prompt)] = answers
            lines.append(json.dumps(row))
    text = "\n".join(lines)
    if rng.random() < 0.5:
        text = "[" + ",\n".join("null" if line in NO_JSON else line for line in lines) + "]"
    folder = Path(mkdtemp(dir=tmp_path))
    file, out = folder / "rows.json.gz", folder / "out"
    file.write_bytes(gzip.compress(text.encode()))
    fraction = 0.5 if len(good) >= 20 else 0.0  # an empty validation file is refused
    code, text = gad("prepare", file, "--output_dir", out, "--val_fraction", fraction)
    assert code == 0, text
    counts = {name: int(n.replace(",", "")) for name, n in re.findall(r"^(\w+) +([\d,]+) rows", text, re.MULTILINE)}
    files = sorted(out.glob("*.parquet"))
    assert [data_file_problems(file, "content", "teacher_response")[1] for file in files] == [[]] * len(files)
    written = [row for file in files for row in pq.read_table(file).to_pylist()]
    rejects = lines_of(out / "rejects.jsonl")
    assert counts["read"] == len(lines) == len(written) + len(rejects) + counts.get("duplicates", 0)
    assert (counts["train"] + counts.get("val", 0), counts.get("rejected", 0)) == (len(written), len(rejects))
    assert counts.get("duplicates", 0) >= copies
    assert bad <= {reject["row"] for reject in rejects} and all(reject["reason"] for reject in rejects)
    read_back = {json.dumps(row["content"]): row["teacher_response"] for row in written}
    assert len(read_back) == len(written)
    for prompt, answers in good.items():
        found = read_back[prompt]
        assert ([found] if isinstance(found, str) else found) == answers


# ---------------------------------------------------------------------- the data set

WORDS = "a b c d e f g h i j".split()
COLUMNS = {"text": "teacher_response", "message": "teacher_response", "list": "teacher_response", "two": ["one", "two"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def training_row(rng: random.Random, i: int, kind: str, prompt_words: int) -> tuple[dict, list[str]]:
    """A row as prepare writes it, and the answers that it holds; ``kind`` is the form of the teacher's columns."""
    answers = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(1 + (kind in ("list", "two")))]
    cells = {
        "text": {"teacher_response": answers[0]},
        "message": {"teacher_response": say("assistant", answers[0])},
        "list": {"teacher_response": answers},
        "two": dict(zip(("one", "two"), answers, strict=False)),
    }[kind]
    row = {"content": [say("user", " ".join(rng.choices(WORDS, k=prompt_words)))], **cells, "number": i}
    return row, answers


def bad_training_row(rng: random.Random, row: dict, teachers: list[str]) -> dict:
    """The row without a usable prompt, or without a usable answer."""
    bad_prompts = [None, [], "text", [None], [{"role": "user"}], [say("assistant", "a")], [say(5, "a")], 5]
    bad_answers = [None, "", "  ", 5, {}, {"role": "assistant"}]
    if rng.random() < 0.5:
        return {**row, "content": rng.choice(bad_prompts)}
    answer = rng.choice(bad_answers)
    if isinstance(row[teachers[0]], list):
        answer = rng.choice([[], [answer], ["a", answer]])
    return {**row, **dict.fromkeys(teachers), teachers[0]: answer}


def data_set(file: Path, key) -> tuple[RLHFDataset, str]:
    """The training data of a file, and what reading it prints; prompts of more than 32 tokens are dropped."""
    limits = {"max_prompt_length": 32, "max_response_length": 12, "truncation": "right"}
    options = {"filter_overlong_prompts": True, "filter_overlong_prompts_workers": 1, "cache_dir": f"{file.parent}/c"}
    config = OmegaConf.create({"prompt_key": "content", "teacher_key": key, **limits, **options})
    with redirect_stdout(io.StringIO()) as printed:
        return RLHFDataset(str(file), build_tokenizer(), config), printed.getvalue()


def write_json(rng: random.Random, rows: list[dict], folder: Path) -> Path:
    """A file of lines, or of one list."""
    file = folder / f"rows.{rng.choice(['jsonl', 'json'])}"
    file.write_text("\n".join(map(json.dumps, rows)) if file.suffix == ".jsonl" else json.dumps(rows))
    return file


@cases(5)
@rows_from
def test_the_data_set_takes_all_rows_or_the_check_counts_the_bad_ones(tmp_path, rng):
    kind, damaged = rng.choice(list(COLUMNS)), rng.random() < 0.5
    key, folder = COLUMNS[kind], Path(mkdtemp(dir=tmp_path))
    rows, kept, bad = [], [], 0
    for i in range(40):
        is_long = i > 0 and rng.randrange(10) == 9
        row, answers = training_row(rng, i, kind, prompt_words=rng.randint(40, 60) if is_long else rng.randint(1, 9))
        if damaged and rng.randrange(10) == 9:
            row, bad = bad_training_row(rng, row, [key] if isinstance(key, str) else key), bad + 1
        elif not is_long:
            kept.append((row, answers))
        rows.append(row)
    if bad or rng.random() < 0.5:
        file = write_json(rng, rows, folder)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file := folder / "rows.parquet")
    read, problems = data_file_problems(file, "content", key)
    counted = [re.search(r"row \d+: (?:.* \((\d+) such rows\))?", str(problem))[1] for problem in problems]
    assert (read, sum(int(n or 1) for n in counted)) == (len(rows), bad)
    if bad:
        with pytest.raises(ValueError, match="row "):
            data_set(file, key)
        return
    dataset, printed = data_set(file, key)
    assert printed.startswith(f"dataset len: {len(rows)}\nfilter dataset len: {len(kept)}\n")
    vocab = dataset.tokenizer.get_vocab()
    assert len(dataset) == len(kept)
    for i, (row, answers) in enumerate(kept):
        got = dataset[i]
        assert got["raw_prompt"] == row["content"] and got["number"] == row["number"]
        assert got["teacher_response"] == answers[0]
        assert got["teacher_response_ids"] == [*(vocab[word] for word in answers[0].split()), vocab["<end>"]]


PARQUET_CELLS = {
    "bytes": ("a", pa.binary()), "decimal": (Decimal("1.5"), pa.decimal128(9, 2)), "time": (datetime.min, None),
    "null": (None, None), "map": ([("a", 1)], pa.map_(pa.string(), pa.int64())), "large": (2**64 - 1, pa.uint64()),
    "half": (1.5, pa.float16()), "view": ("a", pa.string_view()), "list_view": ([1], pa.list_view(pa.int64())),
    "long text": ("a", pa.large_string()), "codes": ("a", pa.dictionary(pa.int32(), pa.string())),
    "date": ("2026-01-02", None), "struct": ({"index": 1, "ground_truth": "a"}, None), "number": (5, None),
    "json": ('{"index": 1}', pa.json_()), "json text": ('"a"', pa.json_()), "json number": ("5", pa.json_()),
    "texts": (["a", "b"], None), "message": (say("user", "a"), None), "messages": ([say("user", "a")], None),
}  # fmt: skip
NAMES = ["note", "", "a.b", "extra_info", "reward_model", "data_source", "index", "raw_prompt", "dummy_tensor", "uid"]
NAMES += ["teacher_response_ids", "teacher_response_length", "teacher_answers", "tools_kwargs", "content"]


@cases(12)
@rows_from
def test_the_data_set_reads_each_file_that_passes_the_check(tmp_path, rng):
    """One row of a JSON file is damaged at any place, or a column of a parquet file has any type or name."""
    kind, size, folder = rng.choice(list(COLUMNS)), 12, Path(mkdtemp(dir=tmp_path))
    others = {"data_source": "x", "extra_info": {"index": 1}, "reward_model": {"style": "s", "ground_truth": "a"}}
    rows = [{**training_row(rng, i, kind, prompt_words=3)[0], **others} for i in range(size)]
    teachers = [COLUMNS[kind]] if kind != "two" else COLUMNS[kind]
    if rng.random() < 0.5:
        at = rng.randrange(size)
        rows[at] = damaged_value(rng, rows[at])
        file = write_json(rng, rows, folder)
    else:
        name, (value, type_) = rng.choice([*NAMES, teachers[0]]), rng.choice(list(PARQUET_CELLS.values()))
        rows = [{key: cell for key, cell in row.items() if key != name} for row in rows]
        table = pa.Table.from_pylist(rows).append_column(name, pa.array([value] * size, type_))
        pq.write_table(table, file := folder / "rows.parquet", row_group_size=rng.randint(1, 20))
        as_json = isinstance(type_, pa.JsonType)
        rows = [{**row, name: json.loads(row[name]) if as_json else row[name]} for row in table.to_pylist()]
    read, problems = data_file_problems(file, "content", COLUMNS[kind])
    assert all(str(file) in str(problem) for problem in problems)
    if problems:
        return
    dataset, printed = data_set(file, COLUMNS[kind])
    assert read == size == len(dataset)
    got = [dataset[i] for i in range(size)]
    for row, read_row in zip(rows, got, strict=True):
        first = next(row[name] for name in teachers if row.get(name) is not None)
        first = first[0] if isinstance(first, list) else first
        assert read_row["teacher_response"] == (first["content"] if isinstance(first, dict) else first)
        assert 0 < len(read_row["teacher_response_ids"]) <= 12
        assert [m["content"] for m in read_row["raw_prompt"]] == [m["content"] for m in row["content"]]
    assert len(collate_fn(got)["raw_prompt"]) == size


# ---------------------------------------------------------------------- collect


@cases(3)
@rows_from
def test_collect_answers_each_prompt_once_and_counts_all_rows(tmp_path, chat_server, monkeypatch, rng):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    lines, good, failing, bad, copies = [], {}, {}, 0, 0
    for i in range(20):
        fate = rng.choice(["good", "good", "failing", "bad", "copy"]) if i else "good"
        prompt = [say("user", f"q {i}")]
        row = rng.choice([{"prompt": f"q {i}"}, {"messages": prompt}, {"question": f"q {i}", "answer": "not read"}])
        if fate == "copy":
            copies += 1
            lines.append(lines[0])
        elif fate == "bad":
            bad += 1
            unusable = [{"response": "a"}, {"prompt": " "}, {"prompt": None}, {"messages": []}, 5, None]
            lines.append(rng.choice([*map(json.dumps, unusable), "{"]))
        elif fate == "failing":
            failing[f"q {i}"] = rng.choice(
                [
                    chat_server.error(400),
                    chat_server.answer(" "),
                    chat_server.answer("half of an", finish_reason="length"),
                    chat_server.answer("", refusal="no"),
                    Reply({}),
                    Reply(b"not JSON"),
                ]
            )
            lines.append(json.dumps(row))
        else:
            good[f"q {i}"] = f"answer {i}"
            lines.append(json.dumps(row))
    folder = Path(mkdtemp(dir=tmp_path))
    file, out = folder / "rows.jsonl", folder / "answers.jsonl"
    file.write_text("\n".join(lines) + "\n")

    def reply(body, earlier):
        prompt = body["messages"][-1]["content"]
        return failing[prompt] if prompt in failing else chat_server.answer(good[prompt])

    chat_server.reply = reply
    arguments = ["collect", file, "--output", out, "--model", "m", "--base_url", chat_server.url, "--max_retries", "0"]
    code, text = gad(*arguments)
    written, failed, rejected = map(lines_of, (out, *map(out.with_suffix, (".failed.jsonl", ".rejects.jsonl"))))
    assert {row["content"][-1]["content"]: row["teacher_response"] for row in written} == good, text
    assert sorted(row["content"][-1]["content"] for row in failed) == sorted(failing)
    assert all(row["reason"] for row in failed + rejected)
    assert len(rejected) == bad and len(lines) == len(written) + len(failed) + len(rejected) + copies
    counts = re.findall(r"^(\w+) +([\d,]+) ", text, re.MULTILINE)
    counted = {name: sum(int(n.replace(",", "")) for other, n in counts if other == name) for name, _ in counts}
    names = ("answers", "failed", "rejected", "duplicates")
    assert [counted.get(name, 0) for name in names] == [len(written), len(failed), bad, copies]

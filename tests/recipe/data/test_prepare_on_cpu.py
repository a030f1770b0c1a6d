"""gad prepare: layouts, split, duplicates, bad rows, lengths, memory, and what the trainer reads of it."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from recipe.gad import cli
from recipe.gad.data.prepare import prompt_hash, student_token_counter
from recipe.gad.run import data_file as teacher_file
from recipe.gad.run.atomic_io import alone_in
from recipe.gad.run.data_file import check_data_file, json_rows

ROOT = Path(__file__).parents[3]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def run(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["prepare", *map(str, args)])
    return exit_.value.code


@pytest.fixture
def write(tmp_path):
    """Function that writes rows as JSON lines (or the text or bytes given) and returns the path."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(r) + "\n" for r in rows), "utf-8")
        return path

    return write


def table(folder, name="train"):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def rejects(folder):
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text("utf-8").splitlines()]


def one(write, tmp_path, row, *args):
    """(content, teacher_response) of a row, or the reason why it was rejected."""
    good = {"prompt": "another", "response": "row"}
    code = run(write([row, good]), "--output_dir", tmp_path / "out", "--val_fraction", 0, "--overwrite", *args)
    assert code == 0
    rows = table(tmp_path / "out")
    if len(rows) == 1:
        return rejects(tmp_path / "out")[0]["reason"]
    return rows[0]["content"], rows[0]["teacher_response"]


# ---------------------------------------------------------------------------------------------------------- layouts

TURNS = [user("u1"), assistant("a1"), user("u2")]
LAYOUTS = {
    "own": ({"content": [user("q")], "teacher_response": "a"}, [user("q")], "a"),
    "own with a message": ({"content": [user("q")], "teacher_response": assistant("a")}, [user("q")], "a"),
    "own with text": ({"content": "q", "teacher_response": "a"}, [user("q")], "a"),
    "openai": ({"messages": [user("q"), assistant("a")]}, [user("q")], "a"),
    "openai, multi-turn": ({"messages": [*TURNS, assistant("a2")]}, TURNS, "a2"),
    "openai, turns after the answer": ({"messages": [*TURNS, assistant("a2"), user("u3")]}, TURNS, "a2"),
    "openai, developer": (
        {"messages": [{"role": "developer", "content": "s"}, user("q"), assistant("a")]},
        [{"role": "system", "content": "s"}, user("q")],
        "a",
    ),
    "openai, text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, assistant("a")]},
        [user("q")],
        "a",
    ),
    "openai, answer in a column": ({"messages": TURNS, "response": "a"}, TURNS, "a"),
    "openai, own answer before a column": ({"messages": [user("q"), assistant("a")], "answer": "42"}, [user("q")], "a"),
    "openai, replaced answer": (
        {"messages": [user("q"), assistant("old")], "teacher_response": "a"},
        [user("q")],
        "a",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [user("q")],
        "a",
    ),
    "sharegpt, system column": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [{"role": "system", "content": "s"}, user("q")],
        "a",
    ),
    "sharegpt, system turn": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [{"role": "system", "content": "s"}, user("q")],
        "a",
    ),
    "alpaca": ({"instruction": "do", "input": "", "output": "a"}, [user("do")], "a"),
    "alpaca with input": ({"instruction": "do", "input": "this", "output": "a"}, [user("do\n\nthis")], "a"),
    "alpaca with history": (
        {"instruction": "u2", "output": "a", "history": [["u1", "a1"]], "system": "s"},
        [{"role": "system", "content": "s"}, *TURNS],
        "a",
    ),
    "prompt, response": ({"prompt": "q", "response": "a"}, [user("q")], "a"),
    "question, answer": ({"question": "q", "answer": "a"}, [user("q")], "a"),
    "query, completion": ({"query": "q", "completion": "a"}, [user("q")], "a"),
    "prompt and completion as messages": ({"prompt": TURNS, "completion": [assistant("a")]}, TURNS, "a"),
    "tool result last": (
        {"messages": [user("q"), {"role": "tool", "content": "4"}, assistant("a")]},
        [user("q"), {"role": "tool", "content": "4"}],
        "a",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(write, tmp_path, layout):
    row, prompt, teacher = LAYOUTS[layout]
    assert one(write, tmp_path, row) == (prompt, teacher)


def test_columns_by_name(write, tmp_path):
    row = {"prompt": "no", "response": "no", "frage": "q", "antwort": "a"}
    keys = ("--prompt_key", "frage", "--teacher_key", "antwort")
    write([row])
    assert run(tmp_path / "data.jsonl", "--output_dir", tmp_path / "out", "--val_fraction", 0, *keys) == 0
    assert [(r["content"], r["teacher_response"]) for r in table(tmp_path / "out")] == [([user("q")], "a")]


BAD = {
    "no prompt column": ({"text": "q", "output": "a"}, "has none of the prompt's columns .*it has 'text', 'output'"),
    "no answer": ({"prompt": "q"}, "has no teacher's answer"),
    "no assistant turn": ({"messages": [user("q")]}, "has no teacher's answer: no assistant turn"),
    "null answer": ({"prompt": "q", "response": None}, "column 'response' is null"),
    "empty answer": ({"prompt": "q", "response": " \n"}, "column 'response' holds only whitespace"),
    "number as answer": ({"prompt": "q", "response": 4}, "column 'response' is of type int"),
    "empty assistant turn": ({"messages": [user("q"), assistant("")]}, "the assistant's turn is empty"),
    "null prompt": ({"prompt": None, "response": "a"}, "column 'prompt' is of type NoneType"),
    "blank prompt": ({"prompt": "  ", "response": "a"}, "blank"),
    "no messages": ({"messages": []}, "column 'messages' is an empty list"),
    "answer without prompt": ({"messages": [assistant("a")]}, "the prompt is an empty list"),
    "two answers": ({"messages": [user("q"), assistant("a"), assistant("b")]}, "ends with a message of role 'assist"),
    "system only": ({"messages": [{"role": "system", "content": "s"}, assistant("a")]}, "ends with .* role 'system'"),
    "text as messages": ({"messages": "q"}, "column 'messages' is text, not a list"),
    "text as message": ({"messages": ["q"]}, "message 0 is of type str"),
    "unknown role": ({"messages": [{"role": "alien", "content": "q"}]}, "message 0 has the role 'alien'"),
    "role of another type": ({"messages": [{"role": ["user"], "content": "q"}]}, "has the role"),
    "no content": ({"messages": [{"role": "user"}, assistant("a")]}, "message 0 has content of type NoneType"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, assistant("a")]},
        "message 0 has content of type list",
    ),
    "tool call": (
        {"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "message 1 calls a tool",
    ),
    "half a surrogate pair in a prompt": ({"prompt": "\ud83d", "response": "a"}, "not valid Unicode"),
    "half a surrogate pair in an answer": ({"prompt": "q", "response": "\ud83d"}, "not valid Unicode"),
    "history of another form": ({"instruction": "q", "output": "a", "history": ["x"]}, "column 'history' holds"),
    "history that is no list": ({"instruction": "q", "output": "a", "history": True}, "'history' is of type bool"),
    "not an object": (["q", "a"], "is of type list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_rejected_with_the_reason(write, tmp_path, kind):
    row, reason = BAD[kind]
    path = write([{"prompt": "good", "response": "row"}, row])
    assert run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    (found,) = rejects(tmp_path / "out")
    assert (found["file"], found["row"], found["record"]) == (str(path), 1, row)
    assert re.search(reason, found["reason"])
    assert len(table(tmp_path / "out")) == 1


def test_bad_rows_are_counted_shown_and_all_written(write, tmp_path, capsys):
    lines = [json.dumps({"prompt": f"p{i}", "response": "a"}) for i in range(10)]
    for i in range(1, 8):
        lines[i] = '{"prompt": "cut off'
    assert run(write("\n".join(lines) + "\n"), "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    printed = capsys.readouterr()
    assert printed.err.count("rejected: ") == 5
    assert f"{tmp_path}/data.jsonl, row 1: is not valid JSON" in printed.err
    assert re.search(r"read +10 rows\nrejected +7 rows.*rejects.jsonl\ntrain +3 rows", printed.out)
    assert [(r["row"], r["record"]) for r in rejects(tmp_path / "out")] == [(i, lines[1]) for i in range(1, 8)]


def test_a_row_that_is_not_utf8_is_named_as_such(tmp_path):
    rows = [json.dumps({"prompt": f"Größe {i}", "response": "a"}, ensure_ascii=False) for i in range(2)]
    (tmp_path / "data.jsonl").write_bytes(rows[0].encode("utf-8") + b"\n" + rows[1].encode("latin-1") + b"\n")
    assert run(tmp_path / "data.jsonl", "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    (found,) = rejects(tmp_path / "out")
    assert (found["row"], found["reason"]) == (1, "is not UTF-8 (byte 0xf6 at place 14)")


def test_few_validation_rows_are_pointed_out(write, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "response": "a"} for i in range(100)]
    file, val = write(rows), write(rows[:49], "val.jsonl")
    assert run(file, "--output_dir", tmp_path / "few", "--val_inputs", val) == 0
    assert capsys.readouterr().out.count("fewer than 50 say little: see --val_fraction") == 1
    assert run(file, "--output_dir", tmp_path / "enough", "--val_inputs", write(rows[:50], "val.jsonl")) == 0
    assert "say little" not in capsys.readouterr().out


def test_strict_stops_and_writes_nothing(write, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "response": "a"} for i in range(5)]
    rows[3]["response"] = ""
    assert run(write(rows), "--output_dir", tmp_path / "out", "--strict") == 2
    assert "data.jsonl, row 3: column 'response' is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_bad_rows(write, tmp_path, capsys):
    assert run(write([{"text": "q"}] * 3), "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "no training row is left of 3 rows (3 rejected" in error and "--prompt_key" in error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------- sources

PAIRS = [("one, two", 'say "hi"\nand bye'), ("zwei  ", "größe 🎈"), ("three", "x" * 200_000)]


def csv_text():
    import io

    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([("question", "answer"), *PAIRS])
    return out.getvalue()


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl with BOM", "json list", "json pretty list", "csv", "parquet", "folder", "saved"]
)
def test_every_kind_of_source_gives_the_same_rows(write, tmp_path, kind):
    rows = [{"question": q, "answer": a} for q, a in PAIRS]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if kind == "jsonl":
        source = write(lines, "d.jsonl")
    elif kind == "jsonl with BOM":
        source = write(b"\xef\xbb\xbf" + lines.encode(), "d.jsonl")
    elif kind.startswith("json"):
        source = write(json.dumps(rows, indent=2 if "pretty" in kind else None), "d.json")
    elif kind == "csv":
        source = write("\ufeff" + csv_text(), "d.csv")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source := tmp_path / "d.parquet")
    elif kind == "folder":
        (source := tmp_path / "d").mkdir()
        write(lines, "d/train.jsonl")
    else:
        datasets.Dataset.from_list(rows).save_to_disk(source := tmp_path / "d")
    assert run(source, "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    found = table(tmp_path / "out")
    assert [(row["content"], row["teacher_response"]) for row in found] == [([user(q)], a) for q, a in PAIRS]
    assert [row["extra_info"] for row in found] == [{"index": i} for i in range(3)]
    assert {row["data_source"] for row in found} == {"d"}


ROWS = [{"prompt": f"q {i}", "response": f"a {i}"} for i in range(3)]
JSON_LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.JSONL", JSON_LINES),
        ("d.json", json.dumps({"data": ROWS})),
        ("d.json", json.dumps({"version": 1, "data": ROWS, "tags": []}, indent=2)),
        ("d.json", JSON_LINES),
        ("d.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0)),
        ("d.json.BZ2", bz2.compress(json.dumps(ROWS).encode())),
        ("d.csv.xz", lzma.compress(b"prompt,response\nq 0,a 0\nq 1,a 1\nq 2,a 2\n")),
        ("d.tsv", "prompt\tresponse\nq 0\ta 0\nq 1\ta 1\nq 2\ta 2\n"),
        ("d.csv", "prompt;response\nq 0;a 0\nq 1;a 1\nq 2;a 2\n"),
    ],
)
def test_endings_and_wrappings_of_the_same_rows(write, tmp_path, name, content):
    assert run(write(content, name), "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    found = [(r["content"][0]["content"], r["teacher_response"], r["data_source"]) for r in table(tmp_path / "out")]
    assert found == [(f"q {i}", f"a {i}", "d") for i in range(3)]


def test_one_pretty_printed_row(write, tmp_path):
    row = {"messages": [user("q"), assistant("a")], "meta": [{"x": 1}]}
    assert run(write(json.dumps(row, indent=1), "d.json"), "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    assert [(r["content"], r["teacher_response"]) for r in table(tmp_path / "out")] == [([user("q")], "a")]


def test_messages_in_a_csv_file(write, tmp_path):
    messages = json.dumps([user("q"), assistant("a")]).replace('"', '""')
    assert run(write(f'messages\n"{messages}"\n', "d.csv"), "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    assert [(r["content"], r["teacher_response"]) for r in table(tmp_path / "out")] == [([user("q")], "a")]


def test_a_csv_row_with_too_many_cells(write, tmp_path):
    path = write("prompt,response\nq,a\nq2,a,b\n", "d.csv")
    assert run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    assert [(r["row"], r["reason"]) for r in rejects(tmp_path / "out")] == [(1, "has 3 cells, the header has 2")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.xlsx", "x", "unknown ending '.xlsx'"),
        ("d.jsonl", "", "the inputs hold no row. Fix: "),
        ("d.jsonl.gz", "no gzip", "d.jsonl.gz: cannot be decompressed"),
        ("d.jsonl.xz", lzma.compress(b"x" * 999)[:-9], "d.jsonl.xz: cannot be decompressed"),
        ("d.parquet", "PAR1", "d.parquet: is not a readable parquet file"),
        ("d.json", '[{"prompt": "q", "response": "a"},', "d.json: row 1 is not valid JSON"),
        ("d.json", '[{"prompt": "q", "response": "a"}]\n[]', "has more text after its JSON list"),
        ("d.csv", 'prompt,response\nq,"open', "d.csv: is not a readable CSV file"),
        ("d.csv", b"prompt,response\nq,\xff\n", "d.csv: is not a readable CSV file"),
    ],
)
def test_unreadable_files(write, tmp_path, capsys, name, content, message):
    assert run(write(content, name), "--output_dir", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["lines", "a prompt"])
def test_a_row_that_is_nested_too_deeply_is_a_bad_row(write, tmp_path, form):
    depths = [*range(100, 1100, 20), 5_000, 100_000]
    deep = ["[{" + "[" * depth + "]" * depth + "}]" for depth in depths]
    if form == "lines":
        deep = [f'{{"prompt": {"[" * depth}{"]" * depth}, "response": "a"}}' for depth in depths]
    else:
        deep = [json.dumps({"prompt": text.replace("{[", '{"content": [', 1), "response": "a"}) for text in deep]
    good = [json.dumps(row) for row in numbered(range(len(deep)))]
    path = write("".join(f"{row}\n" for pair in zip(good, deep, strict=True) for row in pair))
    assert run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    assert {row["teacher_response"] for row in table(tmp_path / "out")} >= {f"answer {i}" for i in range(len(deep))}
    if form == "lines":
        assert len(rejects(tmp_path / "out")) == len(deep)


@pytest.mark.parametrize("depth", [900, 990, 5_000, 100_000])
def test_a_list_with_a_row_that_is_nested_too_deeply_is_named(write, tmp_path, capsys, depth):
    path = write(f'[{{"prompt": "q", "response": "a"}}, {"[" * depth}{"]" * depth}]', "d.json")
    code = run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0)
    error = capsys.readouterr().err
    assert code == 0 or f"error: {path}: row 1 is nested too deeply. Fix: drop the row" in error


@pytest.mark.parametrize("other", ["b.csv", "deeper/b.parquet", "b.txt", "b.tsv", "b.csv.gz"])
def test_a_folder_of_several_kinds_is_refused(write, tmp_path, capsys, other):
    (tmp_path / "d/deeper").mkdir(parents=True)
    write(numbered(range(3)), "d/a.jsonl")
    write("prompt,response\nq,a\n", f"d/{other}")
    assert run(tmp_path / "d", "--output_dir", tmp_path / "out") == 2
    message = f"{tmp_path}/d holds data files of several kinds ("
    printed = capsys.readouterr().err
    assert message in printed and "a.jsonl" in printed and other in printed and not (tmp_path / "out").exists()


def test_a_folder_of_one_kind_is_read_whole(write, tmp_path):
    (tmp_path / "d/deeper").mkdir(parents=True)
    (tmp_path / "d/.cache").mkdir()
    write(numbered(range(3)), "d/a.jsonl")
    write(numbered(range(3, 5)), "d/deeper/b.json")
    for name in ("README.md", ".gitattributes", ".cache/x.csv"):
        write("a,b\n", f"d/{name}")
    assert run(tmp_path / "d", "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    assert {row["teacher_response"] for row in table(tmp_path / "out")} == {f"answer {i}" for i in range(5)}


def test_a_data_set_that_cannot_be_read(write, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    write('{"prompt": "q", "response": "a"}\n{"prompt": \n', "d/train.jsonl")
    assert run(tmp_path / "d", "--output_dir", tmp_path / "out") == 2
    assert f"the data set {tmp_path}/d cannot be read" in capsys.readouterr().err


def test_sources_that_are_not_there(tmp_path, capsys):
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    # a name with the ending of a data file is no hub id, so nothing is asked there
    names = ("data/anwsers.jsonl", "data/answers.JSONL.gz", "data/a.tsv:train", "data/a.parquet")
    for source in ("nowhere.jsonl", tmp_path / "nowhere.jsonl", "a/b/c", *names, tmp_path / "loop.csv"):
        assert run(source, "--output_dir", tmp_path / "out") == 2
        assert f"{source}: no such file or folder" in capsys.readouterr().err
    assert run("--output_dir", tmp_path / "out") == 2
    assert "no input" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--max_prompt_length", "--max_response_length"])
@pytest.mark.parametrize("value", ["0", "-5"])
def test_limits_below_1_are_refused(write, tmp_path, option, value):
    assert run(write(numbered(range(3))), "--output_dir", tmp_path / "out", option, value) == 2
    assert not (tmp_path / "out").exists()


def test_own_data_source_and_an_override(write, tmp_path):
    path = write(
        [{"prompt": "a", "response": "b", "data_source": "own"}, {"prompt": "c", "response": "d"}], "name.jsonl"
    )
    assert run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    assert [row["data_source"] for row in table(tmp_path / "out")] == ["own", "name"]
    assert run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0, "--overwrite", "--data_source", "x") == 0
    assert [row["data_source"] for row in table(tmp_path / "out")] == ["x", "x"]


@pytest.mark.parametrize("chunk", [1, 2, 7, 100, 10**6])
def test_json_lists_are_streamed_whatever_the_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(teacher_file, "CHUNK_CHARS", chunk)
    rng = random.Random(0)
    rows = [{"a": rng.choice(["x,]é[", [1, [2]], {"b": []}, 1.5]), "n": i} for i in range(50)] + [12, 123, "s", None]
    for expected in (rows, [], [{}], [[1], [2]]):
        for indent in (None, 2):
            path = tmp_path / "list.json"
            path.write_text(json.dumps(expected, indent=indent, ensure_ascii=False) + "\n \n", encoding="utf-8")
            assert [row for row, _ in json_rows(path)] == expected


# ---------------------------------------------------------------------------------------------------------- outputs


def numbered(numbers):
    return [{"prompt": f"prompt {i}", "response": f"answer {i}"} for i in numbers]


def sides(folder):
    return [{row["content"][0]["content"] for row in table(folder, name)} for name in ("train", "val")]


def test_the_split_depends_on_the_prompt_alone(write, tmp_path):
    numbers = list(range(3000))
    for name, order in (("a", numbers), ("b", numbers[::-1]), ("more", [*range(3000, 6000), *numbers])):
        assert run(write(numbered(order)), "--output_dir", tmp_path / name, "--val_fraction", 0.1) == 0
    (train, val), (train_b, val_b), (train_more, val_more) = (sides(tmp_path / name) for name in ("a", "b", "more"))
    assert (train, val) == (train_b, val_b) and not train & val and len(train | val) == 3000
    assert train < train_more and val < val_more
    assert abs(len(val) - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5  # binomial, 5 sigma


def test_a_larger_fraction_keeps_the_smaller_validation_set(write, tmp_path):
    write(numbered(range(500)))
    for fraction in (0.1, 0.4):
        assert run(tmp_path / "data.jsonl", "--output_dir", tmp_path / str(fraction), "--val_fraction", fraction) == 0
    assert sides(tmp_path / "0.1")[1] < sides(tmp_path / "0.4")[1]


def test_duplicates(write, tmp_path, capsys):
    accented = unicodedata.normalize("NFD", "café x")
    prompts = ["café x", "other", " café\n\tx ", accented, "Café x"]
    rows = [{"prompt": prompt, "response": f"answer {i}"} for i, prompt in enumerate(prompts)]
    write(rows + [rows[0]])
    assert run(tmp_path / "data.jsonl", "--output_dir", tmp_path / "one", "--val_fraction", 0) == 0
    assert [row["teacher_response"] for row in table(tmp_path / "one")] == ["answer 0", "answer 1", "answer 4"]
    assert "duplicates          3 rows" in capsys.readouterr().out
    assert run(tmp_path / "data.jsonl", "--output_dir", tmp_path / "all", "--val_fraction", 0, "--keep_answers") == 0
    assert [row["teacher_response"] for row in table(tmp_path / "all")] == [f"answer {i}" for i in range(5)]


def test_several_answers_to_a_prompt_are_kept_and_every_row_of_the_file_has_a_list(
    write, tmp_path, tiny_problem, capsys
):
    answers = ["a", [assistant("b")], ["c d", assistant("e")], "f", ["g", " "], ["h", user("i")]]
    path = write([{"content": f"{'a ' * i}b", "teacher_response": answer} for i, answer in enumerate(answers)])
    options = ("--val_fraction", 0, "--tokenizer", tiny_problem / "model")
    assert run(path, "--output_dir", tmp_path / "out", *options) == 0
    rows = table(tmp_path / "out")
    assert [row["teacher_response"] for row in rows] == [["a"], ["b"], ["c d", "e"], ["f"]]
    assert [(row["content"][0]["content"], row["extra_info"]["index"]) for row in rows] == [
        (f"{'a ' * i}b", i) for i in range(4)
    ]
    assert [bad["reason"] for bad in rejects(tmp_path / "out")] == [
        "column 'teacher_response', answer 1 holds only whitespace",
        "column 'teacher_response', answer 1 has the role 'user', not assistant",
    ]
    assert not list((tmp_path / "out").glob("*.single"))
    assert check_data_file(tmp_path / "out/train.parquet", "content", "teacher_response") == 4
    assert re.search(rf"train answers +{(2 + 2 + 3 + 2 + 2) / 5:.1f} ", capsys.readouterr().out)


def test_the_hash_tells_roles_and_borders_of_messages_apart():
    prompts = [[user("a b")], [user("a"), user("b")], [{"role": "tool", "content": "a b"}], [user("ab")], [user("A b")]]
    assert len({prompt_hash(prompt) for prompt in prompts}) == len(prompts)
    assert all(0 <= prompt_hash(prompt) < 2**64 for prompt in prompts)


@pytest.mark.parametrize("keep", [(), ("--keep_answers",)])
def test_validation_rows_of_their_own_are_kept_out_of_training(write, tmp_path, keep):
    train = write([*numbered(range(10)), {"prompt": "prompt  3", "response": "other"}], "train.jsonl")
    val = write(numbered([3, 20]), "val.jsonl")
    assert run(train, "--val_inputs", val, "--output_dir", tmp_path / "out", *keep) == 0
    assert sides(tmp_path / "out") == [
        {f"prompt {i}" for i in range(10) if i != 3},
        {"prompt 3", "prompt 20"},
    ]


def test_existing_outputs(write, tmp_path, capsys):
    out = tmp_path / "out"
    write([*numbered(range(3)), {"x": 1}])
    assert run(tmp_path / "data.jsonl", "--output_dir", out, "--val_fraction", 0) == 0
    before = (out / "train.parquet").read_bytes()
    assert run(tmp_path / "data.jsonl", "--output_dir", out, "--val_fraction", 0) == 2
    assert "already there" in capsys.readouterr().err and (out / "train.parquet").read_bytes() == before
    assert run(write(numbered(range(5))), "--output_dir", out, "--val_fraction", 0, "--overwrite") == 0
    assert len(table(out)) == 5
    assert [path.name for path in out.iterdir()] == ["train.parquet"]  # the old rejects are gone


def test_an_output_that_is_a_folder_is_refused_before_anything_is_replaced(write, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "val.parquet").mkdir(parents=True)
    (out / "train.parquet").write_text("mine")
    assert run(write(numbered(range(50))), "--output_dir", out, "--overwrite") == 2
    assert f"error: {out}/val.parquet: a folder, expected a file. Fix: " in capsys.readouterr().err
    assert (out / "train.parquet").read_text() == "mine"


def test_one_prepare_at_a_time_and_what_a_killed_one_left_is_removed(write, tmp_path, capsys):
    out = tmp_path / "out"
    (out / ".prepare.dead").mkdir(parents=True)
    (out / ".prepare.dead" / "train.parquet").write_text("half")
    with alone_in(out, "gad prepare"):
        assert run(write(numbered(range(3))), "--output_dir", out, "--val_fraction", 0) == 2
    assert f"another gad prepare uses {out}. Fix: wait for it" in capsys.readouterr().err
    assert (out / ".prepare.dead").exists()
    assert run(write(numbered(range(3))), "--output_dir", out, "--val_fraction", 0) == 0
    assert os.listdir(out) == ["train.parquet"]


def test_too_few_rows_for_validation(write, tmp_path, capsys):
    assert run(write(numbered(range(3))), "--output_dir", tmp_path / "out", "--val_fraction", 1e-9) == 2
    assert "no row of 3 went to validation" in capsys.readouterr().err
    assert run(write(numbered(range(3))), "--output_dir", tmp_path / "out", "--val_fraction", 1.0) == 2
    assert "val_fraction=1.0" in capsys.readouterr().err


def test_conversations_that_lose_turns_are_counted(write, tmp_path, capsys):
    write([{"messages": [user("q"), assistant("a"), user("more")]}, {"messages": [user("p"), assistant("a")]}])
    assert run(tmp_path / "data.jsonl", "--output_dir", tmp_path / "out", "--val_fraction", 0) == 0
    assert re.search(r"shortened +1 conv", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------- preset


def test_preset_keeps_the_data_set_s_own_split(tmp_path, capsys):
    """A stand-in with the layout of the public data set: splits train and test, own column names, columns beside."""
    folder = tmp_path / "LMSYS-Chat-GPT-5-Chat-Response"
    (folder / "data").mkdir(parents=True)
    for split, numbers in (("train", range(20)), ("test", range(15, 25))):
        rows = [
            {"id": str(i), "content": [user(f"p {i}")], "teacher_response": f"a {i}", "language": "en"} for i in numbers
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")
    out = tmp_path / "out"
    assert run(folder, "--preset", "lmsys-gpt5", "--output_dir", out) == 0
    assert sides(out) == [{f"p {i}" for i in range(15)}, {f"p {i}" for i in range(15, 25)}]
    assert {row["data_source"] for row in table(out)} == {"LMSYS-Chat-GPT-5-Chat-Response"}
    assert run(f"{folder}:nowhere", "--output_dir", tmp_path / "no") == 2
    assert "no split 'nowhere'. Fix: choose from train, test" in capsys.readouterr().err
    assert run(f"{folder}:test", "--output_dir", tmp_path / "test", "--val_fraction", 0) == 0
    assert len(table(tmp_path / "test")) == 10


def test_wrong_presets(tmp_path, capsys):
    assert run("--preset", "gpt6", "--output_dir", tmp_path / "out") == 2
    assert "expected one of lmsys-gpt5" in capsys.readouterr().err
    assert run("--preset", "lmsys-gpt5", "--val_inputs", "x", "--output_dir", tmp_path / "out") == 2
    assert "own split" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- lengths


def test_lengths_in_the_student_s_tokens(write, tmp_path, tiny_problem, capsys):
    """The word tokenizer: a prompt is <bos> <user> words <end> <assistant>, an answer is words <end>."""
    words = [1, 2, 3, 4, 40]
    rows = [{"prompt": " ".join(["a"] * n), "response": " ".join(["b"] * (n + 1))} for n in words]
    limits = ("--max_prompt_length", 8, "--max_response_length", 4)
    path = write(rows)
    assert (
        run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0, "--tokenizer", tiny_problem / "model", *limits)
        == 0
    )
    printed = capsys.readouterr().out
    prompts, answers = [n + 4 for n in words], [n + 2 for n in words]
    for name, lengths, over in (
        ("prompts", prompts, "20.00% longer than 8"),
        ("answers", answers, "60.00% longer than 4"),
    ):
        p50, p95 = np.percentile(lengths, 50), np.percentile(lengths, 95)
        expected = rf"train {name} +{sum(lengths) / 5:.1f} +{p50:.0f} +{p95:.0f} +{max(lengths)} +{over}"
        assert re.search(expected, printed), (expected, printed)


def test_default_limits_are_the_trainer_s(write, tmp_path, tiny_problem, capsys):
    out = tmp_path / "out"
    assert (
        run(write(numbered([1])), "--output_dir", out, "--val_fraction", 0, "--tokenizer", tiny_problem / "model") == 0
    )
    printed = capsys.readouterr().out
    assert "longer than 2048" in printed and "longer than 1536" in printed


def test_a_prompt_that_the_template_refuses_is_rejected(write, tmp_path, tiny_problem):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_problem / "model")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    shutil.copytree(tiny_problem / "model", tmp_path / "strict")
    tokenizer.save_pretrained(tmp_path / "strict")
    system = {"role": "system", "content": "s"}
    path = write([{"messages": [system, user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}])
    assert run(path, "--output_dir", tmp_path / "out", "--val_fraction", 0, "--tokenizer", tmp_path / "strict") == 0
    assert len(table(tmp_path / "out")) == 1
    assert "chat template refuses the prompt: no system role" in rejects(tmp_path / "out")[0]["reason"]


def test_a_tokenizer_without_template(tmp_path, tiny_problem):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_problem / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no chat template"):
        student_token_counter(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="the tokenizer in /nowhere/model cannot be loaded"):
        student_token_counter("/nowhere/model")


# ---------------------------------------------------------------------------------------------------------- trainer


def test_the_trainer_reads_what_was_written(tmp_path, write, tiny_problem):
    from transformers import AutoTokenizer

    from verl.utils.dataset.rl_dataset import RLHFDataset

    rows = [row for row, _, _ in LAYOUTS.values()] + [{"prompt": f"c {i}", "response": "b d"} for i in range(30)]
    assert (
        run(write(rows), "--output_dir", tmp_path / "out", "--val_fraction", 0.3, "--tokenizer", tiny_problem / "model")
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_problem / "model")
    config = OmegaConf.create(
        {
            "prompt_key": "content",
            "teacher_key": "teacher_response",
            "max_prompt_length": 64,
            "max_response_length": 16,
            "truncation": "error",
            "cache_dir": str(tmp_path / "cache"),
            "filter_overlong_prompts": True,
            "filter_overlong_prompts_workers": 1,
        }
    )
    total = 0
    for name in ("train", "val"):
        path, expected = tmp_path / "out" / f"{name}.parquet", table(tmp_path / "out", name)
        assert check_data_file(path, "content", "teacher_response") == len(expected)
        dataset = RLHFDataset(str(path), tokenizer, config)
        assert len(dataset) == len(expected)
        for i, row in enumerate(expected):
            assert dataset[i]["raw_prompt"] == row["content"]
            assert dataset[i]["teacher_response"] == row["teacher_response"]
            assert dataset[i]["data_source"] == "data" and dataset[i]["index"] == i
        total += len(expected)
    distinct = {json.dumps(prompt) for _, prompt, _ in LAYOUTS.values()}
    assert total == len(distinct) + 30


# ---------------------------------------------------------------------------------------------------------- memory

PEAK = """
import sys
from recipe.gad.data.prepare import prepare_files

def peak_mb():  # of this process since it was started; ru_maxrss would count its parent
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

small, big = sys.argv[1:]
prepare_files([small], "small")
before = peak_mb()
print(prepare_files([big], "big").rows, peak_mb() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """A 160 MB file after one of 40 MB."""
    rng = random.Random(0)
    filler = "".join(rng.choice("abcdefgh ") for _ in range(20_000))

    def big_file(name, size):
        path = tmp_path / f"{name}.{kind}"
        starts = [rng.randrange(10_000) for _ in range(size)]
        rows = ({"prompt": f"{name} {i}", "response": filler[start : start + 10_000]} for i, start in enumerate(starts))
        if kind == "parquet":  # one row group
            pq.write_table(pa.Table.from_pylist(list(rows)), path, compression="none", use_dictionary=False)
            return path
        with path.open("w", newline="") as file:
            if kind == "csv":
                out = csv.DictWriter(file, ["prompt", "response"])
                out.writeheader()
                out.writerows(rows)
            elif kind == "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                file.write("[" + json.dumps({"prompt": "first", "response": "row"}))
                file.writelines(", " + json.dumps(row) for row in rows)
                file.write("]")
        return path

    small, big = big_file("small", 4000), big_file("big", 16_000)
    command = [sys.executable, "-c", PEAK, str(small), str(big)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    rows, grown = map(int, done.stdout.split())
    print(f"{kind}: {big.stat().st_size / 1e6:.0f} MB read, the peak grew by {grown} MB")
    assert rows == 16_000 + (kind == "json") and grown < 60
    shutil.rmtree(tmp_path)


def test_sigterm_leaves_nothing(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(f'{{"prompt": "q {i}", "response": "a"}}\n' for i in range(300_000)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "recipe.gad.cli", "prepare", str(tmp_path / "d.jsonl"), "--output_dir", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(out.glob(".prepare.*")):
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=30) == 143 and not out.exists()

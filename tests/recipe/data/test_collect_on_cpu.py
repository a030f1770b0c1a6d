"""gad collect against a real HTTP server: results, failures, and a kill -9 in the middle."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recipe.gad import cli, openai_client

KEY = "sk-very-secret-0123456789"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(openai_client, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    return path


def arguments(server, prompts, out, *more):
    return ["collect", str(prompts), "--output", str(out), "--model", "teacher", "--base_url", server.url, *more]


def run(*args):
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(arg) for arg in args])
    return exit_.value.code


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_collected_and_prepared(chat_server, prompts, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    more = ("--temperature", "0.5", "--max_tokens", "9", "--extra", '{"top_p": 0.9}', "--samples", "2")
    prices = ("--price_prompt", "1e6", "--price_completion", "2e6")
    assert run(*arguments(chat_server, prompts, out, *more, *prices)) == 0
    rows = lines(out)
    assert sorted((row["content"][0]["content"], row["sample"]) for row in rows) == [
        (text, sample) for text in ("one", "three", "two") for sample in (0, 1)
    ]
    for row in rows:
        assert row["content"] == [{"role": "user", "content": row["content"][0]["content"]}]
        assert row["teacher_response"] == "answer to " + row["content"][0]["content"]
        assert (row["data_source"], row["finish_reason"]) == ("prompts", "stop")
    assert all(body["top_p"] == 0.9 and body["max_tokens"] == 9 for body in chat_server.bodies)
    printed = capsys.readouterr().out
    assert "6 in" in printed and "18 of prompts, 12 of answers" in printed
    assert "cost          42.0000" in printed  # 6 x (3 x 1 + 2 x 2)

    data = tmp_path / "data"
    assert run("prepare", out, "--output_dir", data, "--val_fraction", "0") == 0
    table = pq.read_table(data / "train.parquet").to_pylist()
    assert sorted(row["teacher_response"] for row in table) == ["answer to one", "answer to three", "answer to two"]


def test_every_layout_is_a_prompt_file_and_its_answers_are_left_out(chat_server, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": "old"}], "data_source": "chat"},
        {"messages": turns[:1]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "old"}]},
        {"instruction": "do", "input": "this", "output": "old"},
        {"messages": turns[:1]},  # a second time
    ]
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run(*arguments(chat_server, prompts, tmp_path / "out.jsonl", "--system", "be brief")) == 0
    system = {"role": "system", "content": "be brief"}
    sent = [body["messages"] for body in chat_server.bodies]
    expected = [turns, turns[:1], [{"role": "user", "content": "q"}], [{"role": "user", "content": "do\n\nthis"}]]
    assert sorted(map(str, sent)) == sorted(str([system, *messages]) for messages in expected)
    found = {str(row["content"]): row["data_source"] for row in lines(tmp_path / "out.jsonl")}
    assert found == {str(prompt): "chat" if prompt is turns else "rows" for prompt in expected}


def test_odd_answers_fail_alone_and_the_output_can_be_resumed(chat_server, tmp_path):
    def odd(text="fine", **changes):
        reply = chat_server.answer(text)
        reply.body["choices"][0]["message"] |= changes.pop("message", {})
        reply.body |= changes
        return reply

    replies = {
        "good": odd(),
        "text counts": odd(usage={"prompt_tokens": "12", "completion_tokens": [1]}),
        "listed usage": odd(usage=[1]),
        "negative": odd(usage={"prompt_tokens": -15, "completion_tokens": 2}),
        "number": odd(message={"content": 5}),
        "object": odd(message={"content": {}}),
        "choices": odd(choices="abc"),
        "no choice": odd(choices=[None]),
        "deep": type(odd())(b'{"choices": ' + b"[" * 100_000),
        "surrogate": type(odd())(json.dumps(odd("x\ud83d").body).encode()),
    }
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(replies), encoding="utf-8")
    chat_server.reply = lambda body, _: replies[body["messages"][-1]["content"]]
    out, failed = tmp_path / "out.jsonl", tmp_path / "out.failed.jsonl"
    call = arguments(chat_server, prompts, out, "--max_retries", "0")
    assert run(*call) == 1
    tokens = {row["content"][0]["content"]: (row["prompt_tokens"], row["completion_tokens"]) for row in lines(out)}
    assert tokens == {"good": (3, 2), "text counts": (0, 0), "listed usage": (0, 0), "negative": (0, 2)}
    assert {row["content"][0]["content"] for row in lines(failed)} == set(replies) - set(tokens)
    asked = len(chat_server.bodies)
    assert run(*call) == 1 and len(chat_server.bodies) == asked, "nothing is asked again"


def test_answers_that_are_no_training_data(chat_server, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("good\ncut\nempty\nrefusal\nfiltered\nbad\nbroken\n", encoding="utf-8")
    answer = chat_server.answer
    replies = {
        "good": lambda: answer("fine"),
        "cut": lambda: answer("half an ans", "length"),
        "empty": lambda: answer("  \n"),
        "refusal": lambda: answer(None, refusal="I will not"),
        "filtered": lambda: answer("", "content_filter"),
        "bad": lambda: chat_server.error(400, "too long"),
        "broken": lambda: chat_server.error(500, "boom"),
    }
    chat_server.reply = lambda body, _: replies[body["messages"][-1]["content"]]()
    out, failed = tmp_path / "out.jsonl", tmp_path / "out.failed.jsonl"
    call = arguments(chat_server, prompts, out, "--max_retries", "1")
    assert run(*call) == 1
    assert [row["teacher_response"] for row in lines(out)] == ["fine"]
    reasons = {row["content"][0]["content"]: row["reason"] for row in lines(failed)}
    assert reasons == {
        "cut": "cut at the token limit",
        "empty": "empty",
        "refusal": "refused",
        "filtered": "refused",
        "bad": "request failed",
        "broken": "request failed",
    }
    by_prompt = {row["content"][0]["content"]: row for row in lines(failed)}
    assert by_prompt["cut"]["teacher_response"] == "half an ans"
    assert by_prompt["refusal"]["teacher_response"] == "I will not"
    assert "too long" in by_prompt["bad"]["error"] and "boom" in by_prompt["broken"]["error"]
    assert chat_server.count("broken") == 2
    assert "2 refused" in capsys.readouterr().out

    asked = len(chat_server.bodies)
    assert run(*call) == 1  # failed requests are done, and still failed
    assert len(chat_server.bodies) == asked
    replies.update(dict.fromkeys(replies, lambda: answer("fine now")))
    assert run(*call, "--retry_failed") == 0
    assert len(chat_server.bodies) == asked + 6
    assert sorted(row["teacher_response"] for row in lines(out)) == ["fine"] + ["fine now"] * 6
    assert len(lines(failed)) == 6  # they stay, and were paid for: 5 answers of the first run, 6 of the last
    assert run(*call) == 0
    assert "33 of prompts, 22 of answers" in capsys.readouterr().out


def test_more_samples_later(chat_server, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run(*arguments(chat_server, prompts, out)) == 0
    assert run(*arguments(chat_server, prompts, out, "--samples", "3")) == 0
    assert len(chat_server.bodies) == 9
    assert sorted(row["sample"] for row in lines(out)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({row["id"] for row in lines(out)}) == 9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--temperature", "0.1"), "temperature was 0.7, is 0.1"),
        (("--model", "other"), "model was 'teacher', is 'other'"),
        (("--system", "be rude"), "system was None, is 'be rude'"),
        (("--extra", '{"top_p": 1}'), r"extra was {}, is {'top_p': 1}"),
    ],
)
def test_changed_settings_are_refused(chat_server, prompts, tmp_path, capsys, changed, message):
    call = arguments(chat_server, prompts, tmp_path / "out.jsonl", "--temperature", "0.7")
    assert run(*call) == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(*call, *changed) == 2
    error = capsys.readouterr().err
    assert message in error and "another --output" in error
    assert len(chat_server.bodies) == 3 and (tmp_path / "out.jsonl").read_bytes() == before


def test_settings_that_led_to_nothing_may_change(chat_server, prompts, tmp_path, capsys):
    chat_server.reply = lambda body, _: (
        chat_server.error(404, "no such model") if body["model"] == "typo" else chat_server.answer("hi")
    )
    call = arguments(chat_server, prompts, tmp_path / "out.jsonl")
    assert run(*call, "--model", "typo") == 2
    error = capsys.readouterr().err
    assert "no such model" in error and "rerun the same command to resume" in error
    assert run(*call) == 0
    assert len(lines(tmp_path / "out.jsonl")) == 3


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_cut_off_and_asked_again(chat_server, prompts, tmp_path, cut):
    out = tmp_path / "out.jsonl"
    call = arguments(chat_server, prompts, out, "--concurrency", "1")
    assert run(*call) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    assert run(*call) == 0
    assert out.read_bytes() == whole
    assert [chat_server.count(prompt) for prompt in ("one", "two", "three")] == [1, 1, 2]


def test_a_foreign_file_is_left_alone(chat_server, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text('{"messages": []}\n', encoding="utf-8")
    assert run(*arguments(chat_server, prompts, out)) == 2
    assert "out.jsonl, row 0: not written by gad collect" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == '{"messages": []}\n' and chat_server.bodies == []


def test_two_runs_do_not_write_to_one_file(chat_server, prompts, tmp_path, capsys):
    with (tmp_path / "out.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(*arguments(chat_server, prompts, tmp_path / "out.jsonl")) == 2
    assert "another gad collect writes to" in capsys.readouterr().err and chat_server.bodies == []
    assert run(*arguments(chat_server, prompts, tmp_path / "out.jsonl")) == 0


def test_bad_prompts_are_reported_and_the_others_asked(chat_server, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": \n{"text": "x"}\n{"prompt": " "}\n', encoding="utf-8")
    assert run(*arguments(chat_server, prompts, tmp_path / "out.jsonl")) == 1
    assert [row["row"] for row in lines(tmp_path / "out.rejects.jsonl")] == [1, 2, 3]
    assert "prompts.jsonl, row 2: has none of the prompt's columns" in capsys.readouterr().err
    assert len(lines(tmp_path / "out.jsonl")) == 1


def test_half_a_surrogate_pair_in_an_answer(chat_server, prompts, tmp_path):
    body = json.dumps(chat_server.answer("X").body).replace('"X"', '"\\ud83d"').encode()
    chat_server.reply = lambda *_: type(chat_server.answer(""))(body)
    assert run(*arguments(chat_server, prompts, tmp_path / "out.jsonl")) == 1, "gad prepare would reject these rows"
    failed = [(row["teacher_response"], row["reason"]) for row in lines(tmp_path / "out.failed.jsonl")]
    assert failed == [("\ud83d", "not valid Unicode")] * 3 and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("text", ["", '{"text": "x"}'])
def test_without_a_prompt_no_answers_appear(chat_server, tmp_path, capsys, text):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text, encoding="utf-8")
    assert run(*arguments(chat_server, prompts, tmp_path / "out" / "out.jsonl")) == 2
    assert f"error: no prompt in {prompts} ({bool(text):d} rows rejected)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.rejects.jsonl"] * bool(text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--samples", "0"), "samples=0"),
        (("--concurrency", "0"), "concurrency=0"),
        (("--samples", "1000000000"), "samples=1000000000: expected 1 to 10000"),
        (("--temperature", "nan"), "temperature nan: expected a number of 0 or more"),
        (("--temperature", "-1"), "temperature -1.0"),
        (("--max_tokens", "0"), "max_tokens 0: expected 1 or more"),
        (("--timeout", "nan"), "timeout=nan"),
        (("--extra", '{"n": 3}'), "the extra fields of the request set n. Fix: leave"),
        (("--extra", '{"messages": [], "stream": true}'), "set messages, stream"),
        (("--extra", '{"top_p": NaN}'), "hold NaN or Infinity"),
        (("--base_url", "http://u:hunter2@localhost/v1"), "base_url of localhost holds a user name"),
        (("--extra", "top_p=1"), "expected a JSON object"),
        (("--extra", "[1]"), "expected a JSON object"),
        (("--api_key_env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
        (("--output", "answers.csv"), "ends with .jsonl"),
    ],
)
def test_wrong_arguments(chat_server, prompts, tmp_path, capsys, wrong, message):
    assert run(*arguments(chat_server, prompts, tmp_path / "out.jsonl", *wrong)) == 2
    assert message in capsys.readouterr().err and chat_server.bodies == []


def test_kill_9_in_the_middle_and_resume(chat_server, tmp_path):
    """Nothing that was finished is asked again; the key is in no output and no file."""
    texts = [f"prompt {i}" for i in range(40)]
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out" / "answers.jsonl"
    prompts.write_text("\n".join(texts), encoding="utf-8")
    concurrency = 4

    def reply(body, earlier):
        text = body["messages"][-1]["content"]
        if text == "prompt 3" and not earlier:
            return chat_server.error(429, f"slow down, {KEY}", **{"Retry-After": "0.1"})
        if text == "prompt 5":
            return chat_server.error(400, f"not with the key {KEY}")
        return chat_server.answer(f"answer to {text}", delay=0.05)

    chat_server.reply = reply
    call = [sys.executable, "-m", "recipe.gad.cli"]
    call += arguments(chat_server, prompts, out, "--concurrency", str(concurrency))

    def finished():
        return out.read_bytes().count(b"\n") if out.exists() else 0

    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    unsaved = 0
    while finished() < 10 and process.poll() is None and time.monotonic() < deadline:
        asked = len(chat_server.bodies)
        unsaved = max(unsaved, asked - finished())
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    printed = "".join(process.communicate(timeout=60))
    assert process.returncode == -signal.SIGKILL
    complete_lines = out.read_bytes().splitlines(keepends=True)
    before = [json.loads(line)["content"][0]["content"] for line in complete_lines if line.endswith(b"\n")]
    assert 10 <= len(before) < 39
    asked_before = len(chat_server.bodies)
    time.sleep(0.2)  # what was in flight at the server ends

    second = subprocess.run(call, capture_output=True, text=True, timeout=60)
    printed += second.stdout + second.stderr
    assert second.returncode == 1, second.stderr  # prompt 5
    rows = lines(out)
    assert sorted(row["content"][0]["content"] for row in rows) == sorted(set(texts) - {"prompt 5"})
    assert [row["content"][0]["content"] for row in lines(out.with_suffix(".failed.jsonl"))] == ["prompt 5"]
    assert [chat_server.count(text) for text in before] == [1 + (text == "prompt 3") for text in before]
    assert unsaved <= concurrency + 2  # 2: the 429 and the 400
    assert asked_before - len(before) <= concurrency + 2
    assert len(chat_server.bodies) - 41 <= concurrency  # 41: every prompt once, prompt 3 twice
    assert "39 in" in second.stdout and KEY not in printed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 and not any(KEY.encode() in path.read_bytes() for path in files)

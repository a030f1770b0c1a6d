"""The judge (recipe/gad/evaluation/judge.py) against a real local HTTP server with judges whose verdicts are known."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.gad.evaluation.judge import (
    PAIRWISE_PROMPT,
    REPLIES,
    Candidates,
    JudgeSettings,
    against,
    judge,
    outcome,
    parse_score,
    parse_verdict,
)
from recipe.gad.openai_client import ChatClient, RequestFailed

CONVERSATION = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why {x}?"}]
ANSWER_A = re.compile(r"<answer_A>\n(.*?)\n</answer_A>", re.DOTALL)
ANSWER_B = re.compile(r"<answer_B>\n(.*?)\n</answer_B>", re.DOTALL)
ANSWER = re.compile(r"<answer>\n(.*?)\n</answer>", re.DOTALL)


def candidates(*texts: tuple[str, str]) -> list[Candidates]:
    return [Candidates(index, CONVERSATION, first, second) for index, (first, second) in enumerate(texts)]


def run(server, folder, pairs, mode="pairwise", **kwargs):
    settings = JudgeSettings(model="a judge", mode=mode, **kwargs)
    client = ChatClient(server.url, max_retries=0)
    return judge(pairs, client, settings, folder, concurrency=4, seed=0)


def says(server, verdict) -> None:
    """The server's judge: ``verdict(question)`` is the last line of its reply."""
    server.reply = lambda body, earlier: server.answer(f"Because.\n\n{verdict(body['messages'][-1]['content'])}")


def longer_wins(question: str) -> str:
    a, b = len(ANSWER_A.search(question)[1]), len(ANSWER_B.search(question)[1])
    return "Verdict: tie" if a == b else f"Verdict: {'A' if a > b else 'B'}"


def rates(result) -> tuple[float, float, float]:
    return tuple(result["pairwise"][name]["value"] for name in ("win", "tie", "lose"))


def test_an_unbiased_judge_is_counted_as_it_is(chat_server, tmp_path):
    says(chat_server, longer_wins)
    result = run(chat_server, tmp_path, candidates(("long", "s"), ("longer", "x"), ("i", "much"), ("as", "is")))
    assert rates(result) == (0.5, 0.25, 0.25)
    assert result["pairwise"]["order_disagreement"] == 0
    assert (result["pairwise"]["pairs"], result["pairwise"]["unparsable"], result["pairwise"]["failed"]) == (4, 0, 0)


@pytest.mark.parametrize("position", ["A", "B"])
def test_a_judge_that_prefers_a_position_makes_only_ties(chat_server, tmp_path, position):
    says(chat_server, lambda question: f"Verdict: {position}")
    result = run(chat_server, tmp_path, candidates(("one", "two"), ("three", "four")))
    assert rates(result) == (0, 1, 0)
    assert result["pairwise"]["order_disagreement"] == 1


def test_both_orders_are_asked_and_equal_texts_are_not(chat_server, tmp_path):
    says(chat_server, longer_wins)
    result = run(chat_server, tmp_path, candidates(("one", "two"), ("same", "same")))
    asked = [body["messages"][-1]["content"] for body in chat_server.bodies]
    shown = sorted((ANSWER_A.search(text)[1], ANSWER_B.search(text)[1]) for text in asked)
    assert shown == [("one", "two"), ("two", "one")]
    assert all("system: be brief\n\nuser: why {x}?" in text for text in asked)
    assert rates(result) == (0, 1, 0)


@pytest.mark.parametrize(
    ("as_a", "as_b", "expected"),
    [("A", "B", 1.0), ("B", "A", 0.0)]
    + [(a, b, 0.5) for a, b in itertools.product(("A", "B", "tie"), repeat=2) if {a, b} != {"A", "B"}],
)
def test_only_agreement_of_both_orders_wins(as_a, as_b, expected):
    assert outcome(as_a, as_b) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Good.\nVerdict: A", "A"),
        ("**Verdict:** B\n", "B"),
        ("Verdict: [[Tie]].", "tie"),
        ("verdict: a", "A"),
        ("Verdict: B\nVerdict: A", "A"),  # the last line counts
        ("Verdict: A\nI hope this helps.", None),
        ("Verdict: A or B", None),
        ("Verdict: C", None),
        ("A", None),
        ("Verdict:", None),
        ("The verdict: A", None),
        ("", None),
    ],
)
def test_verdicts_are_read_strictly(reply, expected):
    assert parse_verdict(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Fine.\nScore: 7", 7),
        ("**Score: 10**", 10),
        ("Score: 8/10", 8),
        ("Score: [1]", 1),
        ("Score: 0", None),
        ("Score: 11", None),
        ("Score: 7.5", None),
        ("Score: -3", None),
        ("Score: 7 or 8", None),
        ("7", None),
        ("Score: N", None),
    ],
)
def test_scores_are_read_strictly(reply, expected):
    assert parse_score(reply) == expected


def test_unparsable_replies_and_refused_requests_are_counted_and_left_out(chat_server, tmp_path):
    def reply(body, earlier):
        question = body["messages"][-1]["content"]
        if "refuse me" in question:
            return chat_server.error(400, "content filter")
        return chat_server.answer("no idea" if "murky" in question else longer_wins(question))

    chat_server.reply = reply
    pairs = candidates(("long", "s"), ("murky", "x"), ("refuse me", "y"))
    result = run(chat_server, tmp_path, pairs)
    assert rates(result) == (1, 0, 0)
    assert (result["pairwise"]["pairs"], result["pairwise"]["unparsable"], result["pairwise"]["failed"]) == (1, 2, 2)
    with pytest.raises(ValueError, match="no verdict: 2 requests failed and 2 replies"):
        run(chat_server, tmp_path, pairs[1:])


def test_scores_of_both_sides(chat_server, tmp_path):
    says(chat_server, lambda question: f"Score: {len(ANSWER.search(question)[1])}")
    result = run(chat_server, tmp_path, candidates(("xxx", "xxxxxxxx"), ("xxxxx", "xxxxxxxxxx")), mode="score")
    assert (result["score"]["first"]["value"], result["score"]["second"]["value"]) == (4, 9)
    assert (result["score"]["first"]["low"], result["score"]["first"]["high"]) == (3, 5)
    assert "pairwise" not in result


def test_several_samples_of_a_prompt_count_as_one(chat_server, tmp_path):
    says(chat_server, longer_wins)
    pairs = [Candidates(0, CONVERSATION, first, "four") for first in ("xxxxxx", "xxxxx", "x")]
    result = run(chat_server, tmp_path, [*pairs, Candidates(1, CONVERSATION, "y", "four")])
    assert rates(result) == pytest.approx((1 / 3, 0, 2 / 3))  # prompt 0: 2/3 won; prompt 1: lost


def test_nothing_is_asked_twice(chat_server, tmp_path):
    says(chat_server, longer_wins)
    pairs = candidates(("one", "three"), ("four", "seven"))
    first = run(chat_server, tmp_path, pairs)
    assert len(chat_server.bodies) == 4
    assert run(chat_server, tmp_path, pairs) == first
    assert len(chat_server.bodies) == 4
    run(chat_server, tmp_path, [*pairs, Candidates(9, CONVERSATION, "new", "newer")])
    assert len(chat_server.bodies) == 6
    run(chat_server, tmp_path, pairs, extra={"temperature": 0.5})  # another request
    assert len(chat_server.bodies) == 10
    assert chat_server.bodies[-1]["temperature"] == 0.5


def test_replies_before_a_crash_are_kept_and_a_torn_line_is_asked_again(chat_server, tmp_path):
    says(chat_server, longer_wins)
    pairs = candidates(("one", "three"), ("four", "seven!"))
    expected = run(chat_server, tmp_path, pairs)
    file = tmp_path / REPLIES
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])  # killed while the last line was written
    assert run(chat_server, tmp_path, pairs) == expected
    assert len(chat_server.bodies) == 5
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert len({entry["key"] for entry in lines}) == len(lines) == 4


def test_replies_before_a_hopeless_failure_are_kept(chat_server, tmp_path):
    def reply(body, earlier):
        if len(chat_server.bodies) > 2:
            return chat_server.error(401, "wrong key")
        return chat_server.answer("Verdict: A")

    chat_server.reply = reply
    with pytest.raises(RequestFailed, match="HTTP 401"):
        run(chat_server, tmp_path, candidates(*((f"a{i}", f"b{i}") for i in range(20))))
    assert 1 <= len((tmp_path / REPLIES).read_text().splitlines()) <= 2


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(chat_server, tmp_path):
    """A real process, killed with requests in flight."""
    chat_server.reply = lambda body, earlier: chat_server.answer("Verdict: A", delay=0.0 if earlier else 0.05)
    program = f"""
from recipe.gad.evaluation.judge import *
pairs = [Candidates(i, [dict(role="user", content="q")], f"a{{i}}", f"b{{i}}") for i in range(200)]
judge(pairs, ChatClient({chat_server.url!r}), JudgeSettings("a judge", "pairwise"), {str(tmp_path)!r}, 2, 0)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3], env=os.environ)
    try:
        while len(chat_server.bodies) < 20:
            assert process.poll() is None, "the run ended early"
    finally:
        process.kill()
        process.wait()
    kept = (tmp_path / REPLIES).read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert kept.count(b"\n") >= 16
    pairs = [Candidates(i, [{"role": "user", "content": "q"}], f"a{i}", f"b{i}") for i in range(30)]
    assert rates(run(chat_server, tmp_path, pairs)) == (0, 1, 0)
    text = (tmp_path / REPLIES).read_bytes()
    assert text.startswith(kept)
    assert len({json.loads(line)["key"] for line in text.splitlines()}) == text.count(b"\n") == 60


def test_the_key_comes_from_the_environment_and_is_written_nowhere(chat_server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    chat_server.reply = lambda body, earlier: chat_server.error(400, "bad key sk-very-secret")
    with pytest.raises(ValueError, match="no verdict"):
        run(chat_server, tmp_path, candidates(("one", "two")))
    assert chat_server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in "".join(capfd.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_foreign_replies_and_unknown_modes_are_refused(chat_server, tmp_path):
    (tmp_path / REPLIES).write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="row 0: not written by gad eval"):
        run(chat_server, tmp_path, candidates(("one", "two")))
    with pytest.raises(ValueError, match="pairwise, score, both"):
        JudgeSettings("a judge", mode="best")
    with pytest.raises(ValueError, match="set model, n. Fix: leave these fields out"):
        JudgeSettings("a judge", extra={"n": 2, "model": "other"})


def test_answers_are_paired_with_their_rivals():
    answers = [{"index": 3, "messages": CONVERSATION, "student": "s", "teacher": "t"}]
    assert against(answers, ["rival"]) == [Candidates(3, CONVERSATION, "s", "rival")]
    with pytest.raises(ValueError):
        against(answers, [])


def test_braces_in_texts_stay():
    [pair] = candidates(("{first}", "{second}"))
    question = pair.in_both_orders()[0]
    assert (ANSWER_A.search(question)[1], ANSWER_B.search(question)[1]) == ("{first}", "{second}")
    assert question.startswith(PAIRWISE_PROMPT.partition("{")[0])

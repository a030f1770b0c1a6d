"""recipe/gad/openai_client.py against a real HTTP server."""

import asyncio
import contextlib
import email.utils
import itertools
import json
import random
import socket
import string
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest

from recipe.gad import openai_client
from recipe.gad.openai_client import ChatClient, Completion, RequestFailed, for_each

KEY = "sk-very-secret-0123456789"
PROMPT = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(openai_client, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def complete(server, times=1, messages=PROMPT, request=None, **client):
    """(completion or list of them, client) of ``times`` requests at once."""

    async def run():
        async with ChatClient(server.url, **client) as chat:
            jobs = [chat.complete(messages, model="teacher", **(request or {})) for _ in range(times)]
            return await asyncio.gather(*jobs), chat

    completions, chat = asyncio.run(run())
    return (completions[0] if times == 1 else completions), chat


def test_a_completion(chat_server):
    chat_server.reply = lambda body, _: chat_server.answer("hi", usage=(11, 7))
    completion, chat = complete(chat_server, request={"temperature": 0.8, "max_tokens": 5, "extra": {"top_p": 0.5}})
    assert completion == Completion("hi", "stop", 11, 7)
    assert chat.retries == 0
    expected = {"model": "teacher", "messages": PROMPT, "temperature": 0.8, "max_tokens": 5, "top_p": 0.5}
    assert chat_server.bodies == [expected]
    assert chat_server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_what_is_not_given_is_not_sent(chat_server):
    complete(chat_server)
    assert chat_server.bodies == [{"model": "teacher", "messages": PROMPT}]


def test_an_answer_without_usage_and_a_refusal(chat_server):
    reply = chat_server.answer(None, refusal="I will not")
    del reply.body["usage"]
    chat_server.reply = lambda *_: reply
    assert complete(chat_server)[0] == Completion("", "stop", 0, 0, "I will not")


def broken(server, kind):
    good = json.dumps(server.answer("hi").body).encode()
    return {
        "500": server.error(500),
        "503": server.error(503),
        "429": server.error(429, **{"Retry-After": "0"}),
        "408": server.error(408),
        "truncated JSON": type(server.answer(""))(good[:60]),
        "cut connection": type(server.answer(""))(good[:60], announced_length=len(good)),
        "not a completion": type(server.answer(""))({"error": "overloaded"}),
        "no choice": type(server.answer(""))({**server.answer("").body, "choices": []}),
        "HTML": type(server.answer(""))(b"<html>bad gateway</html>", status=502),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["500", "503", "429", "408", "truncated JSON", "cut connection", "not a completion", "no choice", "HTML"],
)
def test_what_may_pass_is_retried(chat_server, kind):
    chat_server.reply = lambda _, earlier: broken(chat_server, kind) if earlier < 2 else chat_server.answer("hi")
    completion, chat = complete(chat_server)
    assert (completion.text, chat.retries, len(chat_server.bodies)) == ("hi", 2, 3)


def odd_values():
    """JSON values of every type, and numbers that are no counts."""
    deep = "[" * 20_000 + "]" * 20_000
    return [*map(json.dumps, ["abc", "", 5, -1, 1e400, True, None, {}, [], [None], [5], {"text": 3}]), "NaN", deep]


@pytest.mark.parametrize(
    "place", ["all", "choices", "choice", "message", "content", "part", "finish_reason", "usage", "count"]
)
def test_odd_answers_are_read_or_refused(chat_server, place):
    for odd in odd_values():
        body = chat_server.answer("hi").body
        choice = body["choices"][0]
        message, usage = choice["message"], body["usage"]
        holder, key = {
            "all": ({}, 0),
            "choices": (body, "choices"),
            "choice": (body["choices"], 0),
            "message": (choice, "message"),
            "content": (message, "content"),
            "part": (message, "content"),
            "finish_reason": (choice, "finish_reason"),
            "usage": (body, "usage"),
            "count": (usage, "prompt_tokens"),
        }[place]
        holder[key] = "ODD"
        text = json.dumps(holder if place == "all" else body)
        text = (
            odd
            if place == "all"
            else text.replace('"ODD"', f'[{{"type": "text", "text": "a"}}, {odd}]' if place == "part" else odd)
        )
        try:
            found = openai_client.read_completion(text.encode())
        except openai_client._UnreadableAnswer:
            assert place not in ("finish_reason", "usage", "count") or odd == odd_values()[-1], "the answer is there"
            continue
        assert isinstance(found.text, str) and isinstance(found.finish_reason, str | None)
        for count in (found.prompt_tokens, found.completion_tokens):
            assert type(count) is int and count >= 0


def test_random_damage_to_an_answer_is_read_or_refused(chat_server):
    good = json.dumps(chat_server.answer("hi").body).encode()
    for seed in range(500):
        draw, body = random.Random(seed), bytearray(good)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(body))
            body[place : place + draw.randint(0, 4)] = draw.choice(
                [b"", b"[", b"{", b'"', b"null", b"-1", b"\xff", b","]
            )
        try:
            found = openai_client.read_completion(bytes(body))
        except openai_client._UnreadableAnswer:
            continue
        assert isinstance(found.text, str) and type(found.prompt_tokens) is int


def test_content_in_parts(chat_server):
    parts = [{"type": "text", "text": "a"}, {"type": "reasoning"}, {"type": "text", "text": "b"}]
    chat_server.reply = lambda *_: chat_server.answer(parts)
    assert complete(chat_server)[0].text == "ab"


@pytest.mark.parametrize("date", ["Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Foo 2100 00:00:00 GMT", "nan", "soon"])
def test_an_unreadable_retry_after_is_ignored(chat_server, date):
    chat_server.reply = lambda _, earlier: (
        chat_server.answer("hi") if earlier else chat_server.error(503, **{"Retry-After": date})
    )
    completion, chat = complete(chat_server)
    assert (completion.text, chat.retries) == ("hi", 1)


def test_a_timeout_is_retried(chat_server):
    chat_server.reply = lambda _, earlier: chat_server.answer("hi", delay=0.0 if earlier else 1.0)
    completion, chat = complete(chat_server, timeout=0.3)
    assert (completion.text, chat.retries) == ("hi", 1)


class Dripping(BaseHTTPRequestHandler):
    """A server that sends a byte every 0.05 s and never ends."""

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)

    def log_message(self, *_):
        pass


def test_an_answer_that_drips_in_ends_with_the_requests_time():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = ChatClient(f"http://127.0.0.1:{server.server_port}/v1", timeout=5, request_timeout=0.4, max_retries=0)
    start = time.monotonic()
    with pytest.raises(RequestFailed, match=r"did not answer in time \(1 attempts\)"):
        asyncio.run(client.complete([{"role": "user", "content": "q"}], model="m"))
    assert time.monotonic() - start < 4
    server.shutdown()
    server.server_close()


def test_retries_end(chat_server):
    chat_server.reply = lambda *_: chat_server.error(500, "boom")
    with pytest.raises(RequestFailed, match=r"HTTP 500: .*boom.* \(4 attempts\)") as failure:
        complete(chat_server, max_retries=3)
    assert len(chat_server.bodies) == 4 and not failure.value.hopeless


@pytest.mark.parametrize(
    ("status", "code", "hopeless"),
    [(400, None, False), (422, None, False), (401, None, True), (404, None, True), (429, "insufficient_quota", True)],
)
def test_what_cannot_pass_is_not_retried(chat_server, status, code, hopeless):
    chat_server.reply = lambda *_: chat_server.error(status, "no such thing", code)
    with pytest.raises(RequestFailed, match=rf"HTTP {status}: .*no such thing") as failure:
        complete(chat_server)
    assert len(chat_server.bodies) == 1 and failure.value.hopeless is hopeless


def test_a_server_that_is_not_there_is_hopeless_and_named_at_once(chat_server, capsys):
    chat_server.close()
    with pytest.raises(RequestFailed, match="no connection") as failure:
        complete(chat_server, max_retries=2)
    assert failure.value.hopeless
    printed = capsys.readouterr().err
    assert printed.count("no connection to the server") == 1 and "trying again, up to 2 times" in printed


def test_a_connection_that_breaks_without_a_word_is_named():
    def reset(server):
        connection, _ = server.accept()
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets it
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=reset, args=(server,), daemon=True).start()
        client = ChatClient(f"http://127.0.0.1:{server.getsockname()[1]}/v1", max_retries=0)
        with pytest.raises(RequestFailed, match=r"no connection to the server \(\w*Error\(.*\)\) \(1 attempts\)"):
            asyncio.run(client.complete(PROMPT, model="m"))


def test_retry_after_is_honoured_by_all_requests(chat_server):
    first = itertools.count()
    chat_server.reply = lambda *_: (
        chat_server.error(429, **{"Retry-After": "0.5"}) if next(first) == 0 else chat_server.answer("hi", delay=0.05)
    )

    async def run():
        async with ChatClient(chat_server.url) as chat:
            held_back = asyncio.create_task(chat.complete(PROMPT, model="teacher"))
            await asyncio.sleep(0.2)  # the 429 has arrived
            await asyncio.gather(held_back, *(chat.complete(PROMPT, model="teacher") for _ in range(3)))

    asyncio.run(run())
    start, *later = sorted(chat_server.times)
    assert len(later) == 4 and all(moment - start >= 0.5 for moment in later)


def test_retry_after_as_a_date(chat_server):
    def reply(_, earlier):
        date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now
        return chat_server.answer("hi") if earlier else chat_server.error(503, **{"Retry-After": date})

    chat_server.reply = reply
    complete(chat_server)
    first, second = chat_server.times
    assert 0.9 <= second - first <= 3.0


def test_a_pause_of_hours_is_not_waited_for(chat_server):
    chat_server.reply = lambda *_: chat_server.error(429, **{"Retry-After": "7200"})
    with pytest.raises(RequestFailed, match="asks for 7200 s") as failure:
        complete(chat_server)
    assert failure.value.hopeless


def test_back_off_doubles_with_jitter(chat_server, monkeypatch):
    monkeypatch.setattr(openai_client, "FIRST_DELAY", 0.1)
    monkeypatch.setattr(openai_client, "LONGEST_DELAY", 0.4)
    chat_server.reply = lambda *_: chat_server.error(500)
    with pytest.raises(RequestFailed):
        complete(chat_server, max_retries=4)
    waits = [later - earlier for earlier, later in itertools.pairwise(chat_server.times)]
    for wait, longest in zip(waits, (0.1, 0.2, 0.4, 0.4), strict=True):
        assert longest / 2 <= wait <= longest + 0.3  # 0.3: a busy machine


def test_rate_limit(chat_server):
    complete(chat_server, times=5, requests_per_minute=600)
    times = sorted(chat_server.times)
    assert times[-1] - times[0] >= 4 * 0.1 - 0.05


def test_the_key_is_in_no_message(chat_server):
    chat_server.reply = lambda *_: chat_server.error(400, f"key {KEY} may not do that")
    with pytest.raises(RequestFailed) as failure:
        complete(chat_server)
    assert KEY not in str(failure.value) and "key <key> may not do that" in str(failure.value)
    assert failure.value.__cause__ is None and failure.value.__suppress_context__


@pytest.mark.parametrize("white", ["\n", "\r\n", " ", "\t \n"])
def test_white_space_around_the_key_is_dropped(chat_server, monkeypatch, white):
    monkeypatch.setenv("OPENAI_API_KEY", f"{white}{KEY}{white}")
    complete(chat_server)
    assert chat_server.headers[0]["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("OPENAI_API_KEY", white)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        ChatClient()


@pytest.mark.parametrize("inside", ["\n", "\r\n", " ", "\x7f", "é", "\u2028"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(chat_server, monkeypatch, inside):
    monkeypatch.setenv("OPENAI_API_KEY", KEY[:12] + inside + KEY[12:])
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds a space, a line break") as refusal:
        ChatClient(chat_server.url)
    assert KEY[:12] not in str(refusal.value) and KEY[12:] not in str(refusal.value)


def test_no_part_of_the_key_stays_where_a_message_is_cut(chat_server, monkeypatch):
    random_ = random.Random(0)
    key = 'sk/+"%' + "".join(random_.choices(string.ascii_letters + string.digits, k=30))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    forms = [key, quote(key, safe=""), json.dumps(key)[1:-1]]
    for length in range(openai_client.MESSAGE_CHARS - 120, openai_client.MESSAGE_CHARS + 5, 4):
        for form in forms:
            chat_server.reply = lambda *_, text=f"{'x' * length} {form}": chat_server.error(400, text)
            with pytest.raises(RequestFailed) as failure:
                complete(chat_server)
            message = str(failure.value)
            assert key[6:12] not in message and len(message) <= openai_client.MESSAGE_CHARS + 10


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://user:hunter2@localhost/v1", "holds a user name, a password"),
        ("http://localhost/v1?api_key=hunter2", "a query"),
        ("http://localhost/v1#hunter2", "a fragment"),
        ("http://localhost:99999/v1", "no valid http"),
        ("http://local\nhost/v1", "no valid http"),
        ("http://[localhost/v1", "no valid http"),
        ("localhost:8000/v1", "no valid http"),
        ("ftp://localhost/v1", "no valid http"),
        ("http://", "no valid http"),
    ],
)
def test_addresses_with_secrets_or_mistakes_are_refused(monkeypatch, address, message):
    with pytest.raises(ValueError, match=message) as refusal:
        ChatClient(address)
    assert "hunter2" not in str(refusal.value)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(ValueError, match=message):
        ChatClient()


def test_no_key(chat_server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        ChatClient()
    with pytest.raises(ValueError, match="TEACHER_KEY is not set"):
        ChatClient(chat_server.url, api_key_env="TEACHER_KEY")
    complete(chat_server)
    assert chat_server.headers[0]["authorization"] == "Bearer none"


def test_the_key_of_another_variable(chat_server, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "other")
    complete(chat_server, api_key_env="TEACHER_KEY")
    assert chat_server.headers[0]["authorization"] == "Bearer other"


@pytest.mark.parametrize(
    "argument",
    [
        {"requests_per_minute": 0},
        {"requests_per_minute": float("nan")},
        {"max_retries": -1},
        {"timeout": 0},
        {"request_timeout": float("nan")},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
    ],
)
def test_arguments_out_of_range(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        ChatClient("http://localhost/v1", **argument)


def test_for_each_is_lazy_and_bounded():
    running, most, taken = 0, 0, 0

    def items():
        nonlocal taken
        for item in range(20):
            taken += 1
            yield item

    async def work(_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert taken <= 20 and running <= 3
        await asyncio.sleep(0.001)
        running -= 1

    asyncio.run(for_each(items(), work, concurrency=3))
    assert (most, taken, running) == (3, 20, 0)


def test_for_each_stops_at_an_exception():
    taken, cancelled = [], []

    async def work(item):
        taken.append(item)
        if item == 1:
            raise RequestFailed("over")
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(RequestFailed, match="over"):
        asyncio.run(for_each(range(100), work, concurrency=2))
    assert (taken, cancelled) == ([0, 1], [0])

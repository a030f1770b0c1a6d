"""A real local HTTP server that speaks the chat completions API and misbehaves on demand."""

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Reply:
    """What the server sends: ``body`` as JSON, or as it is if it is bytes."""

    body: dict | bytes
    status: int = 200
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    announced_length: int | None = None
    """Content-Length, if it is not the body's: the connection is cut early."""


class ChatServer:
    """``reply(body, earlier)`` decides what a request gets; ``earlier``: requests with the same last message before."""

    def __init__(self):
        self.bodies, self.headers, self.times = [], [], []
        self.reply = lambda body, earlier: self.answer("answer to " + body["messages"][-1]["content"])
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    earlier = outer.count(body["messages"][-1]["content"])
                    outer.bodies.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.times.append(time.monotonic())
                reply = outer.reply(body, earlier)
                time.sleep(reply.delay)
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(reply.announced_length or len(data)))
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:  # the client was killed
                    pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # with 5, the default, Linux resets connections on a busy machine

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, prompt: str) -> int:
        """Requests whose last message is ``prompt``."""
        return sum(body["messages"][-1]["content"] == prompt for body in self.bodies)

    @staticmethod
    def answer(text, finish_reason="stop", refusal=None, usage=(3, 2), **reply) -> Reply:
        message = {"role": "assistant", "content": text, "refusal": refusal}
        body = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "teacher",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)},
        }
        return Reply(body, **reply)

    @staticmethod
    def error(status, message="no", code=None, **headers) -> Reply:
        return Reply({"error": {"message": message, "code": code}}, status, headers)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def chat_server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    server = ChatServer()
    yield server
    server.close()

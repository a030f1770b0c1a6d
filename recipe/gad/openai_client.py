"""Chat completions from any OpenAI-compatible API, with retries, back-off and a rate limit.

    async with ChatClient(base_url="http://localhost:8000/v1") as client:
        completion = await client.complete(messages, model="teacher", temperature=0.8, max_tokens=1536)

It uses only ``chat.completions`` of the ``openai`` package and switches that package's retries off. What a server sends
is data: :func:`read_completion` reads it, and anything that is no chat completion counts as a failed attempt.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from recipe.gad.run.findings import InputError, visible

T = TypeVar("T")

API_KEY_ENV, BASE_URL_ENV = "OPENAI_API_KEY", "OPENAI_BASE_URL"
MAX_RETRIES = 8
"""Attempts after the first one. With the delays below they span about 3 minutes, enough for a server to restart."""
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
"""Seconds of back-off after the first failure, and the maximum; it doubles with every failure of a request."""
LONGEST_RETRY_AFTER = 600.0
"""Seconds. A longer Retry-After usually means that the day's quota is used up, so the request fails at once."""
TIMEOUT = 600.0
"""Seconds without a byte from the server before an attempt fails; reasoning models are silent for minutes."""
RETRIED_STATUS = (408, 409, 425, 429)
"""HTTP status codes that are retried, besides all from 500 up."""
HOPELESS_STATUS = (401, 402, 404)
"""HTTP status codes that every request would get: wrong key, no money left, no such model or address."""
OWN_FIELDS = frozenset({"messages", "model", "n", "stream"})
"""Fields of a request that ``extra`` must not set: one answer, whole, to the caller's messages."""
QUOTA_CODE = "insufficient_quota"
"""Error code of a 429 that waiting does not resolve."""
MESSAGE_CHARS = 300
"""Characters of an error message that are kept; some servers send whole HTML pages."""
MOST_TOKENS = 10**9
"""Counts of tokens from here on are taken for a mistake of the server."""


@dataclass(frozen=True)
class Completion:
    """One answer. The server counts the tokens (0 if it reports none).

    ``finish_reason`` comes from the server: "stop", "length" (cut at max_tokens), "content_filter", ... ``refusal`` is
    the text of an answer that the API marks as a refusal.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    refusal: str | None = None


class RequestFailed(ValueError):
    """A request that failed for good; if ``hopeless``, every other one would too (wrong key, no such model, ...)."""

    def __init__(self, message: str, hopeless: bool = False):
        super().__init__(message)
        self.hopeless = hopeless


class ChatClient:
    """Asynchronous client for chat completions; any number of ``complete`` calls may run at the same time.

    Args:
        base_url: address of the API ("http://localhost:8000/v1"); None takes OPENAI_BASE_URL, else OpenAI's address. It
            is kept in files, so it must hold no password and no query.
        api_key_env: environment variable with the key, which never appears in a message. White space around the key is
            dropped. With a ``base_url``, the default variable may be unset: some servers need no key.
        requests_per_minute: attempts start at least 60 / requests_per_minute seconds apart.
        max_retries: attempts after the first one.
        timeout: seconds without a byte from the server before an attempt fails.
        request_timeout: seconds that one attempt may take in all; None sets no limit.

    Raises:
        ValueError: the key or the address cannot be used, or a number is out of range.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key_env: str = API_KEY_ENV,
        requests_per_minute: float | None = None,
        max_retries: int = MAX_RETRIES,
        timeout: float = TIMEOUT,
        request_timeout: float | None = None,
    ):
        from openai import AsyncOpenAI

        if requests_per_minute is not None and not 0 < requests_per_minute < math.inf:
            raise ValueError(f"requests_per_minute={requests_per_minute}: expected a number above 0")
        if max_retries < 0:
            raise ValueError(f"max_retries={max_retries}: expected 0 or more")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout={timeout}: expected seconds above 0")
        if request_timeout is not None and not 0 < request_timeout < math.inf:
            raise ValueError(f"request_timeout={request_timeout}: expected seconds above 0")
        key = _read_key(api_key_env)
        if not key and (base_url is None or api_key_env != API_KEY_ENV):
            raise InputError(
                f"the environment variable {api_key_env} is not set", fix=f"export {api_key_env}=<API key>"
            )
        base_url = base_url or os.environ.get(BASE_URL_ENV) or None
        if base_url is not None:
            _check_address(base_url)
        # a server may send the key back in a URL, or in JSON inside of JSON
        self._secrets = {form for form in (key, quote(key, safe=""), json.dumps(key)[1:-1]) if form}
        # never None: the package would then read OPENAI_API_KEY and send it to any address
        self._client = AsyncOpenAI(api_key=key or "none", base_url=base_url, max_retries=0, timeout=timeout)
        self._interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self._max_retries = max_retries
        self._request_timeout = request_timeout
        self._next_start = 0.0  # time.monotonic() before which no attempt starts
        self.base_url = str(self._client.base_url)
        self.retries = 0
        """Number of repeated attempts so far."""

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()

    async def complete(
        self,
        messages: list[dict[str, str]],
        *,
        model: str,
        temperature: float | None = None,
        max_tokens: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Completion:
        """Request one answer to chat messages ``[{role, content}, ...]``.

        Rate limits (429), timeouts, lost connections, server errors (5xx) and unreadable answers are retried after the
        server's Retry-After, or with exponential back-off and jitter. A 429 delays all requests of the client.

        Args:
            messages: the prompt.
            model: name of the model in the API.
            temperature, max_tokens: None leaves the field out, and the server uses its default.
            extra: further fields of the request body, such as {"top_p": 0.9, "max_completion_tokens": 2048}.

        Raises:
            RequestFailed: the request was refused, or every attempt failed.
        """
        body: dict[str, Any] = {"model": model, "messages": messages}
        if temperature is not None:
            body["temperature"] = temperature
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        for attempt in range(self._max_retries + 1):
            await self._wait_for_start()
            try:
                sent = self._client.chat.completions.with_raw_response.create(**body, extra_body=extra)
                answer = await asyncio.wait_for(sent, self._request_timeout)
                return read_completion(answer.content)
            except Exception as error:
                failure = _Failure.of(error)
                if failure is None:
                    raise
            message = self._shown(failure.message)
            if not failure.passing:
                raise RequestFailed(message, failure.hopeless) from None
            if (failure.retry_after or 0) > LONGEST_RETRY_AFTER:
                raise RequestFailed(f"{message}; the server asks for {failure.retry_after:.0f} s", True) from None
            if attempt == self._max_retries:
                raise RequestFailed(f"{message} ({attempt + 1} attempts)", failure.hopeless) from None
            self.retries += 1
            if self.retries == 1:  # a wrong address would be silent for minutes
                tqdm.write(f"{visible(message)}; trying again, up to {self._max_retries} times", file=sys.stderr)
            await self._back_off(attempt, failure)
        raise AssertionError("the last attempt returns or raises")

    async def _wait_for_start(self) -> None:
        while (wait := self._next_start - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next_start = time.monotonic() + self._interval

    async def _back_off(self, attempt: int, failure: "_Failure") -> None:
        if failure.retry_after is None:
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(LONGEST_DELAY, FIRST_DELAY * 2**attempt))
            return
        if failure.status == 429:
            self._next_start = max(self._next_start, time.monotonic() + failure.retry_after)
        # jitter only adds: never start before the server allows it
        await asyncio.sleep(failure.retry_after * random.uniform(1.0, 1.1))

    def _shown(self, message: str) -> str:
        """The message without the key, and then cut: a cut through the key would leave a part of it."""
        for form in sorted(self._secrets, key=len, reverse=True):
            message = message.replace(form, "<key>")
        return message if len(message) <= MESSAGE_CHARS else f"{message[:MESSAGE_CHARS]}..."


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], concurrency: int) -> None:
    """Await ``work(item)`` for every item, ``concurrency`` at a time; take an item only when its work starts.

    The first exception cancels all running work and is raised.
    """
    iterator = iter(items)

    async def worker() -> None:
        for item in iterator:
            await work(item)

    workers = [asyncio.ensure_future(worker()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def check_request(temperature: float | None, extra: dict[str, Any]) -> None:
    """Check what a caller sends with every request.

    Raises:
        ValueError: the temperature is no number of 0 or more, or ``extra`` sets a field that the caller owns or that
            changes the form of the answer.
    """
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}: expected a number of 0 or more")
    if refused := sorted(OWN_FIELDS & extra.keys()):
        raise InputError(f"the extra fields of the request set {', '.join(refused)}", fix="leave these fields out")
    try:
        json.dumps(extra, allow_nan=False)
    except ValueError:
        raise InputError("the extra fields of the request hold NaN or Infinity", fix="pass finite numbers") from None


def _read_key(variable: str) -> str:
    """The key of an environment variable without white space around it; "" if it is unset.

    Raises:
        ValueError: no HTTP header can carry the key. The message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise InputError(
            f"the environment variable {variable} holds a space, a line break or a character outside of ASCII, so it "
            "is no API key",
            fix=f"export {variable}=<API key>",
        )
    return key


def _check_address(base_url: str) -> None:
    """Raise ValueError, which shows no secret, if ``base_url`` is no http address or holds a password or a query."""
    fix = "pass an address such as http://localhost:8000/v1"
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number up to 65535, or half a pair of brackets
        valid = False
    if not valid or not all("!" <= character <= "~" for character in base_url):
        raise InputError("base_url is no valid http or https address", fix)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"base_url of {parts.hostname} holds a user name, a password, a query or a fragment, and files keep it",
            fix=f"{fix}, and put the key into the environment variable {API_KEY_ENV} (--api_key_env names another)",
        )


class _UnreadableAnswer(Exception):
    """HTTP 200 without a chat completion."""


def read_completion(body: bytes) -> Completion:
    """The first choice of a chat completion, as the server sent it.

    The content is text, null, or a list of parts, of which those with a text are joined. Counts of tokens that are no
    whole number of 0 or more are read as 0, and other fields of a wrong type as missing.

    Raises:
        _UnreadableAnswer: the body is no JSON, or has no first choice with a message and such a content.
    """
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message = choice["message"]
        text = _text(message["content"] if "content" in message else None)
        reason, refusal, usage = choice.get("finish_reason"), message.get("refusal"), answer.get("usage")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        shown = body.decode("utf-8", "backslashreplace")
        raise _UnreadableAnswer(f"the server's answer is no chat completion: {shown}") from None
    counts = usage if isinstance(usage, dict) else {}
    return Completion(
        text=text,
        finish_reason=reason if isinstance(reason, str) else None,
        prompt_tokens=_count(counts.get("prompt_tokens")),
        completion_tokens=_count(counts.get("completion_tokens")),
        refusal=refusal if isinstance(refusal, str) else None,
    )


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(_text(part["text"]) for part in content if "text" in part)
    if content is None or isinstance(content, str):
        return content or ""
    raise TypeError(f"content is of type {type(content).__name__}, expected text or a list of parts")


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < MOST_TOKENS else 0


@dataclass(frozen=True)
class _Failure:
    """A failed attempt: ``passing`` ones are worth a retry, ``hopeless`` ones would hit every other request too."""

    message: str
    passing: bool
    hopeless: bool = False
    status: int | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: Exception) -> "_Failure | None":
        """Classify an exception; None if it is a bug of this program rather than a failed request."""
        import openai

        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            out_of_quota = error.code == QUOTA_CODE
            text = error.message.removeprefix(f"Error code: {status} - ")
            return cls(
                message=f"HTTP {status}: {text}",
                passing=(status in RETRIED_STATUS or status >= 500) and not out_of_quota,
                hopeless=status in HOPELESS_STATUS or out_of_quota,
                status=status,
                retry_after=_retry_after(error.response.headers),
            )
        if isinstance(error, openai.APITimeoutError | asyncio.TimeoutError):
            return cls("the server did not answer in time", passing=True)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return cls(f"no connection to the server ({str(cause) or repr(cause)})", passing=True, hopeless=True)
        if isinstance(error, openai.APIError | _UnreadableAnswer):
            return cls(str(error), passing=True)
        if isinstance(error, UnicodeEncodeError):
            return cls(f"the prompt cannot be sent as UTF-8 ({error})", passing=False)
        if isinstance(error, ValueError):  # the package's errors
            return cls(f"the request failed ({error})", passing=True)
        return None


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait, from the Retry-After header: a number of seconds or a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if not math.isnan(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):  # no date, or one that no calendar has
        return None

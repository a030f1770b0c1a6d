"""``gad collect``: a black-box teacher's answers to a file of prompts, through any OpenAI-compatible API.

Every finished request becomes one line, which is written at once. A killed run loses only the requests in flight;
rerun the same command to resume. Three more files are written next to the answers (``answers.jsonl``):

- ``answers.failed.jsonl``: answers that were cut at max_tokens, refused or empty, and requests that failed for good,
  each with the reason. They count as done until ``retry_failed``. Their lines stay even after a later answer.
- ``answers.rejects.jsonl``: rows of the input without a usable prompt.
- ``answers.settings.json``: the settings of the requests. Answers with other settings belong in another file.

A hash of its messages, its sample number and the settings identifies a request.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from recipe.gad.data import CONCURRENCY, SAMPLES
from recipe.gad.data.layouts import Message, Rejects, data_source_of, open_rejects, read_prompt, read_rows
from recipe.gad.openai_client import ChatClient, Completion, RequestFailed, check_request, for_each
from recipe.gad.run.atomic_io import JsonLog, read_object, write_atomically
from recipe.gad.run.findings import InputError
from recipe.gad.run.progress import progress

ID_BYTES = 12
"""Length of a request's hash. Among a billion requests, the chance that any two share one is 6e-12."""
MOST_SAMPLES, MOST_CONCURRENT = 10_000, 10_000
"""Limits of answers per prompt and of requests in flight; more is a slip of the keyboard."""
TOKENS_PER_PRICE = 1_000_000
WRITER = "gad collect"
COUNTED = {"id": str, "prompt_tokens": int, "completion_tokens": int}
"""Fields that are read back from the lines of earlier runs, and their types."""
FAILED = {**COUNTED, "reason": str}
"""The same for a failed request."""


@dataclass(frozen=True)
class RequestSettings:
    """Everything but the prompt that decides an answer.

    ``system`` is put before the messages of prompts that have no system message. Only the teacher sees it: the data
    keeps the prompt as it was. ``extra`` holds further fields of the request body.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    base_url: str
    temperature: float | None = None
    max_tokens: int | None = None
    system: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_request(self.temperature, self.extra)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: expected 1 or more")


class Request(NamedTuple):
    id: str
    prompt: list[Message]
    sample: int
    data_source: str


@dataclass
class Collected:
    """Counts for one output file, earlier runs included."""

    answers: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    """Id -> reason, for the requests whose last attempt failed."""
    rejected: int = 0
    """Rows of the input without a usable prompt."""
    duplicates: int = 0
    """Rows of the input with the prompt of an earlier row."""
    new: int = 0
    """Requests finished by this run."""
    prompt_tokens: int = 0
    """Tokens of all requests, including those that failed and were asked again."""
    completion_tokens: int = 0

    def add(self, record: dict[str, Any]) -> None:
        if "reason" in record:
            self.reasons[record["id"]] = record["reason"]
        else:
            self.answers += 1
            self.reasons.pop(record["id"], None)
        self.prompt_tokens += record["prompt_tokens"]
        self.completion_tokens += record["completion_tokens"]

    def cost(self, price_prompt: float, price_completion: float) -> float:
        """Cost of all tokens, for prices per million tokens."""
        return (self.prompt_tokens * price_prompt + self.completion_tokens * price_completion) / TOKENS_PER_PRICE


async def collect_answers(
    inputs: list[str],
    out: str | Path,
    client: ChatClient,
    settings: RequestSettings,
    *,
    samples: int = SAMPLES,
    concurrency: int = CONCURRENCY,
    prompt_key: str | None = None,
    retry_failed: bool = False,
    prices: tuple[float, float] = (0.0, 0.0),
) -> Collected:
    """Ask the teacher every prompt of ``inputs`` that has no answer in ``out`` yet.

    Args:
        inputs: sources for :func:`recipe.gad.data.layouts.read_rows`; answers in them are ignored.
        out: .jsonl file for ``gad prepare``. Its lines have content, teacher_response, data_source, sample, and the
            request's id, finish reason and tokens.
        client: sends the requests.
        settings: must equal those of earlier runs with this ``out``.
        samples: answers per prompt. A larger number than in an earlier run adds the missing ones.
        concurrency: maximum number of requests in flight.
        prompt_key: column of the prompt, if the layout is not recognized.
        retry_failed: repeat the requests that failed in earlier runs.
        prices: of a million prompt tokens and a million completion tokens, for the progress bar.

    Raises:
        ValueError: an argument or a file is wrong, or another run is writing to ``out``. No request was sent.
        RequestFailed: (a ValueError) no request can succeed. Finished requests are kept.
    """
    out = Path(out).expanduser()
    for name, value, most in (("samples", samples, MOST_SAMPLES), ("concurrency", concurrency, MOST_CONCURRENT)):
        if not 1 <= value <= most:
            raise ValueError(f"{name}={value}: expected 1 to {most}")
    if out.suffix != ".jsonl":
        raise ValueError(f"--output {out}: expected a name that ends with .jsonl")
    result = Collected()
    with JsonLog(out, WRITER) as answers, JsonLog(out.with_suffix(".failed.jsonl"), WRITER) as failed:
        done: set[str] = set()
        for record in itertools.chain(failed.records(**FAILED), answers.records(**COUNTED)):
            done.add(record["id"])
            result.add(record)
        if done:
            _check_same_settings(out.with_suffix(".settings.json"), asdict(settings))
        if retry_failed:
            done.difference_update(result.reasons)
        with open_rejects(out.with_suffix(".rejects.jsonl")) as rejects:
            to_do = sum(1 for _ in _open_requests(inputs, samples, prompt_key, settings, set(done), rejects, result))
        result.rejected = rejects.count
        if not done:
            if not to_do:
                raise InputError(
                    f"no prompt in {', '.join(inputs)} ({rejects.count} rows rejected)",
                    fix="read the reasons above, or name the prompt's column with --prompt_key",
                )
            write_atomically(out.with_suffix(".settings.json"), json.dumps(asdict(settings), indent=2) + "\n")

        async def ask(request: Request) -> None:
            record = await _ask_teacher(client, settings, request)
            result.add(record)
            (failed if "reason" in record else answers).append(record)
            result.new += 1
            cost = f", cost {result.cost(*prices):.2f}" if any(prices) else ""
            bar.set_postfix_str(f"{len(result.reasons)} failed, {client.retries} retries{cost}", refresh=False)
            bar.update()

        with progress(total=to_do, desc=settings.model, unit=" requests") as bar:
            await for_each(_open_requests(inputs, samples, prompt_key, settings, done), ask, concurrency)
    return result


def summary(result: Collected, out: str | Path, prices: tuple[float, float]) -> str:
    """Counts, tokens and cost as lines of text."""
    out = Path(out)
    lines = [f"answers     {result.answers:>9,} in {out}", f"this run    {result.new:>9,} requests finished"]
    for reason, count in Counter(result.reasons.values()).most_common():
        lines.append(f"failed      {count:>9,} {reason}, in {out.with_suffix('.failed.jsonl')}")
    if result.rejected:
        lines.append(f"rejected    {result.rejected:>9,} rows without a prompt, in {out.with_suffix('.rejects.jsonl')}")
    if result.duplicates:
        lines.append(f"duplicates  {result.duplicates:>9,} rows: an earlier row has the same prompt")
    lines.append(f"tokens      {result.prompt_tokens:>9,} of prompts, {result.completion_tokens:,} of answers")
    if any(prices):
        lines.append(f"cost        {result.cost(*prices):>9,.4f}")
    if result.reasons:
        lines.append("To repeat the failed requests, add --retry_failed")
    return "\n".join(lines)


def _open_requests(
    inputs: list[str],
    samples: int,
    prompt_key: str | None,
    settings: RequestSettings,
    done: set[str],
    rejects: Rejects | None = None,
    result: Collected | None = None,
) -> Iterator[Request]:
    """Requests whose id is not in ``done``, which gets it; rows without a prompt go to ``rejects``, and ``result``
    counts those with the prompt of an earlier row."""
    seen: set[str] = set()
    for row in (row for source in inputs for row in read_rows(source)):
        try:
            prompt = read_prompt(row, prompt_key)
        except ValueError as error:
            if rejects is not None:
                rejects.add(row, str(error))
            continue
        for sample in range(samples):
            text = json.dumps([prompt, sample, asdict(settings)], sort_keys=True)
            request_id = blake2b(text.encode(), digest_size=ID_BYTES).hexdigest()
            if result is not None and sample == 0:
                result.duplicates += request_id in seen
                seen.add(request_id)
            if request_id not in done:
                done.add(request_id)
                yield Request(request_id, prompt, sample, data_source_of(row))


async def _ask_teacher(client: ChatClient, settings: RequestSettings, request: Request) -> dict[str, Any]:
    """Send one request and return its line, with a ``reason`` if it gave no training data."""
    messages = request.prompt
    if settings.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": settings.system}, *messages]
    record: dict[str, Any] = {
        "id": request.id,
        "sample": request.sample,
        "data_source": request.data_source,
        "content": request.prompt,
    }
    try:
        completion = await client.complete(
            messages,
            model=settings.model,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            extra=settings.extra,
        )
    except RequestFailed as error:
        if error.hopeless:
            raise
        return {**record, "reason": "request failed", "error": str(error), "prompt_tokens": 0, "completion_tokens": 0}
    reason = _why_unusable(completion)
    return {
        **record,
        **({"reason": reason} if reason else {}),
        "teacher_response": completion.text or completion.refusal or "",
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
    }


def _why_unusable(completion: Completion) -> str | None:
    """Why an answer is no training data, or None. A refusal that the API does not mark as one counts as an answer."""
    if completion.finish_reason == "length":
        return "cut at the token limit"
    if completion.refusal or completion.finish_reason == "content_filter":
        return "refused"
    if any("\ud800" <= character <= "\udfff" for character in completion.text):
        return "not valid Unicode"  # half a surrogate pair; gad prepare would reject the row
    return None if completion.text.strip() else "empty"


# ---------------------------------------------------------------------------------------------------------- files


def _check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the answers were collected with other settings."""
    if not path.is_file():
        raise InputError(f"{path} is missing, so these answers' settings are unknown", fix="choose another --output")
    before = read_object(path, "choose another --output")
    changed = [
        f"{key} was {before.get(key)!r}, is {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise InputError(
            f"{path}: these answers were collected with other settings ({'; '.join(changed)})",
            fix="use the same settings, or choose another --output",
        )

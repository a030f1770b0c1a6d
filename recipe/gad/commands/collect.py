"""``gad collect``: arguments of :mod:`recipe.gad.data.collect`."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from recipe.gad.commands.options import json_object
from recipe.gad.data import CONCURRENCY, SAMPLES
from recipe.gad.openai_client import API_KEY_ENV, MAX_RETRIES, TIMEOUT

RESUME_HINT = "Finished answers are kept: rerun the same command to resume"


def collect(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Prompts: files (.jsonl, .json, .csv, .parquet, or .txt with one prompt per line), data set folders "
            "or hub ids, in any layout that gad prepare reads."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Answers (.jsonl); an existing file is resumed.")],
    model: Annotated[str, typer.Option(help="Name of the teacher in the API.")],
    base_url: Annotated[
        str | None,
        typer.Option("--base_url", help="Address of the API, such as http://localhost:8000/v1 (default: OpenAI)."),
    ] = None,
    api_key_env: Annotated[
        str, typer.Option("--api_key_env", help="Environment variable with the API key.")
    ] = API_KEY_ENV,
    samples: Annotated[int, typer.Option(help="Answers per prompt.")] = SAMPLES,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature (default: the server's).")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max_tokens", help="Tokens of one answer; longer answers count as failed.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt for the teacher only; it is not written to the data.")
    ] = None,
    extra: Annotated[
        str, typer.Option(help="Further request fields as JSON: '{\"max_completion_tokens\": 2048}'.")
    ] = "{}",
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = CONCURRENCY,
    requests_per_minute: Annotated[
        float | None, typer.Option("--requests_per_minute", help="Rate limit (default: none).")
    ] = None,
    max_retries: Annotated[int, typer.Option("--max_retries", help="Attempts after the first one.")] = MAX_RETRIES,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte before an attempt fails.")] = TIMEOUT,
    request_timeout: Annotated[
        float | None, typer.Option("--request_timeout", help="Seconds that an attempt may take in all (default: any).")
    ] = None,
    prompt_key: Annotated[
        str | None, typer.Option("--prompt_key", help="Column of the prompt (default: recognized by its name).")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry_failed", help="Repeat the requests that failed in earlier runs.")
    ] = False,
    price_prompt: Annotated[float, typer.Option("--price_prompt", help="Price of a million input tokens.")] = 0.0,
    price_completion: Annotated[
        float, typer.Option("--price_completion", help="Price of a million output tokens.")
    ] = 0.0,
) -> None:
    """Collect a teacher's answers through an OpenAI-compatible API.

    The API key is read from the environment. Every answer is saved at once; after a crash, rerun the same command to
    resume. Truncated, refused or empty answers and failed requests are written to OUTPUT.failed.jsonl, and the command
    exits with code 1. gad prepare reads OUTPUT.

    Example: gad collect prompts.txt --output answers.jsonl --model gpt-5-chat-latest --max_tokens 1536
    """
    from recipe.gad.data.collect import Collected, RequestSettings, collect_answers, summary
    from recipe.gad.openai_client import ChatClient, RequestFailed

    fields = json_object("--extra", extra)
    prices = (price_prompt, price_completion)

    async def run() -> Collected:
        async with ChatClient(
            base_url,
            api_key_env=api_key_env,
            requests_per_minute=requests_per_minute,
            max_retries=max_retries,
            timeout=timeout,
            request_timeout=request_timeout,
        ) as client:
            settings = RequestSettings(model, client.base_url, temperature, max_tokens, system, fields)
            return await collect_answers(
                inputs,
                output,
                client,
                settings,
                samples=samples,
                concurrency=concurrency,
                prompt_key=prompt_key,
                retry_failed=retry_failed,
                prices=prices,
            )

    try:
        result = asyncio.run(run())
    except RequestFailed as error:
        raise ValueError(f"{error}. {RESUME_HINT}") from None
    except KeyboardInterrupt:
        typer.echo(RESUME_HINT, err=True)
        raise
    typer.echo(summary(result, output, prices))
    if result.reasons or result.rejected:
        raise typer.Exit(1)

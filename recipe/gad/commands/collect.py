"""``gad collect``: arguments of :mod:`recipe.gad.data.collect`."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from recipe.gad.commands.options import json_object
from recipe.gad.openai_client import API_KEY_ENV, MAX_RETRIES, TIMEOUT

GOES_ON = "What was finished is kept: the same command goes on"


def collect(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Prompts: files (.jsonl, .json, .csv, .parquet, or .txt with one per line), data set folders or hub "
            "ids, in any layout that gad prepare reads."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Answers, .jsonl; the same file again resumes.")],
    model: Annotated[str, typer.Option(help="Name of the teacher at the API.")],
    base_url: Annotated[
        str | None,
        typer.Option("--base_url", help="Address of the API, such as http://localhost:8000/v1 (default: OpenAI)."),
    ] = None,
    api_key_env: Annotated[
        str, typer.Option("--api_key_env", help="Environment variable with the API key.")
    ] = API_KEY_ENV,
    samples: Annotated[int, typer.Option(help="Answers per prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max_tokens", help="Of one answer; longer ones count as failed.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt for the teacher alone: it does not go into the data.")
    ] = None,
    extra: Annotated[
        str, typer.Option(help="More fields of the request as JSON: '{\"max_completion_tokens\": 2048}'.")
    ] = "{}",
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 16,
    requests_per_minute: Annotated[
        float | None, typer.Option("--requests_per_minute", help="Start no more than this (default: no limit).")
    ] = None,
    max_retries: Annotated[int, typer.Option("--max_retries", help="Attempts after the first one.")] = MAX_RETRIES,
    timeout: Annotated[float, typer.Option(help="Seconds of silence after which an attempt failed.")] = TIMEOUT,
    prompt_key: Annotated[
        str | None, typer.Option("--prompt_key", help="Column of the prompt (default: recognised).")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry_failed", help="Ask again for what failed in earlier runs.")
    ] = False,
    price_prompt: Annotated[float, typer.Option("--price_prompt", help="Of a million prompt tokens.")] = 0.0,
    price_completion: Annotated[float, typer.Option("--price_completion", help="Of a million answer tokens.")] = 0.0,
) -> None:
    """Collect a teacher's answers through an OpenAI-compatible API.

    The key comes from the environment. Every answer is saved at once; after a crash the same command goes on with
    what was not finished. Answers that were cut, refused or empty and requests that failed for good go to
    OUTPUT.failed.jsonl; then the exit code is 1. OUTPUT is ready for gad prepare.

    Example: gad collect prompts.txt --output answers.jsonl --model gpt-5-chat-latest --max_tokens 1536
    """
    from recipe.gad.data import collect as work
    from recipe.gad.openai_client import ChatClient, RequestFailed

    fields = json_object("--extra", extra)
    prices = (price_prompt, price_completion)

    async def run() -> work.Collected:
        async with ChatClient(
            base_url,
            api_key_env=api_key_env,
            requests_per_minute=requests_per_minute,
            max_retries=max_retries,
            timeout=timeout,
        ) as client:
            settings = work.Settings(model, client.base_url, temperature, max_tokens, system, fields)
            return await work.collect(
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
        raise ValueError(f"{error}. {GOES_ON}") from None
    except KeyboardInterrupt:
        typer.echo(GOES_ON, err=True)
        raise
    typer.echo(work.summary(result, output, prices))
    if result.reasons or result.rejected:
        raise typer.Exit(1)

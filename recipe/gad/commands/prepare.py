"""``gad prepare``: arguments of :mod:`recipe.gad.data.prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from recipe.gad.commands.options import starting
from recipe.gad.data import VAL_FRACTION
from recipe.gad.run.findings import InputError


def prepare(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for train.parquet, val.parquet and rejects.jsonl.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files (.jsonl, .json, .csv, .tsv, .parquet, also with .gz, .bz2 or .xz), data set folders or hub ids "
            "(owner/name). owner/name:SPLIT reads one split.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A public data set with its own split: lmsys-gpt5. A local copy can be given as the input."),
    ] = None,
    val_inputs: Annotated[
        list[str] | None,
        typer.Option("--val_inputs", help="Validation data instead of a split (repeatable); kept out of training."),
    ] = None,
    val_fraction: Annotated[
        float, typer.Option("--val_fraction", help="Share of the prompts for validation; 0 writes no file.")
    ] = VAL_FRACTION,
    prompt_key: Annotated[
        str | None, typer.Option("--prompt_key", help="Column of the prompt (default: recognized by its name).")
    ] = None,
    teacher_key: Annotated[
        str | None, typer.Option("--teacher_key", help="Column of the answer (default: recognized by its name).")
    ] = None,
    data_source: Annotated[str | None, typer.Option("--data_source", help="Data source of all rows.")] = None,
    keep_answers: Annotated[
        bool, typer.Option("--keep_answers", help="Keep different answers to one prompt (default: only its first row).")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="The student's folder or hub id, to report lengths in its tokens.")
    ] = None,
    max_prompt_length: Annotated[
        int | None,
        typer.Option("--max_prompt_length", min=1, help="Report prompts longer than this (default: the trainer's)."),
    ] = None,
    max_response_length: Annotated[
        int | None,
        typer.Option("--max_response_length", min=1, help="Report answers longer than this (default: the trainer's)."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
) -> None:
    """Turn data into train.parquet and val.parquet for the trainer.

    Recognized layouts: OpenAI chat (messages), ShareGPT (conversations), Alpaca (instruction, input, output),
    prompt|question|query + response|answer|output|completion, and content + teacher_response. The last assistant turn
    of a conversation is the teacher's answer; later turns are dropped.

    A row is dropped if an earlier row has the same prompt (white space and Unicode form do not count). A hash of the
    prompt alone decides whether it goes to training or validation. Bad rows go to rejects.jsonl with the reason.

    Example: gad prepare answers.jsonl --output_dir data --tokenizer Qwen/Qwen2.5-7B-Instruct
    """
    from recipe.gad.data.prepare import PRESETS, default_lengths, prepare_files, student_token_counter, summary

    sources, val_sources = inputs or [], val_inputs or []
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
        if val_sources or len(sources) > 1:
            raise ValueError(f"--preset {preset} has its own split: pass at most one input, and no --val_inputs")
        public = PRESETS[preset]
        dataset = sources[0] if sources else public.dataset
        sources, val_sources = [f"{dataset}:{public.train_split}"], [f"{dataset}:{public.val_split}"]
    if not sources:
        raise InputError("no input", fix="name files or data sets, or pass --preset lmsys-gpt5")
    starting("reading the data")
    default_prompt, default_response = default_lengths()
    result = prepare_files(
        sources,
        output_dir,
        val_inputs=val_sources,
        val_fraction=val_fraction,
        prompt_key=prompt_key,
        teacher_key=teacher_key,
        data_source=data_source,
        keep_answers=keep_answers,
        strict=strict,
        overwrite=overwrite,
        count_tokens=student_token_counter(tokenizer) if tokenizer else None,
    )
    limits = max_prompt_length or default_prompt, max_response_length or default_response
    typer.echo(summary(result, output_dir, *limits))

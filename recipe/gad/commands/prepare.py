"""``gad prepare``: arguments of :mod:`recipe.gad.data.prepare`."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for train.parquet, val.parquet and rejects.jsonl.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files (.jsonl, .json, .csv, .parquet), data set folders or hub ids (owner/name); owner/name:SPLIT "
            "reads one split.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A public data set with its own split: lmsys-gpt5. An input is read instead of the hub's."),
    ] = None,
    val_inputs: Annotated[
        list[str] | None,
        typer.Option("--val_inputs", help="Validation rows (repeatable) instead of a split; kept out of training."),
    ] = None,
    val_fraction: Annotated[
        float, typer.Option("--val_fraction", help="Share of the prompts that validate; 0: none.")
    ] = 0.01,
    prompt_key: Annotated[
        str | None, typer.Option("--prompt_key", help="Column of the prompt (default: recognised).")
    ] = None,
    teacher_key: Annotated[
        str | None, typer.Option("--teacher_key", help="Column of the answer (default: recognised).")
    ] = None,
    data_source: Annotated[str | None, typer.Option("--data_source", help="Name of the data, for all rows.")] = None,
    keep_answers: Annotated[
        bool, typer.Option("--keep_answers", help="Keep different answers to one prompt, not its first row only.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="The student's folder or hub id: reports lengths in its tokens.")
    ] = None,
    max_prompt_length: Annotated[
        int | None,
        typer.Option("--max_prompt_length", help="Report prompts longer than this (default: the trainer's)."),
    ] = None,
    max_response_length: Annotated[
        int | None,
        typer.Option("--max_response_length", help="Report answers longer than this (default: the trainer's)."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad row, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
) -> None:
    """Turn data into train.parquet and val.parquet for the trainer.

    Recognised: OpenAI chat (messages), ShareGPT (conversations), Alpaca (instruction, input, output),
    prompt|question|query + response|answer|output|completion, and content + teacher_response. The last assistant turn
    of a conversation is the teacher's answer; turns behind it are left out.

    Rows with a prompt that was there before are left out (white space and Unicode form do not count). A hash of the
    prompt decides its side of the split, whatever else is in the data. Bad rows go to rejects.jsonl with the reason.

    Example: gad prepare answers.jsonl --output_dir data --tokenizer Qwen/Qwen2.5-7B-Instruct
    """
    from recipe.gad.data import prepare as work

    sources, val_sources = inputs or [], val_inputs or []
    if preset is not None:
        if preset not in work.PRESETS:
            raise ValueError(f"--preset {preset}: expected one of {', '.join(work.PRESETS)}")
        if val_sources or len(sources) > 1:
            raise ValueError(f"--preset {preset} has its own split: give one input at most, and no --val_inputs")
        public = work.PRESETS[preset]
        dataset = sources[0] if sources else public.dataset
        sources, val_sources = [f"{dataset}:{public.train_split}"], [f"{dataset}:{public.val_split}"]
    if not sources:
        raise ValueError("no input. Fix: name files or data sets, or --preset lmsys-gpt5")
    default_prompt, default_response = work.default_lengths()
    result = work.prepare(
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
        count_tokens=work.student_token_counter(tokenizer) if tokenizer else None,
    )
    limits = max_prompt_length or default_prompt, max_response_length or default_response
    typer.echo(work.summary(result, output_dir, *limits))

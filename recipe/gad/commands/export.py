"""``gad export``: a checkpoint as a Hugging Face folder."""

from typing import Annotated, Optional

import typer

from recipe.gad.commands.options import starting
from recipe.gad.export import DEFAULT_AVERAGE, DEFAULT_DTYPE, DEFAULT_LORA


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder of a run (exports its newest complete checkpoint), of a step (global_step_N), or of a role."
        ),
    ],
    output_dir: Annotated[str, typer.Option("--output_dir", help="Folder to write.")],
    role: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates the annotation on Python 3.10)
        typer.Option("--role", help="actor, or critic (the discriminator). Default: as the path says, else actor."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = DEFAULT_DTYPE,
    lora: Annotated[
        str, typer.Option("--lora", help="For a run with LoRA: merge it into the weights, or write only the adapter.")
    ] = DEFAULT_LORA,
    average: Annotated[
        int, typer.Option("--average", min=1, help="Average the weights of the run's newest N checkpoints.")
    ] = DEFAULT_AVERAGE,
) -> None:
    """Write the student (or the discriminator) of a checkpoint as a Hugging Face folder.

    transformers loads both, vLLM the student. The new folder is compared with the checkpoint before it appears.

    The discriminator is a token-classification model with one label. Its score is the value at the last token.

    --average 3 averages the run's three newest checkpoints. It helps runs whose curves swing.

    Example: gad export runs/gad --output_dir my-model, then: vllm serve ./my-model
    """
    import sys
    from contextlib import redirect_stdout

    starting(f"reading {checkpoint}")
    from recipe.gad.export import export_model

    with redirect_stdout(sys.stderr):  # verl's merger prints its progress
        done = export_model(checkpoint, output_dir, role, dtype, lora, average)
    note = f"; rounding to {dtype} moves outputs by up to {done.rounding:.2g}" if done.rounding else ""
    sources = ", ".join(map(str, done.sources))
    typer.echo(f"{output_dir}: {done.architecture} from {sources}, loaded again and compared{note}")

"""``gad export``: a checkpoint as a Hugging Face folder."""

from typing import Annotated, Optional

import typer


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run's folder (its newest complete checkpoint counts), global_step_N, or its role folder."
        ),
    ],
    output_dir: Annotated[str, typer.Option("--output_dir", help="Folder to make.")],
    role: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates it on Python 3.10)
        typer.Option("--role", help="actor, or critic (the discriminator). Default: what the path says, else actor."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    lora: Annotated[
        str, typer.Option("--lora", help="Of a run with LoRA: merge it into the weights, or write the adapter alone.")
    ] = "merge",
    average: Annotated[
        int, typer.Option("--average", min=1, help="Write the mean of the weights of the run's newest N checkpoints.")
    ] = 1,
) -> None:
    """Write the actor (or critic) of a checkpoint as a folder that transformers loads, and vLLM in the actor's case.

    The folder is loaded again and compared with the checkpoint before it gets its name.

    The critic is a token-classification model with one label; D's score is its value at the last token.

    --average 3 gives the mean of the run's three newest checkpoints, for runs whose curves swing.

    Example: gad export runs/gad --output_dir my-model, then: vllm serve ./my-model
    """
    import sys
    from contextlib import redirect_stdout

    from recipe.gad.export import export as write

    with redirect_stdout(sys.stderr):  # verl's merger prints its progress
        done = write(checkpoint, output_dir, role, dtype, lora, average)
    note = f"; rounding to {dtype} moves outputs by up to {done.rounding:.2g}" if done.rounding else ""
    sources = ", ".join(map(str, done.sources))
    typer.echo(f"{output_dir}: {done.architecture} from {sources}, loaded again and compared{note}")

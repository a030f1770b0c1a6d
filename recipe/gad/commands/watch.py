"""``gad watch``."""

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run_dir: Annotated[Path, typer.Argument(help="Run folder (--output_dir of the stage).")],
    once: Annotated[bool, typer.Option("--once", help="Print the state of now and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the log.")] = 2.0,
) -> None:
    """Follow a running stage: curves, step time, time left and health, refreshed in place.

    Ends with the last step, if trainer.total_training_steps is set, or with Ctrl-C. Where the output is not a
    terminal, it prints a line whenever the log has grown.

    Example: gad watch runs/gad
    """
    from recipe.gad.monitor.watch import watch as watch_run

    watch_run(run_dir, once, interval)

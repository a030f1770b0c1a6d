"""``gad watch``."""

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run_dir: Annotated[Path, typer.Argument(help="Run folder (--output_dir of the stage).")],
    once: Annotated[bool, typer.Option("--once", help="Print the current state and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two reads of the log.")] = 2.0,
) -> None:
    """Follow a running stage: curves, step time, time left and health, refreshed in place.

    It ends after the last step if trainer.total_training_steps is set, otherwise with Ctrl-C. If the output is not a
    terminal, it prints one line whenever the log has grown.

    Example: gad watch runs/gad
    """
    from recipe.gad.monitor.watch import watch as watch_run

    watch_run(run_dir, once, interval)

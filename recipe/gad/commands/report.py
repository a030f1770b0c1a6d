"""``gad report``."""

from pathlib import Path
from typing import Annotated

import typer

from recipe.gad.commands.options import starting


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run folders or pipeline folders.")],
    output: Annotated[Path, typer.Option(help="HTML file; its pictures also go to NAME_png/ next to it.")] = Path(
        "report.html"
    ),
) -> None:
    """Write curves, samples, settings and health of runs as one self-contained HTML file.

    A RUN_DIR is the --output_dir of a stage. Several runs share the axes, each with its own steps. A pipeline folder
    (with warmup/ and gad/ inside) stands for its stages. GAD steps follow the step of the warmup from which they start.

    Example: gad report runs/gad runs/gad-higher-lr --output compare.html
    """
    starting("reading the runs and drawing")
    from recipe.gad.monitor.report import write_report
    from recipe.gad.run.findings import line

    for run in write_report(run_dirs, output):
        typer.echo(f"{run.label}: {run.last_step} steps." + ("" if run.findings else f" {run.all_clear}"))
        for finding in run.findings:
            typer.echo(line(finding))
        for earlier in run.earlier:
            typer.echo(f"earlier, at {earlier.when()}: {line(earlier.finding)}")
    typer.echo(f"report: {output}")

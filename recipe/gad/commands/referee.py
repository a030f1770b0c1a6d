"""``gad referee``."""

from pathlib import Path
from typing import Annotated

import typer


def referee(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="YAML file with arms, seeds and data sizes.")],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="Gets everything. Default: outputs/referee/NAME_OF_PLAN."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Trainings and evaluations side by side.")] = 1,
    gpus: Annotated[
        str, typer.Option("--gpus", help="CUDA_VISIBLE_DEVICES of the jobs in turn, such as 0,1. Default: as they are.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Print jobs, teacher batches and cost, and stop.")] = False,
    scripts_dir: Annotated[
        Path | None, typer.Option("--scripts_dir", help="Launch scripts. Default: examples/gad of the checkout.")
    ] = None,
) -> None:
    """Compare training recipes at equal teacher batches over several seeds, and write one page with the verdict.

    Trains every arm of the plan with every seed and data size, evaluates every saved checkpoint with gad eval, and
    writes referee.html and referee.json. Rerun the same command to resume after a kill: finished jobs are skipped.

    Example: gad referee examples/gad/referee/toy.yaml --jobs 2
    """
    from recipe.gad.referee.run import Settings, run_plan, show_costs

    settings = Settings.of(plan, output_dir, scripts_dir, jobs, gpus)
    if dry_run:
        typer.echo(show_costs(settings))
        return
    raise typer.Exit(run_plan(settings))

"""``gad doctor``: checks everything about a run that can be checked before GPUs are spent."""

from typing import Annotated, Optional

import typer

from recipe.gad.commands.options import starting
from recipe.gad.run.findings import InputError


def doctor(
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 (typer evaluates it on Python 3.10)
        typer.Argument(metavar="KEY=VALUE", help="Hydra overrides, as the launch scripts pass them."),
    ] = None,
    config_name: Annotated[
        str, typer.Option("--config_name", help="Configuration of recipe/gad/config.")
    ] = "gad_trainer",
    gpu_memory_gb: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--gpu_memory_gb", min=0.001, help="GiB of one GPU of the run (default: this machine's first)."),
    ] = None,
    elsewhere: Annotated[
        bool,
        typer.Option("--for_another_machine", help="Do not judge CPUs, packages and free disk space of this machine."),
    ] = False,
    cpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--cpus", min=1, help="Logical CPUs of the other machine (with --for_another_machine)."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: findings, each with level, where, what, evidence and fix.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="Print warnings and errors, and count the other findings.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print_config", help="Check nothing; print the whole resolved configuration as YAML.")
    ] = False,
) -> None:
    """Check configuration, models, tokenizers, data, GPU memory and disk of a run, in seconds and without a GPU.

    Exit code 0: the run can start (there may be warnings); 1: it cannot, every error says what to do; 2: bad usage.

    Example: gad doctor --for_another_machine --gpu_memory_gb 80 gad.stage=warmup trainer.n_gpus_per_node=8
    actor_rollout_ref.model.path=MODEL data.train_files=train.parquet data.val_files=val.parquet
    """
    import json
    import sys
    from contextlib import redirect_stdout
    from dataclasses import asdict

    from omegaconf import OmegaConf

    from recipe.gad.run.config import compose_config, resolved

    if print_config:
        typer.echo(OmegaConf.to_yaml(resolved(compose_config(overrides or [], config_name))))
        return

    if cpus is not None and not elsewhere:
        raise InputError("--cpus is for another machine", fix="add --for_another_machine, or leave --cpus out")

    starting("checking the run, which takes some seconds")
    from recipe.gad.doctor.checks import examine, report
    from recipe.gad.doctor.memory import GIB

    with redirect_stdout(sys.stderr):  # keeps what imported libraries print out of the report
        gpu_memory = None if gpu_memory_gb is None else gpu_memory_gb * GIB
        findings = examine(overrides or [], config_name, gpu_memory, elsewhere, cpus)
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        report(findings, typer.echo, brief)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)

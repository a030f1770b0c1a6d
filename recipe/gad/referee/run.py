"""The whole of ``gad referee``: read the plan, run what is not finished, compare, write the page."""

import sys
from dataclasses import dataclass
from pathlib import Path

from recipe.gad.referee.cost import dry_run
from recipe.gad.referee.jobs import SCRIPTS, check_files, expand, jobs_of
from recipe.gad.referee.page import failed_jobs, write_page
from recipe.gad.referee.plan import Plan, read_plan
from recipe.gad.referee.results import results
from recipe.gad.referee.schedule import Scheduler, State
from recipe.gad.run.atomic_io import alone_in

KV_CACHE = "kv_cache_memory_bytes"


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    plan: Plan
    output_dir: Path
    scripts: Path = SCRIPTS
    slots: int = 1
    gpus: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Path, output_dir: Path | None, scripts: Path | None, slots: int, gpus: str) -> "Settings":
        """Read the plan. ValueError: a mistake in it."""
        output_dir = output_dir or Path("outputs/referee") / plan.stem
        devices = tuple(device.strip() for device in gpus.split(",") if device.strip())
        return cls(read_plan(plan), output_dir, scripts or SCRIPTS, slots, devices)

    @property
    def state_file(self) -> Path:
        return self.output_dir / "state.json"


def show_costs(settings: Settings) -> str:
    """The text of ``--dry_run``. Nothing is written."""
    runs = expand(settings.plan, settings.output_dir)
    return "\n".join([dry_run(settings.plan, runs, State(settings.state_file), settings.slots), *_warnings(settings)])


def _warnings(settings: Settings) -> list[str]:
    """Settings that tend to end in a failure."""
    plan = settings.plan
    side_by_side = settings.slots > max(1, len(settings.gpus))
    if plan.device == "gpu" and side_by_side and not any(KV_CACHE in text for text in plan.overrides):
        return [
            f"warning: several trainings share a GPU, but the plan's overrides do not set vLLM's {KV_CACHE}; "
            "see docs/troubleshooting.md, Several runs on one machine"
        ]
    return []


def run_plan(settings: Settings) -> int:
    """Run, compare, and write the page.

    Returns:
        the exit code: 0, 1 if a job failed, 128 + the number of the signal that stopped it.

    Raises:
        ValueError: the data has a mistake, another referee uses the folder, or there is nothing to compare.
    """
    plan = settings.plan
    rows = check_files(plan, settings.scripts)
    for warning in _warnings(settings):
        print(warning, file=sys.stderr)
    runs = expand(plan, settings.output_dir)
    with alone_in(settings.output_dir, "gad referee"):
        state = State(settings.state_file)
        environment = {"PYTHON": sys.executable}
        scheduler = Scheduler(jobs_of(runs, settings.scripts), state, settings.slots, settings.gpus, environment)
        if stopped := scheduler.run():
            print("stopped; rerun the same command to resume", file=sys.stderr)
            return 128 + stopped
        sizes = results(plan, runs)
        page = write_page(plan, runs, sizes, state, rows, settings.output_dir)
    for size in sizes:
        print(f"train_rows {size.rows}: {size.headline}")
        for comparison in size.comparisons:
            print(f"  {comparison.verdict.text}")
    print(f"page: {page}")
    return 1 if failed_jobs(runs, state) else 0

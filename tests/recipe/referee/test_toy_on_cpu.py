"""The example plan for a CPU through the real launch scripts, with very few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def plan_file(tiny_problem, tmp_path, seeds):
    """examples/gad/referee/toy.yaml on the tiny problem, two steps a stage."""
    plan = yaml.safe_load((ROOT / "examples/gad/referee/toy.yaml").read_text())
    plan |= {"model": f"{tiny_problem}/model", "train_batch_size": 8, "seeds": seeds}
    plan |= {f"{part}_files": f"{tiny_problem}/{part}.parquet" for part in ("train", "val")}
    plan["overrides"] += ["gad.poll_interval=0.02", "actor_rollout_ref.rollout.agent.num_workers=1"]
    plan["evaluation"] |= {"two_sample_model": f"{tiny_problem}/model", "two_sample_epochs": 1}
    for stage in (stage for stages in plan["arms"].values() for stage in stages):
        next(iter(stage.values())).update(steps=2, save_every=2)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def referee(plan_file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recipe.gad.cli", "referee", str(plan_file), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("VERL_PLATFORM", None)  # the launch scripts set it
    return subprocess.run(
        [*command, "--output_dir", str(plan_file.parent / "out")],
        capture_output=True, text=True, timeout=900, cwd=ROOT, env=environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("seeds", [[0], pytest.param([0, 1, 2], marks=pytest.mark.long)])
def test_two_arms_through_the_launch_scripts(plan_file, seeds):
    done = referee(plan_file)
    out = plan_file.parent / "out"
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((out / "referee.json").read_text())
    [size] = data["sizes"]
    [comparison] = size["comparisons"]
    assert size["headline"] in done.stdout and (out / "referee.html").is_file()
    assert (comparison["arm"], comparison["seeds"], data["failures"]) == ("gad", seeds, [])
    for arm in ("imitation", "gad"):
        assert size["arms"][arm]["used"]["teacher_batches"] == 4 and size["arms"][arm]["used"]["step_minutes"] > 0
        assert 0 < size["arms"][arm]["chosen"]["two_sample"]["value"] <= 1
    names = sorted(folder.name.rpartition("-")[0] for folder in (out / "train").iterdir())
    stages = ("1-warmup", "2-gad", "2-seqkd")
    assert names == [f"all-seed{seed}-{stage}" for seed in seeds for stage in stages]
    assert list((out / "train").glob("**/*_world_size_*.pt")) == []  # only what the next stage and gad eval read
    # the same command again has nothing left to do
    state = json.loads((out / "state.json").read_text())
    assert referee(plan_file).returncode == 0
    assert json.loads((out / "state.json").read_text()) == state

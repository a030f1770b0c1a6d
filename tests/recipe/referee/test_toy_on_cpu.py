"""Whole plans on a CPU through the real launch scripts, with very few steps: two arms, three seeds each."""

import html
import json
import os
import re
import statistics
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from recipe.gad.referee.results import halves

ROOT = Path(__file__).resolve().parents[3]
SEEDS = [0, 1, 2]


@pytest.fixture
def plan_file(tiny_problem, tmp_path):
    """Imitation of the tiny problem with two learning rates: an arm is one stage of two steps, without rollouts."""
    rates = {name: [f"actor_rollout_ref.actor.optim.lr={rate}"] for name, rate in (("low", 1e-4), ("high", 1e-2))}
    plan = {
        "device": "cpu",
        "seeds": SEEDS,
        "control": "low",
        "overrides": [
            "data.max_prompt_length=16",
            "data.max_response_length=12",
            "gad.poll_interval=0.02",
            "ray_kwargs.ray_init.num_cpus=8",
        ],
        "arms": {
            "low": [{"seqkd": {"steps": 2, "overrides": rates["low"]}}],
            "high": [{"seqkd": {"steps": 2, "save_every": 1, "overrides": rates["high"]}}],
        },
        "evaluation": {"temperature": 1.0, "max_prompt_length": 16, "max_response_length": 12, "n": 2},
    }
    return write_plan(plan, tiny_problem, tmp_path)


@pytest.fixture
def toy_file(tiny_problem, tmp_path):
    """examples/gad/referee/toy.yaml on the tiny problem, two steps a stage."""
    plan = yaml.safe_load((ROOT / "examples/gad/referee/toy.yaml").read_text())
    assert plan["seeds"] == SEEDS
    plan["overrides"] += ["gad.poll_interval=0.02", "actor_rollout_ref.rollout.agent.num_workers=1"]
    for stage in (stage for stages in plan["arms"].values() for stage in stages):
        next(iter(stage.values())).update(steps=2, save_every=2)
    return write_plan(plan, tiny_problem, tmp_path)


def write_plan(plan: dict, problem: Path, folder: Path) -> Path:
    """The plan's file, with the tiny problem as its model and data."""
    plan |= {"model": f"{problem}/model", "train_batch_size": 8}
    plan |= {f"{part}_files": f"{problem}/{part}.parquet" for part in ("train", "val")}
    plan["evaluation"] |= {"two_sample_model": f"{problem}/model", "two_sample_epochs": 1}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def referee(plan_file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recipe.gad.cli", "referee", str(plan_file), "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("VERL_PLATFORM", None)  # the launch scripts set it
    return subprocess.run(
        [*command, "--output_dir", str(plan_file.parent / "out")],
        capture_output=True, text=True, timeout=1800, cwd=ROOT, env=environment,
    )  # fmt: skip


def finished(plan_file: Path, control: str, arm: str, trainings: list[str], batches: int) -> tuple[dict, str]:
    """The plan's run to its end: what its page must hold, as referee.json has it, and what was printed."""
    done = referee(plan_file)
    out = plan_file.parent / "out"
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((out / "referee.json").read_text())
    [size] = data["sizes"]
    [comparison] = size["comparisons"]
    assert size["headline"] in done.stdout and (out / "referee.html").is_file()
    assert (comparison["arm"], comparison["seeds"], data["failures"]) == (arm, SEEDS, [])
    for name in (control, arm):
        found = size["arms"][name]
        assert found["seeds"] == SEEDS and found["used"]["teacher_batches"] == batches
        assert found["used"]["step_minutes"] > 0
        assert 0 < found["chosen"]["two_sample"]["value"] <= 1
    names = sorted(folder.name.rpartition("-")[0] for folder in (out / "train").iterdir())
    assert names == [f"all-seed{seed}-{stage}" for seed in SEEDS for stage in trainings]
    assert list((out / "train").glob("**/*_world_size_*.pt")) == []  # only what the next stage and gad eval read
    # the same command again has nothing left to do
    state = json.loads((out / "state.json").read_text())
    assert referee(plan_file).returncode == 0
    assert json.loads((out / "state.json").read_text()) == state
    return size, done.stdout


def reported_lengths(model: str, out: Path) -> float:
    """Mean tokens of an evaluated checkpoint's answers to the prompts that are reported, from answers.jsonl."""
    step, training = Path(model).name.removeprefix("global_step_"), Path(model).parent.name
    [file] = out.glob(f"eval-*/{training}-step{step}/answers.jsonl")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    _, reporting = halves(sorted({answer["index"] for answer in answers}))
    return statistics.fmean(answer["student_tokens"] for answer in answers if answer["index"] in reporting)


@pytest.mark.slow
@pytest.mark.ray
def test_two_arms_with_three_seeds_through_the_launch_scripts(plan_file):
    size, printed = finished(plan_file, "low", "high", ["1-seqkd", "1-seqkd"], batches=2)
    out = plan_file.parent / "out"
    weights = [sha256(file.read_bytes()).digest() for file in out.glob("train/*/global_step_2/actor/*/*.safetensors")]
    assert len(weights) == len({*weights}) == 6  # another seed is another training

    # of every training the checkpoint with the lowest two-sample accuracy on the half for choosing, the later of equals
    chosen = {}
    for arm, steps in (("low", [2]), ("high", [1, 2])):
        for seed in SEEDS:
            found = size["arms"][arm]["checkpoints"][str(seed)]
            assert [int(step) for step in found["candidates"]] == steps
            best = min(found["candidates"].items(), key=lambda item: (item[1], -int(item[0])))[0]
            assert re.search(rf"/all-seed{seed}-1-seqkd-\w+/global_step_{best}$", found["chosen"])
            chosen[arm, seed] = reported_lengths(found["chosen"], out)

    # differences are paired by seed, with an interval and a p-value each
    [comparison] = size["comparisons"]
    page = html.unescape((out / "referee.html").read_text())
    expected = [chosen["high", seed] - chosen["low", seed] for seed in SEEDS]
    assert comparison["chosen"]["length"]["by_seed"] == pytest.approx(expected)
    for metric in ("two_sample", "rouge_l", "length"):
        estimate, by_seed = comparison["chosen"][metric]["estimate"], comparison["chosen"][metric]["by_seed"]
        assert estimate["value"] == pytest.approx(statistics.fmean(by_seed)) and len(by_seed) == 3
        assert estimate["low"] <= estimate["value"] <= estimate["high"] and 0 <= estimate["p_value"] <= 1
        digits = 1 if metric == "length" else 3
        assert f"seeds {', '.join(f'{value:+.{digits}f}' for value in by_seed)}<" in page

    # the verdict, in words
    verdict, difference = comparison["verdict"], comparison["chosen"]["two_sample"]
    ahead = sum(value < 0 for value in difference["by_seed"])
    assert f"{difference['estimate']['value']:+.3f}" in verdict["text"]
    assert f"ahead in {ahead} of 3 training seeds, p " in verdict["text"]
    assert verdict["text"] in printed and verdict["text"] in page and f"high: {verdict['level']}" in page


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.long
def test_the_example_plan_through_the_launch_scripts(toy_file):
    finished(toy_file, "imitation", "gad", ["1-warmup", "2-gad", "2-seqkd"], batches=4)

"""The plan of gad referee: what is refused and with which words, the chains, and the commands of the jobs."""

import re
from pathlib import Path

import pytest
import yaml

from recipe.gad.cli import main
from recipe.gad.referee.jobs import Training, eval_options, expand, jobs_of
from recipe.gad.referee.plan import KINDS, parse_plan, read_plan

from .conftest import plan_value

ROOT = Path(__file__).resolve().parents[3]
SEQKD = {"seqkd": {"steps": 50}}


def arms(**chains):
    return {"seqkd": [SEQKD], **chains}


MISTAKES = {
    "no mapping": ([1], "the plan: found [1], expected a mapping"),
    "unknown key": (plan_value(seed=[0]), "the plan: unknown key 'seed'. Known keys: model, train_files"),
    "missing key": (plan_value(control=None), "the plan lacks control"),
    "no arms": (plan_value(arms={}), "arms: found {}"),
    "two training files": (plan_value(train_files=["a", "b"]), "train_files ('a', 'b'): expected one path"),
    "device": (plan_value(device="tpu"), "device 'tpu': expected one of gpu, cpu"),
    "no seeds": (plan_value(seeds=[]), "seeds (): expected a list of different values"),
    "equal seeds": (plan_value(seeds=[1, 1]), "seeds (1, 1): expected a list of different values"),
    "seed": (plan_value(seeds=[-1]), "seeds -1: expected whole numbers of at least 0"),
    "seed in a list": (plan_value(seeds=[[1]]), "seeds [1]: expected whole numbers of at least 0"),
    "rows": (plan_value(train_rows=["half"]), "train_rows 'half': expected 'all' or at least train_batch_size (8)"),
    "too few rows": (plan_value(train_rows=[7]), "train_rows 7: expected 'all' or at least train_batch_size (8) rows"),
    "batch": (plan_value(train_batch_size=0), "train_batch_size 0: expected a whole number of at least 1"),
    "control": (plan_value(control="sft"), "control 'sft': expected one of base, seqkd, gad"),
    "untrained control": (plan_value(control="base"), "control 'base' is a reference"),
    "reference": (plan_value(references=["sft"]), "references 'sft': expected one of"),
    "one reference": (plan_value(references="seqkd"), "references 'seqkd': expected a list of base, seqkd, gad"),
    "overrides": (plan_value(overrides=["lr"]), "expected a list of Hydra overrides such as"),
    "own key": (
        plan_value(overrides=["data.seed=3"]),
        "overrides set data.seed, which the referee sets. Use seeds of the",
    ),
    "own key added": (plan_value(overrides=["+trainer.save_freq=3"]), "Use save_every of the stage"),
    "evaluation": (plan_value(evaluation={"temprature": 1}), "evaluation: unknown key 'temprature'"),
    "choice": (plan_value(choose_by="loss"), "choose_by 'loss': expected one of two_sample, rouge_l"),
    "choice without test": (
        plan_value(choose_by="two_sample"),
        "choose_by two_sample needs evaluation.two_sample_model",
    ),
    "arm": (plan_value(arms=arms(gad="gad")), "arm 'gad': found 'gad', expected a list of stages"),
    "kind": (
        plan_value(arms=arms(gad=[{"ppo": {}}])),
        "arm 'gad', stage 1: found {'ppo': {}}, expected one of seqkd, w",
    ),
    "no steps": (plan_value(arms=arms(x=[{"seqkd": {}}])), "arm 'x', stage 1: seqkd lacks steps"),
    "stage key": (plan_value(arms=arms(x=[{"seqkd": {"steps": 1, "lr": 1}}])), "stage 1: seqkd: unknown key 'lr'"),
    "kind as key": (plan_value(arms=arms(x=[{"seqkd": {"steps": 1, "kind": "gad"}}])), "seqkd: unknown key 'kind'"),
    "steps": (
        plan_value(arms=arms(x=[{"seqkd": {"steps": True}}])),
        "steps True: expected a whole number of at least 1",
    ),
    "empty steps": (
        plan_value(arms=arms(x=[{"seqkd": {"steps": None}}])),
        "steps None: expected a whole number of at least 1",
    ),
    "step time": (
        plan_value(arms=arms(x=[{"seqkd": {"steps": 1, "seconds_per_step": 0}}])),
        "seconds_per_step 0: expected a number above 0",
    ),
    "reward model": (
        plan_value(arms=arms(x=[{"seqkd": {"steps": 50, "reward_model": "d"}}])),
        "reward_model 'd': only warmup and discriminator take one",
    ),
    "gad first": (plan_value(arms=arms(x=[{"gad": {"steps": 50}}])), "arm 'x': stage 1 (gad) comes first, but needs a"),
    "gad after seqkd": (
        plan_value(arms=arms(x=[SEQKD, {"gad": {"steps": 5}}])),
        "arm 'x': stage 2 (gad) follows seqkd, which leaves no discriminator, but needs a trained",
    ),
    "discriminator last": (
        plan_value(arms=arms(x=[SEQKD, {"discriminator": {"steps": 5}}])),
        "arm 'x': the last stage (discriminator) does not train the student",
    ),
    "unequal": (
        plan_value(arms=arms(x=[{"warmup": {"steps": 30}}, {"gad": {"steps": 21}}])),
        "arm 'x' uses 51 teacher batches and the control 'seqkd' 50: they cannot be compared",
    ),
}


@pytest.mark.parametrize(("value", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_plan(value)


def test_mistakes_name_the_file_and_end_with_exit_code_2(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    for text, message in (("a: [", "is not readable YAML"), ("a: 1", "unknown key 'a'")):
        path.write_text(text)
        with pytest.raises(SystemExit) as end:
            main(["referee", str(path)])
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {path}") or message in capsys.readouterr().err


def test_an_unequal_arm_may_be_shown_as_a_reference():
    plan = parse_plan(plan_value(arms=arms(short=[{"seqkd": {"steps": 10}}], base=[]), references=["short"]))
    assert plan.is_reference("short") and plan.is_reference("base") and not plan.is_reference("seqkd")
    assert plan.compared() == []


def test_the_measure_is_the_two_sample_test_where_there_is_one(plan):
    assert plan.measure == "rouge_l"
    with_test = {"two_sample_model": "student"}
    assert parse_plan(plan_value(evaluation=with_test)).measure == "two_sample"
    assert parse_plan(plan_value(evaluation=with_test, choose_by="rouge_l")).measure == "rouge_l"


def test_saved_steps_end_with_the_last(plan):
    assert plan.arms["seqkd"].stages[1].saved_steps() == [10, 20, 30]
    assert plan.arms["seqkd"].stages[0].saved_steps() == [20]
    value = plan_value(arms=arms(x=[{"seqkd": {"steps": 50, "save_every": 20}}]))
    assert parse_plan(value).arms["x"].stages[0].saved_steps() == [20, 40, 50]


def test_equal_beginnings_of_chains_are_one_training(plan, tmp_path):
    runs = expand(plan, tmp_path)
    assert len(runs) == 6  # 3 arms, 2 seeds
    names = [job.name for job in jobs_of(runs)]
    assert len(names) == len(set(names))
    trainings = [name for name in names if not name.startswith("eval-")]
    assert len(trainings) == 2 * 4  # a shared seqkd, seqkd, discriminator and gad for each seed
    by_arm = {run.arm.name: run for run in runs if run.seed == 0}
    assert by_arm["seqkd"].trainings[0].name == by_arm["gad"].trainings[0].name
    # the checkpoint of the shared stage, three of seqkd, two of gad, and the untrained student once
    assert len(names) - len(trainings) == 2 * (1 + 3 + 2) + 1


def test_an_edit_renames_what_depends_on_it_alone(plan, tmp_path):
    value = plan_value()
    value["arms"]["gad"][2]["gad"]["overrides"] = ["critic.optim.lr=1e-3"]
    before = {job.name for job in jobs_of(expand(plan, tmp_path))}
    after = {job.name for job in jobs_of(expand(parse_plan(value), tmp_path))}
    assert {"-3-gad-" in name for name in before ^ after} == {True}
    value["arms"]["gad"][2]["gad"]["seconds_per_step"] = 3.0  # says nothing of the result
    assert {job.name for job in jobs_of(expand(parse_plan(value), tmp_path))} == after


def chain(plan, tmp_path, arm, seed=1) -> list[Training]:
    return next(list(r.trainings) for r in expand(plan, tmp_path) if r.arm.name == arm and r.seed == seed)


def test_stages_start_where_the_one_before_ended(plan, tmp_path):
    imitation, discriminator, gad = chain(plan, tmp_path, "gad")
    assert imitation.start() == ["--model", "student"]
    assert discriminator.start() == ["--model", f"{imitation.folder}/global_step_20/actor/huggingface"]
    assert gad.start() == ["--warmup_dir", str(discriminator.folder), "--resume_step", "10"]
    assert [t.job(Path("s")).needs for t in (imitation, discriminator, gad)] == [
        (), (imitation.name,), (discriminator.name,)
    ]  # fmt: skip
    assert "trainer.critic_warmup=11" in discriminator.overrides()  # the student is never updated
    assert [t.teacher_batches for t in (imitation, discriminator, gad)] == [20, 30, 50]


def test_a_discriminator_goes_along_and_may_be_named(tmp_path):
    value = plan_value(arms=arms(x=[{"warmup": {"steps": 20, "reward_model": "larger"}}, {"warmup": {"steps": 30}}]))
    first, second = chain(parse_plan(value), tmp_path, "x")
    assert first.start() == ["--model", "student", "--reward_model", "larger"]
    checkpoint = f"{first.folder}/global_step_20"
    assert second.start() == [
        *("--model", f"{checkpoint}/actor/huggingface"),
        *("--reward_model", f"{checkpoint}/critic/huggingface"),
    ]


def test_dpo_starts_from_the_student_of_the_stage_before(tmp_path):
    value = plan_value(arms=arms(x=[{"warmup": {"steps": 20}}, {"soda": {"steps": 10}}, {"online_dpo": {"steps": 20}}]))
    warmup, soda, online = chain(parse_plan(value), tmp_path, "x")
    assert soda.start() == ["--model", f"{warmup.folder}/global_step_20/actor/huggingface"]
    assert online.start() == ["--model", f"{soda.folder}/global_step_10/actor/huggingface"]
    commands = [training.job(Path("s")).command for training in (soda, online)]
    assert [command[:3] for command in commands] == [
        ("bash", "s/run_soda.sh", "--model"),
        ("bash", "s/run_soda.sh", "--online"),
    ]


def test_seeds_and_rows_reach_the_launch_script(tmp_path):
    plan = parse_plan(plan_value(train_rows=[16, "all"], overrides=["data.max_prompt_length=16"]))
    runs = [run for run in expand(plan, tmp_path) if run.arm.name == "gad" and run.seed == 1]
    small, whole = (run.trainings[2].job(Path("scripts")).command for run in runs)
    assert small[:2] == ("bash", "scripts/run_gad.sh")
    for text in (
        *("data.seed=1", "actor_rollout_ref.rollout.seed=1", "critic.fsdp.seed=1", "trainer.save_freq=10"),
        *("data.train_max_samples=16", "data.max_prompt_length=16", "trainer.total_training_steps=20"),
    ):
        assert text in small
    assert not any("train_max_samples" in text for text in whole)
    # the subset of the rows is drawn by data.seed: it must not change from stage to stage
    for training in runs[0].trainings:
        assert {"data.seed=1", "data.train_max_samples=16"} <= set(training.overrides())


def test_every_training_has_a_short_ray_folder_of_its_own(plan, tmp_path):
    folders = [job.scratch for job in jobs_of(expand(plan, tmp_path / ("long" * 20))) if job.scratch]
    assert len(set(folders)) == len(folders) == 8
    assert all(len(str(folder)) < 40 for folder in folders)


def test_options_of_the_evaluation_parse():
    from typer.main import get_command

    from recipe.gad.cli import app

    options = eval_options(
        {"n": 2, "temperature": 1.0, "enforce_eager": True, "two_sample_seeds": [0, 1], "backend": "hf"}
        | {"chat_template_kwargs": {"enable_thinking": False}}
    )
    assert "--enforce_eager" in options
    context = get_command(app).commands["eval"].make_context("eval", options)
    assert context.params["two_sample_seeds"] == "0,1"
    assert (context.params["temperature"], context.params["max_prompt_length"]) == (1.0, 512)
    assert context.params["chat_template_kwargs"] == '{"enable_thinking": false}'


def test_the_scripts_of_all_kinds_exist():
    assert all((ROOT / "examples/gad" / kind.script).is_file() for kind in KINDS.values())


@pytest.mark.parametrize("name", ["toy", "smollm2"])
def test_the_example_plans(name, tmp_path, capsys):
    path = ROOT / f"examples/gad/referee/{name}.yaml"
    plan = read_plan(path)
    assert plan.compared() and len(plan.seeds) == 3
    assert yaml.safe_load(path.read_text())["device"] == plan.device
    with pytest.raises(SystemExit) as end:
        main(["referee", str(path), "--dry-run", "--output_dir", str(tmp_path / "new"), "--jobs", "3"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "3 at a time" in out and "warning" not in out
    assert not (tmp_path / "new").exists()

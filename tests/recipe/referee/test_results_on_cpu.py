"""From evaluations to the page: values per prompt, choosing and reporting, cost, HTML and JSON."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from recipe.gad.referee import cost
from recipe.gad.referee.jobs import expand, jobs_of
from recipe.gad.referee.page import failed_jobs, write_page
from recipe.gad.referee.plan import parse_plan
from recipe.gad.referee.results import Values, choose, halves, mean, prompt_wins, read_values, results
from recipe.gad.referee.run import Settings, run_plan, show_costs
from recipe.gad.referee.schedule import State
from recipe.gad.referee.verdict import p_text
from recipe.gad.run.atomic_io import alone_in

from .conftest import plan_value

TEST = {"two_sample_model": "student"}


@pytest.fixture
def evaluated(tmp_path, write_evaluation):
    """Function: plan and runs whose evaluations are written, with a quality and a share of wins for each arm."""

    def evaluate(qualities, wins=None, skip=lambda evaluation: False, **changes):
        plan = parse_plan(plan_value(**changes))
        runs = expand(plan, tmp_path)
        written = set()
        for run in runs:
            for evaluation in run.evaluations:
                if evaluation.name not in written and not skip(evaluation):
                    written.add(evaluation.name)
                    share = wins[run.arm.name] if wins else None
                    write_evaluation(evaluation, qualities[run.arm.name], wins=share)
        return plan, runs

    return evaluate


def test_halves_are_disjoint_and_the_same_for_all():
    choosing, reporting = halves(range(11))
    assert sorted(choosing + reporting) == list(range(11)) and len(choosing) == 5
    assert (choosing, reporting) == halves(list(range(11))[::-1])
    assert halves(range(11), seed=1) != (choosing, reporting)
    with pytest.raises(ValueError, match="3 validation prompts, expected at least 4"):
        halves(range(3))


def test_wins_of_a_prompt_are_the_mean_over_its_answers():
    answers = [{"index": index} for index in (0, 0, 1)]
    assert prompt_wins({"wins_by_seed": [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]}, answers) == (
        {0: 0.5, 1: 1.0},
        {0: 1.0, 1: 0.0},
    )
    for section in ({}, {"wins_by_seed": [[1.0]]}):
        with pytest.raises(ValueError, match="no two-sample verdict on every answer"):
            prompt_wins(section, answers)


def test_values_are_those_of_gad_eval(plan, tmp_path, write_evaluation):
    evaluation = expand(plan, tmp_path)[0].evaluations[0]
    write_evaluation(evaluation, 0.7, wins=0.5)
    values = read_values(evaluation.folder)
    text = json.loads((evaluation.folder / "scores.json").read_text())["text"]
    everything = list(range(24))
    for metric in ("rouge_l", "length", "cut", "repetition"):
        assert mean(values, metric, everything) == pytest.approx(text[metric]["student"]["value"])
    assert values.metrics["two_sample"][3] == (values.wins[0][3] + values.wins[1][3]) / 2


def made(name, step, **prompts):
    return SimpleNamespace(name=name, step=step), Values({"rouge_l": dict(enumerate(prompts["rouge"]))})


def test_a_checkpoint_is_chosen_on_one_half_alone():
    early, late = made("early", 10, rouge=[0.9, 0.9, 0.1, 0.1]), made("late", 20, rouge=[0.5, 0.5, 0.9, 0.9])
    values = {evaluation.name: found for evaluation, found in (early, late)}
    run = SimpleNamespace(candidates=[early[0], late[0]])
    assert choose(run, values, "rouge_l", [0, 1]).chosen.evaluation.name == "early"
    assert choose(run, values, "rouge_l", [2, 3]).chosen.evaluation.name == "late"
    assert choose(run, values, "rouge_l", [0, 1]).last.evaluation.name == "late"
    assert choose(run, {}, "rouge_l", [0, 1]) is None
    equal = {name: early[1] for name in values}
    assert choose(run, equal, "rouge_l", [0, 1]).chosen.evaluation.name == "late"


def test_a_better_arm_is_called_better(evaluated):
    plan, runs = evaluated({"base": 0.2, "seqkd": 0.5, "gad": 0.9}, seeds=[0, 1, 2])
    [size] = results(plan, runs)
    assert size.headline == "gad is better than seqkd."
    [comparison] = size.comparisons
    assert comparison.seeds == (0, 1, 2) and comparison.verdict.level == "better"
    assert comparison.chosen["rouge_l"].estimate.low > 0.1
    base, seqkd, gad = size.arms
    assert (len(base.seeds), len(seqkd.seeds)) == (1, 3)  # the untrained student is one model
    assert [batches for batches, _ in gad.curve] == [20, 40, 50]
    assert [batches for batches, _ in seqkd.curve] == [20, 30, 40, 50]


def test_two_sample_accuracy_decides_where_there_is_one(evaluated):
    plan, runs = evaluated(
        {"base": 0.5, "seqkd": 0.5, "gad": 0.5}, {"base": 1.0, "seqkd": 1.0, "gad": 0.3}, evaluation=TEST
    )
    [size] = results(plan, runs)
    assert "two-sample accuracy -0." in size.comparisons[0].verdict.text
    assert size.comparisons[0].chosen["two_sample"].estimate.high < 0


def test_seeds_that_both_arms_have_are_compared_and_the_rest_is_named(evaluated):
    plan, runs = evaluated(
        {"base": 0.2, "seqkd": 0.5, "gad": 0.5}, skip=lambda e: "seed1-3-gad" in e.name or "seed1-2-seqkd" in e.name
    )
    [size] = results(plan, runs)
    assert size.comparisons[0].seeds == (0,) and size.missing == ("seqkd, seed 1", "gad, seed 1")


def test_nothing_evaluated_is_an_error(plan, tmp_path):
    with pytest.raises(ValueError, match="no evaluation is finished"):
        results(plan, expand(plan, tmp_path))


def test_evaluations_with_other_settings_are_refused(evaluated):
    plan, runs = evaluated({"base": 0.2, "seqkd": 0.5, "gad": 0.5})
    settings = runs[1].evaluations[0].folder / "settings.json"
    settings.write_text(settings.read_text().replace("0.8", "0.7"))
    with pytest.raises(ValueError, match="temperature: 0.8 and 0.7|temperature: 0.7 and 0.8"):
        results(plan, runs)


# ---------------------------------------------------------------------- cost


def finish(training, seconds=2.0):
    """What a finished training leaves, as far as cost and completeness need it."""
    folder = training.folder
    folder.mkdir(parents=True)
    steps = range(1, training.stage.steps + 1)
    lines = (json.dumps({"step": step, "data": {"timing_s/step": seconds}}) + "\n" for step in steps)
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_distinct_rows_are_those_of_the_longest_stage(plan):
    assert cost.distinct_rows(plan.arms["seqkd"], 8, 1000) == 30 * 8
    assert cost.distinct_rows(plan.arms["gad"], 8, 100) == 100
    assert cost.distinct_rows(plan.arms["base"], 8, 100) == 0


def test_a_dry_run_says_what_is_not_known(tmp_path):
    settings = Settings(parse_plan(plan_value()), tmp_path, slots=2)
    text = show_costs(settings)
    assert "8 trainings and 13 evaluations, 2 at a time" in text
    assert re.search(r"seqkd +50  control +seqkd 20 \+ seqkd 30", text)
    assert re.search(r"base +0  reference +the untrained student", text)
    assert "The step time of discriminator, gad, seqkd is not known" in text
    assert "The time of 13 evaluations is not known yet" in text


def test_a_dry_run_takes_step_times_from_the_plan_and_from_finished_jobs(tmp_path, monkeypatch):
    value = plan_value(seeds=[0, 1])
    value["arms"]["gad"][2]["gad"]["seconds_per_step"] = 6
    value["arms"]["gad"][1]["discriminator"]["seconds_per_step"] = 3
    value["arms"]["seqkd"][1]["seqkd"]["seconds_per_step"] = 1
    for arm in ("seqkd", "gad"):
        value["arms"][arm][0]["seqkd"]["seconds_per_step"] = 50  # measured below
    plan = parse_plan(value)
    runs = expand(plan, tmp_path)
    shared = runs[1].trainings[0]
    finish(shared)
    monkeypatch.setattr(type(shared), "is_finished", lambda self: self.name == shared.name)
    state = State(tmp_path / "state.json")
    state.record(shared.name, status="finished", seconds=100.0)
    text = cost.dry_run(plan, runs, state, 2)
    assert "is not known: no run" not in text
    # the shared stage: one of two is finished in 20 steps of 2 s; 60 s of it were not steps
    steps = 20 * 2 + 2 * (30 * 1 + 10 * 3 + 20 * 6)
    assert f"{(steps + 7 * 60) / 60:.0f} job minutes are left" in text


def test_what_an_arm_used(plan, tmp_path):
    run = next(run for run in expand(plan, tmp_path) if run.arm.name == "gad")
    state = State(tmp_path / "state.json")
    for training in run.trainings:
        finish(training)
        state.record(training.name, status="finished", seconds=120.0)
    used = cost.used([run], state, plan, rows=1000)
    assert (used.teacher_batches, used.teacher_answers, used.distinct_answers) == (50, 400, 160)
    assert used.step_minutes == pytest.approx(100 / 60) and used.wall_minutes == pytest.approx(6.0)


# ---------------------------------------------------------------------- page


class Page(HTMLParser):
    VOID = {"meta", "br", "circle", "line", "rect", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert not any(name.startswith("on") or name in ("src", "srcset") for name in values)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write(plan, runs, tmp_path, state=None):
    state = state or State(tmp_path / "state.json")
    page = write_page(plan, runs, results(plan, runs), state, 1000, tmp_path)
    return Page(page.read_text()), json.loads((tmp_path / "referee.json").read_text())


def test_the_page_and_the_json_hold_everything(evaluated, tmp_path):
    plan, runs = evaluated(
        {"base": 0.2, "seqkd": 0.5, "gad": 0.9}, {"base": 1.0, "seqkd": 0.8, "gad": 0.2}, evaluation=TEST
    )
    page, data = write(plan, runs, tmp_path)
    assert page.open == [] and {link.removeprefix("#") for link in page.links} <= set(page.ids)
    [size] = data["sizes"]
    difference = size["comparisons"][0]["chosen"]["two_sample"]
    for text in (
        size["headline"],
        size["comparisons"][0]["verdict"]["text"],
        "gad: better",
        "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference["estimate"]),
        p_text(difference["estimate"]["p_value"]),
        "seqkd 20 + discriminator 10 + gad 20",
        "2 seeds are few",
    ):
        assert text in page.text, text
    assert list(size["arms"]) == ["base", "seqkd", "gad"]
    gad = size["arms"]["gad"]
    assert gad["used"]["teacher_batches"] == 50 and set(gad["checkpoints"]) == {"0", "1"}
    assert set(gad["checkpoints"]["0"]["candidates"]) == {"10", "20"}
    assert data["failures"] == [] and data["measure"] == "two_sample"


def test_failures_are_named_with_their_log_and_texts_are_escaped(evaluated, tmp_path):
    plan, runs = evaluated({"base": 0.2, "seqkd": 0.5, "gad": 0.5}, skip=lambda e: "seed1-3-gad" in e.name)
    state = State(tmp_path / "state.json")
    training = next(run for run in runs if run.arm.name == "gad" and run.seed == 1).trainings[-1]
    log = tmp_path / "logs" / f"{training.name}.log"
    log.parent.mkdir()
    log.write_text("error: <b>no memory</b>\n")
    state.record(training.name, status="failed")
    state.record(f"eval-{training.name}-step20", status="left out")
    page, data = write(plan, runs, tmp_path, state)
    assert "2 jobs failed or could not start" in " ".join(page.text.split())
    assert "error: <b>no memory</b>" in page.text and "b" not in page.ids
    assert str(log) in page.text and data["failures"][0]["arms"] == ["gad"]
    assert [failure["status"] for failure in failed_jobs(runs, state)] == ["failed", "left out"]
    assert "Without result: gad, seed 1" in page.text


def test_a_page_without_a_comparison(evaluated, tmp_path):
    plan, runs = evaluated({"base": 0.2, "seqkd": 0.5, "gad": 0.5}, skip=lambda e: e.training is not None, seeds=[0])
    page, data = write(plan, runs, tmp_path)
    assert "No arm could be compared with seqkd." in page.text and data["sizes"][0]["comparisons"] == []
    assert "There is one training seed" in page.text


# ---------------------------------------------------------------------- the whole


def data_files(folder, rows=16):
    lines = (
        json.dumps({"content": [{"role": "user", "content": f"{i}"}], "teacher_response": "yes"}) for i in range(rows)
    )
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return {"train_files": str(folder / "data.jsonl"), "val_files": str(folder / "data.jsonl")}


FAKE_SCRIPT = """
echo "$0 $*" >> {log}
exit {code}
"""


def test_the_scripts_of_the_stages_are_run_and_failures_end_with_1(tmp_path, write_evaluation, capsys):
    plan = parse_plan(plan_value(**data_files(tmp_path), seeds=[0], train_rows=[16]))
    scripts, log = tmp_path / "scripts", tmp_path / "calls"
    settings = Settings(plan, tmp_path / "out", scripts, slots=2)
    with pytest.raises(ValueError, match="run_[a-z]+.sh is missing. Fix: --scripts_dir"):
        run_plan(settings)
    scripts.mkdir()
    for name in ("seqkd", "warmup", "gad"):
        (scripts / f"run_{name}.sh").write_text(FAKE_SCRIPT.format(log=log, code=3))
    write_evaluation(expand(plan, tmp_path / "out")[0].evaluations[0], 0.5)
    assert run_plan(settings) == 1
    [call] = log.read_text().splitlines()  # the shared stage fails, so nothing else can start
    assert "run_seqkd.sh --model student --device cpu" in call and "data.train_max_samples=16" in call
    assert "No arm could be compared" in capsys.readouterr().out
    assert (tmp_path / "out/referee.html").is_file()


def test_too_many_rows_are_refused(tmp_path):
    plan = parse_plan(plan_value(**data_files(tmp_path), train_rows=[17]))
    with pytest.raises(ValueError, match="train_rows 17: .*data.jsonl has 16 rows. Fix: at most 16, or all"):
        run_plan(Settings(plan, tmp_path / "out"))


def test_a_second_referee_on_the_same_folder_is_refused(tmp_path):
    plan = parse_plan(plan_value(**data_files(tmp_path)))
    with alone_in(tmp_path / "out", "gad referee"):
        with pytest.raises(ValueError, match="another gad referee uses"):
            run_plan(Settings(plan, tmp_path / "out"))


def test_sharing_a_gpu_without_a_limit_of_the_cache_is_warned_of(tmp_path):
    def text(**changes):
        slots, gpus = changes.pop("slots", 2), changes.pop("gpus", ())
        return show_costs(Settings(parse_plan(plan_value(device="gpu", **changes)), tmp_path, slots=slots, gpus=gpus))

    assert "warning: several trainings share a GPU" in text()
    limit = "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=1"
    for harmless in ({"slots": 1}, {"gpus": ("0", "1")}, {"overrides": [limit]}):
        assert "warning" not in text(**harmless)


def test_every_job_once(plan, tmp_path):
    jobs = jobs_of(expand(plan, tmp_path))
    order = {job.name: i for i, job in enumerate(jobs)}
    assert all(order[need] < order[job.name] for job in jobs for need in job.needs)

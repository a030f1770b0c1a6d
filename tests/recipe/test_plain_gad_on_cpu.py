"""benchmarks/plain_gad.py: its sampler against transformers, its gradients against float64, a plan from end to end."""

import copy
import json
import math
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from recipe.gad.evaluation.sampling import read_answers
from recipe.gad.training.fresh import fresh_discriminator, load_base

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
ANSWERS = [[[10, 11, 1], [12, 13]], [[14, 15, 6, 7], [1]], [[8], [9, 10]]]
TEACHERS = [[11, 12, 1], [13, 1], [14, 15, 6, 7, 1]]
STUDENT_ROWS = [(prompt, answer) for prompt, group in zip(PROMPTS, ANSWERS, strict=True) for answer in group]


@pytest.fixture(scope="module")
def plain(load_script):
    return load_script("plain_gad", "benchmarks")


@pytest.fixture
def student(tiny_problem):
    return AutoModelForCausalLM.from_pretrained(tiny_problem / "model", dtype=torch.float32)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= 1e-5 * scale, name


def log_prob(model, prompt: list[int], answer: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, one sequence alone."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(answer)), answer]


@pytest.mark.parametrize("heads", [2, 4])
def test_the_sampler_computes_the_logits_of_transformers(plain, tiny_problem, monkeypatch, heads):
    config = AutoConfig.from_pretrained(tiny_problem / "model", num_attention_heads=heads)  # and two of keys and values
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    sampler = plain.Sampler(student, [1], rows=6, max_tokens=4, temperature=0.8)
    for prompts in (PROMPTS, PROMPTS[::-1]):  # the second call reuses cache and masks
        told = torch.randint(4, 20, (3, 4)).repeat_interleave(2, dim=0)
        seen: list[torch.Tensor] = []

        def draw(logits, seen=seen, told=told):
            seen.append(logits)
            return told[:, len(seen) - 1]

        monkeypatch.setattr(sampler, "_draw", draw)
        assert sampler.answers(prompts) == [[told[2 * i].tolist()] * 2 for i in range(3)]
        for row, answer in enumerate(told.tolist()):
            with torch.no_grad():
                whole = student(input_ids=torch.tensor([prompts[row // 2] + answer])).logits[0]
            expected = whole[len(prompts[row // 2]) - 1 : -1]
            assert (torch.stack([logits[row] for logits in seen]) - expected).abs().max() < 1e-5


def test_draws_follow_the_softmax_at_the_temperature_and_stop(plain, student):
    torch.manual_seed(0)
    sampler = plain.Sampler(student, [2], rows=20000, max_tokens=1, temperature=0.5)
    logits = torch.tensor([0.0, 0.5, 1.0])
    expected = (logits.double() / 0.5).softmax(0)
    counts = sampler._draw(logits.expand(20000, 3)).bincount() / 20000
    assert ((counts - expected).abs() < 4 * (expected * (1 - expected) / 20000).sqrt()).all()


def test_an_answer_ends_with_its_stop_token(plain, student, monkeypatch):
    sampler = plain.Sampler(student, [7, 9], rows=2, max_tokens=40, temperature=1.0)
    steps = iter([[1, 7], [2, 3], [9, 4], *[[5, 5]] * 37])
    monkeypatch.setattr(sampler, "_draw", lambda logits: torch.tensor(next(steps)))
    assert sampler.answers([[3, 4]]) == [[[1, 2, 9], [7]]]
    assert len(list(steps)) == 40 - plain.LOOK_EVERY  # nobody waits for rows that have ended


COMPILED = pytest.param(
    24, True, marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")]
)


@pytest.mark.parametrize("tokens, compiled", [(16384, False), (12, False), COMPILED])
def test_gradients_of_the_student(plain, student, monkeypatch, tokens, compiled):
    monkeypatch.setattr(plain, "MAX_BATCH_TOKENS", tokens)
    reference = copy.deepcopy(student).double()
    plain.fused(SimpleNamespace(compile=compiled), student)
    advantages, weight, temperature = [0.5, -1.0, 2.0, 0.25, -0.75, 1.5], 0.2, 0.8
    plain.policy_gradient(student, STUDENT_ROWS, advantages, temperature)
    teachers = list(zip(PROMPTS, TEACHERS, strict=True))
    loss = plain.imitation_gradient(student, teachers, weight)
    found = gradients(student)

    policy = sum(
        a * log_prob(reference, *row, temperature).sum() for a, row in zip(advantages, STUDENT_ROWS, strict=True)
    )
    imitation = -torch.cat([log_prob(reference, *row, 1.0) for row in teachers]).mean()
    (-policy / sum(len(answer) for _, answer in STUDENT_ROWS) + weight * imitation).backward()
    check_equal(found, gradients(reference))
    assert loss == pytest.approx(float(imitation.detach()), rel=1e-5)


def moved(model):
    """A copy with other weights, close to those of the model."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return other


@pytest.mark.parametrize("tokens", [16384, 12])
def test_gradient_of_the_kl_to_the_reference(plain, student, monkeypatch, tokens):
    monkeypatch.setattr(plain, "MAX_BATCH_TOKENS", tokens)
    start, advantages, temperature = moved(student), [0.5, -1.0, 2.0, 0.25, -0.75, 1.5], 0.8
    exact, exact_start = copy.deepcopy(student).double(), copy.deepcopy(start).double()
    mean = plain.policy_gradient(student, STUDENT_ROWS, advantages, temperature, start, 0.7)

    policy, distances = 0.0, []
    for advantage, row in zip(advantages, STUDENT_ROWS, strict=True):
        log_probs, fixed = (log_prob(model, *row, temperature) for model in (exact, exact_start))
        policy += advantage * log_probs.sum()
        ratio = fixed.detach() - log_probs
        distances.append(ratio.exp() - 1 - ratio)
    distance = torch.cat(distances)
    (-policy / len(distance) + 0.7 * distance.mean()).backward()
    check_equal(gradients(student), gradients(exact))
    assert mean == pytest.approx(float(distance.mean().detach()), rel=1e-3) and mean > 1e-3
    assert not gradients(start)


def test_without_the_kl_the_policy_gradient_keeps_every_bit(plain, student):
    before, advantages = copy.deepcopy(student), [0.5, -1.0, 2.0, 0.25, -0.75, 1.5]
    assert plain.policy_gradient(student, STUDENT_ROWS, advantages, 0.8, None, 0.0) == 0.0
    [part] = plain.parts(STUDENT_ROWS)
    log_probs, of = plain.answer_log_probs(before, [STUDENT_ROWS[i] for i in part], 0.8)
    weights = torch.tensor([advantages[i] for i in part])
    (-(weights[of] * log_probs).sum() / sum(len(answer) for _, answer in STUDENT_ROWS)).backward()
    for found, expected in zip(student.parameters(), before.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_advantages_are_divided_by_the_deviation_of_the_group(plain):
    scores = torch.tensor([[1.0, 2.0, 4.5], [-3.0, 0.25, 0.5], [0.5, 0.5, 0.5]])
    assert torch.equal(plain.advantages_of(scores, False), scores - scores.mean(dim=1, keepdim=True))
    for found, group in zip(plain.advantages_of(scores, True).tolist(), scores.tolist(), strict=True):
        mean, deviation = statistics.mean(group), statistics.stdev(group)
        assert found == pytest.approx([(score - mean) / (deviation + 1e-6) for score in group], rel=1e-6)


@pytest.mark.parametrize("tokens, compiled", [(16384, False), (12, False), COMPILED])
def test_gradient_of_soda(plain, student, monkeypatch, tokens, compiled):
    monkeypatch.setattr(plain, "MAX_BATCH_TOKENS", tokens)
    start, beta = moved(student), 0.3
    exact, exact_start = copy.deepcopy(student).double(), copy.deepcopy(start).double()
    for model in (student, start):
        plain.fused(SimpleNamespace(compile=compiled), model)
    found = plain.dpo_gradient(student, start, list(zip(PROMPTS, TEACHERS, strict=True)), ANSWERS, beta)

    def reward(prompt: list[int], answer: list[int]) -> torch.Tensor:
        fixed = log_prob(exact_start, prompt, answer, 1.0).sum().detach()
        return beta * (log_prob(exact, prompt, answer, 1.0).sum() - fixed)

    triples = zip(PROMPTS, TEACHERS, ANSWERS, strict=True)
    margins = torch.stack([reward(p, teacher) - reward(p, answer) for p, teacher, group in triples for answer in group])
    loss = torch.log1p((-margins).exp()).mean()
    loss.backward()
    check_equal(gradients(student), gradients(exact))
    assert not gradients(start)
    assert found == pytest.approx(
        {
            "actor/dpo_loss": float(loss.detach()),
            "actor/dpo_acc": float((margins > 0).double().mean()),
            "actor/dpo_margin": float(margins.mean().detach()),
        },
        rel=1e-4,
        abs=1e-6,
    )


@pytest.mark.parametrize("tokens, compiled", [(16384, False), (24, False), COMPILED])
def test_gradients_of_the_discriminator(plain, tiny_problem, monkeypatch, tokens, compiled):
    monkeypatch.setattr(plain, "MAX_BATCH_TOKENS", tokens)
    d = fresh_discriminator(load_base(str(tiny_problem / "model")), seed=0)
    reference = copy.deepcopy(d).double()
    plain.fused(SimpleNamespace(compile=compiled), d)
    scores, right = plain.discriminator_gradient(d, PROMPTS, ANSWERS, TEACHERS)
    found = gradients(d)

    def value(prompt: list[int], answer: list[int]) -> torch.Tensor:
        return reference(input_ids=torch.tensor([prompt + answer])).logits[0, -1, 0]

    expected = torch.stack([value(*row) for row in STUDENT_ROWS]).view(3, 2)
    teachers = torch.stack([value(*row) for row in zip(PROMPTS, TEACHERS, strict=True)])[:, None]
    (torch.log1p((expected - teachers).exp()).mean()).backward()
    check_equal(found, gradients(reference))
    assert (scores - expected.detach()).abs().max() < 1e-5
    assert right == pytest.approx(float((teachers > expected).double().mean().detach()))


def plan_of(tiny_problem, **changes) -> dict:
    return {
        "model": str(tiny_problem / "model"),
        "data": str(tiny_problem / "train.parquet"),
        "watch": str(tiny_problem / "val.parquet"),
        "held_out": 12,
        "seeds": [3, 4],
        "max_prompt_length": 16,
        "max_response_length": 12,
        "rows": 16,
        "stages": {
            "seqkd": {"does": "imitate", "steps": 30, "lr": 1e-3, "prompts": 8},
            "lead": {"does": "lead", "student": "seqkd", "steps": 2, "lr": 1e-3, "prompts": 8},
            "gad": {
                "does": "gad",
                "student": "seqkd",
                "discriminator": "lead",
                "steps": 3,
                "lr": 1e-4,
                "d_lr": 1e-3,
                "prompts": 4,
                "imitation": 0.2,
            },
        },
        "controls": ["seqkd"],
        "arms": ["gad"],
        "answers": 2,
        "judge": {"seeds": [0, 1], "epochs": 1},
        **changes,
    }


def test_a_plan_from_end_to_end(plain, tiny_problem, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(plan_of(tiny_problem, arms=["gad", "base"]), sort_keys=False))
    folder = tmp_path / "runs"
    plain.split(plain.Plan.read(plan), folder)
    jobs = plain.jobs_of(plain.Plan.read(plan), plan, folder)
    assert [job.name for job in jobs] == [
        *(f"stage-{stage}-{seed}" for stage in ("seqkd", "lead", "gad") for seed in (3, 4)),
        *(f"judge-{stage}-{seed}" for stage in ("seqkd", "gad", "base") for seed in (3, 4)),
    ]
    assert jobs[-1].needs == () and jobs[-1].steps is None
    assert jobs[4].needs == ("stage-seqkd-3", "stage-lead-3") and jobs[6].needs == ("stage-seqkd-3",)
    for job in jobs:
        assert not job.is_finished()
        assert plain.main(job.command[2:]) == 0
        assert job.is_finished()

    def metrics(stage: str) -> list[dict]:
        return [json.loads(line)["data"] for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]

    imitation = [line["actor/imitation_loss"] for line in metrics("seqkd-3")]
    assert len(imitation) == 30 and imitation[-1] < imitation[0]
    assert [sorted(line) for line in metrics("lead-4")][-1] == [
        "critic/d_acc", "critic/grad_norm", "response_length/mean", "timing_s/gen", "timing_s/step", "val-aux/d_acc",
    ]  # fmt: skip
    assert all(math.isfinite(line["actor/grad_norm"]) for line in metrics("gad-3"))
    assert (folder / "seqkd-3/model.safetensors").read_bytes() != (folder / "gad-3/model.safetensors").read_bytes()

    prompts = {json.dumps(a["messages"]) for a in read_answers(folder / "eval/gad-3")}
    trained = {json.dumps(row["messages"]) for row in plain.Plan.read(plan).rows_of(folder / "train.parquet").rows}
    assert len(prompts) == 12 and not prompts & trained
    untrained = [read_answers(folder / f"eval/base-{seed}") for seed in (3, 4)]
    assert [len(answers) for answers in untrained] == [24, 24] and untrained[0] != untrained[1]
    settings = [json.loads((folder / f"eval/{name}-3/settings.json").read_text()) for name in ("base", "gad")]
    assert [one["model"] for one in settings] == [str(tiny_problem / "model"), str(folder / "gad-3")]

    capsys.readouterr()
    assert plain.main([str(plan), "--folder", str(folder), "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "| stage", "|---|---|---|---|---|---|---|", "| seqkd", "| gad", "| base", "",
        "| difference", "|---|---|---|---|---|---|---|", "| gad - seqkd", "| base - seqkd",
    ]  # fmt: skip


def run_one(plain, tiny_problem, folder, **stage) -> list[dict]:
    """Metrics of the steps of a stage that starts from the untrained model."""
    settings = {"steps": 8, "prompts": 8, "lr": 1e-3, **stage}
    plan = plain.Plan.parse(plan_of(tiny_problem, stages={"one": settings}, controls=["one"], arms=["base"]))
    plain.split(plan, folder)
    plain.run_stage(plan, folder, 0, "one")
    return [json.loads(line)["data"] for line in (folder / "one-0/metrics.jsonl").read_text().splitlines()]


def test_soda_learns_from_answers_of_its_start(plain, tiny_problem, student, tmp_path, monkeypatch):
    sampled, new, seen, answers = [], [], {}, plain.Sampler.answers
    expected = student.state_dict()

    def recorded(sampler, prompts):
        sampled.append(sampler.model)
        return answers(sampler, prompts)

    def gradient(policy, reference, teachers, groups, beta, real=plain.dpo_gradient):
        assert beta == 0.5 and policy is not reference and sampled[-1] is reference
        assert all(torch.equal(value, expected[name]) for name, value in reference.state_dict().items())
        new.append(any(tuple(prompt) not in seen for prompt, _ in teachers))
        for (prompt, _), group in zip(teachers, groups, strict=True):
            assert len(group) == 2 and seen.setdefault(tuple(prompt), group) == group
        return real(policy, reference, teachers, groups, beta)

    monkeypatch.setattr(plain.Sampler, "answers", recorded)
    monkeypatch.setattr(plain, "dpo_gradient", gradient)
    lines = run_one(plain, tiny_problem, tmp_path, does="soda", beta=0.5, steps=14)  # 52 rows, 8 a step
    assert len(sampled) == sum(new) < len(new) == 14
    assert lines[0]["actor/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["actor/dpo_loss"] < 0.69 and lines[-1]["actor/dpo_margin"] > 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "one-0", dtype=torch.float32).state_dict()
    assert not torch.equal(trained["lm_head.weight"], expected["lm_head.weight"])
    assert not (tmp_path / "one-0/d.pt").exists() and "actor/imitation_loss" not in lines[0]
    [line] = run_one(plain, tiny_problem, tmp_path, does="soda", beta=0.5, steps=1, imitation=0.2)
    assert line["actor/dpo_loss"] == lines[0]["actor/dpo_loss"] and line["actor/imitation_loss"] > 0
    assert line["actor/grad_norm"] != lines[0]["actor/grad_norm"]


def test_online_dpo_learns_from_fresh_answers(plain, tiny_problem, student, tmp_path, monkeypatch):
    sampled, expected, answers = [], student.state_dict(), plain.Sampler.answers

    def recorded(sampler, prompts):
        sampled.append((sampler.model, answers(sampler, prompts)))
        return sampled[-1][1]

    def gradient(policy, reference, teachers, groups, beta, real=plain.dpo_gradient):
        assert sampled[-1][0] is policy and groups is sampled[-1][1]
        assert all(torch.equal(value, expected[name]) for name, value in reference.state_dict().items())
        return real(policy, reference, teachers, groups, beta)

    monkeypatch.setattr(plain.Sampler, "answers", recorded)
    monkeypatch.setattr(plain, "dpo_gradient", gradient)
    lines = run_one(plain, tiny_problem, tmp_path, does="online_dpo", beta=0.5, steps=9, imitation=0.2)
    assert len(sampled) == 9  # 52 rows, 8 a step: the second epoch has begun
    assert lines[0]["actor/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["actor/dpo_loss"] < 0.69 and lines[0]["actor/imitation_loss"] > 0
    assert (tmp_path / "one-0/model.safetensors").exists() and not (tmp_path / "one-0/d.pt").exists()


def test_gad_normalises_and_stays_close_to_its_start_as_the_stage_says(plain, tiny_problem, tmp_path, monkeypatch):
    seen: list[float] = []

    def gradient(student, rows, advantages, *rest, real=plain.policy_gradient):
        seen.extend(map(abs, advantages))
        return real(student, rows, advantages, *rest)

    monkeypatch.setattr(plain, "policy_gradient", gradient)
    lines = run_one(plain, tiny_problem, tmp_path, does="gad", d_lr=1e-3, steps=3, normalise=True, kl=0.1)
    assert all(min(a, abs(a - 0.5**0.5)) < 0.01 for a in seen) and max(seen) > 0.7  # two answers: +-1/sqrt(2)
    assert abs(lines[0]["actor/kl_loss"]) < 1e-6 < lines[-1]["actor/kl_loss"]
    seen.clear()
    monkeypatch.setattr(plain, "copy", None)  # there is no reference
    lines = run_one(plain, tiny_problem, tmp_path, does="gad", d_lr=1e-3, steps=1)
    assert "actor/kl_loss" not in lines[0] and any(min(a, abs(a - 0.5**0.5)) > 0.01 for a in seen)


def test_defaults_are_those_of_the_trainer(plain):
    config = yaml.safe_load((Path(__file__).parents[2] / "recipe/gad/config/gad_trainer.yaml").read_text())
    assert plain.Stage("soda", 1, 1e-3).beta == config["gad"]["dpo_beta"]
    assert plain.KL_TYPE == config["actor_rollout_ref"]["actor"]["kl_loss_type"]


@pytest.mark.parametrize("seed", [None, 0, 1821])
def test_rows_are_shuffled_as_pandas_does(plain, tiny_problem, tmp_path, seed):
    plain.split(plain.Plan.parse(plan_of(tiny_problem, shuffle=seed)), tmp_path)
    frame = pd.read_parquet(tiny_problem / "train.parquet")
    if seed is not None:
        frame = frame.sample(frac=1, random_state=seed)
        assert frame.index.tolist() != list(range(64))
    for name, expected in (("held_out", frame[:12]), ("train", frame[12:])):
        found = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert list(found.columns) == list(expected.columns)
        assert found["extra_info"].tolist() == expected["extra_info"].tolist()


def test_the_rate_falls_over_the_steps_or_over_the_seconds(plain):
    stage = plain.Stage("imitate", steps=4, lr=2.0)
    assert [stage.student_lr(step, 1e9) for step in range(4)] == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    stage = plain.Stage("imitate", steps=4, lr=2.0, max_seconds=10)
    assert stage.student_lr(1, 5) == pytest.approx(1.0) and stage.student_lr(2, 1) == pytest.approx(1.0)
    assert stage.student_lr(3, 11) == 0


@pytest.mark.parametrize("limit", ["--seconds", "max_seconds"])
def test_a_stage_ends_when_its_time_is_over(plain, tiny_problem, tmp_path, limit):
    values = plan_of(tiny_problem)
    values["stages"]["seqkd"] |= {"steps": 10**6, "lr": 1.0} | ({"max_seconds": 1.0} if limit == "max_seconds" else {})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    plan = plain.Plan.read(tmp_path / "plan.yaml")
    plain.split(plan, tmp_path / "runs")
    until = time.time() + (3.0 if limit == "--seconds" else math.inf)
    plain.run_stage(plan, tmp_path / "runs", 0, "seqkd", until)
    lines = (tmp_path / "runs/seqkd-0/metrics.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 10**6 and (tmp_path / "runs/seqkd-0/model.safetensors").exists()
    assert json.loads(lines[-1])["data"]["actor/lr"] < 0.5
    with pytest.raises(ValueError, match="no time is left for seqkd-0"):
        plain.run_stage(plan, tmp_path / "runs", 0, "seqkd", time.time() - 1)


def lead(**changes) -> dict:
    """Change of a plan: its only stage, with some settings; None takes one out."""
    settings = {"does": "lead", "steps": 1, "lr": 1e-3, "prompts": 8, **changes}
    stage = {key: value for key, value in settings.items() if value is not None}
    return {"stages": {"gad": stage}, "controls": ["gad"]}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sedes": [1]}, "the plan: unknown key 'sedes'"),
        ({"arms": ["gdd"]}, "arms 'gdd': expected one of gad, lead, seqkd"),
        ({"held_out": "all"}, "held_out 'all': expected a whole number of at least 1"),
        ({"compile": "yes"}, "compile 'yes': expected true or false"),
        ({"shuffle": "yes"}, "shuffle 'yes': expected null or a whole number from 0 to 4294967295"),
        ({"shuffle": True}, "shuffle True: expected null or a whole number"),
        ({"shuffle": -1}, "shuffle -1: expected null or a whole number"),
        ({"stages": {"base": {"does": "imitate", "steps": 1, "lr": 1e-3}}}, "stage 'base': the name of the untrained"),
        ({"answers": 3}, r"rows 16 is no multiple of \[3\]"),
        ({"stages": ["gad"]}, r"stages: found \('gad',\), expected names with the settings"),
        ({"stages": {"gad": 3}}, "stage 'gad': found 3, expected a mapping with keys of does, steps"),
        ({"answers": None}, "answers None: expected a whole number of at least 1"),
        ({"seeds": 3}, "seeds 3: expected a list of different values"),
        ({"controls": 3}, "controls 3: expected a list of gad, lead, seqkd"),
        ({"watch": ["a"]}, r"watch \('a',\): expected one path"),
        ({"judge": {"seed": [0]}}, "judge: unknown key 'seed'"),
        ({"judge": {"lr": "fast"}}, "judge: lr 'fast': expected a number above 0"),
        ({"judge": {"epochs": None}}, "judge: epochs None: expected a whole number of at least 1"),
        ({"judge": {"batch_pairs": [8]}}, r"judge: batch_pairs \(8,\): expected a whole number of at least 1"),
        ({"judge": {"seeds": "0"}}, "judge: seeds '0': expected a list of different values"),
        ({"judge": {"seeds": [[0]]}}, r"judge: seeds \[0\]: expected whole numbers of at least 0"),
        (lead(imitation=math.nan), "stage 'gad': imitation nan: expected a number of at least 0"),
        (lead(stepz=2), "stage 'gad': unknown key 'stepz'. Known keys: does, steps, lr,"),
        (lead(lr=None), "stage 'gad' lacks lr"),
        (lead(lr="2e-5"), "stage 'gad': lr '2e-5': expected a number above 0"),
        (lead(steps=1.5), "stage 'gad': steps 1.5: expected a whole number"),
        (lead(prompts=[8]), r"stage 'gad': prompts \(8,\): expected a whole number"),
        (lead(imitation="much"), "stage 'gad': imitation 'much': expected a number of at least 0"),
        (lead(student="seqkd"), "stage 'gad': student 'seqkd': expected one of gad"),
        (lead(discriminator={"a": 1}), "stage 'gad': discriminator {'a': 1}: expected one of gad"),
        (lead(does="gda"), "stage 'gad': does 'gda': expected one of imitate, lead, gad, soda, online_dpo"),
        (lead(does="gad", d_lr=1e-3, normalise=1), "stage 'gad': normalise 1: expected true or false"),
        (lead(does="gad", d_lr=1e-3, normalise=True, prompts=16), "stage 'gad': normalise needs two answers"),
        (lead(does="gad", d_lr=1e-3, kl=-1e-3), "stage 'gad': kl -0.001: expected a number of at least 0"),
        (lead(does="soda", beta=0), "stage 'gad': beta 0: expected a number above 0"),
        (lead(does="soda", kl=1e-3), "stage 'gad': kl 0.001: a stage that does soda takes none, only gad"),
        (
            lead(imitation=0.2),
            "stage 'gad': imitation 0.2: a stage that does lead takes none, only gad or soda or online_dpo",
        ),
        (lead(normalise=True), "stage 'gad': normalise True: a stage that does lead takes none, only gad"),
        (
            lead(does="gad", d_lr=1e-3, beta=0.2),
            "stage 'gad': beta 0.2: a stage that does gad takes none, only soda or online_dpo",
        ),
        (lead(does="gad"), "stage 'gad': a stage that does gad needs d_lr"),
    ],
)
def test_a_mistake_in_a_plan_is_named(plain, tiny_problem, tmp_path, change, error):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan_of(tiny_problem, **change)))
    with pytest.raises(ValueError, match=rf"plan\.yaml: {error}"):
        plain.Plan.read(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "plan", sorted((Path(__file__).parents[2] / "benchmarks/plans").iterdir()), ids=lambda p: p.stem
)
def test_the_plans_can_be_read(plain, plan):
    assert plain.Plan.read(plan).arms


def test_an_empty_step_count_is_named(plain):
    with pytest.raises(ValueError, match="steps None: expected a whole number of at least 1"):
        plain.Stage("imitate", steps=None, lr=1e-3)

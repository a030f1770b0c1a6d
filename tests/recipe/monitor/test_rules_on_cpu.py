"""recipe/gad/monitor/rules.py: every finding from hand-made curves, and none on healthy ones."""

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from recipe.gad.monitor import rules as health
from recipe.gad.monitor.rules import Curve, apply_rules, earlier_findings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script(load_script):
    """benchmarks/false_alarms.py as a module."""
    return load_script("false_alarms", "benchmarks")


def curve(values) -> Curve:
    values = np.array(values, dtype=float)
    return Curve(np.arange(1, len(values) + 1), values)


def noisy(values, scale=0.05, seed=0) -> Curve:
    rng = random.Random(seed)
    return curve([value + rng.uniform(-scale, scale) for value in values])


def healthy_metrics(steps=120) -> dict:
    """A GAD stage like the quickstart's: d_acc 1 -> 0.6, gap 6 -> 0.3, ROUGE-L up, KL growing to 1, lengths alike."""
    rng = random.Random(1)
    metrics = {0: {"val-aux/toy/rouge_l/mean@1": 0.44}}
    for step in range(1, steps + 1):
        t = step / steps
        metrics[step] = {
            "critic/d_acc": min(1.0, 1.0 - 0.4 * t + rng.uniform(-0.08, 0.08)),
            "critic/score_gap": 6 * (1 - t) + 0.3 + rng.uniform(-0.5, 0.5),
            "critic/lr": 1e-6,
            "critic/grad_norm": rng.uniform(0.3, 9.0),
            "actor/pg_loss": rng.uniform(-0.03, 0.03),
            "actor/pg_clipfrac": 0.0,
            "actor/ppo_kl": 0.0,
            "actor/kl_loss": t + rng.uniform(0, 0.05),
            "actor/entropy": 0.95 - 0.1 * t + rng.uniform(-0.02, 0.02),
            "response_length/mean": 10 + rng.uniform(-0.8, 0.8),
            "teacher_response_length/mean": 10 + rng.uniform(-0.3, 0.3),
            "response_length/cut_ratio": rng.uniform(0, 0.14),
            "teacher_response_length/cut_ratio": 0.0,
            "gad/missing_rollouts": 0.0,
        }
        if step % 10 == 0:
            metrics[step]["val-aux/toy/rouge_l/mean@1"] = 0.44 + 0.15 * t + rng.uniform(-0.02, 0.02)
    return metrics


def answers(n=64) -> list[dict]:
    rng = random.Random(2)
    words = ["well", "um", "then", "and", "plus", "right", "see", "a", "b", "c"]
    return [{key: f"{i} " + " ".join(rng.choices(words, k=10)) for key in ("input", "output", "gts")} for i in range(n)]


@pytest.mark.parametrize("steps", range(1, 121, 7))
def test_a_healthy_run_gives_no_alarm_at_any_time(steps):
    metrics = {step: row for step, row in healthy_metrics().items() if step <= steps}
    findings, looked_at = apply_rules(metrics, answers())
    assert findings == []
    assert {"critic/d_acc", "actor/entropy", "validation samples", "gad/missing_rollouts"} <= set(looked_at)


def test_warmup_may_have_a_certain_discriminator():
    metrics = {
        step: {"critic/d_acc": 1.0, "actor/sft_loss": 1.5, "actor/entropy": 2.0 / step} for step in range(1, 101)
    }
    findings, looked_at = apply_rules(metrics)
    assert findings == [] and "actor/entropy" not in looked_at  # the rule on entropy is for policy steps


def test_saturated_discriminator():
    finding = health.saturated_discriminator(curve([0.7] * 10 + [0.99] * 50))
    assert finding.level == "warning" and "0.99 (mean of steps 11-60)" in finding.evidence
    assert "critic.optim.lr" in finding.fix
    assert health.saturated_discriminator(curve([0.99] * 49)) is None
    assert health.saturated_discriminator(curve([1.0] * 25 + [0.95] * 25)) is None  # it falls
    assert health.saturated_discriminator(curve([0.94] * 60)) is None


def test_guessing_discriminator():
    finding = health.guessing_discriminator(noisy([0.5] * 40, scale=0.1))
    assert "from the start" in finding.evidence and "trainer.critic_warmup" in finding.fix
    assert health.guessing_discriminator(noisy([0.5] * 29)) is None
    assert health.guessing_discriminator(curve([0.98] * 10 + [0.5] * 100)) is None  # it has learnt once


def test_fooled_discriminator():
    assert "0.3 (mean of steps 41-60)" in health.fooled_discriminator(curve([0.9] * 40 + [0.3] * 20)).evidence
    assert health.fooled_discriminator(noisy([0.5] * 60)) is None
    assert health.fooled_discriminator(curve([0.06] + [0.98] * 10)) is None  # a new D may start below


def test_frozen_discriminator():
    assert "steps 11-30" in health.frozen_discriminator(curve([0.0] * 30)).evidence
    assert health.frozen_discriminator(curve([1e-6] * 29 + [0.0])) is None  # the end of a decay


def test_collapsed_entropy():
    finding = health.collapsed_entropy(curve([0.8] * 5 + [0.4] * 20 + [0.02] * 5))
    assert finding.level == "error"
    assert "0.8 (mean of steps 1-5) to 0.02 (mean of steps 26-30)" in finding.evidence
    assert health.collapsed_entropy(curve([0.8] * 20 + [0.17] * 5)) is None
    assert health.collapsed_entropy(curve([0.8] * 5 + [0.01] * 4)) is None  # too short


def test_reward_hacking_needs_both_curves():
    rouge = Curve(np.array([0, 10, 20, 30, 40]), np.array([0.3, 0.5, 0.45, 0.3, 0.2]))
    closing, opening = curve(np.linspace(5, 1, 40)), curve(np.linspace(1, 5, 40))
    finding = health.falling_validation(rouge, closing)
    assert finding.level == "error" and "reward hacking" in finding.what
    assert "0.5 (step 10) to 0.2 (step 40)" in finding.evidence
    assert "kl_loss_coef" in finding.fix
    assert health.falling_validation(rouge, opening).what == "Validation gets worse"
    rouge.values[-1] = 0.48
    assert health.falling_validation(rouge, closing) is None  # a single bad validation
    assert health.falling_validation(curve([0.1, 0.2]), closing) is None


def test_closed_gate():
    finding = health.closed_gate(curve([1.0] * 10 + [0.04] * 20))
    assert finding.level == "warning" and "0.04 (mean of steps 11-30)" in finding.evidence
    assert "gad.discriminator_lead.max_steps" in finding.fix
    assert health.closed_gate(curve([0.0] * 19)) is None
    assert health.closed_gate(curve([0.0] * 10 + [0.1] * 10)) is None
    steps = {step: {"gad/policy_gate": 0.0} for step in range(1, 31)}  # D trains alone: no policy step is lost
    assert apply_rules(steps)[0] == []


def test_clip_fraction():
    finding = health.clip_fraction(curve([0.35] * 20))
    assert finding.level == "warning" and "usual with this loss is 0.0-0.3" in finding.evidence
    assert "raise actor_rollout_ref.actor.clip_ratio_low and actor_rollout_ref.actor.clip_ratio_high" in finding.fix
    assert health.clip_fraction(curve([0.003] * 20)) is None  # PPO at 0.2 clips few tokens
    assert health.clip_fraction(curve([0.2] * 20)) is None
    assert health.clip_fraction(curve([0.0] * 200)) is None  # one update per batch: nothing can be clipped


def test_clip_fraction_of_gspo():
    """The recorded runs of examples/gad/moe_gspo had 0.02 to 0.31, with a mean of 0.15."""
    for usual in ([0.15] * 20, [0.31] * 20, [0.02] * 20, [0.26, 0.19, 0.31, 0.20] * 5, [0.0] * 200):
        assert health.clip_fraction(curve(usual), "gspo") is None
    assert health.clip_fraction(curve([0.45] * 20), "gspo").level == "warning"
    few = health.clip_fraction(curve([0.003] * 20), "gspo")
    assert few.level == "ok" and "usual with this loss is 0.02-0.4" in few.evidence and "clip_ratio_low" in few.fix


def test_the_loss_mode_reaches_its_rule():
    metrics = {step: {"actor/pg_clipfrac": 0.35 if step <= 40 else 0.0} for step in range(1, 81)}
    early = {step: row for step, row in metrics.items() if step <= 40}
    assert [finding.where for finding in apply_rules(early)[0]] == ["clip_fraction"]
    assert apply_rules(early, loss_mode="gspo")[0] == []
    assert [earlier.finding.where for earlier in earlier_findings(metrics, [])] == ["clip_fraction"]
    assert earlier_findings(metrics, [], loss_mode="gspo") == []


def test_kl():
    assert "before: 0.1" in health.kl_blow_up(curve([0.1] * 20 + [1.5] * 5)).evidence
    assert health.kl_blow_up(curve([6.0] * 40)).level == "error"
    assert health.kl_blow_up(curve(np.linspace(0, 1.5, 100))) is None
    assert health.kl_blow_up(curve([0.001] * 20 + [0.5] * 5)) is None
    assert "0.2 (mean" in health.large_policy_steps(curve([0.2] * 20)).evidence
    assert health.large_policy_steps(curve([-0.2] * 20)) is not None
    assert health.large_policy_steps(curve([0.02] * 20)) is None


def test_length_drift():
    teacher = curve([100] * 40)
    finding = health.length_drift(curve([100] * 10 + [300] * 30), teacher)
    assert "too long" in finding.what and "from 1 (mean of steps 1-5) to 3 (mean of steps 21-40)" in finding.evidence
    assert "too short" in health.length_drift(curve([100] * 10 + [20] * 30), teacher).what
    assert health.length_drift(curve(np.linspace(30, 60, 40)), teacher) is None  # on its way to the teacher
    assert health.length_drift(curve([130] * 40), teacher) is None
    # the sides are compared step by step: D alone trained in the first 20 steps and logged no student
    late = Curve(np.arange(21, 41), np.full(20, 300.0))
    assert health.length_drift(late, teacher) is None


def test_swinging_lengths():
    teacher = curve([50] * 90)
    down_and_up = curve([50] * 30 + [38] * 30 + [50] * 30)
    finding = health.swinging_lengths(down_and_up, teacher)
    assert finding.what == "The length of the student's answers swings"
    numbers = r": 1\.00 \(steps (\d+)-\d+\), {} \(steps (\d+)-(\d+)\), 1\.00 \(steps (\d+)-\d+\)\."
    before, first, last, after = map(int, re.search(numbers.format("0\\.76"), finding.evidence).groups())
    assert before <= 21 and 31 <= first <= last - 9 <= 51 and 61 <= after
    up_and_down = health.swinging_lengths(curve([50] * 30 + [75] * 30 + [50] * 30), teacher)
    assert re.search(numbers.format("1\\.50"), up_and_down.evidence)
    assert health.swinging_lengths(curve([50] * 30 + [41] * 30 + [50] * 30), teacher) is None  # by less than a quarter
    assert health.swinging_lengths(curve(np.linspace(150, 50, 90)), teacher) is None  # on its way
    assert health.swinging_lengths(curve([100] * 30 + [45] * 30 + [50] * 30), teacher) is None  # overshoots a little
    assert health.swinging_lengths(noisy([50] * 90, scale=15), teacher) is None
    assert health.swinging_lengths(down_and_up, down_and_up) is None  # the data's own lengths
    long_ago = curve([50] * 30 + [38] * 30 + [50] * 130)
    assert health.swinging_lengths(long_ago, curve([50] * 190)) is None


def test_cut_answers():
    assert "the teacher's is 0.1" in health.cut_answers(curve([0.6] * 20), curve([0.1] * 20)).evidence
    assert health.cut_answers(curve([0.6] * 20), curve([0.5] * 20)) is None  # the limit is tight for both


def test_missing_rollouts():
    finding = health.missing_rollouts(curve([0, 3, 0, 2]))
    assert "5 samples in 2 of 4 steps, first in step 2, last in step 4" in finding.evidence
    assert health.missing_rollouts(curve([0] * 9)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value):
    metrics = healthy_metrics(10)
    metrics[4]["actor/grad_norm"] = metrics[7]["actor/grad_norm"] = value
    (finding,), _ = apply_rules(metrics)
    assert finding.level == "error" and "actor/grad_norm in 2 steps, first 4, last 7" in finding.evidence
    metrics = healthy_metrics(10)
    metrics[4]["perf/mfu/actor"] = value  # not a number that training hangs on
    assert apply_rules(metrics)[0] == []


def test_looping_answers():
    teacher = ["The quick brown fox jumps over the lazy dog, and then goes home to sleep for a while."] * 20
    fine, loop = teacher[0].upper(), "I am sorry. " * 30
    finding = health.looping_answers([fine] * 17 + [loop] * 3, teacher)
    assert "3 of 20" in finding.evidence and "I am sorry." in finding.evidence
    assert health.looping_answers([fine] * 19 + [loop], teacher) is None
    assert health.looping_answers([loop] * 20, [loop.lower()] * 20) is None  # so does the teacher
    assert health.looping_answers(["好的。" * 40] * 20, teacher) is not None  # no words needed
    assert health.looping_answers(["", "\ud800"], ["", "a"]) is None


def test_same_answers():
    prompts = [str(i) for i in range(20)]
    various = [f"answer {i}" for i in range(20)]
    finding = health.same_answers(prompts, ["yes"] * 5 + various[5:], various)
    assert finding.level == "error" and "5 of 20" in finding.evidence and "'yes'" in finding.evidence
    assert health.same_answers(prompts, ["yes"] * 5 + various[5:], ["yes"] * 4 + various[4:]) is None
    # eight samples of one prompt may well agree
    assert health.same_answers(["p"] * 8 + prompts, ["yes"] * 8 + various, various[:8] + various) is None


def test_worst_first_and_missing_metrics_are_no_error():
    metrics = {step: {"actor/pg_loss": 0.0, "gad/missing_rollouts": 1.0} for step in range(1, 4)}
    metrics[2]["actor/pg_loss"] = math.nan
    findings, looked_at = apply_rules(metrics)
    assert [finding.level for finding in findings] == ["error", "warning"]
    assert "critic/d_acc" not in looked_at


def test_several_validation_sets_count_as_their_mean():
    metrics = {1: {"val-aux/a/rouge_l/mean@1": 0.2, "val-aux/b/rouge_l/mean@1": 0.4}, 2: {}}
    steps, values = health.curve(metrics, health.ROUGE_L)
    assert steps.tolist() == [1] and values.tolist() == pytest.approx([0.3])


def test_what_was_wrong_and_passed_is_told_with_its_steps():
    metrics = healthy_metrics()
    assert earlier_findings(metrics, []) == []
    for step in range(40, 61):
        metrics[step]["response_length/mean"] = 3.0
    findings, _ = apply_rules(metrics)
    assert [finding.what for finding in findings] == ["The length of the student's answers swings"]
    (earlier,) = earlier_findings(metrics, findings)
    assert earlier.finding.what == "The student's answers grow too short"
    # means of 20 steps are below 10 / 1.5 from 10 short answers in 20 on: steps 49 to 70, seen at every fifth
    assert earlier.when() == "steps 49 to 69"
    assert earlier_findings(metrics, [*findings, earlier.finding]) == [], "it is told once"


def test_a_long_run_is_looked_at_so_many_times_only(monkeypatch):
    looks = []
    monkeypatch.setattr(health, "apply_rules", lambda metrics, loss_mode: (looks.append(len(metrics)), ([], []))[1])
    earlier_findings({step: {} for step in range(1000)}, [], looks=10)
    assert looks == list(range(100, 1000, 100))


def validations(values, every=10) -> Curve:
    return Curve(np.arange(every, every * len(values) + 1, every), np.array(values, dtype=float))


def gad_stage(first_policy_step: int, accuracies: dict[int, float]) -> dict:
    """Metrics of 60 steps in which the policy trains from one step on, with validations at some steps."""
    metrics = {step: {"actor/pg_loss": 0.01} if step >= first_policy_step else {} for step in range(61)}
    for step, accuracy in accuracies.items():
        metrics[step]["val-aux/d_acc"] = accuracy
    return metrics


@pytest.mark.parametrize(
    ("began", "accuracies", "seen"),
    [
        (1, {0: 0.53, 20: 0.7}, "0.53 in step 0"),  # no lead
        (1, {20: 0.594, 40: 0.7}, "0.594 in step 20"),  # trainer.val_before_train=False
        (21, {0: 0.7, 10: 0.7, 20: 0.55, 30: 0.7}, "0.55 in step 20"),  # a lead that ends with a validation
        (26, {0: 0.7, 20: 0.7, 30: 0.578}, "0.578 in step 30"),  # and one that ends between two
    ],
)
def test_weak_discriminator(began, accuracies, seen):
    (finding,), looked_at = apply_rules(gad_stage(began, accuracies))
    assert finding.level == "warning" and finding.where == "weak_discriminator" and "val-aux/d_acc" in looked_at
    assert f"val-aux/d_acc is {seen}" in finding.evidence and f"from step {began} on" in finding.evidence
    assert "Expected is 0.6 or more" in finding.evidence
    for remedy in ("trainer.critic_warmup", "gad.discriminator_lead.max_steps", "critic.optim.lr", "--reward_model"):
        assert remedy in finding.fix


@pytest.mark.parametrize(
    ("began", "accuracies"),
    [
        (1, {0: 0.6, 20: 0.5, 40: 0.5}),  # it may fall later: the student gets closer
        (21, {0: 0.5, 10: 0.55, 20: 0.66}),  # it was weak before its lead
        (26, {0: 0.5, 20: 0.5, 40: 0.7}),  # the lead went on after the weak validation
        (21, {0: 0.5, 10: 0.5}),  # no validation yet since the lead
        (61, {0: 0.5, 20: 0.5, 60: 0.5}),  # the policy has not begun, as in the warmup's metrics
        (1, {30: 0.5}),  # the first validation comes late: the student may have caught up
        (1, {}),  # gad.val_d_acc=False
    ],
)
def test_weak_discriminator_is_silent(began, accuracies):
    assert apply_rules(gad_stage(began, accuracies))[0] == []


def test_weak_discriminator_is_silent_about_a_lead_that_was_long_enough():
    """The mean of 0.66 to 0.77 in 64 pairs: at most 38 right, with a chance of 0.031, are below 0.6."""
    starts = np.random.default_rng(0).binomial(64, 0.71, size=1000) / 64
    findings = [health.weak_discriminator(curve([0.01]), Curve(np.array([0]), start[None])) for start in starts]
    assert 10 < sum(finding is not None for finding in findings) < 50


def test_memorizing_discriminator():
    training = curve([0.86] * 30 + [0.94] * 30)
    finding = health.memorizing_discriminator(training, validations([0.8, 0.75, 0.72, 0.7, 0.69, 0.69]))
    assert finding.level == "warning" and "0.94 against 0.69 (step 60)" in finding.evidence
    assert "critic.optim.lr" in finding.fix and "gad.label_smoothing=0.1" in finding.fix
    assert health.memorizing_discriminator(training, validations([0.8, 0.75, 0.72, 0.85, 0.69, 0.69])) is None
    assert health.memorizing_discriminator(training, validations([0.5, 0.5])) is None  # two are not enough
    assert health.memorizing_discriminator(curve([0.94] * 12), validations([0.5] * 3, every=4)) is None  # too early


def test_memorizing_discriminator_is_silent_about_a_discriminator_that_generalizes():
    """64 prompts, some easy and some hard in every validation, and the same chances in training."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(300):
        chances = rng.beta(4.25, 0.75, size=64)  # mean 0.85
        held_out = [rng.binomial(1, chances).mean() for _ in range(10)]
        training = rng.binomial(32, 0.85, size=100) / 32
        curves = curve(training), validations(held_out)
        alarms += any(
            health.memorizing_discriminator(curves[0], Curve(*(part[:end] for part in curves[1]))) for end in range(11)
        )
    assert alarms <= 3


def sight(own: list[float], fresh: list[float], first_policy_step: int = 1) -> dict:
    """Metrics of a GAD stage with a validation every ten steps: d_acc and a fresh discriminator's accuracy."""
    metrics = gad_stage(first_policy_step, dict(zip(range(0, 61, 10), own, strict=True)))
    for step, accuracy in zip(range(0, 61, 10), fresh, strict=True):
        metrics[step]["val-aux/two_sample"] = accuracy
    return metrics


def test_student_out_of_sight():
    own, fresh = [0.75, 0.75, 0.75, 0.65, 0.6, 0.55, 0.5], [0.65, 0.7, 0.6, 0.65, 0.7, 0.7, 0.64]
    (finding,), looked_at = apply_rules(sight(own, fresh))
    assert finding.level == "warning" and finding.where == "student_out_of_sight"
    assert "val-aux/d_acc went from 0.75 (mean of steps 0-20) to 0.55 (mean of steps 40-60)" in finding.evidence
    assert "val-aux/two_sample went from 0.65 to 0.68" in finding.evidence and "val-aux/two_sample" in looked_at
    assert "lowest" in finding.fix and "gad.replay" in finding.fix


@pytest.mark.parametrize(
    ("own", "fresh", "began"),
    [
        ([0.95, 0.9, 0.9, 0.7, 0.6, 0.55, 0.5], [0.9, 0.85, 0.8, 0.8, 0.8, 0.8, 0.8], 1),  # both fall: it gets closer
        ([0.7] * 7, [0.6, 0.6, 0.6, 0.65, 0.75, 0.75, 0.75], 1),  # D sees what it saw before
        ([0.95] * 3 + [0.85] + [0.7] * 3, [0.6] * 7, 1),  # D falls and still sees more than a fresh one
        ([1.0] + [0.6] * 6, [0.3] + [0.6] * 6, 11),  # it fell before the policy began
        ([0.8, 0.8, 0.8, 0.65, 0.6, 0.55, 0.5], [0.7] * 7, 31),  # too few validations since then
    ],
)
def test_student_out_of_sight_is_silent(own, fresh, began):
    assert apply_rules(sight(own, fresh, began))[0] == []


@pytest.mark.parametrize(("prompts", "n"), [(8, 4), (16, 8), (256, 8)])
def test_rules_seldom_find_fault_with_a_healthy_run(script, prompts, n):
    found = script.rates(prompts, n, runs=30, steps=200, seed=1)
    assert len(found) == len(health.RULES) + 2
    alarms = {name: round(30 * rate) for name, rate in found.items()}
    assert {name: n for name, n in alarms.items() if n > (3 if name == "falling_validation" else 1)} == {}
    assert sum(n > 0 for n in alarms.values()) <= 2


def test_every_rule_that_has_a_false_alarm_rate_is_in_the_table_of_the_documentation(script):
    text = (ROOT / "docs/troubleshooting.md").read_text().split("## False alarms")[1].split("\n## ")[0]
    rows = re.findall(r"\| `(\w+)` \|(.*)", text)
    rates = {name: [float(rate) for rate in re.findall(r"([\d.]+) %", cells)] for name, cells in rows}
    assert set(rates) == {rule.check.__name__ for rule in health.RULES} | {"looping_answers", "same_answers"}
    assert all(len(row) == len(script.BATCHES) and max(row) <= 5 for row in rates.values())


@pytest.mark.parametrize(("prompts", "n", "factor"), [(8, 4, 2.5), (16, 8, 1.7), (64, 8, 1.4)])
def test_a_swing_is_seen_through_the_noise_of_its_batch(script, prompts, n, factor):
    student, teacher = "response_length/mean", "teacher_response_length/mean"
    swing = np.exp(np.log(factor) * (1 - np.cos(np.arange(90) * 2 * np.pi / 45)) / 2)  # there and back, twice
    for seed in range(10):
        curves = script.healthy_run(np.random.default_rng(seed), prompts, n, steps=90)
        assert health.swinging_lengths(curves[student]._replace(values=curves[student].values * swing), curves[teacher])

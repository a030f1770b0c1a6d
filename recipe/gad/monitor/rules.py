"""Is this run healthy? Plain rules over its curves and validation answers; every finding names evidence and a fix.

A rule takes curves (steps and values of one metric) and returns a finding or None. A single step of GAD is one batch
and noisy, so the rules look at means over several steps and stay silent until there are enough of them.
:func:`apply_rules` applies all rules whose metrics a run has logged.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from recipe.gad.run.findings import LEVELS, Finding, error, note, warning
from recipe.gad.run.log import ROUGE_L, VAL_D_ACC, VAL_TWO_SAMPLE, VANILLA, Metrics, matching_names, series

RECENT = 20
"""Steps of "now": enough to average out the noise of one batch (d_acc moves by 0.1 from step to step)."""

START = 5
"""Steps of "at the start": few, because a policy can collapse within tens of steps."""

SATURATED_D_ACC = 0.95
SATURATED_STEPS = 50
"""Above 0.95 after 50 policy steps without falling: a student that gains on D has moved d_acc by then, even from 1."""

STUCK_FALL = 0.01
"""A smaller fall of d_acc between the halves of that window is within the noise of the means."""

COIN_TOSS = (0.4, 0.6)
COIN_TOSS_STEPS = 30
"""d_acc of a guessing D is 0.5, and ten-step means of it stay in this band; a D that learns leaves it in 30 steps."""

FOOLED_D_ACC = 0.45
"""Below a coin toss by more than noise: D prefers the student, so it has stopped following the student's changes."""

WEAK_D_ACC = 0.6
"""d_acc on validation prompts with which a lead is too short: it was 0.53 to 0.64 after such leads, 0.66 to 0.77 after
120 steps alone. One of 64 prompts has a standard error of 0.06, so one start in 30 is below by chance if D is right on
0.71."""
WEAK_WITHIN = 20
"""Steps after the first of the policy in which a validation still tells of the lead."""

MEMORIZED = 0.15
MEMORIZED_VALIDATIONS = 3
"""Training d_acc so far above d_acc on validation prompts, in three validations in a row. At an accuracy of 0.85, this
is more than three standard errors of one validation of 64 prompts; below about 50 prompts, chance can reach it."""

OUT_OF_SIGHT = 0.2
SIGHT_VALIDATIONS = 3
"""Growth of the distance from d_acc to a fresh discriminator's accuracy, both on validation prompts, between the first
and the last three validations: almost three standard errors with 64 prompts."""

ENTROPY_COLLAPSE = 0.2
"""Entropy below a fifth of its start: samples of one prompt become the same, and GRPO has no advantages left."""

ROUGE_FALL = 0.15
ROUGE_NOISE = 4.0
ROUGE_POINTS = 8
"""ROUGE-L this share below its best, and by this many standard deviations of one validation's noise, which eight
validations or more can tell."""

LENGTH_RATIO = 1.5
"""Student answers 1.5 times longer or shorter than the teacher's: D can tell the sides by length alone."""

LENGTH_DRIFT = 1.1
"""And at least this much further away than at the start: a student that still approaches the teacher is fine."""

SWING = 1.25
SWING_MEAN = 10
SWING_STEPS = 100
SWING_NOISE = 6.5
"""Ten-step means of the answer length that turn and come back by a quarter, within this many steps; a student that
approaches the teacher overshoots by less. And by this many standard deviations of such a mean, as the differences from
step to step give it: the means of a small batch turn and come back by a quarter without any cause."""

CUT_RATIO = 0.25
"""A quarter more cut answers than the teacher has: they lack the end token, which D sees at once."""

CLIP_BAND = (0.0, 0.3)
CLIP_BANDS = {"gspo": (0.02, 0.4)}
"""Usual pg_clipfrac with several updates per batch, and that of losses for which it is another: GSPO's clip range is so
narrow that runs had 0.02 to 0.31 (examples/gad/moe_gspo). With one update, nothing is clipped."""

CLOSED_GATE = 0.05
"""Mean factor of the policy term; below it the policy takes less than a twentieth of its step."""

KL_LOSS = 5.0
"""Nats per token from the reference policy; the entropy of a language model is about 1, healthy runs stay below 2."""

KL_JUMP = 5.0
KL_JUMP_FLOOR = 1.0
"""Five times the KL of the window before is a jump; below 1 nat per token it is the growth from zero of every run."""

PPO_KL = 0.1
"""Nats per token between the policy that sampled and the updated one; PPO usually stops at 0.01-0.05."""

COMPRESSION = 4.0
COMPRESSION_TO_TEACHER = 2.0
"""zlib shrinks prose 1.5-3 times and a loop ten times and more. Text that is regular by nature is so in the teacher's
answers too."""

CHOOSE = (
    "Keep the checkpoints around the best ROUGE-L (trainer.save_freq), and take the one with the lowest two-sample "
    "accuracy (gad eval --two_sample_model)."
)
"""ROUGE-L alone chooses badly: a lower sampling temperature raises it and makes the student easier to tell apart."""

BAD_ANSWERS = 0.1
"""From this share of validation answers on, loops or equal answers to different prompts are no accident."""


class Curve(NamedTuple):
    """Values of one metric over training; both 1-D and of one length, steps ascending."""

    steps: np.ndarray
    values: np.ndarray

    def last(self, n: int) -> "Curve":
        return Curve(self.steps[-n:], self.values[-n:])

    def first(self, n: int) -> "Curve":
        return Curve(self.steps[:n], self.values[:n])

    def mean(self) -> float:
        return float(self.values.mean())

    def show(self) -> str:
        return f"{self.mean():.3g} (mean of steps {self.steps[0]}-{self.steps[-1]})"


def _common(one: Curve, other: Curve) -> tuple[Curve, Curve]:
    """Both curves, in the steps that both have."""
    steps, i, j = np.intersect1d(one.steps, other.steps, return_indices=True)
    return Curve(steps, one.values[i]), Curve(steps, other.values[j])


class EarlierFinding(NamedTuple):
    """A finding from earlier in a run: the steps at which it was first and last made, and its last form."""

    first: int
    last: int
    finding: Finding

    def when(self) -> str:
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"


# -------------------------------------------------------------------------------------------------- the discriminator


def saturated_discriminator(d_acc: Curve) -> Finding | None:
    """D tells the sides apart in every pair and does not lose ground; give only steps with policy updates."""
    window = d_acc.last(SATURATED_STEPS)
    half = SATURATED_STEPS // 2
    if len(window.steps) < SATURATED_STEPS or window.mean() < SATURATED_D_ACC:
        return None
    if window.last(half).mean() < window.first(half).mean() - STUCK_FALL:
        return None
    return warning(
        "The discriminator is saturated",
        evidence=f"critic/d_acc stays at {window.show()}, above {SATURATED_D_ACC}: the student does not gain on it.",
        fix="Read some answers of both sides for a mark that gives the side away (end token, whitespace, template; "
        "compare the two .../cut_ratio). Then let the student imitate longer (SeqKD, or trainer.total_epochs of the "
        "warmup). Last, lower critic.optim.lr or raise actor_rollout_ref.actor.optim.lr: where the discriminator was "
        "not the faster side, the answers swung (docs/experiments.md).",
    )


def guessing_discriminator(d_acc: Curve) -> Finding | None:
    """D has never left the coin toss."""
    if len(d_acc.steps) < COIN_TOSS_STEPS:
        return None
    tens = np.convolve(d_acc.values, np.full(10, 0.1), mode="valid")
    if tens.min() < COIN_TOSS[0] or tens.max() > COIN_TOSS[1]:
        return None
    return warning(
        "The discriminator does not learn",
        evidence=f"critic/d_acc is {d_acc.show()} and no ten steps leave {COIN_TOSS[0]}-{COIN_TOSS[1]}: it has "
        "guessed from the start.",
        fix="Check that critic/grad_norm and critic/lr are above 0 and that teacher and student answers differ at all. "
        "Then raise critic.optim.lr, let the discriminator train alone for longer (trainer.critic_warmup in the warmup "
        "stage, gad.discriminator_lead.max_steps in stage gad), or start the warmup with a larger one "
        "(--reward_model).",
    )


def fooled_discriminator(d_acc: Curve) -> Finding | None:
    """D prefers the student's answers."""
    window = d_acc.last(RECENT)
    if len(window.steps) < RECENT or window.mean() >= FOOLED_D_ACC:
        return None
    return warning(
        "The student has outrun the discriminator",
        evidence=f"critic/d_acc is {window.show()}, below a coin toss: the discriminator prefers the student's answers "
        "to the teacher's, and its reward no longer points to the teacher.",
        fix="Raise critic.optim.lr, or slow the student: lower actor_rollout_ref.actor.optim.lr, raise "
        "actor_rollout_ref.actor.kl_loss_coef. A discriminator that is no stronger than the student cannot lead it for "
        "long: start the warmup with a larger one (--reward_model). An earlier checkpoint may be the better one.",
    )


def frozen_discriminator(learning_rate: Curve) -> Finding | None:
    """D is not trained."""
    window = learning_rate.last(RECENT)
    if len(window.steps) < RECENT or window.values.any():
        return None
    return warning(
        "The discriminator is frozen",
        evidence=f"critic/lr is 0 in steps {window.steps[0]}-{window.steps[-1]}: the student learns to please a "
        "discriminator that never learns.",
        fix="Set critic.optim.lr above 0, unless this is a control experiment.",
    )


def weak_discriminator(pg_loss: Curve, val_d_acc: Curve) -> Finding | None:
    """D hardly tells the sides apart when the policy begins to follow it; ``pg_loss`` says in which steps it does."""
    began = pg_loss.steps[0]
    # the validation of the step before sees the D with which the policy begins; later the student may have caught up
    near = (val_d_acc.steps >= began - 1) & (val_d_acc.steps < began + WEAK_WITHIN)
    start = Curve(val_d_acc.steps[near], val_d_acc.values[near]).first(1)
    if not len(start.steps) or start.values[0] >= WEAK_D_ACC:
        return None
    return warning(
        "The student follows a weak discriminator",
        evidence=f"{VAL_D_ACC} is {start.values[0]:.3g} in step {start.steps[0]}, and the student follows the "
        f"discriminator from step {began} on. Expected is {WEAK_D_ACC} or more: 0.5 is chance, and what GAD gains "
        "comes from the discriminator's lead.",
        fix="Start the stage again from a discriminator that has trained alone for longer: raise trainer.critic_warmup "
        "and trainer.total_epochs in the warmup stage, or set gad.discriminator_lead.max_steps in stage gad. If more "
        "steps alone do not help, raise critic.optim.lr, or start the warmup with a larger discriminator "
        "(--reward_model). With fewer than 50 validation prompts, add some before you trust this.",
    )


def memorizing_discriminator(d_acc: Curve, val_d_acc: Curve) -> Finding | None:
    """D knows the teacher's training answers by heart: it is far better on them than on validation prompts."""
    pairs = []
    for step, of_validation in zip(*val_d_acc.last(MEMORIZED_VALIDATIONS), strict=True):
        before = d_acc.values[d_acc.steps <= step][-RECENT:]
        if len(before) < RECENT or before.mean() - of_validation < MEMORIZED:
            return None
        pairs.append((step, before.mean(), of_validation))
    if len(pairs) < MEMORIZED_VALIDATIONS:
        return None
    shown = ", ".join(f"{training:.3g} against {held_out:.3g} (step {step})" for step, training, held_out in pairs)
    return warning(
        "The discriminator memorizes",
        evidence=f"critic/d_acc (mean of {RECENT} steps) against {VAL_D_ACC}: {shown}. The reward is worth what the "
        "accuracy on validation prompts says.",
        fix="Collect more teacher answers, or train fewer epochs (trainer.total_epochs). Otherwise slow the "
        "discriminator: lower critic.optim.lr, raise critic.optim.weight_decay, or set gad.label_smoothing=0.1. With "
        "fewer than 50 validation prompts, add some before you trust this.",
    )


def student_out_of_sight(pg_loss: Curve, val_d_acc: Curve, two_sample: Curve) -> Finding | None:
    """D loses its accuracy while a fresh one keeps it; ``pg_loss`` says in which steps the policy follows D."""
    own, fresh = _common(val_d_acc, two_sample)
    followed = own.steps >= pg_loss.steps[0] - 1
    own, fresh = (Curve(curve.steps[followed], curve.values[followed]) for curve in (own, fresh))
    if len(own.steps) < 2 * SIGHT_VALIDATIONS:
        return None
    (own_then, own_now), (fresh_then, fresh_now) = (
        (c.first(SIGHT_VALIDATIONS), c.last(SIGHT_VALIDATIONS)) for c in (own, fresh)
    )
    growth = (fresh_now.mean() - own_now.mean()) - (fresh_then.mean() - own_then.mean())
    if growth < OUT_OF_SIGHT or fresh_now.mean() < max(fresh_then.mean(), own_now.mean()):
        return None
    return warning(
        "The student has left the discriminator's sight",
        evidence=f"{VAL_D_ACC} went from {own_then.show()} to {own_now.show()}, while {VAL_TWO_SAMPLE} went from "
        f"{fresh_then.mean():.3g} to {fresh_now.mean():.3g}: a fresh discriminator tells the student from the teacher "
        "as well as before, and the reward does not see it.",
        fix=f"Take the checkpoint at which {VAL_TWO_SAMPLE} is lowest. Then raise critic.optim.lr or lower "
        "actor_rollout_ref.actor.optim.lr, or let the discriminator train on earlier answers too (gad.replay). With "
        "fewer than 50 validation prompts, add some before you trust this.",
    )


# ----------------------------------------------------------------------------------------------------------- the policy


def collapsed_entropy(entropy: Curve) -> Finding | None:
    """The policy has become (almost) deterministic; give only steps with policy updates."""
    start, now = entropy.first(START), entropy.last(START)
    if len(entropy.steps) < 2 * START or now.mean() >= ENTROPY_COLLAPSE * start.mean():
        return None
    return error(
        "The student's entropy has collapsed",
        evidence=f"actor/entropy went from {start.show()} to {now.show()}.",
        fix="Go back to a checkpoint before the fall. Then lower actor_rollout_ref.actor.optim.lr, or raise "
        "actor_rollout_ref.actor.kl_loss_coef, actor_rollout_ref.actor.entropy_coeff or "
        "actor_rollout_ref.rollout.temperature.",
    )


def falling_validation(rouge_l: Curve, score_gap: Curve) -> Finding | None:
    """ROUGE-L falls; if D sees the sides come closer meanwhile, the student is gaming D.

    The rule looks at the gap of the scores, not at the student's score: the Bradley-Terry loss leaves D's scores free
    up to a constant, which drifts.
    """
    best = int(rouge_l.values.argmax()) if len(rouge_l.steps) else 0
    after = Curve(rouge_l.steps[best + 1 :], rouge_l.values[best + 1 :]).last(2)
    # two validations in a row below: one may be bad luck
    if len(after.steps) < 2 or after.values.max() >= (1 - ROUGE_FALL) * rouge_l.values[best]:
        return None
    if len(rouge_l.steps) >= ROUGE_POINTS:
        noise = np.sqrt((np.diff(rouge_l.values, n=2) ** 2).mean() / 6)  # second differences see no steady rise or fall
        if rouge_l.values[best] - after.values.max() < ROUGE_NOISE * noise:
            return None
    fall = (
        f"ROUGE-L of validation fell from {rouge_l.values[best]:.3g} (step {rouge_l.steps[best]}) "
        f"to {after.values[-1]:.3g} (step {after.steps[-1]})"
    )
    since = score_gap.values[score_gap.steps >= rouge_l.steps[best]]
    if len(since) >= 2 * START and since[-START:].mean() < since[:START].mean():
        return error(
            "The student games the discriminator (reward hacking)",
            evidence=f"{fall}, while critic/score_gap shrank from {since[:START].mean():.3g} to "
            f"{since[-START:].mean():.3g}: the discriminator sees the student come closer, but its answers get worse.",
            fix=f"Inspect the samples that the discriminator scores highest. {CHOOSE} "
            "Then raise actor_rollout_ref.actor.kl_loss_coef or critic.optim.lr, or lower "
            "actor_rollout_ref.actor.optim.lr.",
        )
    return warning(
        "Validation gets worse",
        evidence=f"{fall}.",
        fix=f"{CHOOSE} Then lower actor_rollout_ref.actor.optim.lr, or train fewer steps (trainer.total_epochs).",
    )


def closed_gate(policy_gate: Curve) -> Finding | None:
    """gad.policy_gate has taken the policy gradient away; give only steps with policy updates."""
    window = policy_gate.last(RECENT)
    if len(window.steps) < RECENT or window.mean() >= CLOSED_GATE:
        return None
    return warning(
        "The policy gate is closed",
        evidence=f"gad/policy_gate is {window.show()}: the discriminator is right on about half of the fresh pairs, so "
        "the student hardly follows it.",
        fix="If the discriminator has been better before, the student has caught up: judge it with gad eval "
        "--two_sample_model, and stop. Otherwise let the discriminator train alone first "
        "(gad.discriminator_lead.max_steps), or raise critic.optim.lr.",
    )


def clip_band(loss_mode: str) -> tuple[float, float]:
    """Usual pg_clipfrac under a value of actor_rollout_ref.actor.policy_loss.loss_mode."""
    return CLIP_BANDS.get(loss_mode, CLIP_BAND)


def clip_fraction(pg_clipfrac: Curve, loss_mode: str = VANILLA) -> Finding | None:
    """The share of clipped tokens is outside the usual band of its loss; silent where it is 0 by construction."""
    window = pg_clipfrac.last(RECENT)
    if len(window.steps) < RECENT or not window.values.any():
        return None
    low, high = clip_band(loss_mode)
    evidence = f"actor/pg_clipfrac is {window.show()}; usual with this loss is {low}-{high}."
    if window.mean() > high:
        return warning(
            "Many tokens are clipped",
            evidence=evidence,
            fix="The policy moves too far on one batch: lower actor_rollout_ref.actor.optim.lr, make fewer updates per "
            "batch (a larger actor_rollout_ref.actor.ppo_mini_batch_size, actor_rollout_ref.actor.ppo_epochs=1), or "
            "raise actor_rollout_ref.actor.clip_ratio_low and actor_rollout_ref.actor.clip_ratio_high.",
        )
    if window.mean() < low:
        return note(
            "Few tokens are clipped",
            evidence=evidence,
            fix="This alone is no fault: the updates of a batch are small. If learning is slow, there is room to raise "
            "actor_rollout_ref.actor.optim.lr. If the clip range is verl's default of 0.2, set "
            "actor_rollout_ref.actor.clip_ratio_low=0.005 and actor_rollout_ref.actor.clip_ratio_high=0.01: GSPO's "
            "ratios stay close to 1.",
        )
    return None


def kl_blow_up(kl_loss: Curve) -> Finding | None:
    """The policy has left the reference policy."""
    now, before = kl_loss.last(START), Curve(kl_loss.steps[:-START], kl_loss.values[:-START]).last(RECENT)
    if len(before.steps) < START:
        return None
    jumped = now.mean() > KL_JUMP_FLOOR and now.mean() > KL_JUMP * before.mean()
    if not jumped and now.mean() < KL_LOSS:
        return None
    return error(
        "The student runs away from its reference (KL)",
        evidence=f"actor/kl_loss is {now.show()} nats per token; before: {before.show()}.",
        fix="Go back to a checkpoint before the rise. Then raise actor_rollout_ref.actor.kl_loss_coef, or lower "
        "actor_rollout_ref.actor.optim.lr or actor_rollout_ref.actor.optim.clip_grad.",
    )


def large_policy_steps(ppo_kl: Curve) -> Finding | None:
    """One batch moves the policy too far."""
    window = ppo_kl.last(RECENT)
    if len(window.steps) < RECENT or abs(window.mean()) < PPO_KL:
        return None
    return warning(
        "One batch moves the student too far",
        evidence=f"actor/ppo_kl is {window.show()} nats per token; usual is below {PPO_KL}.",
        fix="Lower actor_rollout_ref.actor.optim.lr, or make fewer updates per batch (a larger "
        "actor_rollout_ref.actor.ppo_mini_batch_size).",
    )


# ---------------------------------------------------------------------------------------------- lengths and rollouts


def _length_ratio(student: Curve, teacher: Curve) -> Curve | None:
    """Length of the student's answers over the teacher's in the steps that have both; None if a length is 0."""
    of_student, of_teacher = _common(student, teacher)
    if not len(of_student.steps) or teacher.values.min() <= 0 or student.values.min() <= 0:
        return None
    return Curve(of_student.steps, of_student.values / of_teacher.values)


def length_drift(student: Curve, teacher: Curve) -> Finding | None:
    """Student answers depart in length from the teacher's (mean tokens of both sides)."""
    ratio = _length_ratio(student, teacher)
    if ratio is None or len(ratio.steps) < RECENT + START:
        return None
    start, now = ratio.first(START), ratio.last(RECENT)
    distance_then, distance_now = (max(r.mean(), 1 / r.mean()) for r in (start, now))
    if distance_now < LENGTH_RATIO or distance_now < LENGTH_DRIFT * distance_then:
        return None
    longer = now.mean() > 1
    return warning(
        f"The student's answers grow too {'long' if longer else 'short'}",
        evidence=f"response_length/mean over teacher_response_length/mean went from {start.show()} to {now.show()}.",
        fix="Read the samples. Then raise actor_rollout_ref.actor.kl_loss_coef, lower "
        "actor_rollout_ref.actor.optim.lr, or set actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean, which "
        "gives every answer the same weight whatever its length.",
    )


def swinging_lengths(student: Curve, teacher: Curve) -> Finding | None:
    """Answers grow shorter and longer in turn; give only steps with policy updates."""
    ratio = _length_ratio(student, teacher)
    if ratio is None or len(ratio.steps) < 3 * SWING_MEAN:
        return None
    values = ratio.last(SWING_STEPS).values
    means = np.convolve(values, np.full(SWING_MEAN, 1 / SWING_MEAN), mode="valid")
    noise = np.sqrt((np.diff(np.log(values)) ** 2).mean() / 2 / SWING_MEAN)
    ends = ratio.last(len(means)).steps

    def turn(at: int) -> tuple[float, int, int, int]:
        """Factor by which the curve falls (or rises) to this point and returns from it; the three points."""
        back, ahead = means[:at], means[at + 1 :]
        low = min(back.max(), ahead.max()) / means[at]
        high = means[at] / max(back.min(), ahead.min())
        if low > high:
            return low, int(back.argmax()), at, at + 1 + int(ahead.argmax())
        return high, int(back.argmin()), at, at + 1 + int(ahead.argmin())

    swing, *points = max(turn(at) for at in range(1, len(means) - 1))
    if swing < max(SWING, np.exp(SWING_NOISE * noise)):
        return None
    shown = ", ".join(f"{means[k]:.2f} (steps {ends[k] - SWING_MEAN + 1}-{ends[k]})" for k in points)
    return warning(
        "The length of the student's answers swings",
        evidence=f"response_length/mean over teacher_response_length/mean: {shown}. The student learns faster than the "
        "discriminator and overshoots.",
        fix="Let the discriminator learn faster: lower actor_rollout_ref.actor.optim.lr, raise critic.optim.lr. Set "
        "algorithm.norm_adv_by_std_in_grpo=False, as in the runs that came closest (docs/experiments.md). Then raise "
        "data.train_batch_size or actor_rollout_ref.actor.kl_loss_coef.",
    )


def cut_answers(student: Curve, teacher: Curve) -> Finding | None:
    """Many student answers run into the length limit, and the teacher's do not (shares of both sides)."""
    now, of_teacher = student.last(RECENT), teacher.last(RECENT)
    if len(now.steps) < RECENT or not len(of_teacher.steps) or now.mean() < of_teacher.mean() + CUT_RATIO:
        return None
    return warning(
        "Many answers of the student are cut",
        evidence=f"response_length/cut_ratio is {now.show()}; the teacher's is {of_teacher.mean():.3g}.",
        fix="If the text is good, raise data.max_response_length. If it never stops, a longer warmup "
        "(trainer.total_epochs of that stage) teaches the student to stop.",
    )


def missing_rollouts(missing: Curve) -> Finding | None:
    """Samples that the rollout engine did not deliver (count per step)."""
    lost = np.flatnonzero(missing.values > 0)
    if not len(lost):
        return None
    steps = missing.steps[lost]
    return warning(
        "Rollouts are missing",
        evidence=f"gad/missing_rollouts: {missing.values[lost].sum():.0f} samples in {len(lost)} of "
        f"{len(missing.steps)} steps, first in step {steps[0]}, last in step {steps[-1]}. The losses leave them out.",
        fix="Look for errors of the agent loop in the run's output. The cause is often memory (lower "
        "actor_rollout_ref.rollout.gpu_memory_utilization) or long prompts (check data.max_prompt_length).",
    )


def not_finite(metrics: Metrics) -> Finding | None:
    """NaN or an infinity in a training metric (the file logger writes both as null)."""
    bad: dict[str, list[int]] = {}
    for step in sorted(metrics):
        for name, value in metrics[step].items():
            if name.startswith(("actor/", "critic/")) and not np.isfinite(value):
                bad.setdefault(name, []).append(step)
    if not bad:
        return None
    shown = "; ".join(f"{name} in {len(s)} steps, first {s[0]}, last {s[-1]}" for name, s in bad.items())
    return error(
        "NaN or infinite numbers",
        evidence=f"{shown}.",
        fix="If it is a single step of actor/grad_norm or critic/grad_norm alone, do nothing: the optimizer skipped "
        "that step. Otherwise go back to the checkpoint before the first, and lower optim.lr and optim.clip_grad of "
        "the side that broke (actor_rollout_ref.actor or critic).",
    )


# -------------------------------------------------------------------------------------------------------- the samples


def looping_answers(answers: Sequence[str], teacher_answers: Sequence[str]) -> Finding | None:
    """Answers that repeat themselves: they compress far better than text does, and than the teacher's answer."""

    def compression(text: str) -> float:
        data = text.encode("utf-8", "surrogatepass")
        return len(data) / len(zlib.compress(data))

    loops = [
        answer
        for answer, teacher in zip(answers, teacher_answers, strict=True)
        if compression(answer) > max(COMPRESSION, COMPRESSION_TO_TEACHER * compression(teacher))
    ]
    if not answers or len(loops) < BAD_ANSWERS * len(answers):
        return None
    return warning(
        "Answers repeat themselves",
        evidence=f"{len(loops)} of {len(answers)} answers of the last validation loop, for example: "
        f"...{loops[0][-80:]!r}",
        fix="Go back to a checkpoint before it. Then raise actor_rollout_ref.actor.kl_loss_coef or lower "
        "actor_rollout_ref.actor.optim.lr. If the warmup's answers loop too, warm up longer.",
    )


def same_answers(prompts: Sequence[str], answers: Sequence[str], teacher_answers: Sequence[str]) -> Finding | None:
    """One answer to many prompts, which the teacher does not give."""

    def most_common(texts: Sequence[str]) -> tuple[str, int]:
        prompts_of = Counter(text for _, text in set(zip(prompts, texts, strict=True)))
        return prompts_of.most_common(1)[0]

    n_prompts = len(set(prompts))
    if n_prompts < 1 / BAD_ANSWERS:
        return None
    (text, count), (_, of_teacher) = most_common(answers), most_common(teacher_answers)
    if count < of_teacher + BAD_ANSWERS * n_prompts:
        return None
    return error(
        "The same answer to many prompts",
        evidence=f"{count} of {n_prompts} prompts of the last validation got {text[:80]!r}; the teacher's commonest "
        f"answer has {of_teacher}.",
        fix="The student has found an answer that the discriminator likes whatever the prompt. Go back to a checkpoint "
        "before it. Then raise actor_rollout_ref.actor.kl_loss_coef or critic.optim.lr, or lower "
        "actor_rollout_ref.actor.optim.lr.",
    )


# ---------------------------------------------------------------------------------------------------------- all of them


def damaged_files(left_out: Sequence[str]) -> list[Finding]:
    """A finding for what could not be read of a run's files, if there is anything; ``left_out`` has a text for each."""
    if not left_out:
        return []
    more = f"; {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return [
        warning(
            "The run's files are damaged",
            evidence="; ".join(left_out[:3]) + more + ". What is shown comes from the rest.",
            fix="Mend or delete what is named, or restore the file.",
        )
    ]


class Rule(NamedTuple):
    """A rule on curves, patterns of the metrics it needs, whether it sees only steps with policy updates, and whether
    it takes the run's loss_mode too."""

    check: Callable[..., Finding | None]
    needs: tuple[str, ...]
    policy_steps: bool = False
    reads_loss_mode: bool = False


RULES = (
    Rule(saturated_discriminator, ("critic/d_acc",), policy_steps=True),
    Rule(guessing_discriminator, ("critic/d_acc",)),
    Rule(fooled_discriminator, ("critic/d_acc",)),
    Rule(frozen_discriminator, ("critic/lr",)),
    Rule(weak_discriminator, ("actor/pg_loss", VAL_D_ACC)),
    Rule(memorizing_discriminator, ("critic/d_acc", VAL_D_ACC)),
    Rule(student_out_of_sight, ("actor/pg_loss", VAL_D_ACC, VAL_TWO_SAMPLE)),
    Rule(collapsed_entropy, ("actor/entropy",), policy_steps=True),
    Rule(falling_validation, (ROUGE_L, "critic/score_gap")),
    Rule(closed_gate, ("gad/policy_gate",), policy_steps=True),
    Rule(clip_fraction, ("actor/pg_clipfrac",), reads_loss_mode=True),
    Rule(kl_blow_up, ("actor/kl_loss",)),
    Rule(large_policy_steps, ("actor/ppo_kl",)),
    Rule(length_drift, ("response_length/mean", "teacher_response_length/mean")),
    Rule(swinging_lengths, ("response_length/mean", "teacher_response_length/mean"), policy_steps=True),
    Rule(cut_answers, ("response_length/cut_ratio", "teacher_response_length/cut_ratio")),
    Rule(missing_rollouts, ("gad/missing_rollouts",)),
)


def curve(metrics: Metrics, pattern: str) -> Curve:
    """Finite values of a metric: in every step the mean over all names that match ``pattern``. May be empty."""
    values: dict[int, list[float]] = {}
    for name in matching_names(metrics, pattern):
        for step, value in series(metrics, name).items():
            if np.isfinite(value):
                values.setdefault(step, []).append(value)
    steps = sorted(values)
    return Curve(np.array(steps, dtype=int), np.array([np.mean(values[step]) for step in steps], dtype=float))


def apply_rules(
    metrics: Metrics, samples: Sequence[dict] = (), loss_mode: str = VANILLA
) -> tuple[list[Finding], list[str]]:
    """Apply every rule whose metrics were logged.

    Args:
        metrics: of one run, from :func:`recipe.gad.run.log.load_metrics`.
        samples: rows of its last validation dump (input, output, gts), if there is one.
        loss_mode: of its policy loss, from :func:`recipe.gad.run.log.recorded_loss_mode`.

    Returns:
        The findings, worst first (empty: nothing wrong was found), and the names of what was looked at.
    """
    policy = {step: row for step, row in metrics.items() if "actor/pg_loss" in row}
    found = {not_finite.__name__: not_finite(metrics)}
    looked_at = ["actor/*", "critic/*"]
    for rule in RULES:
        curves = [curve(policy if rule.policy_steps else metrics, pattern) for pattern in rule.needs]
        if all(len(c.steps) for c in curves):
            settings = {"loss_mode": loss_mode} if rule.reads_loss_mode else {}
            found[rule.check.__name__] = rule.check(*curves, **settings)
            looked_at += rule.needs
    if samples:
        prompts, answers, teacher = ([row[key] for row in samples] for key in ("input", "output", "gts"))
        found[looping_answers.__name__] = looping_answers(answers, teacher)
        found[same_answers.__name__] = same_answers(prompts, answers, teacher)
        looked_at.append("validation samples")
    findings = [replace(finding, where=name) for name, finding in found.items() if finding is not None]
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level)), sorted(set(looked_at))


def all_clear(metrics: Metrics) -> str:
    """What to say of a run in which no rule has found anything."""
    steps = sum(step > 0 for step in metrics)  # step 0 is a validation
    if steps < RECENT:
        return f"Too few steps to judge: {steps} of {RECENT}."
    return "Nothing wrong was found."


def earlier_findings(
    metrics: Metrics, now: Sequence[Finding], looks: int = 50, loss_mode: str = VANILLA
) -> list[EarlierFinding]:
    """Errors and warnings that someone watching the run would have read, and that are not among those of ``now``.

    Args:
        metrics: of one run, from :func:`recipe.gad.run.log.load_metrics`.
        now: findings about its last state.
        looks: most states of the run that are looked at, spread evenly over its steps.
        loss_mode: of its policy loss.
    """
    steps, known = sorted(metrics), {finding.what for finding in now}
    stride = max(START, -(-len(steps) // looks))
    found: dict[str, EarlierFinding] = {}
    for end in range(stride, len(steps), stride):
        for finding in apply_rules({step: metrics[step] for step in steps[:end]}, loss_mode=loss_mode)[0]:
            if finding.level != "ok" and finding.what not in known:
                first = found[finding.what].first if finding.what in found else steps[end - 1]
                found[finding.what] = EarlierFinding(first, steps[end - 1], finding)
    return list(found.values())

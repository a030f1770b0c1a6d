"""How often each health rule (recipe/gad/monitor/rules.py) finds fault with a healthy run, by simulation.

    python benchmarks/false_alarms.py [--runs 200] [--steps 200] [--seed 0]

A healthy run: the student starts close to the teacher and comes slowly closer. Every metric is a mean over a batch of
simulated answers, so its noise falls with the batch. Student and teacher draw their lengths from one log-normal
distribution; the answers to one prompt differ by a coefficient of variation of 0.8, which is high. A rule is asked
every fifth step, as someone who watches the run would, and a run counts if the rule warns even once. Prints a table.
"""

import argparse
from collections import Counter
from collections.abc import Iterator

import numpy as np

from recipe.gad.monitor.rules import ROUGE_L, RULES, Curve, looping_answers, same_answers
from recipe.gad.run.log import VAL_D_ACC, VAL_TWO_SAMPLE
from recipe.gad.training.gate import PolicyGate

BATCHES = ((8, 4), (16, 8), (32, 8), (64, 8), (128, 8), (256, 8))
"""Prompts and samples per prompt."""
LIMIT = 512
"""Longest answer in tokens."""
WITHIN, BETWEEN = 0.8, 0.6
"""Coefficients of variation of the length: among the answers to one prompt, and among prompts."""
LOOKS, VALIDATE = 5, 10
"""A rule is asked every LOOKS steps; a validation runs every VALIDATE steps."""
GAP = 1.5, 0.7
"""Mean score gap at the start and at the end, in standard deviations of a score; the same on validation prompts."""
VALIDATION = 64
"""Answers of one validation."""
GATE = 0.1
"""gad.policy_gate."""


def log_normal(rng: np.random.Generator, mean: np.ndarray | float, cv: float, size: tuple[int, ...]) -> np.ndarray:
    sigma = np.sqrt(np.log1p(cv**2))
    return mean * np.exp(rng.normal(-(sigma**2) / 2, sigma, size))


def score_noise(rng: np.random.Generator, prompts: int, n: int) -> np.ndarray:
    """Of the score gaps, (prompts, n): the pairs of a prompt share its teacher answer."""
    return rng.normal(0, 1, (prompts, 1)) - rng.normal(0, 1, (prompts, n))


def healthy_run(rng: np.random.Generator, prompts: int, n: int, steps: int) -> dict[str, Curve]:
    """Curves of the metrics that the rules read, by name."""
    values: dict[str, list[float]] = {}
    gate = PolicyGate(GATE)
    for progress in np.linspace(0, 1, steps):

        def drift(start: float, end: float, at: float = progress) -> float:
            return start + (end - start) * at

        of_prompt = log_normal(rng, 100.0, BETWEEN, (prompts, 1))
        student = np.ceil(log_normal(rng, of_prompt, WITHIN, (prompts, n)))
        teacher = np.ceil(log_normal(rng, of_prompt, WITHIN, (prompts, 1)))
        gap = drift(*GAP) + score_noise(rng, prompts, n)
        gate.note((gap > 0).mean())
        row = {
            "critic/d_acc": (gap > 0).mean(),
            "critic/score_gap": gap.mean(),
            "critic/lr": 1e-6,
            "actor/pg_loss": 0.0,
            "actor/entropy": drift(1.2, 0.9) + rng.normal(0, 0.5) / np.sqrt(prompts * n),
            "actor/kl_loss": drift(0.0, 0.3) * (1 + rng.normal(0, 2) / np.sqrt(prompts * n)),
            "gad/policy_gate": gate.factor,
            "actor/pg_clipfrac": 0.2 + rng.normal(0, 0.2) / np.sqrt(prompts * n),
            "actor/ppo_kl": 0.01 + rng.normal(0, 0.1) / np.sqrt(prompts * n),
            "response_length/mean": student.clip(max=LIMIT).mean(),
            "teacher_response_length/mean": teacher.clip(max=LIMIT).mean(),
            "response_length/cut_ratio": (student >= LIMIT).mean(),
            "teacher_response_length/cut_ratio": (teacher >= LIMIT).mean(),
            "gad/missing_rollouts": 0.0,
        }
        for name, value in row.items():
            values.setdefault(name, []).append(float(value))
    at = np.arange(1, steps + 1)
    curves = {name: Curve(at, np.array(column)) for name, column in values.items()}
    validated = np.arange(0, steps + 1, VALIDATE)
    rouge = np.linspace(0.30, 0.35, len(validated)) + rng.normal(0, 0.15, len(validated)) / np.sqrt(VALIDATION)
    curves[ROUGE_L] = Curve(validated, rouge)
    for name in (VAL_D_ACC, VAL_TWO_SAMPLE):  # of two discriminators that see the same on average
        gaps = [gap + score_noise(rng, VALIDATION, 1) for gap in np.linspace(*GAP, len(validated))]
        curves[name] = Curve(validated, np.array([(gap > 0).mean() for gap in gaps]))
    return curves


def healthy_texts(rng: np.random.Generator) -> tuple[list[str], list[str], list[str]]:
    """Prompts, answers and teacher answers of a validation, of words with the frequencies of a language (Zipf)."""
    words = np.array([f"w{i:x}" for i in range(2000)])
    weights = 1 / np.arange(1, 2001)

    def text(length: float) -> str:
        return " ".join(rng.choice(words, int(length), p=weights / weights.sum()))

    lengths = np.ceil(log_normal(rng, 60.0, WITHIN, (3, VALIDATION)))
    prompts, answers, teacher = ([text(length) for length in row] for row in lengths)
    return prompts, answers, teacher


def alarms(curves: dict[str, Curve], texts: tuple[list[str], list[str], list[str]]) -> Iterator[str]:
    """Names of the rules that warn at least once while the run is watched."""
    steps = len(curves["critic/d_acc"].steps)
    for rule in RULES:
        for now in range(LOOKS, steps + 1, LOOKS):
            needed = [curves[name] for name in rule.needs]
            seen = [curve.first(int(np.searchsorted(curve.steps, now, "right"))) for curve in needed]
            finding = rule.check(*seen)
            if finding is not None and finding.level != "ok":
                yield rule.check.__name__
                break
    prompts, answers, teacher = texts
    if looping_answers(answers, teacher) is not None:
        yield "looping_answers"
    if same_answers(prompts, answers, teacher) is not None:
        yield "same_answers"


def rates(prompts: int, n: int, runs: int, steps: int, seed: int) -> dict[str, float]:
    """Rule -> share of healthy runs of a batch size in which it warns."""
    rng = np.random.default_rng([seed, prompts, n])
    simulated = ((healthy_run(rng, prompts, n, steps), healthy_texts(rng)) for _ in range(runs))
    count = Counter(name for curves, texts in simulated for name in alarms(curves, texts))
    names = [rule.check.__name__ for rule in RULES] + ["looping_answers", "same_answers"]
    return {name: count[name] / runs for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    columns = [rates(prompts, n, options.runs, options.steps, options.seed) for prompts, n in BATCHES]
    print("| rule | " + " | ".join(f"{prompts} x {n}" for prompts, n in BATCHES) + " |")
    print("|---|" + "---|" * len(BATCHES))
    for name in columns[0]:
        print(f"| `{name}` | " + " | ".join(f"{100 * column[name]:.1f} %" for column in columns) + " |")


if __name__ == "__main__":
    main()

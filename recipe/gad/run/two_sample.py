"""Settings of fresh discriminators (recipe/gad/training/fresh.py), which ``gad eval`` and validation train."""

import math
from dataclasses import dataclass

from omegaconf import DictConfig

from recipe.gad.run.checkpoint import actor_folder, has_score_head
from recipe.gad.run.config import get, integer, number
from recipe.gad.run.findings import InputError

FRESH = "gad.fresh_discriminator"
MIN_PROMPTS = 2
"""Different prompts that the test needs: one to learn from, one to hold out."""


@dataclass(frozen=True)
class TwoSampleSettings:
    """How the test's discriminators are trained.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    """Base model (Hugging Face folder or hub id) of every discriminator; use one for all students you compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: float = 2e-5
    epochs: int = 3
    batch_pairs: int = 8
    """Pairs per optimizer step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", actor_folder(self.model))
        if not self.seeds:
            raise InputError("the two-sample test needs at least one seed", fix="name one, such as 0")
        if not 0 < self.lr < math.inf or self.epochs < 1 or self.batch_pairs < 1:
            raise InputError(
                f"two-sample test with lr {self.lr}, {self.epochs} epochs and batches of {self.batch_pairs} pairs: "
                "expected all of them to be above 0",
                fix="raise the one that is not",
            )
        if has_score_head(self.model):
            raise InputError(
                f"{self.model} has a score head, so it is a trained discriminator and not neutral",
                fix="pass a base model",
            )


def fresh_settings(config: DictConfig) -> TwoSampleSettings | None:
    """Settings of the fresh discriminators of a run's validation; None: it trains none.

    Raises:
        InputError: a value is of another type or out of its range, or the model cannot be the base.
    """
    names = ("seeds", "lr", "epochs", "batch_pairs")
    given = {name: value for name in names if (value := get(config, f"{FRESH}.{name}")) is not None}
    model = get(config, f"{FRESH}.model")
    if model is None:
        if given:
            found = " ".join(f"{FRESH}.{name}={value}" for name, value in given.items())
            raise InputError(f"{found} has no effect without {FRESH}.model", fix=f"set {FRESH}.model, or leave it out")
        return None
    for name in given:
        if name == "lr":
            number(config, f"{FRESH}.lr", 0, math.inf)
        elif name != "seeds":
            integer(config, f"{FRESH}.{name}")
        elif isinstance(seeds := given["seeds"], int | float | str) or not all(type(seed) is int for seed in seeds):
            raise InputError(f"{FRESH}.seeds={seeds}: expected whole numbers", fix=f"{FRESH}.seeds=[0,1,2]")
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    try:
        return TwoSampleSettings(str(model), **given)
    except InputError as problem:
        raise InputError(f"{FRESH}: {problem.finding.what}", fix=problem.finding.fix) from None

"""``gad.policy_gate``: the policy term shrinks while the discriminator cannot tell fresh answers from the teacher's."""

from dataclasses import dataclass

DECAY = 0.9
"""Of the running mean of the accuracy, per step."""


@dataclass
class PolicyGate:
    """Factor clip((a - 0.5) / width, 0, 1) of the policy term, a the running mean of D's accuracy on fresh pairs.

    Attributes:
        width: lead over 0.5 at which the gate is open; 0: always open.
        accuracy: a; None before the first step. All that a resumed run needs.
    """

    width: float
    accuracy: float | None = None

    def note(self, accuracy: float) -> None:
        """D's accuracy on the pairs of a step, before its update."""
        before = accuracy if self.accuracy is None else self.accuracy
        self.accuracy = DECAY * before + (1 - DECAY) * accuracy

    def state_dict(self) -> dict[str, float | None]:
        """For the checkpoint."""
        return {"accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Take over a :meth:`state_dict`."""
        self.accuracy = state["accuracy"]

    @property
    def factor(self) -> float:
        """In [0, 1]."""
        if not self.width or self.accuracy is None:
            return 1.0
        return min(max((self.accuracy - 0.5) / self.width, 0.0), 1.0)

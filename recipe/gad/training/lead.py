"""``gad.discriminator_lead``: how long the discriminator trains alone at the beginning of stage gad."""

import math
from dataclasses import dataclass, field

from omegaconf import DictConfig

from recipe.gad.run.config import LEAD_MEAN


@dataclass
class DiscriminatorLead:
    """D leads for ``max_steps`` steps, or until its accuracy has not risen by ``min_delta`` for ``patience`` values.

    Attributes:
        max_steps: 0: D never leads.
        patience: values without a rise that end the lead, at least 1.
        min_delta: a value above the best so far by this much is a rise.
        test_freq: steps between two values on validation prompts; 0: means of training steps are the values.
        values: step -> accuracy noted at its end; all that a resumed run needs.
    """

    max_steps: int
    patience: int
    min_delta: float
    test_freq: int = 0
    values: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: DictConfig) -> "DiscriminatorLead":
        """The lead of a run's configuration."""
        lead, test_freq = config.gad.discriminator_lead, config.trainer.test_freq
        return cls(lead.max_steps, lead.patience, lead.min_delta, max(test_freq, 0) if config.gad.val_d_acc else 0)

    def note_training(self, step: int, accuracy: float) -> None:
        """D's accuracy on the fresh pairs of a training step."""
        if not self.test_freq and step <= self.max_steps:
            self.values.setdefault(step, accuracy)

    def note_validation(self, step: int, accuracy: float) -> None:
        """D's accuracy on validation prompts after a step. A resumed run validates again; the first value counts."""
        if self.test_freq and step % self.test_freq == 0 and step <= self.max_steps:
            self.values.setdefault(step, accuracy)

    def state_dict(self) -> dict[int, float]:
        """For the checkpoint."""
        return dict(self.values)

    def load_state_dict(self, state: dict[int, float]) -> None:
        """Take over a :meth:`state_dict`."""
        self.values = dict(state)

    def leads(self, step: int) -> bool:
        """Does D train alone in this step?"""
        return step <= self.max_steps and not self._has_stopped_rising()

    def _has_stopped_rising(self) -> bool:
        values, size = [self.values[step] for step in sorted(self.values)], 1 if self.test_freq else LEAD_MEAN
        best, waited = -math.inf, 0
        for end in range(size, len(values) + 1, size):
            value = sum(values[end - size : end]) / size
            if value >= best + self.min_delta:
                best, waited = value, 0
            else:
                waited += 1
            if waited == self.patience:
                return True
        return False

"""The loss that trains D, with ``gad.label_smoothing``: the label of every pair is wrong with probability e.

    L = -(1 - e) log sigmoid(gap) - e log sigmoid(-gap) = -log sigmoid(gap) + e gap,   gap = D(teacher) - D(student)

The second term is the loss of the pair with its sides swapped, which is that of the negated values. So the same lines
serve every loss over pairs: of whole answers, of prefixes, and of several teacher answers.
"""

from collections.abc import Callable
from functools import partial

from omegaconf import DictConfig
from tensordict import TensorDict

from recipe.gad.training.credit import prefix_discriminator_loss
from recipe.gad.training.teachers import Teachers


def loss_of(gad: DictConfig, teachers: Teachers) -> Callable:
    """D's loss in a run with the switches ``gad``, an engine loss as ``discriminator_loss``."""
    loss = prefix_discriminator_loss if gad.credit == "token" else teachers.loss
    return partial(smoothed_loss, loss, gad.label_smoothing) if gad.label_smoothing else loss


def smoothed_loss(
    loss: Callable, smoothing: float, *, model_output: dict, data: TensorDict, dp_group=None, **arguments
):
    """``loss`` with smoothed labels; the metrics and the scores of rows are those of ``loss`` itself.

    Args:
        loss: an engine loss over pairs whose value depends on differences of ``model_output["values"]`` alone.
        smoothing: e, in (0, 0.5).
        model_output, data, dp_group, arguments: of ``loss``.
    """
    swapped = {**model_output, "values": -model_output["values"]}
    value, metrics = loss(model_output=model_output, data=data, dp_group=dp_group, **arguments)
    of_swapped, _ = loss(model_output=swapped, data=data, dp_group=dp_group, **arguments)
    return (1.0 - smoothing) * value + smoothing * of_swapped, metrics

"""New: objectives of the actor beside stock ``ppo_loss`` (no stock module of this name in verl 0.9.1).

``actor_rollout_wg.set_loss_fn(partial(imitation_loss, config=actor_config))`` makes a stock engine worker train on
teacher trajectories: SeqKD and the GAD warmup. Stock ``sft_loss`` expects a mask over the full sequence, but rows of
the RL trainer carry one over the response. ``on_policy_loss`` is ``ppo_loss`` for a batch that is one optimizer step.
Goes when: stock ``sft_loss`` works on the RL trainer's rows, and stock ``ppo_loss`` without old log-probabilities.
"""

import torch
from tensordict import TensorDict

from verl.trainer.ppo.core_algos import compute_sft_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

__all__ = ["imitation_loss", "on_policy_loss"]


def imitation_loss(config: ActorConfig, model_output: dict, data: TensorDict, dp_group=None):
    """Next-token loss on teacher trajectories; the counterpart of stock ``ppo_loss`` (verl/workers/utils/losses.py).

    Args:
        config: the actor's configuration (loss_agg_mode, loss_scale_factor).
        model_output: ``log_probs``, jagged (rows, prompt + response).
        data: one micro-batch of teacher trajectories with prompts, responses, response_mask (jagged) and the scalars
            dp_size, batch_num_tokens, global_batch_size that the engine adds.
        dp_group: unused, part of the engine's loss interface.

    Returns:
        loss and metrics of :func:`compute_sft_loss`.
    """
    log_prob_BT = no_padding_2_padding(model_output["log_probs"], data)
    mask_BT = data.select("response_mask").to_padded_tensor()["response_mask"].bool()
    batch_info = {
        "dp_size": data["dp_size"],
        "batch_num_tokens": max(data["batch_num_tokens"], 1),
        "global_batch_size": data["global_batch_size"],
        "loss_scale_factor": config.loss_scale_factor,
    }
    return compute_sft_loss(log_prob_BT, mask_BT, config.loss_agg_mode, **batch_info)


def on_policy_loss(config: ActorConfig, model_output: dict, data: TensorDict, dp_group=None):
    """Stock ``ppo_loss`` whose old log-probabilities are those of this very forward pass.

    When a batch is one optimizer step, the policy that sampled it is the policy that is updated: a separate pass for
    old log-probabilities finds the same numbers, the ratio is 1 and the gradient is that of the log-probabilities.

    Args:
        config: the actor's configuration.
        model_output: ``log_probs``, jagged (rows, prompt + response).
        data: one micro-batch with response_mask, advantages and what ``ppo_loss`` reads, jagged; ``rollout_log_probs``
            if the rollout engine returned its own.
        dp_group: part of the engine's loss interface.

    Returns:
        loss and metrics of ``ppo_loss``; with ``rollout_log_probs`` also how far the rollout engine's probabilities of
        the sampled tokens are from the actor's: rollout_probs_diff_mean, _max.
    """
    old = data["old_log_probs"] = response_from_nested(model_output["log_probs"].detach(), data["response_mask"])
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    mask = data["response_mask"].values().bool()
    if "rollout_log_probs" in data:
        rollout = data["rollout_log_probs"].values()[mask].to(old.device)
        difference = (old.values()[mask].exp() - rollout.exp()).abs()
        if not len(difference):  # a micro-batch of missing rollouts
            difference = torch.zeros(1)
        metrics["rollout_probs_diff_mean"] = Metric(AggregationType.MEAN, difference.mean())
        metrics["rollout_probs_diff_max"] = Metric(AggregationType.MAX, difference.max())
    return loss, metrics

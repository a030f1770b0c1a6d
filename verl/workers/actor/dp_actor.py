"""New: the imitation objective of the actor, for SeqKD and the GAD warmup (no stock module of this name in verl 0.9.1).

``actor_rollout_wg.set_loss_fn(partial(imitation_loss, config=actor_config))`` makes a stock engine worker train on
teacher trajectories instead of on advantages.
"""

from tensordict import TensorDict

from verl.trainer.ppo.core_algos import compute_sft_loss
from verl.workers.config import ActorConfig
from verl.workers.utils.padding import no_padding_2_padding


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

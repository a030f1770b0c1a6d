"""New: verl's critic as the discriminator D of GAD, on stock engine workers (no stock module of this name in 0.9.1).

Stock verl trains a critic on returns only; D needs the score of a whole response and a loss over pairs. The names are
those of verl's critic before the engine workers. The class drives a worker group of stock ``TrainingWorker``, so FSDP,
FSDP2 and Megatron engines serve unchanged: ``infer_batch`` scores, ``set_loss_fn`` swaps the value loss for the
Bradley-Terry loss, and ``force_group_size`` keeps the rows [teacher, s_1, ..., s_n] of one prompt in one micro-batch.

Rows live in TransferQueue; a ``KVBatchMeta`` names them. Suffixes: R rows, P prompts, N samples per prompt.
Goes when: the critic's loss can be named in the configuration.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from recipe.gad.training.trajectory import PAIR_WEIGHT, ROW_NUMBER
from verl.trainer.ppo.core_algos import compute_grouped_discriminator_loss
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.workers.config import CriticConfig
from verl.workers.utils.losses import value_loss

__all__ = ["DataParallelPPOCritic", "data_parallel_size", "discriminator_loss", "last_token_scores", "largest_divisor"]

SCORING_FIELDS = ["input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask"]
"""What D reads of a trajectory; the other fields of a row do not travel to its workers."""


def last_token_scores(values: torch.Tensor) -> torch.Tensor:
    """Score of every row: the value at its last token, which is the last response token.

    Args:
        values: jagged (R, prompt + response).

    Returns:
        (R,) in float32.
    """
    return values.values()[values.offsets()[1:] - 1].float()


def discriminator_loss(group_size: int, model_output: dict, data: TensorDict, dp_group=None):
    """Grouped Bradley-Terry loss as a stock engine loss function (the counterpart of stock ``value_loss``).

    Args:
        group_size: n + 1 rows of a prompt, the teacher first.
        model_output: ``values``, jagged (R, prompt + response), R a multiple of group_size.
        data: one micro-batch with ``pair_weight`` (R,): 0 for the teacher and for missing students, else one over the
            number of real pairs of the optimizer step; ``row`` (R,): a number that names the row; and the scalar
            dp_size that the engine adds.
        dp_group: unused, part of the engine's loss interface.

    Returns:
        loss and metrics of the micro-batch, scaled by dp_size since engines average both over ranks: summed over the
        micro-batches of a rank and averaged over ranks they are the means over the step's real pairs. The metric
        "row_scores" lists (row, score): engines return metrics from a training pass, but no model output.
    """
    scores = last_token_scores(model_output["values"])
    weights = data[PAIR_WEIGHT].to(scores.device).view(-1, group_size) * data["dp_size"]
    groups = scores.view(-1, group_size)
    loss, metrics = compute_grouped_discriminator_loss(groups[:, 1:], groups[:, 0], weights[:, 1:])
    return loss, {**metrics, "row_scores": list(zip(data[ROW_NUMBER].tolist(), scores.tolist(), strict=True))}


def largest_divisor(total: int, limit: int) -> int:
    """Largest divisor of ``total`` that is at most ``limit`` (engines split a batch into equal fixed micro-batches)."""
    return max(d for d in range(1, min(total, limit) + 1) if total % d == 0)


def data_parallel_size(worker_group: Any, mesh_name: str) -> int:
    """Data-parallel ranks of a worker group's mesh ("train" of a ``TrainingWorker``, "actor" of the actor's worker)."""
    if mesh_name not in worker_group._dispatch_info:
        worker_group._dispatch_info[mesh_name] = worker_group._query_dispatch_info(mesh_name)
    return max(worker_group._dispatch_info[mesh_name]) + 1


class DataParallelPPOCritic:
    """Scores and updates D through a critic worker group.

    Args:
        critic_wg: worker group of stock ``TrainingWorker`` with a value model.
        config: ``config.critic``.
        rollout_n: student samples per prompt.
        loss: of groups, an engine loss as :func:`discriminator_loss`.
        averages: the workers keep an average of D's weights, which scores (``gad.discriminator_ema``).
        teachers: teacher rows per prompt in an update (``gad.teacher_answers``).
    """

    def __init__(
        self,
        critic_wg: Any,
        config: DictConfig,
        rollout_n: int,
        loss: Callable = discriminator_loss,
        averages: bool = False,
        teachers: int = 1,
    ):
        self.critic_wg = critic_wg
        self.config = config
        self.rollout_n = rollout_n
        self.group_loss = loss
        self.averages = averages
        self.group_size = rollout_n + teachers  # rows of one prompt in an update
        self._loss: Callable | None = None

    def data_parallel_size(self) -> int:
        """Data-parallel ranks that D runs on."""
        return data_parallel_size(self.critic_wg, "train")

    def compute_values(self, batch: KVBatchMeta) -> torch.Tensor:
        """D's scores of ``batch.keys``, (R,) in float32. The trainer calls it if scores get their own forward pass."""
        if not self.averages:
            return self._forward_micro_batch(batch, compute_teacher=False)
        self.critic_wg.use_average(True)
        scores = self._forward_micro_batch(batch, compute_teacher=False)
        self.critic_wg.use_average(False)
        return scores

    def _forward_micro_batch(self, batch: KVBatchMeta, compute_teacher: bool) -> torch.Tensor:
        """D's scores of one batch: only the value of the last response token is kept.

        Args:
            batch: rows to score, ``extra_info["teacher_keys"]`` the rows of their teachers (one per prompt).
            compute_teacher: score the teachers' rows instead. The trainer needs it for ``gad.teacher_in_group``.

        Returns:
            (R,) float32, or (P,) for the teachers.
        """
        keys = batch.extra_info["teacher_keys"] if compute_teacher else batch.keys
        rows_per_rank = len(keys) // self.data_parallel_size()
        rows = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=keys,
            tags=[{} for _ in keys],
            fields=SCORING_FIELDS,
            extra_info={"compute_loss": False, "temperature": 1.0, **self._micro_batches(rows_per_rank, forward=True)},
        )
        ray.get(self.critic_wg.infer_batch(rows).futures)
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["values"])
        return last_token_scores(data["values"])

    def _forward_batch_teacher_forcing_grpo(self, batch: KVBatchMeta, teacher_repeat: int) -> torch.Tensor:
        """Scores of teacher responses used as ``teacher_repeat`` rollouts of their prompt. Called by tests only.

        Repeats of one text have one score, so GRPO's group normalisation would divide zero by zero. The copies of a
        prompt therefore get D's score plus 0, 1, ..., teacher_repeat - 1. (P * teacher_repeat,) float32, copies side
        by side; ``batch`` as in :meth:`_forward_micro_batch`.
        """
        if teacher_repeat < 1:
            raise ValueError(f"teacher_repeat must be at least 1, got {teacher_repeat}")
        scores_P = self._forward_micro_batch(batch, compute_teacher=True)
        return (scores_P.unsqueeze(-1) + torch.arange(teacher_repeat)).flatten()

    def update_critic(self, batch: KVBatchMeta) -> tuple[dict[str, float], torch.Tensor]:
        """Optimizer steps over the batch, ``ppo_epochs`` times. The trainer calls it with teacher data.

        Args:
            batch: with teacher data (``extra_info["group_size"]``) rows grouped as [teacher, s_1..s_n], with
                :data:`PAIR_WEIGHT` and :data:`ROW_NUMBER` = 0, 1, ...; without it see :meth:`update_on_returns`.
                ``extra_info["mini_batch_prompts"]``: prompts of one optimizer step, if not ppo_mini_batch_size.

        Returns:
            Metrics of the step, under "critic/"; and D's scores of the rows in float32, (R,), as the first epoch's
            forward passes found them: those of :meth:`compute_values` if the batch is one optimizer step.
        """
        if "group_size" not in batch.extra_info:
            return self.update_on_returns(batch), torch.empty(0)
        self._set_loss(self.group_loss, group_size=self.group_size)
        fields = [*SCORING_FIELDS, PAIR_WEIGHT, ROW_NUMBER]
        # groups must stay whole: the trainer shuffles them, the engine's row-wise shuffle stays off
        metrics = self._train(batch, self.group_size, fields, shuffle=False, force_group_size=self.group_size)
        row_scores: dict[int, float] = {}
        for row, score in metrics.pop("critic/row_scores"):  # in the order of the optimizer steps
            row_scores.setdefault(row, score)
        return reduce_metrics(metrics), torch.tensor([row_scores[row] for row in sorted(row_scores)])

    def update_on_returns(self, batch: KVBatchMeta) -> dict[str, float]:
        """Metrics of stock's value loss on rows without a teacher. No stage has such rows: called by tests."""
        config: CriticConfig = omega_conf_to_dataclass(self.config)
        self._set_loss(value_loss, config=config)
        return reduce_metrics(self._train(batch, self.rollout_n, None, shuffle=self.config.shuffle))

    def _train(self, batch: KVBatchMeta, rows_per_prompt: int, fields: list[str] | None, shuffle: bool, **extra_info):
        """Metrics of the optimizer steps, under "critic/", not yet reduced; ``fields`` None: all that the rows have."""
        prompts = batch.extra_info.get("mini_batch_prompts", self.config.ppo_mini_batch_size)
        mini_batch_size = prompts * rows_per_prompt
        rows_per_rank = mini_batch_size // self.data_parallel_size()
        extra_info |= {
            "global_batch_size": mini_batch_size,
            "mini_batch_size": mini_batch_size,
            "epochs": self.config.ppo_epochs,
            "seed": self.config.data_loader_seed,
            "dataloader_kwargs": {"shuffle": shuffle},
            "temperature": 1.0,
            **self._micro_batches(rows_per_rank, extra_info.get("force_group_size", 1)),
        }
        rows = KVBatchMeta(batch.keys, batch.tags, batch.partition_id, fields, extra_info)
        output = self.critic_wg.train_mini_batch(rows).get()
        metrics = rename_dict(output["metrics"], "critic/")
        metrics["perf/mfu/critic"] = metrics.pop("critic/mfu")
        return metrics

    def _set_loss(self, loss: Callable, **arguments: Any) -> None:
        if loss is not self._loss:
            self.critic_wg.set_loss_fn(partial(loss, **arguments))
            self._loss = loss

    def _micro_batches(self, rows_per_rank: int, group_size: int = 1, forward: bool = False) -> dict[str, Any]:
        """The critic's own micro-batch keys as per-call engine arguments (stock wires only one of them)."""
        config = self.config
        if config.use_dynamic_bsz:
            limit = config.forward_max_token_len_per_gpu if forward else config.ppo_max_token_len_per_gpu
            return {"use_dynamic_bsz": True, "max_token_len_per_gpu": limit}
        limit = config.forward_micro_batch_size_per_gpu if forward else config.ppo_micro_batch_size_per_gpu
        # with forced groups the engine counts groups, not rows
        size = largest_divisor(rows_per_rank // group_size, max(limit // group_size, 1))
        return {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": size}

"""New: verl's critic as the discriminator D of GAD, on stock engine workers (no stock module of this name in 0.9.1).

Before the engine workers, ``dp_critic.py`` was where a critic scored and updated; the names are kept. The class
drives a worker group of stock ``TrainingWorker`` (model_type "value_model"), so FSDP, FSDP2 and Megatron engines
serve unchanged: ``infer_batch`` scores, ``set_loss_fn`` swaps the value loss for the Bradley-Terry loss, and
``force_group_size`` keeps the rows [teacher, s_1, ..., s_n] of one prompt in one micro-batch, so that D runs on the
teacher once per prompt.

Rows live in TransferQueue; a ``KVBatchMeta`` names them. Suffixes: R rows, P prompts, N samples per prompt.
"""

from functools import partial
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

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
    weights = data["pair_weight"].to(scores.device).view(-1, group_size) * data["dp_size"]
    groups = scores.view(-1, group_size)
    loss, metrics = compute_grouped_discriminator_loss(groups[:, 1:], groups[:, 0], weights[:, 1:])
    return loss, {**metrics, "row_scores": list(zip(data["row"].tolist(), scores.tolist(), strict=True))}


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
    """

    def __init__(self, critic_wg: Any, config: DictConfig, rollout_n: int):
        self.critic_wg = critic_wg
        self.config = config
        self.rollout_n = rollout_n
        self._loss = ""

    @property
    def group_size(self) -> int:
        """Rows of one prompt: the teacher and its n students."""
        return self.rollout_n + 1

    def data_parallel_size(self) -> int:
        """Data-parallel ranks that D runs on."""
        return data_parallel_size(self.critic_wg, "train")

    # ------------------------------------------------------------------ scoring

    def _forward_micro_batch(self, batch: KVBatchMeta, compute_teacher: bool) -> torch.Tensor:
        """D's scores of one batch: only the value of the last response token is kept.

        Args:
            batch: rows to score, ``extra_info["teacher_keys"]`` the rows of their teachers (one per prompt). The
                workers split them into micro-batches by critic.forward_micro_batch_size_per_gpu or, with dynamic
                batches, by critic.forward_max_token_len_per_gpu.
            compute_teacher: score the teacher's tensors instead of the students'.

        Returns:
            (R,) float32, or (P,) for the teachers.
        """
        keys = batch.extra_info["teacher_keys"] if compute_teacher else batch.keys
        rows = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=keys,
            tags=[{} for _ in keys],
            fields=SCORING_FIELDS,
            extra_info={
                "compute_loss": False,
                "temperature": 1.0,
                **self._micro_batches(len(keys) // self.data_parallel_size(), forward=True),
            },
        )
        ray.get(self.critic_wg.infer_batch(rows).futures)
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["values"])
        return last_token_scores(data["values"])

    def _forward_batch_teacher_forcing_grpo(self, batch: KVBatchMeta, teacher_repeat: int) -> torch.Tensor:
        """Scores of teacher responses used as if they were ``teacher_repeat`` rollouts of their prompt.

        Repeats of one text have one score, so GRPO's group normalisation would divide zero by zero. Within every group
        the scores are therefore D's score plus 0, 1, ..., teacher_repeat - 1: increasing, and equal spread in all
        groups.

        Args:
            batch: as in :meth:`_forward_micro_batch`.
            teacher_repeat: copies of every teacher response.

        Returns:
            (P * teacher_repeat,) float32, the copies of one prompt side by side.
        """
        if teacher_repeat < 1:
            raise ValueError(f"teacher_repeat must be at least 1, got {teacher_repeat}")
        scores_P = self._forward_micro_batch(batch, compute_teacher=True)
        return (scores_P.unsqueeze(-1) + torch.arange(teacher_repeat)).flatten()

    def compute_values(self, batch: KVBatchMeta) -> torch.Tensor:
        """Scores of a batch, chosen by ``batch.extra_info["values_of"]``.

        "students" (default) or "teachers": see :meth:`_forward_micro_batch`. "teacher_forcing": see
        :meth:`_forward_batch_teacher_forcing_grpo`, with ``batch.extra_info["teacher_repeat"]`` (default rollout_n).
        """
        values_of = batch.extra_info.get("values_of", "students")
        if values_of == "teacher_forcing":
            teacher_repeat = batch.extra_info.get("teacher_repeat", self.rollout_n)
            return self._forward_batch_teacher_forcing_grpo(batch, teacher_repeat)
        if values_of not in ("students", "teachers"):
            raise ValueError(f"values_of must be students, teachers or teacher_forcing, got {values_of!r}")
        return self._forward_micro_batch(batch, compute_teacher=values_of == "teachers")

    # ------------------------------------------------------------------ update

    def update_critic(self, batch: KVBatchMeta) -> tuple[dict[str, float], torch.Tensor]:
        """One pass of optimizer steps over the batch, ``ppo_epochs`` times.

        With teacher data (``batch.extra_info["group_size"]``: rows grouped as [teacher, s_1..s_n], with
        ``pair_weight`` and ``row`` = 0, 1, ...) the discriminator loss; without, stock verl's value loss on values and
        returns.

        Returns:
            Metrics of the step, under "critic/"; and D's scores of the rows in float32, (R,), as the first epoch's
            forward passes found them: those of :meth:`compute_values` if the batch is one optimizer step. Empty
            without teacher data.
        """
        has_teacher = "group_size" in batch.extra_info
        self._set_loss("discriminator" if has_teacher else "value")
        rows_per_prompt = self.group_size if has_teacher else self.rollout_n
        mini_batch_size = self.config.ppo_mini_batch_size * rows_per_prompt
        rows_per_rank = mini_batch_size // self.data_parallel_size()
        extra_info = {
            "global_batch_size": mini_batch_size,
            "mini_batch_size": mini_batch_size,
            "epochs": self.config.ppo_epochs,
            "seed": self.config.data_loader_seed,
            # groups must stay whole: the trainer shuffles them, the engine's row-wise shuffle stays off
            "dataloader_kwargs": {"shuffle": self.config.shuffle and not has_teacher},
            "temperature": 1.0,
            **self._micro_batches(rows_per_rank, group_size=self.group_size if has_teacher else 1),
        }
        if has_teacher:
            extra_info["force_group_size"] = self.group_size
        rows = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=batch.keys,
            tags=batch.tags,
            fields=[*SCORING_FIELDS, "pair_weight", "row"] if has_teacher else None,
            extra_info=extra_info,
        )
        output = self.critic_wg.train_mini_batch(rows).get()
        metrics = rename_dict(output["metrics"], "critic/")
        metrics["perf/mfu/critic"] = metrics.pop("critic/mfu")
        row_scores: dict[int, float] = {}
        for row, score in metrics.pop("critic/row_scores", []):  # in the order of the optimizer steps
            row_scores.setdefault(row, score)
        return reduce_metrics(metrics), torch.tensor([row_scores[row] for row in sorted(row_scores)])

    def _set_loss(self, name: str) -> None:
        if self._loss == name:
            return
        if name == "discriminator":
            loss = partial(discriminator_loss, self.group_size)
        else:
            critic_config: CriticConfig = omega_conf_to_dataclass(self.config)
            loss = partial(value_loss, config=critic_config)
        self.critic_wg.set_loss_fn(loss)
        self._loss = name

    # ------------------------------------------------------------------ micro-batches

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

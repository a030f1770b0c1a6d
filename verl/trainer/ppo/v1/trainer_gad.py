"""New: the GAD trainer (arXiv 2511.10643), the stock synchronous PPO trainer with the discriminator's steps added.

One step, stock unless marked *:
    rollout -> * rows in order, * teacher trajectories -> old_log_prob -> ref -> * scores of D -> advantage (GRPO)
    -> * update of D on [teacher, s_1..s_n] -> from trainer.critic_warmup on: update of the actor (* or imitation)

When a batch is one optimizer step, two of the passes would find numbers that an update finds anyway, and are left out:
scores of D (``gad.score_in_update``: D is updated first, its scores are those of the update's forward pass, before the
optimizer step) and old_log_prob (``gad.skip_old_log_prob``).

Steps are counted from 1 and the actor is updated while ``critic_warmup <= global_step`` (stock comparison), so
``trainer.critic_warmup=10`` trains D alone for 9 steps.

Teacher rows live in TransferQueue beside the students' under ``{uid}_teacher_0`` and never enter the batch that stock
code sees; the trainer clears them at the end of the step.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from recipe.gad.run.checkpoint import claim_folder
from recipe.gad.run.checks import check_config
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions
from verl.workers.actor.dp_actor import imitation_loss, on_policy_loss
from verl.workers.critic.dp_critic import DataParallelPPOCritic, data_parallel_size, largest_divisor
from verl.workers.rollout.teacher_trajectory import build_prompt_ids, build_teacher_trajectory
from verl.workers.utils.losses import ppo_loss

__all__ = ["PPOTrainerGAD"]

OLD_LOG_PROB_ESTIMATORS = ("optimal_token_baseline", "tir_optimal_token_baseline")
"""Advantage estimators that read old log-probabilities."""


def _uid(key: str) -> str:
    """The prompt of a student's row: keys are {uid}_{session}_{index}."""
    return key.rsplit("_", 2)[0]


class _Group:
    """One prompt of a step: its student rows and the teacher's row in TransferQueue."""

    def __init__(self, uid: str, n: int):
        self.uid = uid
        self.students: list[tuple[str, int]] = []  # (key, tokens)
        self.teacher: tuple[str, int] = (f"{uid}_teacher_0", 0)
        self.n = n

    def rows(self) -> list[tuple[str, int, bool]]:
        """(key, tokens, is a real student) of [teacher, s_1, ..., s_n], missing students filled."""
        fillers = [(f"{self.uid}_filler_{i}", 2, False) for i in range(self.n - len(self.students))]
        return [(*self.teacher, False), *((key, size, True) for key, size in self.students), *fillers]


@register_trainer("gad")
class PPOTrainerGAD(PPOTrainerSync):
    """Stock synchronous trainer plus D: scoring, the teacher's rows, D's update, and imitation as an actor objective.

    Args:
        config: recipe/gad/config/gad_trainer.yaml composed with overrides.

    Raises:
        ValueError: the configuration, the data or the folders do not fit a GAD run (recipe/gad/run/checks.py);
            before any model is loaded.
    """

    # stock code compares trainer_mode with "sync" in several places; GAD keeps every sync semantic
    trainer_mode = property(lambda self: "sync", lambda self, value: None)

    def __init__(self, config):
        for warning in check_config(config):
            print(f"warning: {warning}")
        claim_folder(config.trainer.default_local_dir, config.gad.stage)
        super().__init__(config)
        self.rollout_n = config.actor_rollout_ref.rollout.n
        self.seqkd = config.gad.stage == "seqkd"
        self.imitation = config.gad.actor_objective == "imitation"
        self._submitted: dict[str, int] = {}
        self._groups: list[_Group] = []
        self._extra_keys: list[str] = []

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = self.config.gad.poll_interval
        return replay_buffer

    def _setup(self):
        super()._setup()
        if self.use_critic:
            self.discriminator = DataParallelPPOCritic(self.critic_wg, self.config.critic, self.rollout_n)
        self._actor_loss: Callable = ppo_loss  # what stock verl has set

    def _set_actor_loss(self, loss: Callable) -> None:
        if loss is not self._actor_loss:
            actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(loss, config=actor_config))
            self._actor_loss = loss

    # ------------------------------------------------------------------ passes that an update makes unnecessary

    def _one_optimizer_step(self, update: DictConfig) -> bool:
        """Is a batch one optimizer step of ``config.critic`` or of the actor's config?"""
        return update.ppo_epochs == 1 and update.ppo_mini_batch_size == self.config.data.train_batch_size

    def _scores_in_update(self) -> bool:
        return self.config.gad.score_in_update and self._one_optimizer_step(self.config.critic)

    def _skips_old_log_prob(self) -> bool:
        """Does nothing need old log-probabilities beyond those that the actor's update finds itself?"""
        algorithm, actor = self.config.algorithm, self.config.actor_rollout_ref.actor
        correction = algorithm.get("rollout_correction") or {}
        needed = (
            algorithm.use_kl_in_reward
            or algorithm.adv_estimator in OLD_LOG_PROB_ESTIMATORS
            or any(correction.get(key) for key in ("bypass_mode", "rollout_is", "rollout_rs"))
            or OmegaConf.select(actor, f"{actor.strategy}.router_replay.mode", default="disabled") != "disabled"
        )
        return self.config.gad.skip_old_log_prob and not needed and (self.imitation or self._one_optimizer_step(actor))

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Stock, or nothing but the entropy: -log pi of a sampled token is an unbiased estimate of it."""
        if not self._skips_old_log_prob():
            return super()._compute_old_log_prob(batch, metrics)
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            fields = ["rollout_log_probs", "response_mask"]
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
            mask = data["response_mask"].values().bool()
            metrics["actor/entropy"] = -data["rollout_log_probs"].values()[mask].mean().item()
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Stock; its statistics of rollout correction need old log-probabilities."""
        if not self._skips_old_log_prob():
            return super()._compute_advantage(batch, metrics)
        correction = self.config.algorithm.get("rollout_correction")
        with open_dict(self.config):
            self.config.algorithm.rollout_correction = None
            try:
                return super()._compute_advantage(batch, metrics)
            finally:
                self.config.algorithm.rollout_correction = correction

    # ------------------------------------------------------------------ rollout and the teacher's rows

    def prepare_step(self) -> dict:
        self._submitted = {}
        return {} if self.seqkd else super().prepare_step()

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        """Stock, after noting the order of the prompts and telling the reward function that D scores training rows."""
        for uid in batch["uid"]:
            self._submitted[uid] = len(self._submitted)
        for extra_info in batch["extra_info"]:
            extra_info["scored_by_discriminator"] = True
        return super()._submit_batch_to_rollout(batch)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs) -> KVBatchMeta:
        """Stock balancing of the students, after putting them in the order of the data (a run repeats itself)."""
        order = sorted(range(len(batch)), key=lambda i: self._sample_order(batch.keys[i]))
        batch.reorder(order)
        self._add_teacher_rows(batch, metrics)
        return super()._balance_batch(batch, metrics, **kwargs)

    def _sample_order(self, key: str) -> tuple[int, int, int]:
        uid, session, index = key.rsplit("_", 2)
        return self._submitted.get(uid, len(self._submitted)), int(session), int(index)

    def _add_teacher_rows(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Put one teacher trajectory per prompt into TransferQueue, built from the prompt ids the students really got.

        The number of groups never changes: a missing student is a filler row of weight 0, and a prompt whose rollouts
        all failed is a whole group of them.
        """
        first_rows: dict[str, str] = {}
        for key in batch.keys:
            first_rows.setdefault(_uid(key), key)
        failed = [uid for uid in self._submitted if uid not in first_rows]
        uids = [*first_rows, *failed][: self.config.data.train_batch_size]
        groups = {uid: _Group(uid, self.rollout_n) for uid in uids}
        for key, tag in zip(batch.keys, batch.tags, strict=True):
            groups[_uid(key)].students.append((key, tag["seq_len"]))
        assert all(len(group.students) <= self.rollout_n for group in groups.values()), (
            "an agent loop gave several outputs for one sample; D scores one answer per sample"
        )
        data = tq.kv_batch_get(
            keys=list(first_rows.values()),
            partition_id=batch.partition_id,
            select_fields=["prompts", "teacher_response_ids"],
        )
        rows: dict[str, dict[str, torch.Tensor]] = {}
        for uid, prompt_ids, teacher_ids in zip(
            first_rows, data["prompts"].unbind(), list(data["teacher_response_ids"]), strict=True
        ):
            trajectory = build_teacher_trajectory(prompt_ids, torch.tensor(teacher_ids))
            groups[uid].teacher = (groups[uid].teacher[0], trajectory["input_ids"].numel())
            rows[groups[uid].teacher[0]] = trajectory
        limit = self.config.data.max_response_length
        metrics.update(teacher_length_metrics(rows, limit))
        metrics["response_length/cut_ratio"] = float(np.mean([tag["response_len"] >= limit for tag in batch.tags]))
        metrics["gad/missing_rollouts"] = len(groups) * self.rollout_n - len(batch)
        self._groups = list(groups.values())
        for group in self._groups:
            for key, _, is_student in group.rows():
                if not is_student and key not in rows:
                    rows[key] = self._filler()
        self._put_rows(batch.partition_id, rows)

    def _filler(self) -> dict[str, torch.Tensor]:
        """A two-token row that no loss sees."""
        eos = torch.tensor([self.tokenizer.eos_token_id])
        row = build_teacher_trajectory(eos, eos)
        return {
            **row,
            "response_mask": torch.zeros(1, dtype=torch.int64),
            "loss_mask": torch.zeros(1, dtype=torch.int64),
        }

    def _put_rows(self, partition_id: str, rows: dict[str, dict[str, torch.Tensor]]) -> None:
        fields = tu.list_of_dict_to_tensordict(list(rows.values()))
        tq.kv_batch_put(keys=list(rows), partition_id=partition_id, fields=fields, tags=[{} for _ in rows])
        self._extra_keys.extend(rows)

    # ------------------------------------------------------------------ scoring

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """D's score of every student answer, at its last response token, becomes ``values`` and ``rm_scores``."""
        if self._scores_in_update():
            score_of = self._update_discriminator(batch.partition_id, metrics)
            scores = torch.tensor([score_of.get(key, 0.0) for key in batch.keys])
        else:
            scores = self.discriminator.compute_values(self._view(batch.keys, batch.tags))
        fields = ["response_mask", "values"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        offsets = data["response_mask"].offsets()
        lengths = offsets.diff()
        real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags]) & (lengths > 0)
        uids = [_uid(key) for key, is_real in zip(batch.keys, real.tolist(), strict=True) if is_real]
        correlation = score_length_correlation(scores[real], lengths[real], uids)
        if correlation is not None:
            metrics["critic/score_length_corr"] = correlation
        token_scores = torch.zeros(int(offsets[-1]), dtype=torch.float32)
        token_scores[offsets[1:][real] - 1] = scores[real]
        nested = torch.nested.nested_tensor_from_jagged(token_scores, offsets)
        # `values` replaces what workers may have put there, (prompt + response), in its dtype: the queue insists
        dtype = data["values"].dtype if "values" in data else nested.dtype
        fields = TensorDict({"values": nested.to(dtype), "rm_scores": nested}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        return batch

    def _view(self, keys: list[str], tags: list[dict] | None = None, **extra_info: Any) -> KVBatchMeta:
        """A batch of its own: ``extra_info`` of the stock batch persists and would leak into the actor's update."""
        tags = [{} for _ in keys] if tags is None else tags
        return KVBatchMeta(partition_id="train", keys=keys, tags=tags, extra_info=extra_info)

    # ------------------------------------------------------------------ updates

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self._scores_in_update():  # else the scores have come from the update
            self._update_discriminator(batch.partition_id, metrics)
        return batch

    def _update_discriminator(self, partition_id: str, metrics: dict) -> dict[str, float]:
        """Update D on whole groups; d_loss and d_acc are means over the real pairs of an optimizer step.

        Returns:
            key of a row -> its score in the update's forward pass.
        """
        critic = self.config.critic
        sizes = [sum(size for _, size, _ in group.rows()) for group in self._groups]
        ranks = self._spread(sizes, critic, self.discriminator.data_parallel_size())
        pairs = [
            sum(len(self._groups[i].students) for part in mini_batch for i in part)
            for mini_batch in zip(*ranks, strict=True)
        ]
        weights: dict[str, float] = {}  # in the order in which the rows go to the ranks
        for rank in ranks:
            for indices, n_pairs in zip(rank, pairs, strict=True):
                for key, _, is_student in (row for i in indices for row in self._groups[i].rows()):
                    weights[key] = 1.0 / n_pairs if is_student else 0.0
        fields = {"pair_weight": torch.tensor(list(weights.values())), "row": torch.arange(len(weights))}
        tq.kv_batch_put(keys=list(weights), partition_id=partition_id, fields=TensorDict(fields, len(weights)))
        rows = self._view(list(weights), group_size=self.discriminator.group_size)
        update_metrics, scores = self.discriminator.update_critic(rows)
        metrics.update(update_metrics)
        return dict(zip(weights, scores.tolist(), strict=True))

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Stock policy update, or imitation of the teacher rows (one per prompt)."""
        if not self.imitation:
            self._set_actor_loss(on_policy_loss if self._skips_old_log_prob() else ppo_loss)
            batch = super()._update_actor(batch, metrics)
            for name in ("rollout_probs_diff_mean", "rollout_probs_diff_max"):
                if f"actor/{name}" in metrics:  # under stock's name for what its old_log_prob pass finds
                    metrics[f"training/{name}"] = metrics.pop(f"actor/{name}")
            return batch
        self._imitate([group.teacher for group in self._groups], sum(bool(g.students) for g in self._groups), metrics)
        return batch

    def _imitate(self, teacher_rows: list[tuple[str, int]], n_real: int, metrics: dict) -> None:
        """Next-token loss on the teacher rows, at temperature 1: the text was not sampled from the student."""
        self._set_actor_loss(imitation_loss)
        actor = self.config.actor_rollout_ref.actor
        ranks = self._spread(
            [size for _, size in teacher_rows], actor, data_parallel_size(self.actor_rollout_wg, "actor")
        )
        extra_info = {
            "global_batch_size": n_real / len(ranks[0]),
            "mini_batch_size": actor.ppo_mini_batch_size,
            "epochs": actor.ppo_epochs,
            "seed": actor.data_loader_seed,
            "dataloader_kwargs": {"shuffle": False},  # _spread has shuffled already
            "temperature": 1.0,
            "calculate_entropy": False,
            "distillation_use_topk": False,
            "distillation_only": False,
        }
        if not actor.use_dynamic_bsz:
            rows_per_rank = actor.ppo_mini_batch_size // len(ranks)
            extra_info["micro_batch_size_per_gpu"] = largest_divisor(rows_per_rank, actor.ppo_micro_batch_size_per_gpu)
        keys = [teacher_rows[i][0] for rank in ranks for indices in rank for i in indices]
        output = rename_dict(self.actor_rollout_wg.update_actor(self._view(keys, **extra_info))["metrics"], "actor/")
        output["perf/mfu/actor"] = output.pop("actor/mfu")
        metrics.update(reduce_metrics(output))

    def _spread(self, sizes: list[int], update: DictConfig, dp_size: int) -> list[list[list[int]]]:
        """Which unit (a group of rows, or a row) goes to which rank and optimizer step.

        Mini-batches are cut in the order of the data, or shuffled anew at every step (``update.shuffle``), so they do
        not depend on the number of ranks; the units of one mini-batch are balanced over the ranks by their tokens.

        Args:
            sizes: tokens of every unit.
            update: ``config.critic`` or the actor's config: ppo_mini_batch_size, shuffle, data_loader_seed.
            dp_size: data-parallel ranks.

        Returns:
            [rank][mini-batch] -> indices into ``sizes``; a worker group hands every rank an equal, contiguous share.
        """
        indices = list(range(len(sizes)))
        if update.shuffle:
            random.Random(f"{update.data_loader_seed}-{self.global_steps}").shuffle(indices)
        ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
        for start in range(0, len(indices), update.ppo_mini_batch_size):
            mini_batch = indices[start : start + update.ppo_mini_batch_size]
            workload = calculate_workload(torch.tensor([sizes[i] for i in mini_batch])).tolist()
            parts = get_seqlen_balanced_partitions(workload, k_partitions=dp_size, equal_size=True)
            for rank, part in zip(ranks, parts, strict=True):
                rank.append([mini_batch[i] for i in part])
        return ranks

    # ------------------------------------------------------------------ end of a step

    def on_step_end(self):
        if self._extra_keys:
            tq.kv_clear(keys=self._extra_keys, partition_id="train")
            self._extra_keys = []
        super().on_step_end()

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, global_steps: int, epoch: int
    ) -> None:
        if self.seqkd:
            metrics.update({f"timing_s/{name}": seconds for name, seconds in timing_raw.items()})
            metrics.update({"training/global_step": global_steps, "training/epoch": epoch})
            return
        if self._scores_in_update():  # D's update took the place of stock's pass for values
            timing_raw["update_critic"] = timing_raw.pop("values")
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        # D's score sits on one token of a row, so stock statistics over all tokens of `values` mean nothing here
        for name in [name for name in metrics if name.startswith(("critic/values/", "critic/vf_"))]:
            del metrics[name]

    # ------------------------------------------------------------------ SeqKD

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        """Stock; for SeqKD the teacher rows come straight from the data: nothing is sampled or scored."""
        if not self.seqkd:
            return super()._step_once(metrics, timing_raw, sample_batch_size)
        self.on_sample_end()  # the rollout engine sleeps until the weights are sent to it again
        data = self._next_train_batch(sample_batch_size)
        template_kwargs = self.config.data.get("apply_chat_template_kwargs", {})
        rows = {}
        for uid, messages, teacher_ids in zip(
            list(data["uid"]), list(data["raw_prompt"]), list(data["teacher_response_ids"]), strict=True
        ):
            prompt_ids = build_prompt_ids(self.tokenizer, messages, template_kwargs)[
                -self.config.data.max_prompt_length :
            ]
            rows[f"{uid}_teacher_0"] = build_teacher_trajectory(torch.tensor(prompt_ids), torch.tensor(teacher_ids))
        self._put_rows("train", rows)
        self._extra_keys = []  # they are the batch: the stock loop clears it
        metrics.update(teacher_length_metrics(rows, self.config.data.max_response_length))
        with marked_timer("update_actor", timing_raw, color="red"):
            self._imitate([(key, row["input_ids"].numel()) for key, row in rows.items()], len(rows), metrics)
        return self._view(list(rows))


def score_length_correlation(scores: torch.Tensor, lengths: torch.Tensor, uids: list[str]) -> float | None:
    """Pearson correlation of D's scores with the answers' lengths among the answers to one prompt, over all prompts.

    Args:
        scores: [rows].
        lengths: [rows], tokens.
        uids: prompt of each row.

    Returns:
        in [-1, 1]; near 1 (or -1) the policy is mainly rewarded for longer (shorter) answers. None if the scores or the
        lengths do not differ within any group.
    """
    columns = torch.stack([scores.double(), lengths.double()])
    groups = torch.tensor(np.unique(uids, return_inverse=True)[1])
    counts = torch.bincount(groups)
    sums = torch.zeros(2, len(counts), dtype=torch.double).index_add_(1, groups, columns)
    score, length = columns - (sums / counts)[:, groups]
    spread = (score.norm() * length.norm()).item()
    return float(score @ length) / spread if spread > 0 else None


def teacher_length_metrics(rows: dict[str, dict[str, torch.Tensor]], limit: int) -> dict[str, float]:
    """Mean, max, min of the answers of teacher rows in tokens, and the share that reached ``limit``."""
    lengths = np.array([row["responses"].numel() for row in rows.values()])
    statistics = {
        "mean": lengths.mean(),
        "max": lengths.max(),
        "min": lengths.min(),
        "cut_ratio": (lengths >= limit).mean(),
    }
    return {f"teacher_response_length/{name}": float(value) for name, value in statistics.items()}

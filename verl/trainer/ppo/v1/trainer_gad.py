"""New: the GAD trainer (arXiv 2511.10643), the stock synchronous PPO trainer plus the discriminator D.

One step, stock unless marked *:
    rollout -> * rows in order, * teacher trajectories -> old_log_prob -> ref -> * scores of D -> advantage (GRPO)
    -> * update of D on [teacher, s_1..s_n] -> from trainer.critic_warmup on: update of the actor
:class:`PPOTrainerGAD` is stage gad; the classes of the other stages override what they do differently. When a batch is
one optimizer step, an update finds the numbers of two passes, which are left out: scores of D (``gad.score_in_update``)
and old_log_prob (``gad.skip_old_log_prob``).
Teacher rows are in TransferQueue too, but never in the batch that stock code sees; they are cleared after the step.
Goes when: verl ships a GAD trainer.
"""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from recipe.gad.run.checks import check_config, claim_output
from recipe.gad.run.checksums import forget_checksums, write_checksums
from recipe.gad.run.stop import take_request
from recipe.gad.training import rows as gad_rows
from recipe.gad.training.bad_steps import BadSteps
from recipe.gad.training.rows import Group, Row, Trajectory
from recipe.gad.training.trajectory import TEACHER_IDS, build_prompt_ids
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.workers.actor.dp_actor import imitation_loss, on_policy_loss
from verl.workers.critic.dp_critic import DataParallelPPOCritic, data_parallel_size, largest_divisor
from verl.workers.utils.losses import ppo_loss

__all__ = ["PPOTrainerGAD", "PPOTrainerSeqKD", "PPOTrainerWarmup"]

logger = logging.getLogger(__name__)

OLD_LOG_PROB_ESTIMATORS = ("optimal_token_baseline", "tir_optimal_token_baseline")
"""Advantage estimators that read old log-probabilities."""

GROUP_ESTIMATORS = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "reinforce_plus_plus_baseline")
"""Advantage estimators that compare an answer with the others to its prompt, and take one answer's score as it is."""


@register_trainer("gad")
class PPOTrainerGAD(PPOTrainerSync):
    """Stage gad: D learns on fresh samples, and the actor follows its scores by policy gradient.

    Args:
        config: recipe/gad/config/gad_trainer.yaml with overrides; ``gad`` chooses the class (:func:`stage_class`).

    Raises:
        ValueError: configuration, data or folders do not fit a GAD run (recipe/gad/run/checks.py); no model is loaded.
    """

    # stock code compares trainer_mode with "sync" in several places; GAD keeps every sync semantic
    trainer_mode = property(lambda self: "sync", lambda self, value: None)

    reads_old_log_prob = True  # does the actor's update compare with the policy that sampled?

    def __new__(cls, config=None):  # copy.copy gives no config
        return super().__new__(stage_class(config) if cls is PPOTrainerGAD and config is not None else cls)

    def __init__(self, config):
        for warning in check_config(config):
            logger.warning("%s", warning)
        claim_output(config)
        super().__init__(config)
        self.rollout_n = config.actor_rollout_ref.rollout.n
        self._submitted: dict[str, int] = {}  # prompt -> its place in the data of the step
        self._data: dict[str, list] = {}  # prompt -> its messages and the teacher's ids
        self._groups: list[Group] = []
        self._bad_steps = BadSteps(config.gad.stop_after_bad_steps)
        self._actor_loss: Callable = ppo_loss  # what stock verl has set
        self._extra_keys: list[str] = []  # rows of ours, cleared at the end of the step

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = self.config.gad.poll_interval
        return replay_buffer

    def _setup(self):
        super()._setup()
        if self.use_critic:
            self.discriminator = DataParallelPPOCritic(self.critic_wg, self.config.critic, self.rollout_n)

    # ------------------------------------------------------------------ a step

    def prepare_step(self) -> dict:
        self._submitted, self._data = {}, {}
        return super().prepare_step()

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        """Stock, after noting the order of the prompts and telling the reward function that D scores training rows."""
        for uid, *data in zip(*(list(batch[key]) for key in ("uid", "raw_prompt", TEACHER_IDS)), strict=True):
            self._submitted[uid] = len(self._submitted)
            self._data[uid] = data
        for extra_info in batch["extra_info"]:
            extra_info["scored_by_discriminator"] = True
        return super()._submit_batch_to_rollout(batch)

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        batch = super().step(metrics, timing_raw)
        if self._bad_steps.must_stop(metrics):
            rows = self._texts([*batch.keys, *self._extra_keys], batch.partition_id)
            self._bad_steps.stop(self.config.trainer.default_local_dir, self.global_steps, metrics, rows)
        return batch

    def _texts(self, keys: list[str], partition_id: str) -> list[dict[str, str]]:
        """Prompt and answer of rows, special tokens included."""
        data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["prompts", "responses"])
        texts = [[self.tokenizer.decode(ids) for ids in data[name].unbind()] for name in ("prompts", "responses")]
        return [{"key": key, "prompt": p, "answer": a} for key, p, a in zip(keys, *texts, strict=True)]

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        if self._scores_in_update():
            del timing_raw["values"]  # stock's timer around an update that has timed itself
        return batch

    def on_step_end(self):
        if signal := take_request(self.config.trainer.default_local_dir):
            self._stop_after_this_step(signal)
        if self._extra_keys:
            tq.kv_clear(keys=self._extra_keys, partition_id="train")
            self._extra_keys = []
        super().on_step_end()

    def _save_checkpoint(self) -> None:
        """Stock, and then the checksums of what it wrote, unless it still writes (async_save)."""
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        forget_checksums(folder)
        super()._save_checkpoint()
        if not self.config.actor_rollout_ref.actor.checkpoint.get("async_save", False):
            write_checksums(folder)

    def _stop_after_this_step(self, signal: str) -> None:
        """Save unless stock code has, and end the loop."""
        step, every = self.global_steps, self.config.trainer.save_freq
        if every > 0 and step % every and step < self.total_training_steps:
            with marked_timer("save_checkpoint", self.timing_raw, color="green"):
                self._save_checkpoint()
        saved = f"; rerun the same command to resume from global_step_{step}" if every > 0 else ", and saved nothing"
        print(f"{signal}: the run stopped after step {step} of {self.total_training_steps}{saved}")
        self.total_training_steps = step

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, *args, **kwargs) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        # D's score sits on one token of a row, so stock statistics over all tokens of `values` mean nothing here
        for name in [name for name in metrics if name.startswith(("critic/values/", "critic/vf_"))]:
            del metrics[name]

    # ------------------------------------------------------------------ rows

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, **kwargs) -> KVBatchMeta:
        """Stock balancing of the students, after putting them in the order of the data (a run repeats itself)."""
        batch.reorder(sorted(range(len(batch)), key=lambda i: gad_rows.sample_order(batch.keys[i], self._submitted)))
        self._add_teacher_rows(batch, metrics)
        return super()._balance_batch(batch, metrics, **kwargs)

    def _add_teacher_rows(self, batch: KVBatchMeta, metrics: dict) -> None:
        """Put one teacher trajectory per prompt into TransferQueue, built from the prompt ids the students really got.

        The number of groups never changes: a missing student is a filler row of weight 0. If all rollouts of a prompt
        failed, its messages give the prompt ids.
        """
        limit, n_prompts = self.config.data.max_response_length, self.config.data.train_batch_size
        students = [Row(key, tag["seq_len"]) for key, tag in zip(batch.keys, batch.tags, strict=True)]
        self._groups = gad_rows.group_rows(students, self._submitted, self.rollout_n, n_prompts)
        answered = [group for group in self._groups if group.students]
        keys, fields = [group.students[0].key for group in answered], ["prompts", TEACHER_IDS]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        uids = [group.uid for group in answered]
        rows = gad_rows.teacher_rows(uids, data["prompts"].unbind(), list(data[TEACHER_IDS]))
        failed = [group.uid for group in self._groups if not group.students]
        rows |= self._rows_from_data(failed, *([self._data[uid][i] for uid in failed] for i in (0, 1)))
        for group in self._groups:
            group.teacher_tokens = rows[group.teacher.key]["input_ids"].numel()
        metrics.update(gad_rows.teacher_length_metrics(rows, limit))
        metrics["response_length/cut_ratio"] = float(np.mean([tag["response_len"] >= limit for tag in batch.tags]))
        metrics["gad/missing_rollouts"] = len(self._groups) * self.rollout_n - len(batch)
        known = {*rows, *batch.keys}
        missing = [row.key for group in self._groups for row in group.rows() if row.key not in known]
        rows |= {key: gad_rows.filler(self.tokenizer.eos_token_id) for key in missing}
        self._put_rows(batch.partition_id, rows)
        self._extra_keys.extend(rows)

    def _rows_from_data(self, uids: list[str], messages: list, teacher_ids: list) -> dict[str, Trajectory]:
        """Teacher rows of prompts that no rollout has turned into token ids."""
        config = self.config.data
        template_kwargs = config.get("apply_chat_template_kwargs", {})
        prompts = [build_prompt_ids(self.tokenizer, list(chat), template_kwargs) for chat in messages]
        prompts = [torch.tensor(ids[-config.max_prompt_length :]) for ids in prompts]
        return gad_rows.teacher_rows(uids, prompts, teacher_ids)

    def _put_rows(self, partition_id: str, rows: dict[str, Trajectory]) -> None:
        fields = tu.list_of_dict_to_tensordict(list(rows.values()))
        tq.kv_batch_put(keys=list(rows), partition_id=partition_id, fields=fields, tags=[{} for _ in rows])

    def _view(self, keys: list[str], tags: list[dict] | None = None, **extra_info: Any) -> KVBatchMeta:
        """A batch of our own: ``extra_info`` of the stock batch persists and would leak into the actor's update."""
        tags = [{} for _ in keys] if tags is None else tags
        return KVBatchMeta(partition_id="train", keys=keys, tags=tags, extra_info=extra_info)

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
            or (self.reads_old_log_prob and not self._one_optimizer_step(actor))
        )
        return self.config.gad.skip_old_log_prob and not needed

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
        """Stock; without its statistics of rollout correction if there are no old log-probabilities to compare."""
        if not self._skips_old_log_prob():
            return super()._compute_advantage(batch, metrics)
        algorithm = self.config.algorithm.copy()
        algorithm.rollout_correction = None
        view = copy.copy(self)  # this trainer with a view of its configuration, which stays as it is
        view.config = SimpleNamespace(**{**self.config, "algorithm": algorithm})
        return super(PPOTrainerGAD, view)._compute_advantage(batch, metrics)

    # ------------------------------------------------------------------ the discriminator's scores

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """D's score of every student answer, at its last response token, becomes ``values`` and ``rm_scores``."""
        score = self._score_by_updating if self._scores_in_update() else self._score_by_forward
        self._put_scores(batch, score(batch, metrics), metrics)
        return batch

    def _score_by_forward(self, batch: KVBatchMeta, metrics: dict) -> torch.Tensor:
        """Scores by a forward pass of D; :meth:`_update_critic` updates it later in the step."""
        return self.discriminator.compute_values(self._view(batch.keys, batch.tags))

    def _score_by_updating(self, batch: KVBatchMeta, metrics: dict) -> torch.Tensor:
        """Update D; the scores are those of the update's forward pass. Stock's padding rows get 0."""
        with marked_timer("update_critic", self.timing_raw, color="pink"):
            score_of = self._update_discriminator(batch.partition_id, metrics)
        return torch.tensor([score_of.get(key, 0.0) for key in batch.keys])

    def _put_scores(self, batch: KVBatchMeta, scores: torch.Tensor, metrics: dict) -> None:
        """Write scores, one per row of ``batch``, into TransferQueue; 0 for padding, empty and lone answers."""
        fields = ["response_mask", "values"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        offsets = data["response_mask"].offsets()
        lengths = offsets.diff()
        real = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags]) & (lengths > 0)
        uids = [gad_rows.split_key(key)[0] for key, is_real in zip(batch.keys, real.tolist(), strict=True) if is_real]
        correlation = gad_rows.score_length_correlation(scores[real], lengths[real], uids)
        if correlation is not None:
            metrics["critic/score_length_corr"] = correlation
        token_scores = torch.zeros(int(offsets[-1]), dtype=torch.float32)
        if self.config.algorithm.adv_estimator in GROUP_ESTIMATORS:
            scores = gad_rows.without_lone_students(scores, batch.keys, self._groups)
        token_scores[offsets[1:][real] - 1] = scores[real]
        nested = torch.nested.nested_tensor_from_jagged(token_scores, offsets)
        # `values` replaces what workers may have put there, (prompt + response), in its dtype: the queue insists
        dtype = data["values"].dtype if "values" in data else nested.dtype
        fields = TensorDict({"values": nested.to(dtype), "rm_scores": nested}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _update_critic(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        if not self._scores_in_update():  # else D has been updated by _score_by_updating
            self._update_discriminator(batch.partition_id, metrics)
        return batch

    def _update_discriminator(self, partition_id: str, metrics: dict) -> dict[str, float]:
        """Update D on whole groups; d_loss and d_acc are means over the real pairs of an optimizer step.

        Returns:
            key of a row -> its score in the update's forward pass, before the optimizer step.
        """
        sizes = [sum(row.tokens for row in group.rows()) for group in self._groups]
        n_ranks = self.discriminator.data_parallel_size()
        ranks = gad_rows.spread(sizes, self.config.critic, n_ranks, self.global_steps)
        weights = gad_rows.pair_weights(self._groups, ranks)
        keys, fields = list(weights), TensorDict(gad_rows.update_fields(weights), batch_size=len(weights))
        tq.kv_batch_put(keys=keys, partition_id=partition_id, fields=fields)
        rows = self._view(keys, group_size=self.discriminator.group_size)
        update_metrics, scores = self.discriminator.update_critic(rows)
        metrics.update(update_metrics)
        return dict(zip(keys, scores.tolist(), strict=True))

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Stock, with the loss that fits the passes of this step."""
        self._set_actor_loss(on_policy_loss if self._skips_old_log_prob() else ppo_loss)
        batch = super()._update_actor(batch, metrics)
        for name in ("rollout_probs_diff_mean", "rollout_probs_diff_max"):
            if f"actor/{name}" in metrics:  # under stock's name for what its old_log_prob pass finds
                metrics[f"training/{name}"] = metrics.pop(f"actor/{name}")
        return batch

    def _set_actor_loss(self, loss: Callable) -> None:
        if loss is not self._actor_loss:
            actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(loss, config=actor_config))
            self._actor_loss = loss


class PPOTrainerWarmup(PPOTrainerGAD):
    """Stage warmup: D learns on fresh samples, and the actor imitates the teacher's text."""

    reads_old_log_prob = False

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Imitation of every teacher answer of the step, rollouts or not."""
        self._imitate([group.teacher for group in self._groups], metrics)
        return batch

    def _imitate(self, teachers: list[Row], metrics: dict) -> None:
        """Next-token loss on one teacher row per prompt. The text was not sampled from the student, so the temperature
        is 1."""
        self._set_actor_loss(imitation_loss)
        actor = self.config.actor_rollout_ref.actor
        n_ranks = data_parallel_size(self.actor_rollout_wg, "actor")
        ranks = gad_rows.spread([row.tokens for row in teachers], actor, n_ranks, self.global_steps)
        extra_info = {
            "global_batch_size": len(teachers) / len(ranks[0]),
            "mini_batch_size": actor.ppo_mini_batch_size,
            "epochs": actor.ppo_epochs,
            "seed": actor.data_loader_seed,
            "dataloader_kwargs": {"shuffle": False},  # spread has shuffled already
            "temperature": 1.0,
            "calculate_entropy": False,
            "distillation_use_topk": False,
            "distillation_only": False,
        }
        if not actor.use_dynamic_bsz:
            rows_per_rank = actor.ppo_mini_batch_size // n_ranks
            extra_info["micro_batch_size_per_gpu"] = largest_divisor(rows_per_rank, actor.ppo_micro_batch_size_per_gpu)
        keys = [teachers[i].key for rank in ranks for indices in rank for i in indices]
        output = rename_dict(self.actor_rollout_wg.update_actor(self._view(keys, **extra_info))["metrics"], "actor/")
        output["perf/mfu/actor"] = output.pop("actor/mfu")
        metrics.update(reduce_metrics(output))


class PPOTrainerSeqKD(PPOTrainerWarmup):
    """Stage seqkd: imitation alone. The teacher's rows come straight from the data; nothing is sampled or scored."""

    def prepare_step(self) -> dict:
        return {}

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        self.on_sample_end()  # the rollout engine sleeps until the weights are sent to it again
        data = self._next_train_batch(sample_batch_size)
        rows = self._rows_from_data(*(list(data[key]) for key in ("uid", "raw_prompt", TEACHER_IDS)))
        self._put_rows("train", rows)
        metrics.update(gad_rows.teacher_length_metrics(rows, self.config.data.max_response_length))
        with marked_timer("update_actor", timing_raw, color="red"):
            self._imitate([Row(key, row["input_ids"].numel()) for key, row in rows.items()], metrics)
        return self._view(list(rows))

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """Nothing: there are no rollouts."""

    def _compute_metrics(self, batch, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        metrics.update({f"timing_s/{name}": seconds for name, seconds in timing_raw.items()})
        metrics.update({"training/global_step": global_steps, "training/epoch": epoch})


def stage_class(config: DictConfig) -> type[PPOTrainerGAD]:
    """Class of a run. Stages warmup and gad differ in the actor's objective, which ``gad.actor_objective`` can swap."""
    stage, objective = (OmegaConf.select(config, f"gad.{key}") for key in ("stage", "actor_objective"))
    if stage == "seqkd":
        return PPOTrainerSeqKD
    return PPOTrainerWarmup if objective == "imitation" else PPOTrainerGAD

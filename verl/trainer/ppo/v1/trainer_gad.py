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
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from recipe.gad.run.checks import check_config, check_steps, claim_output, resumed_checkpoint
from recipe.gad.run.checksums import forget_checksums, write_checksums
from recipe.gad.run.config import labelled_mini_batch, unlabelled_prompts, validates
from recipe.gad.run.disk import DiskWatch
from recipe.gad.run.log import VAL_D_ACC
from recipe.gad.run.nodes import check_nodes
from recipe.gad.run.refusals import GROUP_ESTIMATORS, OLD_LOG_PROB_ESTIMATORS
from recipe.gad.run.stop import take_request
from recipe.gad.run.watchdog import Watchdog
from recipe.gad.training import rows as gad_rows
from recipe.gad.training.bad_steps import BadSteps, texts
from recipe.gad.training.credit import token_credit
from recipe.gad.training.gate import PolicyGate
from recipe.gad.training.lead import DiscriminatorLead
from recipe.gad.training.lora import merge_checkpoint
from recipe.gad.training.reading import Reading
from recipe.gad.training.replay import Replay, fresh_groups, pair_metrics, past_rows, spread_both
from recipe.gad.training.rows import Group, Row, Trajectory
from recipe.gad.training.shortcuts import ShortcutProbe, read_as, replaced_rows
from recipe.gad.training.smoothing import loss_of
from recipe.gad.training.start import StartsSideBySide
from recipe.gad.training.state import load_state, save_metrics, save_state
from recipe.gad.training.task_reward import FIELDS, add_task_reward
from recipe.gad.training.teacher_terms import group_advantages, group_update, loss_with_teacher
from recipe.gad.training.teachers import Teachers
from recipe.gad.training.trajectory import TEACHER_IDS
from recipe.gad.training.unlabelled import UnlabelledPrompts, join
from recipe.gad.training.validation import Pair, SeenRows, fresh_accuracy, pair_rows
from verl.trainer.ppo.core_algos import compute_discriminator_accuracy
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.workers.actor.dp_actor import imitation_loss, on_policy_loss
from verl.workers.critic.dp_critic import (
    SCORING_FIELDS,
    DataParallelPPOCritic,
    data_parallel_size,
    largest_divisor,
)
from verl.workers.utils.losses import ppo_loss

__all__ = ["PPOTrainerGAD", "PPOTrainerWarmup"]

logger = logging.getLogger(__name__)


@register_trainer("gad")
class PPOTrainerGAD(StartsSideBySide, PPOTrainerSync):
    """Stage gad: D learns on fresh samples, and the actor follows its scores by policy gradient.

    Args:
        config: recipe/gad/config/gad_trainer.yaml with overrides; ``gad`` chooses the class (:func:`stage_class`).

    Raises:
        ValueError: configuration, data or folders do not fit a GAD run (recipe/gad/run/checks.py); no model is loaded.
    """

    # stock code compares trainer_mode with "sync" in several places; GAD keeps every sync semantic
    trainer_mode = property(lambda self: "sync", lambda self, value: None)

    reads_old_log_prob = True  # does the actor's update compare with the policy that sampled?
    samples_in_training = True  # or is the rollout engine for validation alone?

    def __new__(cls, config=None):  # copy.copy gives no config
        return super().__new__(stage_class(config) if cls is PPOTrainerGAD and config is not None else cls)

    def __init__(self, config):
        for warning in check_config(config):
            logger.warning("%s", warning)
        check_nodes(config)
        claim_output(config)
        super().__init__(config)
        self.rollout_n = config.actor_rollout_ref.rollout.n
        self._submitted: dict[str, int] = {}  # prompt -> its place in the data of the step
        self._unlabelled: set[str] = set()  # prompts of the step that have no teacher answer
        self._data: dict[str, list] = {}  # prompt -> its messages and the teacher's ids
        self._groups: list[Group] = []
        self._watchdog = Watchdog(config.gad.step_timeout, config.trainer.default_local_dir)
        self._measured: tuple[KVBatchMeta, dict] | None = None  # batch and metrics of the step, until its end
        self._disk = DiskWatch(config)
        self._bad_steps = BadSteps(config.gad.stop_after_bad_steps)
        self._scores: dict[str, float] = {}  # D's score of every row of the step
        self._advantages: dict[str, Any] = {}  # key -> advantage of an answer or its tokens, if not stock's
        self._actor_loss: tuple[Callable, dict] = (ppo_loss, {})  # what stock verl has set
        self._extra_keys: list[str] = []  # rows of ours, cleared at the end of the step
        self._lead = DiscriminatorLead.of(config)
        self._gate = PolicyGate(config.gad.policy_gate)
        self._replay = Replay.of(config)
        self._read_as: dict[str, Row] = {}  # key of an answer -> the row that D reads in its place

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        replay_buffer.poll_interval = self.config.gad.poll_interval
        return replay_buffer

    def _setup(self):
        super()._setup()
        if self.use_critic:
            averages = self.config.gad.discriminator_ema > 0
            layout = self.rollout_n, loss_of(self.config.gad, self._teachers), averages, self._teachers.most
            self.discriminator = DataParallelPPOCritic(self.critic_wg, self.config.critic, *layout)

    # ------------------------------------------------------------------ a step

    def _init_dataloader(self):
        count, config = unlabelled_prompts(self.config), self.config
        if count:
            with open_dict(config):
                config.data.gen_batch_size = config.data.train_batch_size - count
        super()._init_dataloader()
        check_steps(config, len(self.train_dataset))
        self._probe = ShortcutProbe(self.tokenizer)
        self._teachers = Teachers.of(config, self.train_dataset)
        self._prompts = UnlabelledPrompts(config, count, self.tokenizer, self.processor) if count else None

    def _next_train_batch(self, num_prompts: int | None = None) -> TensorDict:
        """Stock, with one teacher answer per prompt; with ``gad.unlabelled_files`` a part of the prompts has none."""
        if self._prompts is None:
            return self._teachers.draw(super()._next_train_batch(num_prompts), self.global_steps)
        unlabelled = self._prompts.next()
        self._unlabelled = set(unlabelled["uid"])
        labelled = super()._next_train_batch(self.config.data.gen_batch_size)
        batch = join(self._teachers.draw(labelled, self.global_steps), unlabelled)
        tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
        return batch

    def fit(self, agent_loop_manager: Any) -> None:
        with self._watchdog:
            super().fit(agent_loop_manager)

    def on_step_begin(self) -> None:
        self._watchdog.beat(self.global_steps)
        super().on_step_begin()

    def prepare_step(self) -> dict:
        self._submitted, self._data, self._scores, self._advantages = {}, {}, {}, {}
        return super().prepare_step()

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        """Stock, after noting the prompts and telling the reward function whether D alone scores training rows."""
        self._note_prompts(batch)
        for extra_info in batch["extra_info"]:
            extra_info["scored_by_discriminator"] = not self.config.gad.task_reward.weight
        return super()._submit_batch_to_rollout(batch)

    def _note_prompts(self, batch: TensorDict) -> None:
        """Their order, and their messages and teacher ids, which replace the rollouts of a prompt if all fail."""
        for uid, *data in zip(*(list(batch[key]) for key in ("uid", "raw_prompt", TEACHER_IDS)), strict=True):
            self._submitted[uid] = len(self._submitted)
            self._data[uid] = data

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        batch = super().step(metrics, timing_raw)
        if self._bad_steps.must_stop(metrics):
            rows = texts(self.tokenizer, [*batch.keys, *self._extra_keys], batch.partition_id)
            self._bad_steps.stop(self.config.trainer.default_local_dir, self.global_steps, metrics, rows)
        self._measured = batch, metrics
        return batch

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        if self._scores_in_update():
            del timing_raw["values"]  # stock's timer around an update that has timed itself
        return batch

    def _wakes_engine(self) -> bool:
        """Is the rollout engine used between the first step and the last?"""
        return self.samples_in_training or validates(self.config)

    def on_sample_end(self):
        if self._wakes_engine():
            super().on_sample_end()

    def on_step_end(self):
        if signal := take_request(self.config.trainer.default_local_dir):
            self._stop_after_this_step(signal)
        self._measured = None
        if self._extra_keys:
            tq.kv_clear(keys=self._extra_keys, partition_id="train")
            self._extra_keys = []
        if self._wakes_engine():
            super().on_step_end()

    def _save_checkpoint(self) -> None:
        """Stock, after our state and before merged adapters and checksums, which a save that still writes lacks."""
        folder = self._step_folder()
        with self._disk.save(folder):
            forget_checksums(folder)
            self._save_state()
            if self._measured is not None:
                save_metrics(self, *self._measured, folder)
            super()._save_checkpoint()
            merge_checkpoint(self.config, folder)
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
        pairs = zip(batch.keys, batch.tags, strict=True)
        students = [Row(k, tag["seq_len"]) for k, tag in pairs if gad_rows.split_key(k)[0] not in self._unlabelled]
        submitted = [uid for uid in self._submitted if uid not in self._unlabelled]
        n_labelled = n_prompts - len(self._unlabelled)
        self._groups = gad_rows.group_rows(students, submitted, self.rollout_n, n_labelled)
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
        rows |= self._teachers.other_rows(self._groups, rows, self.tokenizer.eos_token_id)
        metrics["response_length/cut_ratio"] = float(np.mean([tag["response_len"] >= limit for tag in batch.tags]))
        metrics["gad/missing_rollouts"] = (len(self._groups) + len(self._unlabelled)) * self.rollout_n - len(batch)
        known = {*rows, *batch.keys}
        missing = [row.key for group in self._groups for row in group.rows() if row.key not in known]
        rows |= {key: gad_rows.filler(self.tokenizer.eos_token_id) for key in missing}
        if reading := Reading.of(self.config, self.tokenizer):
            data = tq.kv_batch_get(batch.keys, batch.partition_id, select_fields=["prompts", "responses"])
            prompts, responses = (data[name].unbind() for name in ("prompts", "responses"))
            read, lengths = reading.read(response.tolist() for response in responses)
            self._read_as, replaced = replaced_rows(batch.keys, prompts, responses, read)
            rows |= replaced
            metrics.update(lengths)
        self._put_rows(batch.partition_id, rows)
        self._extra_keys.extend(rows)

    def _rows_from_data(self, uids: list[str], messages: list, teacher_ids: list) -> dict[str, Trajectory]:
        return gad_rows.rows_from_messages(self.tokenizer, self.config.data, uids, messages, teacher_ids)

    def _put_rows(self, partition_id: str, rows: dict[str, Trajectory]) -> None:
        fields = tu.list_of_dict_to_tensordict(list(rows.values()))
        tq.kv_batch_put(keys=list(rows), partition_id=partition_id, fields=fields, tags=[{} for _ in rows])

    def _view(self, keys: list[str], tags: list[dict] | None = None, fields: list[str] | None = None, **extra_info):
        """A batch of our own: ``extra_info`` of the stock batch persists and would leak into the actor's update."""
        tags = [{} for _ in keys] if tags is None else tags
        return KVBatchMeta(partition_id="train", keys=keys, tags=tags, fields=fields, extra_info=extra_info)

    # ------------------------------------------------------------------ passes that an update makes unnecessary

    def _one_optimizer_step(self, update: DictConfig) -> bool:
        """Is a batch one optimizer step of ``config.critic`` or of the actor's config?"""
        return update.ppo_epochs == 1 and update.ppo_mini_batch_size == self.config.data.train_batch_size

    def _scores_in_update(self) -> bool:
        gad = self.config.gad
        needs_pass = gad.discriminator_ema or gad.unlabelled_ratio or gad.credit == "token"
        return gad.score_in_update and not needs_pass and self._one_optimizer_step(self.config.critic)

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
        """Stock, or with the teacher's answer in each group (``gad.teacher_in_group``), or of each token
        (``gad.credit``)."""
        batch = self._students_advantage(batch, metrics)
        gad = self.config.gad
        if gad.teacher_in_group:
            by_std = self.config.algorithm.get("norm_adv_by_std_in_grpo", True)
            self._advantages = group_advantages(self._groups, self._scores, by_std)
        if gad.teacher_in_group or gad.credit == "token":
            self._put_advantages(batch)
        return batch

    def _students_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Stock; without its statistics of rollout correction if there are no old log-probabilities to compare."""
        if not self._skips_old_log_prob():
            return super()._compute_advantage(batch, metrics)
        algorithm = self.config.algorithm.copy()
        algorithm.rollout_correction = None
        view = copy.copy(self)  # this trainer with a view of its configuration, which stays as it is
        view.config = SimpleNamespace(**{**self.config, "algorithm": algorithm})
        return super(PPOTrainerGAD, view)._compute_advantage(batch, metrics)

    def _put_advantages(self, batch: KVBatchMeta) -> None:
        """Replace stock's advantages (and returns, which equal them); padding rows have none."""
        mask = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["response_mask"])["response_mask"]
        lengths = mask.offsets().diff().tolist()
        rows = [torch.as_tensor(self._advantages.get(key, 0.0)) for key in batch.keys]
        values = torch.cat([row.expand(length) for row, length in zip(rows, lengths, strict=True)]) * mask.values()
        nested = torch.nested.nested_tensor_from_jagged(values, mask.offsets())
        fields = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields)

    def _scale_advantages(self, batch: KVBatchMeta, factor: float) -> None:
        """Scale the policy term: stock's losses are proportional to a factor of all advantages."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"])
        fields = TensorDict({"advantages": data["advantages"] * factor}, batch_size=len(batch))
        tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields)
        self._advantages = {key: value * factor for key, value in self._advantages.items()}

    # ------------------------------------------------------------------ the discriminator's scores

    def _compute_values(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """D's score of every student answer, at its last response token, becomes ``values`` and ``rm_scores``."""
        score = self._score_by_updating if self._scores_in_update() else self._score_by_forward
        scores = score(batch, metrics)
        self._scores |= dict(zip(batch.keys, scores.tolist(), strict=True))
        self._put_scores(batch, scores, metrics)
        return batch

    def _score_by_forward(self, batch: KVBatchMeta, metrics: dict) -> torch.Tensor:
        """Scores by a forward pass of D; :meth:`_update_critic` updates it later in the step."""
        if self.config.gad.teacher_in_group:
            teachers = [group.teacher.key for group in self._groups]
            view = self._view(batch.keys, teacher_keys=teachers)
            teacher_scores = self.discriminator._forward_micro_batch(view, compute_teacher=True)
            self._scores |= dict(zip(teachers, teacher_scores.tolist(), strict=True))
        keys = [self._read_as[key].key if key in self._read_as else key for key in batch.keys]
        scores = self.discriminator.compute_values(self._view(keys, batch.tags))
        if self.config.gad.credit == "token":
            fields = ["values", "responses"]
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
            columns = zip(batch.keys, data["values"].unbind(), data["responses"].unbind(), strict=True)
            values = {key: row[-len(response) - 1 :] for key, row, response in columns}
            self._advantages = token_credit(self._groups, values, self.config.gad.credit_gamma)
        return scores

    def _score_by_updating(self, batch: KVBatchMeta, metrics: dict) -> torch.Tensor:
        """Update D; the scores are those of the update's forward pass. Stock's padding rows get 0."""
        with marked_timer("update_critic", self.timing_raw, color="pink"):
            self._scores = self._update_discriminator(batch.partition_id, metrics)
        return torch.tensor([self._scores.get(key, 0.0) for key in batch.keys])

    def _put_scores(self, batch: KVBatchMeta, scores: torch.Tensor, metrics: dict) -> None:
        """Write scores, one per row of ``batch``, into TransferQueue; 0 for padding, empty and lone answers."""
        task_reward = self.config.gad.task_reward
        fields = ["response_mask", "values", *(FIELDS if task_reward.weight else ())]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        offsets = data["response_mask"].offsets()
        lengths = offsets.diff()
        columns = zip(batch.keys, batch.tags, strict=True)
        uids = ["" if tag.get("is_padding", False) else gad_rows.split_key(key)[0] for key, tag in columns]
        real = torch.tensor([uid != "" for uid in uids]) & (lengths > 0)
        of_real = [uid for uid, is_real in zip(uids, real.tolist(), strict=True) if is_real]
        correlation = gad_rows.correlation_within_prompts(scores[real], lengths[real], of_real)
        if correlation is not None:
            metrics["critic/score_length_corr"] = correlation
        if task_reward.weight:
            scores = add_task_reward(task_reward, scores, uids, data, metrics)
        token_scores = torch.zeros(int(offsets[-1]), dtype=torch.float32)
        if self.config.algorithm.adv_estimator in GROUP_ESTIMATORS:
            scores = gad_rows.without_lone_answers(scores, uids, self.rollout_n)
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
        past = self._put_past_rows(partition_id) if self._replay.count else []
        fresh = self._teachers.with_others(read_as(self._groups, self._read_as))
        groups, critic = [*fresh, *past], self.config.critic
        sizes = [group.tokens for group in groups]
        n_ranks = self.discriminator.data_parallel_size()
        mini_batch = labelled_mini_batch(self.config)
        update = SimpleNamespace(
            ppo_mini_batch_size=mini_batch, shuffle=critic.shuffle, data_loader_seed=critic.data_loader_seed
        )
        ranks = spread_both(sizes, len(self._groups), update, n_ranks, self.global_steps)
        weights = gad_rows.pair_weights(groups, ranks) | self._teachers.shares(fresh)
        keys, fields = list(weights), TensorDict(gad_rows.update_fields(weights), batch_size=len(weights))
        tq.kv_batch_put(keys=keys, partition_id=partition_id, fields=fields)
        prompts = len(groups) // len(ranks[0])
        rows = self._view(keys, group_size=self.discriminator.group_size, mini_batch_prompts=prompts)
        update_metrics, scores = self.discriminator.update_critic(rows)
        metrics.update(update_metrics)
        score_of = dict(zip(keys, scores.tolist(), strict=True))
        score_of |= {key: score_of[row.key] for key, row in self._read_as.items() if row.key in score_of}
        metrics.update(self._teachers.metrics(self._groups, score_of))
        if self.config.gad.shortcut_probe:
            metrics.update(self._probe.note(fresh_groups(self._groups, partition_id)))
        if past:  # the metrics are about fresh pairs
            metrics.update(rename_dict(pair_metrics(self._groups, score_of), "critic/"))
            metrics["critic/replay_d_acc"] = pair_metrics(past, score_of)["d_acc"]
        if self._replay.count:
            self._replay.add(self.global_steps, fresh_groups(read_as(self._groups, self._read_as), partition_id))
        if self._gate.width:
            self._gate.note(metrics["critic/d_acc"])
            metrics["gad/policy_gate"] = self._gate.factor
        return score_of

    def _put_past_rows(self, partition_id: str) -> list[Group]:
        past, eos = self._replay.draw(self.global_steps), self.tokenizer.eos_token_id
        groups, rows = past_rows(past, self.rollout_n, eos)
        if rows:
            self._put_rows(partition_id, rows)
            self._extra_keys.extend(rows)
        return groups

    # ------------------------------------------------------------------ validation

    def _validate(self) -> dict[str, float]:
        """Stock, and then D's accuracy on the validation samples."""
        if not (self.use_critic and self.config.gad.val_d_acc):
            return super()._validate()
        view = copy.copy(self)  # this trainer with a replay buffer that notes what it hands out
        view.replay_buffer = seen = SeenRows(self.replay_buffer)
        metrics = super(PPOTrainerGAD, view)._validate()
        if seen.pairs and (reading := Reading.of(self.config, self.tokenizer)):
            read, _ = reading.read(pair.student for pair in seen.pairs)
            seen.pairs = [pair._replace(student=ids) for pair, ids in zip(seen.pairs, read, strict=True)]
        if seen.pairs:
            metrics |= self._validation_accuracies(seen.pairs)
            self._lead.note_validation(self.global_steps, metrics[VAL_D_ACC])
            if self._step_folder().is_dir():  # saved before this validation
                self._save_state()
        return metrics

    def _validation_accuracies(self, pairs: list[Pair]) -> dict[str, float]:
        """Shares of pairs in which D, and a fresh D, prefers the teacher. The rollout engine makes room for them."""
        rows = pair_rows(pairs, self.discriminator.data_parallel_size(), self.tokenizer.eos_token_id)
        self._put_rows("train", rows)
        self.checkpoint_manager.sleep_replicas()
        scores = self.discriminator.compute_values(self._view(list(rows)))
        fresh = fresh_accuracy(self.config, self.critic_wg, pairs, self.tokenizer)
        self.checkpoint_manager.update_weights(self.global_steps)
        tq.kv_clear(keys=list(rows), partition_id="train")
        student, teacher = scores[: 2 * len(pairs)].chunk(2)
        return {VAL_D_ACC: compute_discriminator_accuracy(student, teacher).mean().item(), **fresh}

    # ------------------------------------------------------------------ the actor

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Stock, with the loss that fits the passes of this step, and teacher rows if wanted; nothing while D leads."""
        if self._lead.max_steps:
            self._lead.note_training(self.global_steps, metrics["critic/d_acc"])
            metrics["gad/leading"] = float(self._lead.leads(self.global_steps))
            if metrics["gad/leading"]:
                return batch
        if self._gate.factor < 1.0:
            self._scale_advantages(batch, self._gate.factor)
        policy_loss = on_policy_loss if self._skips_old_log_prob() else ppo_loss
        if self.config.gad.imitation_coef or self.config.gad.teacher_in_group:
            self._update_actor_with_teacher(policy_loss, metrics)
        else:
            self._set_actor_loss(policy_loss)
            batch = super()._update_actor(batch, metrics)
        for name in ("rollout_probs_diff_mean", "rollout_probs_diff_max"):
            if f"actor/{name}" in metrics:  # under stock's name for what its old_log_prob pass finds
                metrics[f"training/{name}"] = metrics.pop(f"actor/{name}")
        bypass = OmegaConf.select(self.config, "algorithm.rollout_correction.bypass_mode")
        if self._one_optimizer_step(self.config.actor_rollout_ref.actor) and not bypass:
            for name in ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"):  # 0 at a ratio of 1
                metrics.pop(f"actor/{name}", None)
        return batch

    def _update_actor_with_teacher(self, policy_loss: Callable, metrics: dict) -> None:
        """One update on whole groups [teacher, s_1, ..., s_n]."""
        n_ranks = data_parallel_size(self.actor_rollout_wg, "actor")
        update = group_update(self._groups, self.config, n_ranks, self.global_steps, self._advantages)
        self._put_rows("train", update.blanks)
        tq.kv_batch_put(keys=update.keys, partition_id="train", fields=update.fields)
        terms = {name: self.config.gad[name] for name in ("imitation_coef", "teacher_in_group")}
        self._set_actor_loss(loss_with_teacher, policy_loss=policy_loss, **terms)
        names = [*SCORING_FIELDS, *update.per_token, *update.fields.keys()]
        # what stock divides by, missing answers included
        n_answers = self.config.actor_rollout_ref.actor.ppo_mini_batch_size * self.rollout_n
        self._train_actor(update.keys, n_answers, self.rollout_n + 1, metrics, names, **update.extra_info)

    def _train_actor(
        self,
        keys: list[str],
        global_batch_size: float,
        rows_per_prompt: int,
        metrics: dict,
        fields: list[str] | None = None,
        **extra_info: Any,
    ) -> None:
        """Optimizer steps of the actor over rows that :func:`spread` has put into their order; ``fields`` None: all
        that the rows share."""
        actor = self.config.actor_rollout_ref.actor
        mini_batch_size = actor.ppo_mini_batch_size * rows_per_prompt
        extra_info = {
            "global_batch_size": global_batch_size,
            "mini_batch_size": mini_batch_size,
            "epochs": actor.ppo_epochs,
            "seed": actor.data_loader_seed,
            "dataloader_kwargs": {"shuffle": False},  # spread has shuffled already
            "distillation_use_topk": False,
            "distillation_only": False,
            **extra_info,
        }
        if not actor.use_dynamic_bsz:
            rows_per_rank = mini_batch_size // data_parallel_size(self.actor_rollout_wg, "actor")
            extra_info["micro_batch_size_per_gpu"] = largest_divisor(rows_per_rank, actor.ppo_micro_batch_size_per_gpu)
        view = self._view(keys, fields=fields, **extra_info)
        output = rename_dict(self.actor_rollout_wg.update_actor(view)["metrics"], "actor/")
        output["perf/mfu/actor"] = output.pop("actor/mfu")
        metrics.update(reduce_metrics(output))

    def _set_actor_loss(self, loss: Callable, **arguments: Any) -> None:
        if self._actor_loss != (loss, arguments):
            actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(loss, config=actor_config, **arguments))
            self._actor_loss = (loss, arguments)

    # ------------------------------------------------------------------ checkpoints

    def _stateful(self) -> dict[str, Any]:
        """Parts that are switched on and have a state; stock checkpoints hold the rest."""
        parts = {
            "discriminator_lead": (self._lead, self._lead.max_steps),
            "policy_gate": (self._gate, self._gate.width),
            "replay": (self._replay, self._replay.count),
            "shortcut_probe": (self._probe, self.config.gad.shortcut_probe),
            "unlabelled": (self._prompts, self._prompts is not None),
        }
        return {name: part for name, (part, on) in parts.items() if on}

    def _save_state(self) -> None:
        save_state(self._step_folder(), {name: part.state_dict() for name, part in self._stateful().items()})

    def _step_folder(self) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"

    def _load_checkpoint(self):
        if self.use_critic and self.config.gad.discriminator_ema:
            self.critic_wg.start_average(self.config.gad.discriminator_ema)
        super()._load_checkpoint()
        folder = resumed_checkpoint(self.config)
        if self.global_steps and folder is not None:
            parts = self._stateful()
            for name, state in load_state(folder, set(parts)).items():
                parts[name].load_state_dict(state)


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
        keys = [teachers[i].key for rank in ranks for indices in rank for i in indices]
        self._train_actor(keys, len(teachers) / len(ranks[0]), 1, metrics, temperature=1.0, calculate_entropy=False)


def stage_class(config: DictConfig) -> type[PPOTrainerGAD]:
    """Class of a run. Stages warmup and gad differ in the actor's objective, which ``gad.actor_objective`` can swap."""
    stage, objective = (OmegaConf.select(config, f"gad.{key}") for key in ("stage", "actor_objective"))
    # these modules extend the classes above, so they are imported late
    if stage == "seqkd":
        from recipe.gad.training.seqkd_trainer import PPOTrainerSeqKD

        return PPOTrainerSeqKD
    if stage in ("soda", "online_dpo"):
        from recipe.gad.training.preference_trainer import STAGES

        return STAGES[stage]
    return PPOTrainerWarmup if objective == "imitation" else PPOTrainerGAD

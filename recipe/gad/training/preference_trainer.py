"""The controls soda and online_dpo: DPO of the teacher's answer against the student's own answers.

    online_dpo  every step samples fresh answers of the current policy
    soda        the answers are samples of the policy from which the run starts, drawn once before the first step

Both are stages of the GAD trainer without a discriminator; recipe/gad/training/preference.py has the loss. As in stage
gad, gad.imitation_coef adds an imitation term.
"""

import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from recipe.gad.run.atomic_io import JsonLog
from recipe.gad.training import preference
from recipe.gad.training import rows as gad_rows
from recipe.gad.training.trajectory import TEACHER_IDS
from verl.trainer.ppo.utils import create_rl_sampler
from verl.trainer.ppo.v1.trainer_gad import PPOTrainerGAD
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.debug import marked_timer
from verl.workers.critic.dp_critic import SCORING_FIELDS, data_parallel_size, largest_divisor
from verl.workers.utils.padding import response_from_nested

logger = logging.getLogger(__name__)

START_ANSWERS = "start_answers.jsonl"
"""File of a soda run's folder with the answers of the policy from which it started."""
CHUNK = 512
"""Prompts that are sampled and stored at a time."""


class PPOTrainerOnlineDPO(PPOTrainerGAD):
    """Stage online_dpo: a stock step without scores and advantages, and an update of the actor on pairs."""

    def _scores_in_update(self) -> bool:
        return False  # nothing scores

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return batch

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """One optimizer step on the pairs of the step; a missing rollout is no pair."""
        n, groups = self.rollout_n, self._groups
        sizes = [group.tokens for group in groups]
        n_ranks = data_parallel_size(self.actor_rollout_wg, "actor")
        ranks = gad_rows.spread(sizes, self.config.actor_rollout_ref.actor, n_ranks, self.global_steps)
        weights = gad_rows.pair_weights(groups, ranks)
        keys, pair_weights = list(weights), torch.tensor(list(weights.values()))
        reference, _ = self._sequence_log_probs(keys, n_ranks, of_reference=True)
        policy, tokens = self._sequence_log_probs(keys, n_ranks, of_reference=False)
        policy.requires_grad_()
        loss, found = preference.compute_dpo_loss(policy, reference, pair_weights, n, self.config.gad.dpo_beta)
        metrics.update({f"actor/{name}": float(metric.aggregate()) for name, metric in found.items()})
        if coef := self.config.gad.imitation_coef:
            imitation = preference.imitation_loss(policy, tokens, n)
            loss = loss + coef * imitation
            metrics["actor/imitation_loss"] = imitation.item()
        [coefficients] = torch.autograd.grad(loss, policy)
        fields = TensorDict({preference.COEFFICIENT: coefficients.float()}, batch_size=len(keys))
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields)
        self._set_actor_loss(preference.coefficient_loss)
        fields_read = [*SCORING_FIELDS, preference.COEFFICIENT]
        self._train_actor(keys, len(keys), n + 1, metrics, fields_read, temperature=1.0, calculate_entropy=False)
        del metrics["actor/loss"]  # the sum has the right gradient, but its value means nothing
        return batch

    def _sequence_log_probs(
        self, keys: list[str], n_ranks: int, of_reference: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the answers of rows under the policy or the reference, (rows,) in float64; and the
        tokens of the answers, (rows,)."""
        section = self.config.actor_rollout_ref["ref" if of_reference else "rollout"]
        extra_info: dict[str, Any] = {"calculate_entropy": False, "compute_loss": False, "temperature": 1.0}
        if not section.log_prob_use_dynamic_bsz:
            limit = section.log_prob_micro_batch_size_per_gpu
            extra_info["micro_batch_size_per_gpu"] = largest_divisor(len(keys) // n_ranks, limit)
        compute = self.actor_rollout_wg.compute_log_prob
        if of_reference and self.ref_in_actor:
            extra_info["no_lora_adapter"] = True
        elif of_reference:
            compute = self.ref_policy_wg.compute_ref_log_prob
        rows = self._view(keys, fields=SCORING_FIELDS, **extra_info)
        compute(rows)
        fields = ["log_probs", "response_mask"]
        data = tq.kv_batch_get(keys=keys, partition_id=rows.partition_id, select_fields=fields)
        mask = data["response_mask"]
        tokens = torch.stack([row.sum() for row in mask.unbind()])
        return preference.sequence_log_probs(response_from_nested(data["log_probs"], mask), mask), tokens

    def _compute_metrics(self, batch, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        lengths = [tag["response_len"] for tag in batch.tags if not tag.get("is_padding", False)]
        metrics.update(gad_rows.length_statistics("response_length", lengths))
        metrics.update(gad_rows.step_metrics(timing_raw, global_steps, epoch))


class PPOTrainerSODA(PPOTrainerOnlineDPO):
    """Stage soda: pairs with the start policy's answers, which :meth:`fit` samples and stores before the first step."""

    samples_in_training = False

    def __init__(self, config):
        super().__init__(config)
        self._start_records: dict[str, dict] = {}

    def _load_checkpoint(self):
        """Wait: :meth:`fit` loads the checkpoint once the policy that is loaded now has answered."""
        self.start_engine()
        self.global_steps = 0

    def fit(self, agent_loop_manager):
        self.agent_loop_manager = agent_loop_manager
        self._sample_start_answers()
        self.checkpoint_manager.sleep_replicas()
        super()._load_checkpoint()
        if self._wakes_engine():
            self.on_init_end()
        super().fit(agent_loop_manager)

    def _start_key(self, messages: list[dict]) -> str:
        rollout = self.config.actor_rollout_ref.rollout
        template_kwargs = self.config.data.get("apply_chat_template_kwargs")
        names = ("n", "temperature", "top_p", "top_k", "prompt_length", "response_length", "seed")
        settings = [self.config.actor_rollout_ref.model.path, template_kwargs, *(rollout[name] for name in names)]
        return preference.start_key(settings, messages)

    def _sample_start_answers(self) -> None:
        """Read the stored answers, then sample and store those that are missing for the prompts of this run."""
        order = list(create_rl_sampler(self.config.data, self.train_dataset))
        order = order[: self.total_training_steps * self.config.data.train_batch_size]
        file = Path(self.config.trainer.default_local_dir) / START_ANSWERS
        with JsonLog(file, "run_soda.sh") as log:
            self._start_records = {record["key"]: record for record in log.records(key=str, prompt=list, answers=list)}
            missing: dict[str, int] = {}
            for row in order:
                key = self._start_key(self.train_dataset[row]["raw_prompt"])
                if key not in self._start_records:
                    missing.setdefault(key, row)
            for start in range(0, len(missing), CHUNK):
                logger.info("sampling the start policy's answers: %d of %d prompts", start, len(missing))
                for record in self._sample_chunk(list(missing.values())[start : start + CHUNK]):
                    log.append(record)
                    self._start_records[record["key"]] = record

    def _sample_chunk(self, rows: list[int]) -> list[dict[str, Any]]:
        """Records of sampled answers to the prompts of these rows of the training data."""
        data = collate_fn([self.train_dataset[row] for row in rows])
        data["uid"] = np.array([str(uuid.uuid4()) for _ in rows], dtype=object)
        batch = tu.get_tensordict(data)
        tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
        wanted = {uid: self._start_key(messages) for uid, messages in zip(data["uid"], data["raw_prompt"], strict=True)}
        self._submit_batch_to_rollout(batch)
        sampled, _ = self.replay_buffer.sample(
            global_steps=self.global_steps, partition_id="train", batch_size=len(rows)
        )
        fields = tq.kv_batch_get(keys=sampled.keys, partition_id="train", select_fields=["prompts", "responses"])
        pairs = zip(fields["prompts"].unbind(), fields["responses"].unbind(), strict=True)
        records = preference.start_records(wanted, dict(zip(sampled.keys, pairs, strict=True)))
        tq.kv_clear(keys=sampled.keys, partition_id="train")
        return records

    def prepare_step(self) -> dict:
        self._submitted.clear()
        self._data.clear()
        return {}

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        self.on_sample_end()  # the rollout engine sleeps until the weights are sent to it again
        data = self._next_train_batch(sample_batch_size)
        self._note_prompts(data)
        rows: dict[str, gad_rows.Trajectory] = {}
        for uid, messages, teacher_ids in zip(data["uid"], data["raw_prompt"], data[TEACHER_IDS], strict=True):
            rows |= preference.start_rows(uid, self._start_records[self._start_key(messages)], teacher_ids)
        self._put_rows("train", rows)
        lengths = [(row["responses"].numel(), row["input_ids"].numel()) for row in rows.values()]
        tags = [{"response_len": answer, "seq_len": whole} for answer, whole in lengths]
        batch = self._view(list(rows), tags)
        self._add_teacher_rows(batch, metrics)
        with marked_timer("update_actor", timing_raw, color="red"):
            return self._update_actor(batch, metrics)

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """Nothing: the answers are those of :data:`START_ANSWERS`."""


STAGES = {"soda": PPOTrainerSODA, "online_dpo": PPOTrainerOnlineDPO}
"""Stage -> its trainer."""

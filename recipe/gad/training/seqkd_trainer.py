"""Stage seqkd: imitation alone, on teacher rows that come straight from the data."""

from typing import Any

import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from recipe.gad.training import rows as gad_rows
from recipe.gad.training.bad_steps import not_finite
from recipe.gad.training.rows import Row, Trajectory
from recipe.gad.training.trajectory import TEACHER_IDS
from verl.trainer.ppo.v1.trainer_gad import PPOTrainerWarmup
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.debug import marked_timer

COLUMNS = ("raw_prompt", TEACHER_IDS, "index", "reward_model")
"""What a step reads of a row of the data; the last two serve the draw of one of several answers."""


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of :data:`COLUMNS`."""
    return collate_fn([{name: row[name] for name in COLUMNS if name in row} for row in rows])


def batch_of(rows: list[Trajectory], extra_info: dict[str, Any]) -> TensorDict:
    """Rows and what the workers must know, as the queue would hand them out."""
    columns = {name: tu.nested_tensor_from_tensor_list([row[name] for row in rows]) for name in rows[0]}
    return tu.get_tensordict(columns, extra_info)


class PPOTrainerSeqKD(PPOTrainerWarmup):
    """Stage seqkd: imitation alone. The teacher's rows come straight from the data; nothing is sampled or scored.

    Each batch has one reader, so it goes to the actor's workers with the call that trains on it, and not through
    TransferQueue. The queue knows the keys alone, which stock code clears after the step.

    A run that never validates starts no rollout engine, and none of the processes that ask it or score its answers.
    Otherwise the engine sleeps in all steps that do not validate, and gets no weights after them.
    """

    samples_in_training = False
    _engine_wakes = True
    """Is the engine awake at the start of a step, and at its end?"""

    def __init__(self, config):
        super().__init__(config)
        if not self._wakes_engine():
            self._enable_hybrid_replicas = False
            rollout = config.actor_rollout_ref.rollout
            rollout.nnodes = 1  # stock asks for a node before it finds that no engine is wanted
            rollout.agent.num_workers = config.reward.num_workers = 0

    def on_init_end(self):
        if self._wakes_engine():
            super().on_init_end()

    def _wakes_engine(self) -> bool:
        return self._engine_wakes and super()._wakes_engine()

    def on_step_end(self):
        step, every = self.global_steps, self.config.trainer.test_freq
        # stock's condition of a validation after this step
        self._engine_wakes = every > 0 and (step % every == 0 or step >= self.total_training_steps)
        super().on_step_end()

    def _init_dataloader(self):
        super()._init_dataloader()
        self.train_dataloader.collate_fn = collate

    def prepare_step(self) -> dict:
        return {}

    def _view(self, keys, tags=None, fields=None, **extra_info) -> TensorDict:
        return batch_of([self._rows[key] for key in keys], extra_info)

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        self.on_sample_end()  # the rollout engine sleeps until weights are sent to it again
        data = self._next_train_batch(sample_batch_size)
        self._rows = rows = self._rows_from_data(*(list(data[key]) for key in ("uid", "raw_prompt", TEACHER_IDS)))
        metrics.update(gad_rows.teacher_length_metrics(rows, self.config.data.max_response_length))
        with marked_timer("update_actor", timing_raw, color="red"):
            self._imitate([Row(key, row["input_ids"].numel()) for key, row in rows.items()], metrics)
        if not_finite(metrics):  # a run that stops writes down the rows in the queue
            self._put_rows("train", rows)
        else:
            tq.kv_batch_put(keys=list(rows), partition_id="train", tags=[{} for _ in rows])
        return super()._view(list(rows))

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict, rollout_data_dir: str) -> None:
        """Nothing: there are no rollouts."""

    def _compute_metrics(self, batch, metrics: dict, timing_raw: dict, global_steps: int, epoch: int) -> None:
        metrics.update(gad_rows.step_metrics(timing_raw, global_steps, epoch))

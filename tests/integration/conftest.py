"""A live GAD trainer inside the test process: real Ray cluster, real engine workers and rollouts, step by step."""

import shutil
import tempfile

import pytest
import ray
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict

RAY_CPUS = 16
REWARD = """
import pyarrow.parquet as pq

VALIDATION = set(pq.read_table({!r})["teacher_response"].to_pylist())


def compute_score(solution_str, ground_truth, extra_info, **_):
    assert not extra_info.get("scored_by_discriminator"), "D alone scores these rows"
    return 0.25 if ground_truth in VALIDATION else len(solution_str.split()) / 10
"""


class LiveTrainer:
    """Runs single steps of a trainer; configuration that the trainer process reads can change between steps."""

    def __init__(self, config):
        from recipe.gad.training.agent_loops import AgentLoops
        from verl.trainer.ppo.v1 import get_trainer_cls
        from verl.utils.skip import SkipManager

        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        SkipManager.init(config)
        self.config = config
        self.trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)
        self.trainer.init()
        self.trainer.agent_loop_manager = AgentLoops.create(
            config=config,
            llm_client=self.trainer.get_llm_client(),
            teacher_client=self.trainer.get_teacher_client(),
            reward_loop_worker_handles=self.trainer.get_reward_handles(),
        )
        self.trainer.prev_step_profile = self.trainer.curr_step_profile = self.trainer.next_step_profile = False
        self.trainer.global_steps = 1

    def set(self, **values):
        """Set dotted configuration keys given with __ for a dot."""
        with open_dict(self.config):
            for key, value in values.items():
                OmegaConf.update(self.config, key.replace("__", "."), value)

    def sample(self):
        """Rollouts of one batch and the teacher's rows: (batch, metrics) as the stock step has them after balancing."""
        trainer, metrics = self.trainer, {}
        trainer.timing_raw = {}
        trainer.prepare_step()
        batch, _ = trainer.replay_buffer.sample(
            global_steps=trainer.global_steps, partition_id="train", batch_size=self.config.data.train_batch_size
        )
        batch.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
        trainer.on_sample_end()
        return batch, metrics

    def finish(self, batch):
        """End of a step: weights to the rollout, rows out of the queue."""
        self.trainer.on_step_end()
        tq.kv_clear(keys=batch.keys, partition_id="train")
        self.trainer.global_steps += 1

    def load(self):
        """Resume, as a new process would: no pass over the data has begun."""
        self.trainer._load_checkpoint()
        self.trainer.train_dataloader_it = None

    def step(self):
        """One whole step; returns (metrics, fields): the log and the students' rows, before they are cleared."""
        trainer, metrics = self.trainer, {}
        trainer.timing_raw = {}
        trainer.on_step_begin()
        batch = trainer.step(metrics, trainer.timing_raw)
        fields = self.fields(batch.keys)
        trainer._compute_metrics(batch, metrics, {**trainer.timing_raw, "step": 1.0}, trainer.global_steps, 0)
        self.finish(batch)
        return metrics, fields

    def fields(self, keys):
        """All fields that the rows share."""
        return tq.kv_batch_get(keys=list(keys), partition_id="train")

    def on_workers(self, function):
        """Result of ``function(worker)`` on rank 0's worker process (worker.worker_dict: role -> worker)."""
        return ray.get(self.trainer.actor_rollout_wg.workers[0].__ray_call__.remote(function))

    def weights(self, role):
        """Full float32 weights of "actor" or "critic" by name."""

        def collect(worker):
            import torch

            engines = {"critic": lambda w: w["critic"].engine}
            roles = worker.worker_dict
            if role == "critic":
                engine = engines["critic"](roles)
            else:
                engine = next(w for name, w in roles.items() if name.startswith("actor")).actor.engine
            state = engine.module.state_dict()
            return {
                name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().to(torch.float32).cpu().clone()
                for name, p in state.items()
            }

        return self.on_workers(collect)


@pytest.fixture(scope="package")
def ray_cluster():
    folder = tempfile.mkdtemp(prefix="gad-ray-", dir="/tmp")
    ray.init(
        num_cpus=RAY_CPUS,
        num_gpus=1,
        include_dashboard=False,
        _temp_dir=folder,
        log_to_driver=False,
        runtime_env={"env_vars": {"VERL_PLATFORM": "cpu", "TRANSFER_QUEUE_ENABLE": "1", "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def live(ray_cluster, compose_config, tiny_problem, tmp_path_factory):
    """A GAD-stage trainer at world size 1: actor, critic, reference, rollouts.

    All modules share it: a test finishes the steps it begins and restores the keys it sets.
    """
    folder = tmp_path_factory.mktemp("live")
    (folder / "reward.py").write_text(REWARD.format(f"{tiny_problem}/val.parquet"))
    config = compose_config(
        f"trainer.default_local_dir={folder}/out",
        "trainer.total_training_steps=100",
        "trainer.total_epochs=100",
        "gad.stage=warmup",
        "trainer.resume_mode=disable",
        f"reward.custom_reward_function.path={folder}/reward.py",
        "gad.task_reward.weight=0",
        "gad.score_in_update=False",  # every pass on its own: tests look at them one by one
        "gad.skip_old_log_prob=False",
    )
    config.transfer_queue.enable = True
    tq.init(config.transfer_queue)
    yield LiveTrainer(config)
    tq.close()


@pytest.fixture(autouse=True)
def stage_of_live(request):
    """A test may give the shared trainer the class of another stage; the next test gets it as it was."""
    trainer = request.getfixturevalue("live").trainer if "live" in request.fixturenames else None
    stage = trainer.__class__
    yield
    if trainer is not None:
        trainer.__class__ = stage

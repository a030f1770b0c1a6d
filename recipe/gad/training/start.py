"""The start of a run's processes. Each imports for seconds, so they start side by side where stock verl starts one
after the other.

Stock order: workers and models, rollout engine, then the processes that ask the engine (agent loop, load balancer).
Here the latter start beside the engine. The engine itself still starts once the models are built and before a
checkpoint is loaded: vLLM measures the memory that they leave.
"""

import asyncio
from typing import Any, ClassVar, Optional

import ray

from recipe.gad.run.config import ROLLOUT, get
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.import_utils import load_class_from_fqn


class AgentLoops(AgentLoopManagerTQ):
    """Stock's manager of the agent loop's workers (``rollout.agent.agent_loop_manager_class``), which may be started
    before stock asks for it."""

    _started: ClassVar[Optional["AgentLoops"]] = None

    @classmethod
    def start(cls, **arguments: Any) -> None:
        """Start the workers; the next :meth:`create` returns their manager."""
        cls._started = super().create(**arguments)

    @classmethod
    def create(cls, *args: Any, **arguments: Any) -> "AgentLoops":
        started, cls._started = cls._started, None
        return started or super().create(*args, **arguments)


class StartsSideBySide(PPOTrainerSync):
    """Stock trainer whose agent loop starts beside the rollout engine."""

    _engine_to_come = False

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        self._engine_to_come = getattr(self, "_enable_hybrid_replicas", True)
        if self._engine_to_come:  # stock makes a load balancer without engines, and start_engine adds them
            self._enable_hybrid_replicas = False
            self.config.actor_rollout_ref.rollout.nnodes = 1  # stock asks for a node of such a manager

    def _load_checkpoint(self):
        self.start_engine()
        super()._load_checkpoint()

    def start_engine(self) -> None:
        """Start the rollout engine, and the agent loop beside it. Further calls do nothing."""
        if not self._engine_to_come:
            return
        self._engine_to_come = False
        self.config.actor_rollout_ref.rollout.nnodes = 0
        if (name := get(self.config, f"{ROLLOUT}.agent.agent_loop_manager_class")) and issubclass(
            manager_class := load_class_from_fqn(name), AgentLoops
        ):
            manager_class.start(
                config=self.config,
                llm_client=self.get_llm_client(),
                teacher_client=self.get_teacher_client(),
                reward_loop_worker_handles=self.get_reward_handles(),
            )
        manager = self.llm_server_manager
        manager.worker_group = self.actor_rollout_wg
        asyncio.run(manager._initialize_llm_servers())
        servers = dict(zip(manager.server_addresses, manager.server_handles, strict=True))
        ray.get(manager.global_load_balancer.add_servers.remote(servers))
        self.checkpoint_manager.add_replicas(manager.get_replicas())
        self.checkpoint_manager.sleep_replicas()

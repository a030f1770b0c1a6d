"""The start of a run's processes. Each imports for seconds, so they start side by side where stock verl starts one
after the other.

Stock order: workers and models, rollout engine, then the processes that ask the engine (agent loop, load balancer).
Here the latter start beside the engine. The engine itself still starts once the models are built and before a
checkpoint is loaded: vLLM measures the memory that they leave.
"""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Optional

import ray
from omegaconf import DictConfig
from ray.actor import ActorHandle

from recipe.gad.run.config import ROLLOUT, get, world_size
from verl.plugin.platform import get_platform
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.import_utils import load_class_from_fqn
from verl.workers.rollout.replica import RolloutReplica, get_rollout_replica_class


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


def waiting(server: type) -> type:
    """The class of a server whose process starts and imports its engine; ``begin`` makes it the server."""

    class Waiting(server):
        def __init__(self):
            """Nothing yet."""

        def begin(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    return Waiting


class Begins:
    """Stands where stock's replica has the server's class, and hands out the process that waits."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor

    def options(self, **options: Any) -> "Begins":
        """Itself: :func:`start_servers` has chosen the options."""
        return self

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        ray.get(self.actor.begin.remote(*args, **kwargs))
        return self.actor


def start_servers(config: DictConfig) -> dict[int, ActorHandle]:
    """Start the processes of the rollout engine's servers, which import it and wait.

    Args:
        config: resolved configuration of the run.

    Returns:
        Rank of a replica -> its server. None for engines and clusters where stock decides later how a server starts.
    """
    rollout = config.actor_rollout_ref.rollout
    replica_class = get_rollout_replica_class(rollout.name, rollout.disaggregation.enabled)  # imports the engine
    if rollout.name not in ("vllm", "hf") or len([node for node in ray.nodes() if node["Alive"]]) > 1:
        return {}
    model, platform = config.actor_rollout_ref.model, get_platform()
    variables = dict.fromkeys(platform.ray_noset_envvars(), "1") | platform.rollout_env_vars()
    servers = {}
    sizes = (f"{name}_parallel_size" for name in ("tensor_model", "data", "pipeline_model"))
    for rank in range(world_size(config) // math.prod(rollout[size] for size in sizes)):
        replica = replica_class(rank, rollout, model, rollout.n_gpus_per_node)
        options = {
            "name": f"{replica._get_server_name_prefix()}server_{rank}_0",
            "runtime_env": {"env_vars": variables},
            "max_concurrency": replica.max_concurrency,
            **({"num_cpus": 0} if rollout.name == "hf" else {}),
        }
        server_class = waiting(replica.server_class.__ray_actor_class__)
        servers[rank] = ray.remote(server_class).options(**options).remote()
    return servers


def with_servers(replica: type[RolloutReplica], servers: dict[int, ActorHandle]) -> type[RolloutReplica]:
    """``replica`` that takes its server from :func:`start_servers`."""

    class WithServer(replica):
        async def launch_servers(self):
            self.server_class = Begins(servers[self.replica_rank])
            await super().launch_servers()

    return WithServer


class StartsSideBySide(PPOTrainerSync):
    """Stock trainer whose agent loop starts beside the rollout engine."""

    _engine_to_come = False

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        self._engine_to_come = getattr(self, "_enable_hybrid_replicas", True)
        if self._engine_to_come:  # stock makes a load balancer without engines, and start_engine adds them
            self._enable_hybrid_replicas = False
            self.config.actor_rollout_ref.rollout.nnodes = 1  # stock asks for a node of such a manager
            self._servers = ThreadPoolExecutor(1).submit(start_servers, self.config)

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
        manager, servers = self.llm_server_manager, self._servers.result()
        if servers:
            manager.rollout_replica_class = with_servers(manager.rollout_replica_class, servers)
        manager.worker_group = self.actor_rollout_wg
        asyncio.run(manager._initialize_llm_servers())
        addresses = dict(zip(manager.server_addresses, manager.server_handles, strict=True))
        ray.get(manager.global_load_balancer.add_servers.remote(addresses))
        self.checkpoint_manager.add_replicas(manager.get_replicas())
        self.checkpoint_manager.sleep_replicas()

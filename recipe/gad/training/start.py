"""The start of a run's processes. Each imports for seconds; stock verl starts one after the other.

    stock   models -> rollout engine: trainer imports it, server imports it, engine starts -> load balancer, agent loop
    here    models, while trainer and server import the engine -> engine starts, while load balancer and agent loop do

The engine itself starts where it does in stock: once the models are built, since vLLM measures the memory that they
leave, and before a checkpoint is loaded.
"""

import asyncio
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
from omegaconf import DictConfig
from ray.actor import ActorHandle

from recipe.gad.run.config import ROLLOUT, get, world_size
from recipe.gad.training.average import DiscriminatorWorker
from verl.plugin.platform import get_platform
from verl.trainer.ppo.utils import Role
from verl.utils.import_utils import load_class_from_fqn
from verl.workers.rollout.replica import RolloutReplica, get_rollout_replica_class

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync as Stock
else:
    Stock = object  # that package imports this module

SERVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm": ("vllm_server_{}_0", {}),
    "hf": ("hf_server_{}", {"num_cpus": 0}),
}
"""Engine -> what its replica sets for a server on one node: the name by rank, and further options of Ray."""


def waiting(server: type) -> type:
    """The class of a server whose process starts and imports the engine; ``begin`` makes it the server."""

    class Waiting(server):
        def __init__(self):
            """Nothing yet."""

        def begin(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    Waiting.__name__ = Waiting.__qualname__ = server.__name__  # as Ray shall call it
    return Waiting


class Begins:
    """Stands where a stock replica has the server's class, and hands out the process that waits."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor

    def options(self, **options: Any) -> "Begins":
        """Itself: :func:`start_servers` has set the options."""
        return self

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        ray.get(self.actor.begin.remote(*args, **kwargs))
        return self.actor


def start_servers(config: DictConfig) -> dict[int, ActorHandle]:
    """Import the rollout engine, and start its servers' processes, which import it and wait.

    Args:
        config: resolved configuration of the run.

    Returns:
        Rank of a replica -> its server. Empty for engines that are not in :data:`SERVERS`, and on several nodes, where
        stock decides later what starts where.
    """
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    replica_class = get_rollout_replica_class(rollout.name, rollout.disaggregation.enabled)
    if rollout.name not in SERVERS or rollout.disaggregation.enabled or sum(node["Alive"] for node in ray.nodes()) > 1:
        return {}
    (name, further), platform = SERVERS[rollout.name], get_platform()
    variables = dict.fromkeys(platform.ray_noset_envvars(), "1") | platform.rollout_env_vars()
    size = math.prod(rollout[f"{kind}_parallel_size"] for kind in ("tensor_model", "data", "pipeline_model"))
    servers = {}
    for rank in range(world_size(config) // size):
        replica = replica_class(rank, rollout, model, rollout.n_gpus_per_node)
        options = {
            "name": name.format(rank),
            "runtime_env": {"env_vars": variables},
            "max_concurrency": replica.max_concurrency,
            **further,
        }
        servers[rank] = ray.remote(waiting(replica.server_class.__ray_actor_class__)).options(**options).remote()
    return servers


def with_servers(replica: type[RolloutReplica], servers: dict[int, ActorHandle]) -> type[RolloutReplica]:
    """``replica`` that takes its server from :func:`start_servers`."""

    class WithServer(replica):
        async def launch_servers(self):
            self.server_class = Begins(servers[self.replica_rank])
            await super().launch_servers()

    return WithServer


def introduce(servers: Iterable[ActorHandle], actors: Iterable[ActorHandle]) -> None:
    """Let ``actors`` import the engine of ``servers`` now: Ray imports an actor's class where its handle arrives."""
    for actor in actors:
        actor.__ray_call__.remote(lambda *_: None, list(servers))


class StartsSideBySide(Stock):
    """What a trainer of stock verl starts, and when. A base of the GAD trainer, before the stock trainer."""

    _engine_to_come = False

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        if self.use_critic:
            self.role_worker_mapping[Role.Critic] = ray.remote(DiscriminatorWorker)
        self._engine_to_come = getattr(self, "_enable_hybrid_replicas", True)
        if self._engine_to_come:  # stock makes a load balancer without servers; start_engine adds them
            self._enable_hybrid_replicas = False
            self.config.actor_rollout_ref.rollout.nnodes = 1  # stock asks for a node of such a manager
            self._servers = ThreadPoolExecutor(1).submit(start_servers, self.config)

    def _load_checkpoint(self):
        self.start_engine()
        super()._load_checkpoint()

    def start_engine(self) -> None:
        """Start the rollout engine, and the agent loop's processes beside it. Further calls do nothing."""
        if not self._engine_to_come:
            return
        self._engine_to_come = False
        self.config.actor_rollout_ref.rollout.nnodes = 0
        name, asking = get(self.config, f"{ROLLOUT}.agent.agent_loop_manager_class"), []
        if name and hasattr(agent_loops := load_class_from_fqn(name), "start"):
            asking = agent_loops.start(
                config=self.config,
                llm_client=self.get_llm_client(),
                teacher_client=self.get_teacher_client(),
                reward_loop_worker_handles=self.get_reward_handles(),
            ).agent_loop_workers
        manager, servers = self.llm_server_manager, self._servers.result()
        manager.worker_group = self.actor_rollout_wg
        if servers:
            manager.rollout_replica_class = with_servers(manager.rollout_replica_class, servers)
            introduce(servers.values(), (manager.global_load_balancer, *asking))
        asyncio.run(manager._initialize_llm_servers())
        by_address = dict(zip(manager.server_addresses, manager.server_handles, strict=True))
        ray.get(manager.global_load_balancer.add_servers.remote(by_address))
        self.checkpoint_manager.add_replicas(manager.get_replicas())
        self.checkpoint_manager.sleep_replicas()

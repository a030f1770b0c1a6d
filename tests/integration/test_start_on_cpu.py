"""The start of a run's processes (recipe/gad/training/start.py): real Ray actors, and the live trainer's."""

import asyncio
import sched
import sys

import pytest
import ray

from recipe.gad.training.start import Begins, introduce, waiting


@pytest.fixture
def server(ray_cluster):
    """A server's class as rollout engines have it, with asynchronous methods. Ray sends a nested class as a value."""

    class Server:
        def __init__(self, low, high):
            if low > high:
                raise ValueError(f"{low} is above {high}")
            self.range = (low, high)
            self.ready = asyncio.Event()

        async def wait(self):
            await self.ready.wait()
            return self.range

        async def go(self):
            self.ready.set()

    return Server


def test_a_waiting_process_becomes_the_server(server):
    process = ray.remote(waiting(server)).options(name="server_0", num_cpus=0).remote()
    actor = Begins(process).options(name="stock's options").remote(1, high=2)
    answer = actor.wait.remote()
    ray.get(actor.go.remote())
    assert ray.get(answer) == (1, 2)
    assert ray.get(ray.get_actor("server_0").wait.remote()) == (1, 2)  # stock looks servers up by name


def test_what_keeps_a_server_from_starting_is_raised(server):
    process = ray.remote(waiting(server)).options(num_cpus=0).remote()
    with pytest.raises(ValueError, match="2 is above 1"):
        Begins(process).remote(2, 1)


def test_who_asks_the_servers_imports_their_engine_at_once(ray_cluster):
    class Server(sched.scheduler):
        """``sched`` is the engine."""

    class Asks:
        def knows(self):
            return "sched" in sys.modules

    servers = [ray.remote(waiting(Server)).options(num_cpus=0).remote()]
    told, other = (ray.remote(Asks).options(num_cpus=0).remote() for _ in range(2))
    introduce(servers, [told])
    assert ray.get([told.knows.remote(), other.knows.remote()]) == [True, False]


def test_the_engine_of_the_live_trainer_has_started_once(live):
    trainer = live.trainer
    manager = trainer.llm_server_manager
    (replica,) = trainer.checkpoint_manager.replicas
    assert manager.get_replicas() == [replica] and replica.workers == trainer.actor_rollout_wg.workers
    assert ray.get(manager.global_load_balancer.get_all_servers.remote()) == manager.get_addresses()
    assert ray.get_actor("hf_server_0") == replica.servers[0]
    assert trainer.config.actor_rollout_ref.rollout.nnodes == 0  # as configured
    trainer.start_engine()
    assert trainer.checkpoint_manager.replicas == [replica]


def test_the_live_trainer_has_one_set_of_agent_loops(live):
    actors = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert len([name for name in actors if name.startswith("agent_loop_worker")]) == 1

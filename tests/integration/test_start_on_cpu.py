"""The start of a run's processes (recipe/gad/training/start.py): real Ray actors, and the live trainer's."""

import asyncio
import os

import pytest
import ray

from recipe.gad.training.start import Begins, waiting


class Server:
    """A server as rollout engines have them: an actor with asynchronous methods."""

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
        return os.getpid()


def test_a_waiting_process_becomes_the_server(ray_cluster):
    process = ray.remote(waiting(Server)).options(name="server_0", num_cpus=0).remote()
    server = Begins(process).options(name="as stock names it").remote(1, high=2)
    answer = server.wait.remote()
    ray.get(server.go.remote())
    assert ray.get(answer) == (1, 2)
    assert ray.get(ray.get_actor("server_0").wait.remote()) == (1, 2)  # stock looks servers up by name


def test_what_keeps_a_server_from_starting_is_raised(ray_cluster):
    process = ray.remote(waiting(Server)).options(num_cpus=0).remote()
    with pytest.raises(ValueError, match="2 is above 1"):
        Begins(process).remote(2, 1)


def test_the_engine_of_the_live_trainer_has_started_once(live):
    trainer = live.trainer
    manager = trainer.llm_server_manager
    (replica,) = trainer.checkpoint_manager.replicas
    assert manager.get_replicas() == [replica] and replica.workers == trainer.actor_rollout_wg.workers
    assert ray.get(manager.global_load_balancer.get_all_servers.remote()) == manager.get_addresses()
    assert ray.get_actor("hf_server_0_0") == replica.servers[0]
    assert trainer.config.actor_rollout_ref.rollout.nnodes == 0  # as configured
    trainer.start_engine()
    assert trainer.checkpoint_manager.replicas == [replica]


def test_the_live_trainer_has_one_set_of_agent_loops(live):
    actors = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert len([name for name in actors if name.startswith("agent_loop_worker")]) == 1

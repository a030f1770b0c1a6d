"""What recipe/gad/training/start.py has to know of stock verl; tests/integration/test_start_on_cpu.py starts things."""

import ast
from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from recipe.gad.training.agent_loops import AgentLoops
from recipe.gad.training.start import SERVERS

STOCK = Path(find_spec("verl").submodule_search_locations[0])


def stock_calls(file: str, name: str) -> list[ast.Call]:
    """Calls whose text begins with ``name``, in a stock file: it imports vLLM, so tests only read it."""
    calls = (node for node in ast.walk(ast.parse((STOCK / file).read_text())) if isinstance(node, ast.Call))
    return [call for call in calls if ast.unparse(call.func) == name]


def test_stock_starts_vllm_servers_with_the_options_that_ours_have():
    (call,) = stock_calls("workers/rollout/vllm_rollout/vllm_async_server.py", "self.server_class.options")
    options = {keyword.arg for keyword in call.keywords}
    assert options == {"name", "runtime_env", "max_concurrency", "scheduling_strategy"}  # the last names the only node


def test_stock_looks_vllm_servers_up_under_the_name_that_ours_have():
    source = (STOCK / "workers/rollout/vllm_rollout/vllm_rollout.py").read_text()
    assert 'actor_name = f"{prefix}server_{self.replica_rank}_{self.node_rank}"' in source
    assert SERVERS["vllm"][0].format(3) == "vllm_server_3_0"


def test_the_agent_loops_that_have_started_are_handed_out_once(monkeypatch):
    started = []

    async def start_workers(self):
        started.append(self)

    monkeypatch.setattr(AgentLoops, "_init_agent_loop_workers", start_workers)
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {}, "model": {}}})
    AgentLoops.start(config=config, llm_client="client")
    first, second = (AgentLoops.create(config=config, llm_client="client") for _ in range(2))
    assert started == [first, second] and first.llm_client == "client"

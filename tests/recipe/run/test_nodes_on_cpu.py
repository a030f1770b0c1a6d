"""Every node is compared with the trainer's: what differs is named with its fix (recipe/gad/run/nodes.py)."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from recipe.gad.run.nodes import PACKAGES, VARIABLES, differences, needed_paths, probe

ROOT = Path(__file__).resolve().parents[3]


def answer(**changes):
    """A node's answer that agrees with the trainer's but for ``changes``."""
    same = {"versions": {"torch": "2.11.0"}, "variables": {"A": None}, "plugin": "", "code": "c0de", "missing": {}}
    return {**same, **changes}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (answer(plugin="ImportError: no verl"), "plugin cannot be loaded: ImportError: no verl. Fix: install verl-gad"),
        (answer(code="0ther"), "hash 0ther, the trainer has c0de). Fix: install the same commit"),
        (answer(versions={"torch": "2.9.0"}), "torch 2.9.0, the trainer's node has 2.11.0. Fix: pip install torch=="),
        (answer(variables={"A": "1"}), "A is 1, and is not set where the trainer runs. Fix: start Ray on that node"),
        (answer(missing={"critic.model.path": "/m"}), "critic.model.path: /m is not there. Fix: keep it on storage"),
        (answer(missing={"trainer.default_local_dir": "/o/x"}), "=/o is not the folder that the trainer sees. Fix:"),
    ],
)
def test_what_a_node_lacks_is_named_with_its_fix(found, message):
    (finding,) = differences(answer(), found)
    assert finding.level == "error" and message in str(finding)


def test_equal_nodes_give_no_finding():
    assert list(differences(answer(), answer())) == []


def test_a_node_tells_versions_variables_and_missing_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    found = probe()([*PACKAGES, "no-such-package"], VARIABLES, {"here": str(tmp_path), "gone": f"{tmp_path}/gone"})
    assert found["versions"]["transformers"] == version("transformers")
    assert found["versions"]["no-such-package"] == "is not installed"
    assert found["variables"]["VERL_PLATFORM"] == "cpu" and found["missing"] == {"gone": f"{tmp_path}/gone"}
    assert found["plugin"] == "" and len(found["code"]) == 12


def test_only_local_paths_are_looked_for(compose_config, tiny_problem):
    local = {f"{key}.path": f"{tiny_problem}/model/config.json" for key in ("actor_rollout_ref.model", "critic.model")}
    assert needed_paths(compose_config()) == local
    assert (
        list(needed_paths(compose_config("actor_rollout_ref.model.path=org/student", "critic.model.path=org/d"))) == []
    )


CLUSTER = """
import json, os, sys
from pathlib import Path
from ray.cluster_utils import Cluster
import ray

site, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, include_dashboard=False)

from recipe.gad.run.config import compose_config
from recipe.gad.run.findings import ConfigError
from recipe.gad.run.nodes import check_nodes

config = compose_config([f"trainer.default_local_dir={out}", "actor_rollout_ref.model.path=org/m"])
check_nodes(config)
assert not list(Path(out).iterdir())
broken = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": site, "VLLM_DISABLE_COMPILE_CACHE": "1"})
try:
    check_nodes(config)
except ConfigError as problem:
    print(json.dumps([str(finding) for finding in problem.errors] + [str(broken.node_manager_port)]))
cluster.remove_node(broken)
check_nodes(config)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.long
@pytest.mark.ray
def test_a_node_of_a_real_cluster_that_differs_is_named(tmp_path):
    """Three raylets on this machine; the third has another transformers and no recipe.gad, and one variable more."""
    (tmp_path / "site/recipe").mkdir(parents=True)
    (tmp_path / "site/recipe/__init__.py").touch()
    (tmp_path / "site/transformers-4.0.dist-info").mkdir()
    (tmp_path / "site/transformers-4.0.dist-info/METADATA").write_text("Name: transformers\nVersion: 4.0\n")
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:  # a short path: it holds Ray's sockets
        done = subprocess.run(
            [sys.executable, "-c", CLUSTER, str(tmp_path / "site"), str(tmp_path / "out")],
            cwd=ROOT,
            env={**os.environ, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    plugin, transformers, variable, port = json.loads(done.stdout.splitlines()[-1])
    assert all(f":{port}): " in line and "Fix: " in line for line in (plugin, transformers, variable))
    assert "the GAD plugin cannot be loaded: ModuleNotFoundError: No module named 'recipe.gad'" in plugin
    assert f"transformers 4.0, the trainer's node has {version('transformers')}" in transformers
    assert "VLLM_DISABLE_COMPILE_CACHE is 1, and is not set where the trainer runs" in variable

"""What the other nodes of a Ray cluster need for a run, compared with the trainer's node before models load.

Ray starts a worker on a node that lacks a package, has another version or cannot see a folder, and the run then fails
late, or trains with other code. One Ray task on each node looks first.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.gad.run.config import ACTOR_MODEL, ROLLOUT, get, integer, start_models
from recipe.gad.run.findings import ConfigError, Finding, Findings, error, one_line

PACKAGES = ("verl", "torch", "transformers", "tensordict", "TransferQueue")
"""Packages whose versions must agree, and the rollout engine's."""
VARIABLES = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_PLUGINS", "VLLM_DISABLE_COMPILE_CACHE")
"""Environment variables that must agree."""
TIMEOUT = 300.0
"""Seconds in which every node must answer; a task on a busy node waits for its imports."""


def check_nodes(config: DictConfig, timeout: float = TIMEOUT) -> None:
    """Compare every other node of the running Ray cluster with this one; with one node nothing is done.

    Args:
        config: resolved configuration of the run.
        timeout: seconds in which every node must answer.

    Raises:
        ConfigError: (a ValueError) a node lacks something; every error names node, value found, value expected and fix.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not others:
        return
    saves = integer(config, "trainer.save_freq", -1, minimum=-1) > 0
    folder = Path(get(config, "trainer.default_local_dir")).absolute()
    mark = folder / f".nodes-{uuid.uuid4().hex}"
    paths = needed_paths(config) | ({"trainer.default_local_dir": str(mark)} if saves else {})
    packages = [*PACKAGES, *(name for name in ("vllm", "sglang") if get(config, f"{ROLLOUT}.name") == name)]
    look = probe()
    try:
        if saves:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        expected = look(packages, VARIABLES, paths)
        findings = list(_ask(others, look, expected, (packages, VARIABLES, paths), timeout))
    finally:
        mark.unlink(missing_ok=True)
    if findings:
        raise ConfigError(findings)


def needed_paths(config: DictConfig) -> dict[str, str]:
    """Key -> local path that a worker on any node reads; hub ids and what this node does not have are left out."""
    models = {
        f"{ACTOR_MODEL if role == 'actor' else 'critic.model'}.path": m for role, m in start_models(config).items()
    }
    paths = {key: Path(model).expanduser() / "config.json" for key, model in models.items()}
    for key in (f"{ACTOR_MODEL}.tokenizer_path", "reward.custom_reward_function.path"):
        if get(config, key):
            paths[key] = Path(str(get(config, key))).expanduser()
    return {key: str(path.absolute()) for key, path in paths.items() if path.exists()}


def _ask(nodes: list[dict], look: Callable, expected: Mapping, arguments: tuple, timeout: float) -> Findings:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(look)
    answers = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[task.options(scheduling_strategy=there).remote(*arguments)] = node
    ready, _ = ray.wait(list(answers), num_returns=len(answers), timeout=timeout)
    for answer, node in answers.items():
        name = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}:{node['NodeManagerPort']})"
        try:
            if answer not in ready:
                raise TimeoutError(f"no answer in {timeout:.0f} s")
            found = ray.get(answer)
        except Exception as problem:  # whatever Ray or the node raises is the finding
            what = f"{name} could not be checked: {one_line(problem)[:300]}"
            yield error(what, fix="look into Ray's logs on that node, or take it out of the cluster")
            continue
        yield from (finding.about(name) for finding in differences(expected, found))


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterable[Finding]:
    """Errors of a node that answered ``found`` to the :func:`probe`; the trainer's node answered ``expected``."""
    if found["plugin"]:
        yield error(
            f"the GAD plugin cannot be loaded: {one_line(found['plugin'])}",
            fix="install verl-gad on that node, pip install -e .",
        )
    elif found["code"] != expected["code"]:
        what = f"its verl-gad differs from the trainer's (hash {found['code']}, the trainer has {expected['code']})"
        yield error(what, fix="install the same commit of verl-gad on every node")
    for package, version in expected["versions"].items():
        if found["versions"][package] != version:
            what = f"{package} {found['versions'][package]}, the trainer's node has {version}"
            yield error(what, fix=f"pip install {package}=={version} on that node")
    for name, value in expected["variables"].items():
        if found["variables"][name] != value:
            shown = {text: "is not set" if text is None else f"is {text}" for text in (value, found["variables"][name])}
            what = f"{name} {shown[found['variables'][name]]}, and {shown[value]} where the trainer runs"
            yield error(what, fix=f"start Ray on that node with the same {name}, or start the run with a launch script")
    for key, path in found["missing"].items():
        if key == "trainer.default_local_dir":
            yield error(
                f"{key}={Path(path).parent} is not the folder that the trainer sees",
                fix="keep the output folder on storage that all nodes can access, under one path",
            )
        else:
            fix = "keep it on storage that all nodes can access, under one path"
            yield error(f"{key}: {path} is not there", fix=fix)


def probe() -> Callable[[list[str], Iterable[str], dict[str, str]], dict[str, Any]]:
    """The function that runs on every node. Ray sends a nested function as a value: it needs no module of ours there.

    It takes packages, variables and paths, and returns versions, a hash of our code, variables, and missing paths.
    """

    def look(packages, variables, paths):
        import hashlib
        import importlib
        import os
        import time
        from importlib.metadata import PackageNotFoundError, entry_points, version
        from pathlib import Path

        def version_of(package):
            try:
                return version(package)
            except PackageNotFoundError:
                return "is not installed"

        plugin, code = "", ""
        try:
            module = importlib.import_module("recipe.gad.plugin")
            if "recipe.gad.plugin" not in [entry.value for entry in entry_points(group="verl.plugins")]:
                plugin = "no verl.plugins entry point recipe.gad.plugin is installed"
            overlay, ours = module.overlay_root(), Path(str(module.__file__)).parent
            digest = hashlib.sha256()
            for root in (overlay, ours):
                for file in sorted(root.rglob("*.py")):
                    if root == overlay or not file.is_relative_to(overlay):
                        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
            code = digest.hexdigest()[:12]
        except Exception as problem:  # whatever keeps the plugin from loading is the answer
            plugin = f"{type(problem).__name__}: {problem}"
        deadline = time.monotonic() + 5  # a network file system may show a new file late
        missing = dict(paths)
        while missing and time.monotonic() < deadline:
            missing = {key: path for key, path in missing.items() if not os.path.exists(path)}
            time.sleep(0.2 if missing else 0)
        return {
            "plugin": plugin,
            "code": code,
            "versions": {package: version_of(package) for package in packages},
            "variables": {name: os.environ.get(name) for name in variables},
            "missing": missing,
        }

    return look

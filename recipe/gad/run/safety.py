"""Settings that would show a secret, or run code from a model's folder that nobody asked for.

:data:`recipe.gad.run.checks.CHECKS` lists these checks. SECURITY.md says what is trusted.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.gad.run.config import ACTOR_MODEL, get, tokenizer_key
from recipe.gad.run.findings import Findings, error
from recipe.gad.run.hub import local_model

SECRET = re.compile(r"(?i)(api_?key|passw(or)?d|secret|credentials?|(access|auth|bearer|hf|hub)_?token|access_?key)$")
"""Ends of keys whose text is a secret."""


def check_secrets(config: DictConfig) -> Findings:
    """No key holds a secret: log, saved settings and reports show every key."""
    for key, value in _texts(OmegaConf.to_container(config)):
        if value and SECRET.search(key):
            yield error(
                f"{key} holds a secret, and verl prints every key and saves it in the run's folder",
                fix="leave it out, and set it as a variable of the environment in which Ray starts on each node",
            )


def _texts(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of all texts; lists count by place."""
    if isinstance(node, str):
        yield prefix, node
    elif isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{prefix}.{name}" if prefix else str(name))


def check_remote_code(config: DictConfig) -> Findings:
    """No code from the student's tokenizer folder runs unless trust_remote_code allows it.

    verl's reward workers load the tokenizer with ``trust_remote_code=True``, whatever the configuration says.
    """
    key = tokenizer_key(config)
    try:
        folder = local_model(get(config, key))
    except ValueError:  # neither a folder nor a hub id; check_models reports it
        return
    if folder is None or get(config, f"{ACTOR_MODEL}.trust_remote_code"):
        return
    for name in ("tokenizer_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map")
        except (OSError, ValueError, AttributeError):  # another check reports a missing or damaged file
            continue
        if isinstance(found, dict) and "AutoTokenizer" in found or isinstance(found, list):
            yield error(
                f"{key}={folder}: {name} names Python code for the tokenizer (auto_map). verl's reward workers "
                f"run it, although {ACTOR_MODEL}.trust_remote_code=False",
                fix=f"read that code and set {ACTOR_MODEL}.trust_remote_code=True, or delete auto_map from {name}",
            )

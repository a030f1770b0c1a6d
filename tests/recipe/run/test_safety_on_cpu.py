"""recipe/gad/run/safety.py: secrets in the configuration, and code from a model's folder."""

import json
import shutil

import pytest

from recipe.gad.run import checks, safety


def found(check, config):
    return [f"{finding.level} {finding}" for finding in check(config)]


def test_the_trainer_runs_these_checks_and_the_defaults_pass(compose_config):
    both = {safety.check_secrets, safety.check_remote_code}
    assert both <= set(checks.CHECKS)
    for device in ("cpu", "gpu"):
        assert [line for check in both for line in found(check, compose_config(f"device={device}"))] == []


@pytest.mark.parametrize(
    "key", ["ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY", "gad_judge.password", "trainer.x.HF_TOKEN"]
)
def test_a_secret_is_refused_without_showing_it(compose_config, key):
    (line,) = found(safety.check_secrets, compose_config(f"+{key}=s3cr3t"))
    assert line.startswith(f"error {key} holds a secret") and "Fix: leave it out" in line and "s3cr3t" not in line


@pytest.mark.parametrize("setting", ["+trainer.x.HF_TOKEN=''", "+trainer.eos_token=a", "+trainer.secret_length=5"])
def test_what_is_no_secret_passes(compose_config, setting):
    assert found(safety.check_secrets, compose_config(setting)) == []


def test_code_of_a_tokenizer_needs_trust_remote_code(compose_config, tiny_problem, tmp_path):
    model = shutil.copytree(tiny_problem / "model", tmp_path / "model")
    file = model / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    )
    path = f"actor_rollout_ref.model.path={model}"
    (line,) = found(safety.check_remote_code, compose_config(path))
    assert f"{model}: tokenizer_config.json names Python code" in line and "trust_remote_code=True" in line
    assert found(safety.check_remote_code, compose_config(path, "actor_rollout_ref.model.trust_remote_code=True")) == []
    tokenizer = f"actor_rollout_ref.model.tokenizer_path={tiny_problem}/model"
    assert found(safety.check_remote_code, compose_config(path, tokenizer)) == []

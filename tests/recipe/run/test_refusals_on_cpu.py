"""recipe/gad/run/refusals.py: settings that verl accepts and a GAD run would ignore, or on which it would break."""

import json
import re
import time
from dataclasses import fields, is_dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from recipe.gad import reward
from recipe.gad.run import checks, refusals
from verl import workers
from verl.utils.config import omega_conf_to_dataclass

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"
ROOT = Path(__file__).parents[3]
FOLDERS = ("benchmarks", "docs", "examples", "recipe")
CHECKS = [
    refusals.check_estimator,
    refusals.check_parameter_sync,
    refusals.check_reward_model,
    refusals.check_quantized_rollout,
    refusals.check_router_replay,
    refusals.check_agents,
    refusals.check_names,
    refusals.check_moved_keys,
    refusals.check_ratios,
    refusals.check_task_reward,
    refusals.check_choices,
    refusals.check_loggers,
]


@pytest.fixture(scope="module")
def base(compose_config):
    return compose_config("gad.stage=gad", "gad.actor_objective=policy_gradient")


@pytest.fixture
def found(base):
    """Function: findings of the checks for a GAD run with keys changed, as ``level what. Fix: fix``."""

    def found(changes: dict | None = None) -> list[str]:
        config = OmegaConf.create(OmegaConf.to_container(base, resolve=True))
        for key, value in (changes or {}).items():
            OmegaConf.update(config, key, value, force_add=True)
        return [f"{finding.level} {finding}" for check in CHECKS for finding in check(config)]

    return found


def test_the_defaults_pass(found):
    assert found() == []
    assert set(CHECKS) <= set(checks.CHECKS), "the trainer runs them before it loads a model"


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("engine", ["dp", "megatron", "torchtitan", "veomni"])
def test_the_defaults_of_every_engine_pass(compose_config, device, engine):
    config = compose_config(f"device={device}", f"model_engine={engine}")
    assert [finding for check in CHECKS for finding in check(config)] == []


# ---------------------------------------------------------------------- advantage estimators


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gae", "one score per answer"),
        ("remax", "a greedy answer"),
        ("gdpo", "several rewards per answer"),
        ("optimal_token_baseline", "sum_pi_squared"),
        ("tir_optimal_token_baseline", "sum_pi_squared"),
    ],
)
def test_estimators_that_need_more_than_one_score_per_answer(found, name, reason):
    (message,) = found({"algorithm.adv_estimator": name})
    assert message.startswith(f"error algorithm.adv_estimator={name}: ") and reason in message
    assert message.endswith("Fix: algorithm.adv_estimator=grpo")
    assert found({"algorithm.adv_estimator": name, "gad.stage": "seqkd"}) == []


def test_every_estimator_of_verl_is_known():
    from verl.trainer.ppo.core_algos import AdvantageEstimator

    assert {*refusals.ESTIMATORS, *refusals.OTHER_ESTIMATORS} == {member.value for member in AdvantageEstimator}


@pytest.mark.parametrize("name", refusals.ESTIMATORS)
def test_estimators_that_work_on_one_score_per_answer(found, name):
    import numpy as np
    import torch

    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    assert found({"algorithm.adv_estimator": name}) == []
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    scores = torch.tensor([[0.0, 2, 0], [0, 0, 1]])  # at the last token
    advantages, _ = get_adv_estimator_fn(name)(
        token_level_rewards=scores,
        response_mask=mask,
        index=np.array(["a", "a"], dtype=object),
        config=AlgoConfig(adv_estimator=name),
    )
    assert (advantages[0, :2] > 0).all() and (advantages[1] <= 0).all(), "the answer with the higher score gains"
    assert (advantages.std(dim=-1)[1] == 0) and (advantages * (1 - mask) == 0).all(), "one number for an answer"


def test_a_misspelt_estimator_and_one_that_was_registered(found, monkeypatch):
    from verl.trainer.ppo import core_algos

    (message,) = found({"algorithm.adv_estimator": "grop"})
    assert message.startswith("error algorithm.adv_estimator=grop: expected one of grpo, ")
    monkeypatch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "my_own", print)
    assert found({"algorithm.adv_estimator": "my_own"}) == []
    monkeypatch.delitem(refusals.sys.modules, "verl.trainer.ppo.core_algos")
    (message,) = found({"algorithm.adv_estimator": "my_own"})
    assert message.startswith("warning ") and "was not checked" in message


# ---------------------------------------------------------------------- steps, reward models, engines


@pytest.mark.parametrize("steps", [2, None])
def test_a_step_is_one_batch(found, steps):
    key = "trainer.v1.sync.parameter_sync_step"
    (message,) = found({key: steps})
    assert message.startswith(f"error {key}={steps}: ") and f"Fix: {key}=1" in message
    assert found({key: 1}) == []


@pytest.mark.parametrize("group", ["reward.reward_model", "reward_model"])
def test_a_colocated_reward_model(found, group):
    (message,) = found({f"{group}.enable": True})
    assert message.startswith(f"error {group}.enable=True") and message.endswith(f"Fix: {group}.enable=False")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{ROLLOUT}.quantization", "fp8"),
        (f"{ROLLOUT}.engine_kwargs.vllm.quantization", "fp8"),
        (f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype", "fp8_e5m2"),
    ],
)
def test_quantized_rollouts_need_importance_correction(found, key, value):
    fp8 = {f"{ROLLOUT}.name": "vllm", key: value}
    (message,) = found(fp8)
    assert message.startswith(f"error {key}={value}: ") and message.endswith(f"Fix: {CORRECTION}.rollout_is=token")
    for correction in ({f"{CORRECTION}.rollout_is": "token"}, {f"{CORRECTION}.bypass_mode": True}):
        assert found({**fp8, **correction}) == []
        (message,) = found({**fp8, **correction, f"{ROLLOUT}.calculate_log_probs": False})
        assert message.endswith(f"Fix: {ROLLOUT}.calculate_log_probs=True")
    assert found({**fp8, "gad.actor_objective": "imitation"}) == [], "no gradient reads these samples' probabilities"


def test_rollouts_that_are_not_quantized(found):
    vllm = {f"{ROLLOUT}.name": "vllm", f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype": "auto"}
    assert found(vllm) == []
    another = {f"{ROLLOUT}.name": "sglang", f"{ROLLOUT}.engine_kwargs.vllm.quantization": "fp8"}
    assert found(another) == [], "the engine of the run does not read it"


# ---------------------------------------------------------------------- rewards that training ignores


POOL = {"enable": True, "enable_resource_pool": True, "nnodes": 1, "n_gpus_per_node": 1}


@pytest.mark.parametrize(
    ("changes", "named", "off"),
    [
        (
            {"reward.custom_reward_function.path": "mine.py"},
            "reward.custom_reward_function.path=mine.py",
            "reward.custom_reward_function.path=pkg://recipe.gad.reward",
        ),
        (
            {"custom_reward_function.path": "mine.py"},
            "custom_reward_function.path=mine.py",
            "reward.custom_reward_function.path=pkg://recipe.gad.reward",
        ),
        (
            {f"reward.reward_model.{key}": value for key, value in POOL.items()},
            "reward.reward_model.enable=True",
            "reward.reward_model.enable=False",
        ),
    ],
)
def test_a_reward_that_training_would_ignore(found, changes, named, off):
    (message,) = found(changes)
    assert message.startswith(f"error {named}: training would ignore this reward")
    fix = "gad.task_reward.weight=0 to use it in validation alone, a weight above 0 to follow it too"
    assert message.endswith(f"Fix: {fix}, or {off}")
    assert found({**changes, "gad.task_reward.weight": 0}) == []
    assert found({**changes, "gad.actor_objective": "imitation"}) == [], "imitation follows no reward"


def test_the_packaged_reward_is_for_validation(found):
    assert found({"reward.custom_reward_function.path": reward.__file__}) == []
    assert found({"reward.custom_reward_function.path": None}) == []


MINE = {"reward.custom_reward_function.path": "mine.py", "gad.task_reward.weight": 0.7}


@pytest.mark.parametrize("weight", [-1, True, "all", float("nan"), float("inf"), {}, {"math": -1}, {"math": None}])
def test_a_weight_is_a_number_or_one_for_each_data_source(found, weight):
    (message,) = found({**MINE, "gad.task_reward.weight": weight})
    assert message.startswith("error gad.task_reward.weight=") and "a number of at least 0" in message


def test_a_task_reward_that_cannot_work(found):
    assert found(MINE) == []
    (message,) = found({"gad.task_reward.weight": 0.7})
    assert "no reward of yours" in message and "Fix: set reward.custom_reward_function.path" in message
    (message,) = found({**MINE, "gad.actor_objective": "imitation"})
    assert "follows no reward" in message and message.endswith("Fix: gad.task_reward.weight=0")
    (message,) = found({**MINE, "gad.teacher_in_group": True})
    assert "gad.teacher_in_group=True" in message and "gad.teacher_in_group=False, or" in message
    (message,) = found({**MINE, "gad.credit": "token"})
    assert "gad.credit=token" in message
    (message,) = found({**MINE, "gad.task_reward.combine": "sum"})
    assert "gad.task_reward.combine=sum: expected normalized or raw" in message
    (message,) = found({**MINE, "gad.task_reward.combine": "normalised"})
    assert message.endswith("Fix: gad.task_reward.combine=normalized")
    (message,) = found({**MINE, "actor_rollout_ref.rollout.n": 1})
    assert "rollout.n=1" in message and "combine=raw" in message
    assert found({**MINE, "actor_rollout_ref.rollout.n": 1, "gad.task_reward.combine": "raw"}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file. Fix: correct the path"),
        ("def compute_score(:", "is not valid Python (invalid syntax"),
        ("def my_score(**row): return 1", "name=compute_score: FILE defines my_score. Fix: set reward.custom_reward"),
        ("", "FILE defines no function"),
        (
            "def compute_score(solution_str, extra_info=None): ...",
            "FILE: compute_score does not take data_source, ground",
        ),
        ("async def compute_score(solution_str, **rest): ...", None),
        ("def compute_score(data_source, solution_str, ground_truth, *, extra_info): ...", None),
        ("from scores import compute_score", None),
        ("from scores import *", None),
    ],
)
def test_a_reward_function_that_verl_cannot_call(base, tmp_path, text, message):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    config = OmegaConf.merge(base, {"reward": {"custom_reward_function": {"path": str(file)}}})
    findings = [str(finding) for finding in refusals.check_reward_function(config)]
    assert len(findings) == (message is not None)
    assert all(message.replace("FILE", str(file)) in finding for finding in findings), findings
    assert refusals.check_reward_function in checks.CHECKS and not list(refusals.check_reward_function(base))


def test_every_data_source_has_a_weight(found, tmp_path):
    def file(name, rows):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        return str(tmp_path / name)

    two = file("two.parquet", [{"data_source": "math"}, {"data_source": None}, {"data_source": "math"}])
    none = file("none.parquet", [{"content": "x"}])
    weights = {**MINE, "data.train_files": [two, none], "gad.task_reward.weight": {"math": 0.5, "gad": 0}}
    assert found(weights) == []
    (missing, unknown) = found({**weights, "gad.task_reward.weight": {"math": 0.5, "code": 1}})
    assert "has no weight for data_source gad; the training data has gad, math" in missing
    assert "names data_source code" in unknown
    numbers = file("numbers.parquet", [{"data_source": 1}, {"data_source": 2}])
    assert found({**MINE, "data.train_files": [numbers], "gad.task_reward.weight": {1: 0.5, 2: 0}}) == []


# ---------------------------------------------------------------------- names of losses and engines


def test_names_that_verl_does_not_know(found):
    (message,) = found({f"{ACTOR}.loss_agg_mode": "seq-mean-token-means"})
    assert message.startswith(f"error {ACTOR}.loss_agg_mode=seq-mean-token-means is none of verl's (token-mean, ")
    assert message.endswith(f"Fix: {ACTOR}.loss_agg_mode=seq-mean-token-mean")
    (message,) = found({f"{ACTOR}.policy_loss.loss_mode": "gpso"})
    assert message.startswith("warning ") and message.endswith(f"Fix: {ACTOR}.policy_loss.loss_mode=gspo")
    (message,) = found({f"{ROLLOUT}.name": "vlm"})
    assert message.startswith("warning ") and message.endswith(f"Fix: {ROLLOUT}.name=vllm")


def test_the_names_are_those_of_verl():
    import torch

    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, kl_penalty

    losses = refusals.OPEN_CHOICES[f"{ACTOR}.policy_loss.loss_mode"]
    assert set(losses) == set(POLICY_LOSS_REGISTRY)
    one = torch.ones(1, 1)
    for name in refusals.CHOICES[f"{ACTOR}.loss_agg_mode"]:
        assert agg_loss(one, one, name) == 1
    for name in refusals.CHOICES[f"{ACTOR}.kl_loss_type"]:
        assert kl_penalty(one, one, name) == 0


# ---------------------------------------------------------------------- loggers


def test_loggers_that_cannot_start(found, monkeypatch):
    (message,) = found({"trainer.logger": ["file", "tensorbord"]})
    assert message.startswith("error trainer.logger names tensorbord") and message.endswith("Fix: write tensorboard")
    monkeypatch.setattr(refusals, "find_spec", lambda name: None)
    (message,) = found({"trainer.logger": ["file", "vemlp_wandb"]})
    assert "the package volcengine_ml_platform is not installed" in message
    assert message.endswith("Fix: pip install volcengine-ml-platform, or leave vemlp_wandb out")
    assert found({"trainer.logger": "console"}) == []


def test_wandb_without_a_key(found, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.setattr(refusals, "find_spec", lambda name: "found")
    changes = {"trainer.logger": ["console", "file", "wandb"]}
    (message,) = found(changes)
    assert message.startswith("warning trainer.logger names wandb, and there is no API key")
    file.write_text("machine api.wandb.ai login user password key")
    file.chmod(0o600)
    assert found(changes) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert len(found(changes)) == 1
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "x")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert found(changes) == []


def test_the_loggers_are_those_of_verl():
    from verl.utils.tracking import Tracking

    assert set(refusals.LOGGERS) == {*Tracking.supported_backend, "tracking"}  # the last is an old name of wandb


# ---------------------------------------------------------------------- agents


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("multi_turn.enable", True, "False"),
        ("multi_turn.tool_config_path", "tools.yaml", "null"),
        ("multi_turn.function_tool_path", "tools.py", "null"),
        ("agent.default_agent_loop", "tool_agent", "single_turn_agent"),
        ("agent.agent_loop_config_path", "agents.yaml", "null"),
    ],
)
def test_agents_of_several_turns(found, name, value, expected):
    key = f"{ROLLOUT}.{name}"
    (message,) = found({key: value})
    assert message.startswith(f"error {key}={value}: the teacher's answer is one turn")
    assert message.endswith(f"Fix: {key}={expected}")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_agents_that_the_data_names(found, tmp_path, ending):
    def write(*agents):
        rows = [{"content": [{"role": "user", "content": "a"}], "agent_name": agent} for agent in agents]
        file = tmp_path / f"train.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data.train_files": str(file)}

    assert found(write("single_turn_agent", "single_turn_agent")) == []
    (message,) = found(write("single_turn_agent", "tool_agent", None, "tool_agent"))
    assert f"train.{ending}: column 'agent_name' names None, tool_agent" in message and "Fix: drop the" in message
    assert found({"data.train_files": str(tmp_path / f"none.{ending}")}) == [], "another check reports it"


# ---------------------------------------------------------------------- keys that verl no longer reads


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        (f"{ACTOR}.grad_clip", 0.3, f"{ACTOR}.optim.clip_grad"),
        ("critic.grad_clip", 0.3, "critic.optim.clip_grad"),
        (f"{ACTOR}.fsdp_config.strategy", "fsdp2", f"{ACTOR}.strategy"),
        ("critic.fsdp.strategy", "fsdp2", "critic.strategy"),
    ],
)
def test_an_older_key_is_a_warning_unless_the_newer_one_agrees(found, old, value, new):
    settings = {ACTOR + ".strategy": "fsdp", "critic.strategy": "fsdp"}
    assert found({**settings, old: value}) == [f"warning {old}={value} is not read by verl. Fix: {new}={value}"]
    assert found({**settings, old: value, new: value}) == []


def test_the_defaults_of_older_keys_are_verls(compose_config):
    config = compose_config()
    assert {key: OmegaConf.select(config, key) for key in refusals.MOVED} == (
        {key: default for key, (default, _) in refusals.MOVED.items()}
    )


def test_clip_ratio_is_ignored_beside_the_defaults_of_low_and_high(base, found):
    several = {f"{ACTOR}.ppo_mini_batch_size": 4}
    (message,) = found({**several, f"{ACTOR}.clip_ratio": 0.3})
    assert message.startswith(f"warning {ACTOR}.clip_ratio=0.3 is ignored: verl reads clip_ratio_low and")
    assert f"Fix: {ACTOR}.clip_ratio_low=0.3 {ACTOR}.clip_ratio_high=0.3" in message
    assert found({f"{ACTOR}.clip_ratio": 0.3}) == [message], "in one optimizer step too, and once"
    assert found({**several, f"{ACTOR}.clip_ratio": 0.2}) == []
    assert found({**several, **{f"{ACTOR}.clip_ratio{end}": 0.3 for end in ("", "_low", "_high")}}) == []
    assert found({**several, f"{ACTOR}.clip_ratio": 0.3, f"{ACTOR}.clip_ratio_low": None}) == []
    assert base.actor_rollout_ref.actor.clip_ratio == refusals.CLIP_RATIO


def test_verls_losses_read_clip_ratio_low_and_high_alone():
    """A ratio of e^0.25 = 1.284 with a positive advantage is clipped at 0.2 and not at 0.3."""
    import torch

    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    one = torch.ones(1, 2)
    for mode in ("vanilla", "gspo"):
        for keys, clipped in (({"clip_ratio": 0.3}, 1.0), ({"clip_ratio_high": 0.3}, 0.0)):
            config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **keys)
            _, metrics = get_policy_loss_fn(mode)(-one, -0.75 * one, one, one, "token-mean", config)
            assert metrics["actor/pg_clipfrac"] == clipped, (mode, keys)


# ---------------------------------------------------------------------- router replay


@pytest.mark.parametrize("group", ["router_replay", "fsdp_config.router_replay"])
def test_router_replay_is_refused_where_nothing_reads_it(found, group):
    (message,) = found({f"{ACTOR}.{group}.mode": "R2"})
    assert message.startswith(f"error {ACTOR}.{group}.mode=R2: verl would not read it")
    assert f"set {ACTOR}.megatron.router_replay.mode" in message
    assert found({f"{ACTOR}.{group}.mode": "disabled"}) == []


def test_megatron_reads_router_replay(compose_config):
    config = compose_config("model_engine=megatron", f"{ACTOR}.megatron.router_replay.mode=R2")
    assert [finding for check in CHECKS for finding in check(config)] == []


# ---------------------------------------------------------------------- probability ratios


RATIOS = [("policy_loss.loss_mode", "gspo"), ("clip_ratio_low", 0.005), ("clip_ratio_high", 0.28), ("clip_ratio_c", 10)]


@pytest.mark.parametrize(("name", "value"), RATIOS)
def test_clipping_needs_several_optimizer_steps_per_batch(base, found, name, value):
    setting = {f"{ACTOR}.{name}": value}
    (message,) = found(setting)
    assert message.startswith(f"warning {ACTOR}.{name}={value} changes nothing: a batch is one optimizer step")
    assert "pg_clipfrac and ppo_kl are not logged" in message and "Fix: run_gad.sh --ppo_mini_batches 2" in message
    assert base.data.train_batch_size == 8
    assert found({**setting, f"{ACTOR}.ppo_mini_batch_size": 4}) == []
    assert found({**setting, f"{ACTOR}.ppo_epochs": 2}) == []
    assert found({**setting, f"{CORRECTION}.bypass_mode": True}) == []
    assert found({**setting, "gad.actor_objective": "imitation"}) == []


def test_all_settings_of_the_ratios_are_one_warning(found):
    (message,) = found({f"{ACTOR}.{name}": value for name, value in RATIOS})
    assert all(f"{ACTOR}.{name}={value}" in message for name, value in RATIOS)


def test_at_the_ratio_1_gspo_equals_vanilla_and_nothing_is_clipped():
    import torch

    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    log_probs, advantages = -torch.rand(3, 4), torch.tensor([[1.5], [-2.0], [0.25]]).expand(3, 4)
    results = {}
    for mode in ("vanilla", "gspo"):
        config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=1.001)
        leaf = log_probs.clone().requires_grad_()
        arguments = log_probs, leaf, advantages, mask, "token-mean", config
        loss, metrics = get_policy_loss_fn(mode)(*arguments)
        loss.backward()
        results[mode] = loss.detach(), leaf.grad
        assert set(metrics.values()) == {0.0}
    assert all(torch.equal(vanilla, gspo) for vanilla, gspo in zip(results["vanilla"], results["gspo"], strict=True))
    expected = -(3 * 1.5 + 2 * -2.0 + 4 * 0.25) / 9
    assert results["gspo"][0].item() == pytest.approx(expected, abs=1e-6)


def test_the_defaults_of_clipping_are_verls(base):
    assert {key: base.actor_rollout_ref.actor[key] for key in refusals.CLIPPING} == refusals.CLIPPING


# ---------------------------------------------------------------------- names of keys


UNREAD = {
    "gad.kl_loss_coef": "error gad.kl_loss_coef: verl-gad has no such key, so nothing reads it. Fix: write "
    f"{ACTOR}.kl_loss_coef or ",
    "gad.task_reward.name": "error gad.task_reward.name: verl-gad has no such key",
    "gad.dpo_bet": "error gad.dpo_bet: verl-gad has no such key, so nothing reads it. Fix: write gad.dpo_beta, or",
    f"{ACTOR}.lr": f"error {ACTOR}.lr: verl's FSDPActorConfig has no field lr, so verl fails when it starts its "
    f"workers. Fix: write {ACTOR}.optim.lr, or leave it out",
    f"{ACTOR}.optim.leaning_rate": f"error {ACTOR}.optim.leaning_rate: verl's FSDPOptimizerConfig has no field ",
    f"{ROLLOUT}.multi_turn.max_turns": f"error {ROLLOUT}.multi_turn.max_turns: verl's MultiTurnConfig has no field ",
    "critic.model.fsdp_config.param_offload": "error critic.model.fsdp_config.param_offload: verl's HFModelConfig has "
    "no field fsdp_config, so verl fails when it starts its workers. Fix: write critic.fsdp.param_offload or ",
    "data.num_proc": "warning data.num_proc is read neither by verl nor by verl-gad",
    "trainer.temperature": "warning trainer.temperature is read neither by verl nor by verl-gad",
    "trainer.save_frequency": "warning trainer.save_frequency is read neither by verl nor by verl-gad: it has no "
    "effect, unless your own code reads it. Fix: write trainer.save_freq, or leave it out",
    "trainer.warmup_use_sft": "warning trainer.warmup_use_sft is read neither by verl nor by verl-gad",
    "algorithm.clip_ratio_low": "warning algorithm.clip_ratio_low is read neither by verl nor by verl-gad: it has no "
    f"effect, unless your own code reads it. Fix: write {ACTOR}.clip_ratio_low or ",
}
"""Key that nothing reads -> how the finding begins."""


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_nothing_reads(base, key):
    config = OmegaConf.create(OmegaConf.to_container(base, resolve=True))
    OmegaConf.update(config, key, 1, force_add=True)
    start = time.monotonic()
    (finding,) = refusals.check_names(config)
    assert time.monotonic() - start < 10
    assert f"{finding.level} {finding}".startswith(UNREAD[key])


@pytest.mark.parametrize("key", [f"{ACTOR}.lr", f"{ROLLOUT}.multi_turn.max_turns", "critic.model.fsdp_config.a"])
def test_verl_does_not_convert_a_field_that_is_refused(base, key):
    config = OmegaConf.create(OmegaConf.to_container(base, resolve=True))
    group = ".".join(key.split(".")[: 1 if key.startswith("critic") else 2])
    omega_conf_to_dataclass(OmegaConf.select(config, group))
    OmegaConf.update(config, key, 1, force_add=True)
    with pytest.raises(InstantiationException, match="unexpected keyword argument"):
        omega_conf_to_dataclass(OmegaConf.select(config, group))


def test_the_fields_are_those_of_verl():
    classes = {name: getattr(workers.config, name) for name in dir(workers.config)}
    classes = {
        name: one
        for name, one in classes.items()
        if isinstance(one, type) and is_dataclass(one) and one.__module__.startswith("verl.workers.config")
    }
    assert {"FSDPActorConfig", "HFModelConfig", "McoreEngineConfig", "RolloutConfig"} <= set(classes)
    found = refusals._dataclass_fields()
    assert {name: found[name] for name in classes} == {
        name: {field.name for field in fields(one)} for name, one in classes.items()
    }


def test_every_added_key_of_the_pages_and_scripts_passes(base):
    files = [ROOT / "README.md", *(file for name in FOLDERS for file in (ROOT / name).rglob("*.*") if file.is_file())]
    files = [file for file in files if file.suffix in (".md", ".sh", ".yaml", ".py") and "test_" not in file.name]
    added = {key for file in files for key in re.findall(r"(?<![\w}:])\+{1,2}([a-z_]+(?:\.\w+)+)=", file.read_text())}
    assert {f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes", "ray_kwargs.ray_init._temp_dir"} <= added
    config = OmegaConf.create(OmegaConf.to_container(base, resolve=True))
    for key in added:
        OmegaConf.update(config, key, 1, force_add=True)
    assert list(refusals.check_names(config)) == []


def test_keys_that_are_read_or_handed_on_pass(found):
    added = {
        "data.apply_chat_template_kwargs.enable_thinkng": False,  # the chat template reads what it likes
        "actor_rollout_ref.model.override_config.a_key_of_some_model": 1,
        f"{ROLLOUT}.engine_kwargs.vllm.a_key_of_the_engine": 1,
        "ray_kwargs.ray_init.runtime_env.env_vars.MY_VARIABLE": "1",
        "algorithm.gdpo_reward_keys": ["a"],  # only verl's Python names it
        "reward.reward_kwargs.overlong_buffer_cfg.enable": True,
        "data.cache_dir": "a",  # only verl's Python names it
        "critic.fsdp.wrap_policy.transformer_layer_cls_to_wrap": ["a"],  # a field of no dataclass
        f"{ACTOR}.use_rollout_log_probs": False,  # a field that no default names
    }
    assert found(added) == []
    assert not list(refusals.check_names(OmegaConf.create({"gad": {"task_reward": {"weight": {"math": 0.5}}}})))

"""The launch scripts of examples/gad: flags, messages, and the commands they print, composed on verl's config."""

import dataclasses
import inspect
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipe.gad.doctor.checks import memory_findings
from recipe.gad.quickstart.problem import build_tokenizer
from tests.generated import cases

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples/gad"
LAUNCHERS = ["run_seqkd.sh", "run_warmup.sh", "run_gad.sh", "run_soda.sh", "run_pipeline.sh"]
STAGES = ["seqkd", "warmup", "gad"]
ACTOR = "actor_rollout_ref.actor"
FLAGS = """--model --reward_model --train_files --val_files --exp_name --output_dir --nnodes --device
    --dry-run --skip-doctor --raw-log""".split()


def sh(script, *arguments, cwd=ROOT, **environment):
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        errors="surrogateescape",  # what is not UTF-8
        timeout=120,
    )


def unquoted(line):
    """The words of a line as bash reads them."""
    script = 'eval "set -- $1"; printf "%s\\0" "$@"'
    done = subprocess.run(["bash", "-c", script, "bash", line], capture_output=True, errors="surrogateescape")
    return done.stdout.split("\0")[:-1]


class Command:
    """One printed command: its environment and its Hydra overrides."""

    def __init__(self, line):
        words = unquoted(line)
        start = words.index(sys.executable)
        assert words[0] == "env" and words[start + 1 : start + 3] == ["-m", "verl.trainer.main_ppo"]
        assert words[start + 3 : start + 5] == ["--config-path", "pkg://recipe.gad.config"]
        assert words[start + 5] == "--config-name"
        self.environment = dict(word.split("=", 1) for word in words[1:start])
        self.name, self.overrides = words[start + 6], words[start + 7 :]

    def values(self):
        """Key -> value of every override, as Hydra's parser reads it; the last one of a key counts."""
        overrides = OverridesParser.create().parse_overrides(self.overrides)
        return {override.key_or_group: override.value() for override in overrides}

    def compose(self):
        """The configuration, in struct mode: a key that verl does not have is an error."""
        with initialize_config_module(config_module="recipe.gad.config", version_base=None):
            return compose(self.name, overrides=self.overrides)


def dry_run(script, *arguments, flags=("--model", "org/student", "--train_files", "/data/train.parquet"), **options):
    """The commands that a script prints."""
    done = sh(script, "--dry-run", *flags, *arguments, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [Command(line) for line in done.stdout.splitlines()]


def stage_config(stage, *arguments):
    (command,) = dry_run(f"run_{stage}.sh", *arguments)
    return command.compose()


# ---------------------------------------------------------------------- flags and messages


def test_every_script_is_known_to_these_tests():
    assert {file.name for file in SCRIPTS.glob("*.sh")} == {"flags.sh", "common.sh", "quickstart.sh", *LAUNCHERS}


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_flag(script, flag):
    done = sh(script, flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {script}")
    assert [name for name in FLAGS if f"  {name}" not in done.stdout] == []
    assert ("--warmup_dir" in done.stdout) == (script == "run_gad.sh")


def test_help_of_the_quickstart():
    done = sh("quickstart.sh", "--help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: quickstart.sh")


GOOD = ["--model", "m", "--train_files", "t"]


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "x"], "unknown flag --modle"),
        (["--model"], "--model needs a value"),
        (["--exp_name", "--help"], "--exp_name needs a value, got --help"),
        (["--output_dir", ""], "--output_dir needs a value, got an empty one"),
        (["--train_files", "t"], "--model is missing"),
        (["--model", "m"], "--train_files is missing"),
        ([*GOOD, "--device", "tpu"], "--device must be gpu or cpu, got tpu"),
        ([*GOOD, "data.seed=1", "--lr", "1"], "--lr comes after data.seed=1; write all flags before"),
    ],
    ids=["unknown flag", "no value", "flag as value", "empty value", "no model", "no data", "device", "late flag"],
)
def test_mistakes_exit_2_with_the_message_on_stderr(script, arguments, message):
    done = sh(script, "--dry-run", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("run_gad.sh", [*GOOD, "--resume_step", "5"], "--warmup_dir, which is missing"),
        ("run_gad.sh", ["--warmup_dir", "w", "--model", "m"], "drop --model and --reward_model"),
        ("run_soda.sh", [*GOOD, "--warmup_dir", "w"], "belong to run_gad.sh"),
        ("run_warmup.sh", ["--seqkd_dir", "s", "--model", "m"], "drop --model"),
        ("run_warmup.sh", ["--seqkd_dir", "s"], "--seqkd_dir needs --reward_model"),
        ("run_gad.sh", [*GOOD, "--seqkd_dir", "s"], "unknown flag --seqkd_dir"),
        ("run_soda.sh", [*GOOD, "--beta"], "--beta needs a value"),
        ("run_soda.sh", [*GOOD, "--beta", "x,y"], "--beta must be a number, got x,y"),
        ("run_gad.sh", ["--warmup_dir", "--help"], "--warmup_dir needs a value, got --help"),
        ("run_gad.sh", [*GOOD, "--nnodes", "two"], "--nnodes must be a whole number, got two"),
        ("run_gad.sh", [*GOOD, "--online"], "unknown flag --online"),
        ("run_seqkd.sh", [*GOOD, "--beta", "1"], "unknown flag --beta"),
        ("run_pipeline.sh", [*GOOD, "--warmup_dir", "w"], "belong to run_gad.sh"),
        ("run_pipeline.sh", [*GOOD, "--resume_step", "5"], "belong to run_gad.sh"),
        ("quickstart.sh", ["--speed", "1"], "unknown flag --speed"),
        ("quickstart.sh", ["--seed", "1", "2"], "unknown argument 2"),
        ("quickstart.sh", ["--seed", "9" * 20], "--seed must have at most 9 digits"),
        ("quickstart.sh", ["--output_dir", __file__], "is a file, expected a folder"),
        ("quickstart.sh", ["--output_dir", "/proc/x", "--no_venv"], "cannot make the folder /proc/x"),
        ("quickstart.sh", ["--venv", __file__], "is a file, expected a folder"),
        ("quickstart.sh", ["--seed"], "--seed needs a value"),
        ("quickstart.sh", ["--seed", "x1"], "--seed must be a whole number"),
        ("quickstart.sh", ["--control", "other"], "--control knows frozen_d"),
    ],
)
def test_flags_that_do_not_go_together(script, arguments, message):
    done = sh(script, *arguments)
    assert done.returncode == 2 and done.stdout == "" and message in done.stderr


def test_no_secrets_or_foreign_paths_in_what_we_ship():
    examples = [file for file in SCRIPTS.rglob("*") if file.suffix in (".sh", ".py", ".md")]
    assert SCRIPTS / "smollm2_gpt4/run.sh" in examples
    shipped = [*examples, *(ROOT / "recipe/gad/config").rglob("*.yaml")]
    pattern = re.compile(r"(?i)(api[_-]?key|secret|password|passwd|bearer |hf_[a-z0-9]{20}|wandb_|/home/\w|/mnt/|AKIA)")
    assert [(file.name, hit[0]) for file in shipped for hit in pattern.finditer(file.read_text())] == []


# ---------------------------------------------------------------------- composed commands


@pytest.mark.parametrize("stage", [*STAGES, "soda"])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_printed_command_composes(stage, device):
    (command,) = dry_run(f"run_{stage}.sh", "--device", device, "--output_dir", "/out/a b", "--nnodes", "2")
    config = command.compose()
    assert config.gad.stage == stage
    assert config.trainer.v1.trainer_mode == "gad"
    assert config.trainer.nnodes == 2
    assert config.trainer.default_local_dir == "/out/a b"
    assert config.trainer.experiment_name == stage
    assert config.actor_rollout_ref.model.path == config.critic.model.path == "org/student"
    assert config.critic.model.tokenizer_path == "org/student"
    assert config.data.train_files == config.data.val_files == "/data/train.parquet"
    assert config.trainer.device == ("cpu" if device == "cpu" else "cuda")
    assert config.actor_rollout_ref.rollout.name == ("hf" if device == "cpu" else "vllm")
    expected = {"VERL_FILE_LOGGER_PATH": "/out/a b/metrics.jsonl", "VERL_FILE_LOGGER_APPEND": "1"}
    expected |= {"VERL_PLATFORM": "cpu"} if device == "cpu" else {"VLLM_DISABLE_COMPILE_CACHE": "0"}
    assert command.environment == expected
    assert dict(config.ray_kwargs.ray_init.runtime_env.env_vars) == expected, "Ray workers of other nodes need them too"
    assert all(isinstance(value, str) for value in config.ray_kwargs.ray_init.runtime_env.env_vars.values())


def test_a_run_on_one_cpu_node_keeps_ray_on_the_loopback_address():
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray takes 127.0.0.1 as the address of the node
    (command,) = dry_run("run_gad.sh", "--device", "cpu")
    assert command.environment[name] == "0"
    (joining,) = dry_run("run_gad.sh", "--device", "cpu", RAY_ADDRESS="10.0.0.1:6379")
    (gpu,) = dry_run("run_gad.sh")
    assert name not in {**joining.environment, **gpu.environment}


def test_the_cache_of_compiled_graphs_can_be_disabled_again():
    (command,) = dry_run("run_gad.sh", VLLM_DISABLE_COMPILE_CACHE="1")
    assert command.environment["VLLM_DISABLE_COMPILE_CACHE"] == "1"
    assert command.compose().ray_kwargs.ray_init.runtime_env.env_vars.VLLM_DISABLE_COMPILE_CACHE == "1"


def test_the_papers_setting():
    config = stage_config("gad")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, config.critic.ppo_mini_batch_size) == (256,) * 3
    assert (config.data.max_prompt_length, config.data.max_response_length) == (2048, 1536)
    assert (rollout.prompt_length, rollout.response_length) == (2048, 1536)
    assert (rollout.n, rollout.temperature, rollout.top_p, rollout.top_k) == (8, 0.8, 1.0, -1)
    assert (actor.optim.lr, config.critic.optim.lr) == (1e-6, 1e-6)
    assert (actor.optim.clip_grad, config.critic.optim.clip_grad) == (0.2, 0.2)
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.kl_loss_type) == (True, 0.001, "low_var_kl")
    assert (config.algorithm.adv_estimator, config.algorithm.use_kl_in_reward) == ("grpo", False)
    assert (config.critic.enable, config.critic.ppo_epochs, actor.ppo_epochs) == (True, 1, 1)
    assert (config.trainer.total_epochs, config.trainer.critic_warmup) == (2, 0)
    assert config.gad.actor_objective == "policy_gradient" and actor.policy_loss.loss_mode == "vanilla"
    assert config.critic.ppo_max_token_len_per_gpu >= (8 + 1) * (2048 + 1536), "a whole group fits"


def test_warmup_and_seqkd_differ_from_gad_as_the_paper_says():
    warmup, seqkd = stage_config("warmup"), stage_config("seqkd")
    assert warmup.gad.actor_objective == seqkd.gad.actor_objective == "imitation"
    assert (warmup.trainer.total_epochs, warmup.trainer.critic_warmup) == (1, 10)
    assert (warmup.critic.enable, seqkd.critic.enable) == (True, False)
    assert not warmup.actor_rollout_ref.actor.use_kl_loss and not seqkd.actor_rollout_ref.actor.use_kl_loss
    assert (warmup.actor_rollout_ref.actor.optim.lr, seqkd.actor_rollout_ref.actor.optim.lr) == (1e-6, 5e-6)


@pytest.mark.parametrize(
    ("flags", "stage", "beta"), [([], "soda", 0.1), (["--online", "--beta", "0.5"], "online_dpo", 0.5)]
)
def test_the_dpo_stages_compare_with_the_model_they_start_from(flags, stage, beta):
    config = stage_config("soda", *flags)
    actor = config.actor_rollout_ref.actor
    assert (config.gad.stage, config.gad.actor_objective, config.gad.dpo_beta) == (stage, "dpo", beta)
    assert (config.trainer.experiment_name, config.critic.enable) == (stage, False)
    assert (actor.use_kl_loss, actor.kl_loss_coef) == (True, 0), "use_kl_loss loads the reference"
    assert actor.optim.lr == stage_config("gad").actor_rollout_ref.actor.optim.lr


@pytest.mark.parametrize("flag", ["--ppo_mini_batches", "--ppo-mini-batches"])
def test_optimizer_steps_per_batch(flag):
    assert stage_config("gad", flag, "2").actor_rollout_ref.actor.ppo_mini_batch_size == 128
    config = stage_config("gad", flag, "3", "data.train_batch_size=96")
    assert (config.actor_rollout_ref.actor.ppo_mini_batch_size, config.critic.ppo_mini_batch_size) == (32, 96)
    assert stage_config("gad", flag, "2", f"{ACTOR}.ppo_mini_batch_size=8").actor_rollout_ref.actor == (
        stage_config("gad", f"{ACTOR}.ppo_mini_batch_size=8").actor_rollout_ref.actor
    ), "the user's overrides win"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("3", "--ppo_mini_batches 3 does not divide data.train_batch_size=256. Fix: --ppo_mini_batches 2 or 4"),
        ("300", "does not divide data.train_batch_size=256. Fix: --ppo_mini_batches 128 or 256"),
        ("0", "--ppo_mini_batches 0: expected a whole number of at least 1"),
        ("two", "--ppo_mini_batches two: expected a whole number of at least 1"),
    ],
)
def test_optimizer_steps_per_batch_that_do_not_fit(parts, message):
    done = sh("run_gad.sh", "--dry-run", *GOOD, "--ppo_mini_batches", parts)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
    assert sh("run_warmup.sh", "--dry-run", *GOOD, "--ppo_mini_batches", "2").returncode == 2


def test_without_a_validation_file_a_few_training_rows_are_validated_on():
    assert stage_config("gad").data.val_max_samples == 64
    config = stage_config("gad", "data.val_max_samples=8")
    assert config.data.val_max_samples == 8 and config.data.val_files == config.data.train_files


def test_flags_may_be_spelled_with_dashes():
    written, read = (
        dry_run("run_gad.sh", f"--output{dash}dir", "/out", f"--val{dash}files", "v.parquet")[0] for dash in "_-"
    )
    assert read.overrides == written.overrides and read.compose().trainer.default_local_dir == "/out"


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_the_users_overrides_win(separator):
    overrides = ["trainer.critic_warmup=3", "actor_rollout_ref.rollout.n=4", "trainer.experiment_name=mine"]
    files = "data.train_files=[/a.parquet,/b.parquet]"
    config = stage_config("warmup", "--exp_name", "other", *separator, *overrides, "device=cpu", files)
    assert config.trainer.critic_warmup == 3 and config.actor_rollout_ref.rollout.n == 4
    assert config.trainer.experiment_name == "mine" and config.actor_rollout_ref.rollout.name == "hf"
    assert config.data.train_files == ["/a.parquet", "/b.parquet"]


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_pipeline_prints_its_three_stages(device):
    flags = ["--exp_name", "try", "--output_dir", "/out", "--device", device, "--seqkd_epochs", "20"]
    commands = dry_run("run_pipeline.sh", *flags, "data.seed=5", "trainer.total_epochs=3")
    configs = [command.compose() for command in commands]
    assert [config.gad.stage for config in configs] == STAGES
    assert [config.trainer.default_local_dir for config in configs] == [f"/out/{stage}" for stage in STAGES]
    assert [config.trainer.experiment_name for config in configs] == [f"try-{stage}" for stage in STAGES]
    assert {config.data.seed for config in configs} == {5}
    assert [config.trainer.total_epochs for config in configs] == [20, 3, 3]
    seqkd, warmup, gad = configs
    assert seqkd.actor_rollout_ref.model.path == warmup.critic.model.path == "org/student"
    assert warmup.actor_rollout_ref.model.path == "/out/seqkd/global_step_N/actor/huggingface"
    assert (gad.gad.imitation_coef, gad.algorithm.norm_adv_by_std_in_grpo) == (0.2, False)
    actor = gad.actor_rollout_ref.actor
    assert (actor.optim.lr_scheduler_type, actor.use_kl_loss) == ("cosine", False)
    assert (warmup.gad.imitation_coef, warmup.algorithm.norm_adv_by_std_in_grpo) == (0, True)
    assert (seqkd.trainer.critic_warmup, gad.trainer.critic_warmup) == (0, 0)
    assert warmup.trainer.critic_warmup > 10**5, "the discriminator trains alone"
    for config in (warmup, gad):
        assert config.critic.optim.lr == 3 * actor.optim.lr
    assert configs[2].actor_rollout_ref.model.path == "/out/warmup/global_step_N/actor/huggingface"
    assert configs[2].critic.model.path == "/out/warmup/global_step_N/critic/huggingface"


def test_with_raw_log_the_run_prints_everything():
    for command in dry_run("run_pipeline.sh", "--raw-log"):
        assert "hydra.callbacks.short_console.raw_log" not in command.values()


@pytest.mark.parametrize("script", LAUNCHERS)
def test_scripts_work_from_any_folder_and_make_paths_absolute(script, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "train.parquet").touch()
    flags = ["--model", "student", "--train_files", "train.parquet", "--val_files", "s3://bucket/val.parquet"]
    for command in dry_run(script, "--output_dir", "out", flags=flags, cwd=tmp_path):
        config = command.compose()
        for model in (config.actor_rollout_ref.model.path, config.critic.model.path):
            assert "global_step_N" in model or model == f"{tmp_path}/student"
        assert config.data.train_files == f"{tmp_path}/train.parquet"
        assert config.data.val_files == "s3://bucket/val.parquet"
        assert config.trainer.default_local_dir.startswith(f"{tmp_path}/out")
        assert f"hydra.run.dir={config.trainer.default_local_dir}/hydra" in command.overrides
    assert sorted(file.name for file in tmp_path.iterdir()) == ["student", "train.parquet"], "a dry run writes nothing"


# ---------------------------------------------------------------------- what a script runs

FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$FAKE_LOG"
case "$*" in
  *"recipe.gad.run.checkpoint student"*) echo "$FAKE_CHECKPOINT/actor/huggingface" ;;
  *recipe.gad.run.checkpoint*) echo "$FAKE_CHECKPOINT" ;;
  *recipe.gad.launch*) [ -z "${FAKE_CHECK:-}" ] || exit "$FAKE_CHECK" ;;&
  *main_ppo*) echo "platform ${VERL_PLATFORM:-unset}, devices ${CUDA_VISIBLE_DEVICES-unset}" ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
    """Function that runs a script with a Python that only notes its arguments: (result, calls)."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def fake(script, *arguments, **environment):
        log.write_text("")
        settings = {"PYTHON": str(python), "FAKE_LOG": str(log), "FAKE_CHECKPOINT": "/w/global_step_7"}
        return sh(script, *arguments, cwd=tmp_path, **settings, **environment), log.read_text().splitlines()

    return fake


def test_the_run_is_started_through_the_doctor(fake):
    done, calls = fake("run_warmup.sh", *GOOD, "--device", "cpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "platform cpu, devices unset\n", "Ray's raylet dies of an empty CUDA_VISIBLE_DEVICES"
    (command,) = dry_run("run_warmup.sh", *GOOD, "--device", "cpu")
    _, launch = calls
    assert launch.split("--config-name ")[0] == (
        "-m recipe.gad.launch -m verl.trainer.main_ppo --config-path pkg://recipe.gad.config "
    )
    assert launch.split()[-1] == command.overrides[-1]


def test_a_failed_check_stops_the_run(fake):
    done, calls = fake("run_warmup.sh", *GOOD, FAKE_CHECK="1")
    assert done.returncode == 1 and "recipe.gad.launch" in calls[-1] and done.stdout == ""


@pytest.mark.parametrize("script", ["run_warmup.sh", "run_pipeline.sh"])
def test_the_doctor_can_be_skipped(fake, script):
    done, calls = fake(script, *GOOD, "--skip-doctor", FAKE_CHECK="1")
    assert done.returncode == 0 and not any("gad.launch" in call for call in calls) and "main_ppo" in calls[-1]


@pytest.mark.parametrize("step", [None, 7])
def test_gad_starts_from_the_checkpoint_of_the_warmup(fake, step):
    resume = [] if step is None else ["--resume_step", step]
    done, calls = fake("run_gad.sh", "--warmup_dir", "w", "--train_files", "t", *resume)
    assert done.returncode == 0, done.stderr
    assert calls[0] == "-m recipe.gad.run.checkpoint resolve w" + ("" if step is None else " --step 7")
    assert " actor_rollout_ref.model.path=/w/global_step_7/actor/huggingface " in calls[-1]
    assert " critic.model.path=/w/global_step_7/critic/huggingface " in calls[-1]


def test_a_warmup_starts_from_the_student_of_seqkd(fake):
    done, calls = fake("run_warmup.sh", "--seqkd_dir", "s", "--reward_model", "d", "--train_files", "t")
    assert done.returncode == 0, done.stderr
    assert calls[0] == "-m recipe.gad.run.checkpoint student s"
    assert " actor_rollout_ref.model.path=/w/global_step_7/actor/huggingface " in calls[-1]
    assert " critic.model.path='d' " in calls[-1]


def test_the_smollm2_example_trains_and_evaluates_through_the_same_scripts(fake, tmp_path):
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    for name in ("student", "gad"):
        (out / name).mkdir()
    (out / "data/train.parquet").touch()
    done, calls = fake("smollm2_gpt4/run.sh", "--output_dir", out, "--skip-doctor", "trainer.seed_of_mine=1")
    assert done.returncode == 0, done.stderr
    assert not any("gad.launch" in call for call in calls)
    trained = [call.split() for call in calls if "main_ppo" in call]
    configs = []
    for words in trained:
        assert words[-1] == "trainer.seed_of_mine=1"
        with initialize_config_module(config_module="recipe.gad.config", version_base=None):
            configs.append(compose("gad_trainer", overrides=words[words.index("gad_trainer") + 1 : -1]))
    assert [config.gad.stage for config in configs] == ["seqkd", "seqkd", "seqkd", "warmup", "gad"]
    short, plateau, seqkd, warmup, gad = configs
    assert gad.trainer.total_training_steps == seqkd.trainer.total_training_steps == 200, "as many teacher batches"
    assert gad.data.train_batch_size == seqkd.data.train_batch_size == 32
    assert warmup.trainer.critic_warmup > warmup.trainer.total_training_steps == 120, "the discriminator trains alone"
    student = f"{out}/plateau/global_step_{plateau.trainer.total_training_steps}/actor/huggingface"
    assert warmup.actor_rollout_ref.model.path == seqkd.actor_rollout_ref.model.path == student
    assert warmup.critic.model.path == short.actor_rollout_ref.model.path == f"{out}/student"
    start = f"{out}/short/global_step_{short.trainer.total_training_steps}/actor/huggingface"
    assert plateau.actor_rollout_ref.model.path == start
    assert (gad.gad.imitation_coef, gad.algorithm.norm_adv_by_std_in_grpo) == (0.2, False)
    for config, samples in zip(configs, (8, 8, 8, 4, 8), strict=True):
        assert config.actor_rollout_ref.rollout.n == samples
    for config in configs:
        rollout, data = config.actor_rollout_ref.rollout, config.data
        assert (rollout.name, rollout.temperature, rollout.max_model_len) == ("vllm", 0.8, 768)
        assert (data.max_prompt_length, data.max_response_length) == (512, 256)
        assert config.trainer.n_gpus_per_node == 1
    folders = [config.trainer.default_local_dir for config in configs]
    assert folders == [f"{out}/{name}" for name in ("short", "plateau", "seqkd", "warmup", "gad")]
    assert gad.critic.model.path == "/w/global_step_7/critic/huggingface"
    evaluations = [call for call in calls if "recipe.gad.cli eval --model" in call]
    assert [re.search(r"--model (\S+)", call)[1] for call in evaluations] == [f"{out}/student", f"{out}/gad"]
    assert all(f"--two_sample_model {out}/student" in call for call in evaluations), "one base for all models"
    assert calls[-1] == f"-m recipe.gad.cli report {out} --output {out}/report.html"


def test_the_moe_example_has_its_setting_in_both_stages(fake, tmp_path):
    reward = SCRIPTS / "task_reward/json_form.py"
    models = ["--model", "org/moe", "--reward_model", "org/dense", "--train_files", "t", "--reward", reward]
    done, calls = fake("moe_gspo/run.sh", *models, "--output_dir", tmp_path / "out", "--skip-doctor", "data.seed=7")
    assert done.returncode == 0, done.stderr
    trained = [call.split() for call in calls if "main_ppo" in call]
    with initialize_config_module(config_module="recipe.gad.config", version_base=None):
        warmup, gad = (compose("gad_trainer", overrides=words[words.index("gad_trainer") + 1 :]) for words in trained)
    assert (warmup.gad.stage, warmup.critic.model.path) == ("warmup", "org/dense")
    assert warmup.actor_rollout_ref.model.path == "org/moe"
    assert (gad.gad.stage, gad.critic.model.path) == ("gad", "/w/global_step_7/critic/huggingface")
    for config in (warmup, gad):
        actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
        assert (data.train_batch_size, actor.ppo_mini_batch_size, config.critic.ppo_mini_batch_size) == (128, 64, 64)
        assert (data.max_prompt_length, data.max_response_length, rollout.max_model_len) == (3800, 2900, 7200)
        assert (rollout.name, rollout.n, rollout.tensor_model_parallel_size, rollout.temperature) == ("vllm", 8, 4, 0.6)
        assert (actor.strategy, config.critic.strategy) == ("fsdp2", "fsdp2")
        for engine in (actor.fsdp_config, config.critic.fsdp):
            assert engine.param_offload and engine.optimizer_offload
        assert (config.trainer.critic_warmup, config.trainer.n_gpus_per_node, data.seed) == (20, 8, 7)
        assert "tensorboard" in config.trainer.logger
        folder = config.ray_kwargs.ray_init.runtime_env.env_vars.TENSORBOARD_DIR
        assert folder == f"{tmp_path}/out/tensorboard/{config.gad.stage}"
    actor = gad.actor_rollout_ref.actor
    assert (actor.policy_loss.loss_mode, actor.loss_agg_mode) == ("gspo", "seq-mean-token-mean")
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.005, 0.01, 10)
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.entropy_coeff) == (True, 0.6, 0.01)
    assert (warmup.actor_rollout_ref.actor.use_kl_loss, warmup.actor_rollout_ref.actor.entropy_coeff) == (False, 0)
    assert (gad.gad.task_reward.weight, gad.reward.custom_reward_function.path) == (0.7, str(reward))


def test_the_slice_of_the_moe_example_fits_one_gpu_by_the_estimate(fake, tmp_path, load_script):
    out = tmp_path / "out"
    done, calls = fake("moe_gspo/slice.sh", "--layers", "4", "--output_dir", out, "--skip-doctor", "data.seed=7")
    assert done.returncode == 0, done.stderr
    folders = [f"{out}/data/{name}" for name in ("model", "student", "discriminator")]
    assert calls[1].endswith(f"moe_gspo/tiny.py {' '.join(folders)} --shape slice --layers 4")
    tiny = load_script("tiny", "examples/gad/moe_gspo")
    for folder, model in zip(folders[1:], tiny.configs(build_tokenizer(), "slice", 4), strict=True):
        model.save_pretrained(folder)
    trained = [call.split() for call in calls if "main_ppo" in call]
    with initialize_config_module(config_module="recipe.gad.config", version_base=None):
        configs = [compose("gad_trainer", overrides=words[words.index("gad_trainer") + 1 :]) for words in trained]
    assert [config.gad.stage for config in configs] == ["warmup", "gad"]
    for config in configs:
        rollout = config.actor_rollout_ref.rollout
        assert (config.trainer.device, rollout.name, rollout.tensor_model_parallel_size) == ("cuda", "vllm", 1)
        assert (config.trainer.n_gpus_per_node, config.data.seed) == (1, 7)
        assert config.trainer.critic_warmup < config.trainer.total_training_steps == config.trainer.save_freq
        config.actor_rollout_ref.model.path, config.critic.model.path = folders[1:]  # the warmup has written nothing
        assert {finding.level for finding in memory_findings(config, 80e9)} == {"ok"}


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("moe_gspo/run.sh", ["--model", "m"], "--reward_model is missing"),
        ("moe_gspo/slice.sh", ["--shape", "tiny"], "unknown flag --shape"),
        ("moe_gspo/run.sh", [*GOOD, "--reward_model", "d", "--reward", "no.py"], "--reward no.py is no file"),
        ("moe_gspo/tiny.sh", ["--model", "m"], "unknown flag --model"),
        ("smollm2_gpt4/run.sh", ["--output_dir", "nothing"], "run prepare.sh --output_dir nothing"),
        ("smollm2_gpt4/run.sh", ["--model", "x"], "unknown flag --model"),
        ("smollm2_gpt4/prepare.sh", [], "--train and --val are missing"),
        ("smollm2_gpt4/prepare.sh", ["--train"], "--train needs a value"),
        ("smollm2_gpt4/prepare.sh", ["--model", "x"], "unknown flag --model"),
        ("smollm2_gpt4/prepare.sh", ["data.seed=1"], "unknown argument data.seed=1"),
    ],
)
def test_mistakes_with_the_examples(fake, script, arguments, message):
    done, calls = fake(script, *arguments)
    assert done.returncode == 2 and message in done.stderr and calls == []


def test_the_pipeline_runs_its_stages_in_order_and_stops_at_the_first_failure(fake):
    done, calls = fake("run_pipeline.sh", *GOOD, "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    trained = [re.search(r"gad\.stage=(\w+)", call)[1] for call in calls if "main_ppo" in call]
    assert trained == STAGES
    assert any(re.search(r"recipe\.gad\.run\.checkpoint resolve \S*out/warmup", call) for call in calls)
    done, calls = fake("run_pipeline.sh", *GOOD, FAKE_CHECK="1")
    assert done.returncode == 1
    assert not any("gad.stage=warmup" in call for call in calls)


# ---------------------------------------------------------------------- paths and names reach Hydra as they are

ODD = ["äü日本", "a=b", "a,b", "a (2)", "[a]", "{a:b}", "a;b#c", "a&b|c", "~b", "it's", 'say "hi"', "`ls`", " a "]
ODD += ["a\\", "a\\'b", "'", "a!?*", "a%20b", "null", "1e5", "010", "true", "-x", "a:b@c", "a+b"]


def check_quoting(script, odd, tmp_path):
    """Every path and name that a script passes on is, for Hydra's parser, the text that the user gave."""
    model, out = f"{tmp_path}/m{odd}", f"{tmp_path}/o{odd}"
    data = f"{tmp_path}/{re.sub('[*?[]', '', odd)}/t.parquet"  # a pattern is refused in a data file's path
    flags = ["--model", model, "--train_files", data, "--val_files", f"{data}2", "--exp_name", odd]
    for command in dry_run(script, "--output_dir", out, flags=flags):
        values = command.values()
        stage, here, name, start = values["gad.stage"], out, odd, model
        if script == "run_pipeline.sh":
            here, name = f"{out}/{stage}", f"{odd}-{stage}"
            before = {"gad": "warmup", "warmup": "seqkd"}.get(stage)
            start = f"{out}/{before}/global_step_N/actor/huggingface" if before else model
        expected = {
            "actor_rollout_ref.model.path": start,
            "data.train_files": data,
            "data.val_files": f"{data}2",
            "trainer.experiment_name": name,
            "trainer.default_local_dir": here,
            "trainer.validation_data_dir": f"{here}/val_samples",
            "hydra.run.dir": f"{here}/hydra",
            "hydra.callbacks.short_console.raw_log": f"{here}/train.log",
            "ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH": f"{here}/metrics.jsonl",
        }
        assert {key: values[key] for key in expected} == expected
        assert command.environment["VERL_FILE_LOGGER_PATH"] == f"{here}/metrics.jsonl"


@pytest.mark.parametrize("odd", ["null", "1e5", "a\\\\'b"])
def test_names_that_hydra_would_take_for_values_reach_it_as_text(odd, tmp_path):
    check_quoting("run_gad.sh", odd, tmp_path)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_every_script_quotes(script, tmp_path):
    check_quoting(script, "ä =,()[]{}'\"`\\&|;#~*?<>!", tmp_path)


def test_odd_names_survive_the_whole_configuration(tmp_path):
    config = stage_config("gad", "--exp_name", "lr=1e-6, 'try' (2)", "--output_dir", f"{tmp_path}/ü=[1]")
    assert config.trainer.experiment_name == "lr=1e-6, 'try' (2)"
    assert config.trainer.default_local_dir == f"{tmp_path}/ü=[1]"


def test_odd_and_random_texts_reach_hydra():
    rng = random.Random(0)
    pieces = [*"ab/ .-_=,()[]{}:;#&|~'\"`\\!?*<>%@+^019äß日🎉", *"\\\\'", "null", "true", "1e5", "nan", "\\'", "''"]
    texts = ODD + ["".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(300)]
    script = f'source "{SCRIPTS}/common.sh"; for each in "$@"; do text "$each"; printf "\\0"; done'
    done = subprocess.run(["bash", "-c", script, "bash", *texts], capture_output=True, text=True, check=True)
    parser = OverridesParser.create()
    assert [parser.parse_override(f"key={value}").value() for value in done.stdout.split("\0")[:-1]] == texts


@pytest.mark.parametrize(
    ("flag", "text", "reason"),
    [
        ("--model", "a\nb", "control character"),
        ("--train_files", "a\n", "control character"),
        ("--exp_name", "\x1b[2J", "control character"),
        ("--output_dir", "a${oc.env:HOME}b", "holds \\$"),
        ("--val_files", "a$HOME", "holds \\$"),
        ("--reward_model", b"a\xff", "not UTF-8"),
        ("--train_files", "a[1].parquet", "as a pattern"),
        ("--val_files", "a::b", "as a pattern"),
    ],
)
def test_texts_that_no_layer_below_keeps_are_refused_by_name(fake, flag, text, reason):
    arguments = dict(zip(GOOD[::2], GOOD[1::2], strict=True)) | {flag: os.fsdecode(text)}
    done, calls = fake("run_warmup.sh", *(word for pair in arguments.items() for word in pair))
    assert done.returncode == 2 and calls == [] and "\x1b" not in done.stderr
    assert re.search(f"^error: {flag} .*{reason}", done.stderr), done.stderr


def test_the_warmups_folder_is_refused_by_name_too(fake):
    done, calls = fake("run_gad.sh", "--warmup_dir", "w\n", "--train_files", "t")
    assert done.returncode == 2 and "error: --warmup_dir has a newline" in done.stderr and calls == []


PATHS = {"model", "reward_model", "train_files", "val_files", "output_dir", "exp_name"}
FLAG_NAMES = PATHS | {"nnodes", "device", "resume_step"}
SWITCHES = {"dry_run", "skip_doctor", "raw_log"}
PIECES = [*"ab01 ./-_=,()[]{}:;#&|~'\"`\\!?*<>%@+^$\n\x1bäß日🎉", "\udcff", "--", "null", "${a}", "::", "http://"]
VALUES = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
VALUES |= st.sampled_from(["x", "2", "0.2", "cpu", "a b", *ODD])
OVERRIDES = [[], ["gad.replay=0.5", "a='b c'"], ["--", "-h"], ["--", "--model", "x"]]


@st.composite
def arguments(draw):
    """A launch script, and words after its name: flags with any values, often repeated, and overrides."""
    script = draw(st.sampled_from(LAUNCHERS))
    words = ["--dry-run", *draw(st.sampled_from([GOOD] * 9 + [GOOD[:2]]))]
    names = st.sampled_from([*sorted(PATHS | SWITCHES), *sorted(PATHS), "nnodes", "device"])
    for name in draw(st.lists(names, max_size=5)):
        words.append(draw(st.sampled_from([f"--{name}", f"--{name.replace('_', '-')}"])))
        if name not in SWITCHES:
            words.append(draw({"nnodes": st.just("2"), "device": st.just("cpu")}.get(name, VALUES) | VALUES))
    if draw(st.integers(0, 4)) == 4:  # a value is missing, a flag is unknown, or a word is too many
        other = draw(st.sampled_from(["--model", "--beta", "-h", "--", "x"]) | VALUES)
        words.insert(draw(st.integers(1, len(words))), other)
    return script, words + draw(st.sampled_from(OVERRIDES))


def read_words(words, names, switches):
    """(flag -> value, overrides) of a script's words; None: they are wrong; "help": they ask for help."""
    found = {}
    while words:
        word, *words = words
        if word in ("--help", "-h"):
            return "help"
        if word == "--":
            break
        if not word.startswith("--"):
            if "=" in word and any(re.match("--.", later, re.DOTALL) for later in words):
                return None
            words = [word, *words]
            break
        name = word[2:].replace("-", "_")
        if name in switches:
            found[name] = "1"
        elif name not in names or not words or not words[0] or words[0].startswith("--"):
            return None
        else:
            found[name], *words = words
    return found, words


def is_refused(flags):
    """Whether a script must refuse these flags, by the rules that its help and errors state."""
    texts = [flags[name] for name in PATHS & flags.keys()]
    data = [flags[name] for name in {"train_files", "val_files"} & flags.keys()]
    return (
        not {"model", "train_files"} <= flags.keys()
        or "resume_step" in flags
        or flags.get("device", "cpu") not in ("cpu", "gpu")
        or not re.fullmatch("[0-9]+", flags.get("nnodes", "1"))
        or not re.fullmatch("[0-9.eE+-]+", flags.get("beta", "1"))
        or any(re.search(r"[\x00-\x1f\x7f$\udc80-\udcff]", text) for text in texts)
        or any(re.search(r"[*?[]|::", text) for text in data)
    )


@cases(20)
@given(arguments())
def test_any_arguments_give_help_or_the_command_or_one_error(case):
    script, words = case
    soda = script == "run_soda.sh"
    read = read_words(words, FLAG_NAMES | {"beta"} if soda else FLAG_NAMES, SWITCHES | {"online"} if soda else SWITCHES)
    with TemporaryDirectory() as folder:
        done = sh(script, *words, cwd=folder)
        assert os.listdir(folder) == []
        if read == "help":
            assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
            return
        if read is None or is_refused(read[0]):
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch(r"error: [^\x00-\x1f]+\n", done.stderr), done.stderr
            return
        assert (done.returncode, done.stderr) == (0, "")
        flags, overrides = read
        for command, stage in zip(map(Command, done.stdout.splitlines()), STAGES, strict=False):
            assert command.overrides[len(command.overrides) - len(overrides) :] == overrides
            check_command(command, flags, folder, stage if script == "run_pipeline.sh" else None)


def check_command(command, flags, folder, pipeline_stage):
    """The command holds the texts of the flags as they were given; ``absolute`` is what the help says of paths."""

    def absolute(path):
        return path if "://" in path or not os.path.exists(os.path.join(folder, path)) else os.path.join(folder, path)

    own = [word for word in command.overrides if word.split("=")[0] in KEYS_OF_FLAGS]
    parsed = OverridesParser.create().parse_overrides(own)
    values = {override.key_or_group: override.value() for override in parsed}
    stage = pipeline_stage or values["gad.stage"]
    name = flags.get("exp_name", stage)
    output = flags.get("output_dir", f"checkpoints/gad/{name}")
    if pipeline_stage is not None:
        output = f"{flags.get('output_dir', 'checkpoints/gad/' + flags.get('exp_name', 'pipeline'))}/{stage}"
        name = f"{flags['exp_name']}-{stage}" if "exp_name" in flags else stage
    data = absolute(flags["train_files"])
    expected = {
        "gad.stage": stage,
        "data.train_files": data,
        "data.val_files": absolute(flags["val_files"]) if "val_files" in flags else data,
        "trainer.experiment_name": name,
        "trainer.default_local_dir": os.path.join(folder, output),
    }
    if pipeline_stage in (None, "seqkd"):
        expected["actor_rollout_ref.model.path"] = absolute(flags["model"])
        expected["critic.model.path"] = absolute(flags.get("reward_model", flags["model"]))
    assert {key: values[key] for key in expected} == expected
    assert f"trainer.nnodes={flags.get('nnodes', '1')}" in command.overrides
    assert f"device={flags.get('device', 'gpu')}" in command.overrides


KEYS_OF_FLAGS = {"gad.stage", "data.train_files", "data.val_files", "trainer.experiment_name", "critic.model.path"}
KEYS_OF_FLAGS |= {"trainer.default_local_dir", "actor_rollout_ref.model.path"}


# ---------------------------------------------------------------------- the configuration files


def uncommented(text):
    """Dotted leaf keys without a comment line above them, or above the block of plain leaves that they are in."""
    missing, path, commented, previous = [], [], [], ""
    blocks = yaml.safe_load(text) or {}
    for line in text.splitlines():
        match = re.match(r"( *)([A-Za-z_]\w*):(\s|$)", line)
        if match and not line.lstrip().startswith("#"):
            depth = len(match[1]) // 2
            path[depth:], commented[depth:] = [match[2]], [previous.lstrip().startswith("#")]
            value, parent = blocks, {}
            for key in path:
                parent, value = value, value[key]
            plain_block = not any(isinstance(v, dict) for v in parent.values())
            fine = commented[-1] or (len(path) > 1 and plain_block and commented[-2])
            if not isinstance(value, dict) and path[0] not in ("hydra", "defaults") and not fine:
                missing.append(".".join(path))
        previous = line
    return missing


@pytest.mark.parametrize("file", ["gad_trainer.yaml", "device/cpu.yaml", "device/gpu.yaml"])
def test_every_key_we_set_has_a_comment(file):
    assert uncommented((ROOT / "recipe/gad/config" / file).read_text()) == []


def test_the_comment_check_sees_missing_comments():
    assert uncommented("a:\n  # c\n  b: 1\n\n  c: 2\n  d:\n    e: 3\n") == ["a.c", "a.d.e"]
    assert uncommented("a:\n  # c\n  d:\n    e: 3\n    f: 4\n") == []


OWN_KEYS = {"data.teacher_key"}
"""Outside the ``gad`` group; read by verl/utils/dataset/rl_dataset.py."""


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("file", ["gad_trainer.yaml", "device/cpu.yaml"])
def test_every_key_we_set_exists_in_verls_configuration(file):
    ours = yaml.safe_load((ROOT / "recipe/gad/config" / file).read_text())
    keys = [key for key in leaves(ours) if not key.startswith(("hydra.", "defaults", "gad.")) and key not in OWN_KEYS]
    with initialize_config_module(config_module="verl.trainer.config", version_base=None):
        stock = OmegaConf.to_container(compose("ppo_trainer"), resolve=False)

    def exists(key):
        node, parts = stock, key.split(".")
        for depth, part in enumerate(parts):
            if node in ({}, None):  # an open dictionary such as override_config
                return True
            if part not in node:
                if parts[:depth] == ["ray_kwargs", "ray_init"]:
                    return part in inspect.signature(ray.init).parameters
                target = node.get("_target_")  # a field that verl's dataclass has and its YAML file leaves out
                return target is not None and part in {field.name for field in dataclasses.fields(get_class(target))}
            node = node[part]
        return True

    assert [key for key in keys if not exists(key)] == []


# ---------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", ["INT", "TERM", "USR1"])
def test_a_script_of_several_stages_passes_a_signal_on_and_starts_no_further_stage(tmp_path, number):
    stage = "trap 'sleep 0.5; echo saved; exit 0' TERM; echo started; while :; do sleep 0.05; done"
    text = f'set -euo pipefail; source "{SCRIPTS}/flags.sh"; stoppable bash -c "$1"; echo next'
    process = subprocess.Popen(["bash", "-c", text, "bash", stage], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(getattr(signal, f"SIG{number}"))
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "saved\n")


@pytest.mark.parametrize("code", [0, 3])
def test_a_stage_without_a_signal_keeps_its_exit_code(code):
    text = f'source "{SCRIPTS}/flags.sh"; stoppable bash -c "exit {code}"; echo $?'
    assert subprocess.run(["bash", "-c", text], capture_output=True, text=True).stdout == f"{code}\n"

"""End to end through the real launch scripts: stages, hand-over, world sizes, SIGKILL and resume, stock verl."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
STEPS, SAVE_FREQ = 5, 3
TIMEOUT = 420  # seconds; a hang must not hold the suite
WITH_DOCTOR = ("warmup", "gad", "refused")  # runs that ask the doctor first, which takes a tenth of their CPU time
NOT_REPEATABLE = ("timing", "perf/", "critic/perf", "actor/perf")  # clocks and memory


@pytest.fixture(scope="module")
def runner(tiny_problem, tiny_overrides, tmp_path_factory):
    small = [
        *tiny_overrides,
        "trainer.logger=[file]",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.save_freq={SAVE_FREQ}",
        f"trainer.test_freq={STEPS}",
    ]
    return Runner(tiny_problem, small, tmp_path_factory.mktemp("runs"))


class Runner:
    """Starts launch scripts, each with a Ray cluster of its own, and never leaves a process behind."""

    def __init__(self, problem: Path, small: list[str], base: Path):
        self.problem = problem
        self.small = small
        self.base = base

    def command(self, stage: str, out: Path, *arguments: str) -> list[str]:
        script, flags, overrides = f"run_{stage}.sh", [], []
        for argument in arguments:
            (overrides if "=" in argument else flags).append(argument)
        data = ["--train_files", f"{self.problem}/train.parquet", "--val_files", f"{self.problem}/val.parquet"]
        start = ["bash", str(ROOT / "examples/gad" / script), "--device", "cpu", "--output_dir", str(out), *data]
        doctor = [] if out.name in WITH_DOCTOR else ["--skip-doctor"]
        return [*start, *doctor, *flags, *self.small, *overrides]

    def run(
        self, command: list[str], env: dict | None = None, kill_when=None, signal_when=None, send=None
    ) -> subprocess.CompletedProcess:
        """Run to the end, or until ``kill_when()`` is true: then every process of the run gets SIGKILL.

        ``send(process)`` is called once, when ``signal_when()`` is true.
        """
        ray_dir = tempfile.mkdtemp(prefix="gad-e2e-", dir="/tmp")
        log = Path(ray_dir) / "log"
        environment = {**os.environ, "PYTHON": sys.executable, "HYDRA_FULL_ERROR": "0", **(env or {})}
        environment.pop("VERL_PLATFORM", None)  # the scripts set it
        environment.update(env or {})
        command = [*command, f"+ray_kwargs.ray_init._temp_dir={ray_dir}"]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ray_dir, start_new_session=True
            )
            family = [psutil.Process(process.pid)]
            deadline = time.monotonic() + TIMEOUT
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    if kill_when is not None and kill_when():
                        break
                    if signal_when is not None and signal_when():
                        signal_when = send(process)
                    time.sleep(0.005 if kill_when is not None else 0.1)
                finished = process.poll() is not None
                if not finished:
                    family += family[0].children(recursive=True)
            finally:
                for member in family:
                    if member.is_running():
                        member.send_signal(signal.SIGKILL)
                process.wait()
                psutil.wait_procs(family, timeout=20)
        text = log.read_text(errors="replace")
        shutil.rmtree(ray_dir, ignore_errors=True)
        assert finished or kill_when is not None, f"no end after {TIMEOUT} s:\n{text[-3000:]}"
        return subprocess.CompletedProcess(command, process.returncode, text, "")

    def stage(self, stage: str, name: str, *arguments: str) -> Path:
        out = self.base / name
        result = self.run(self.command(stage, out, *arguments))
        assert result.returncode == 0, result.stdout[-4000:]
        return out

    def killed_and_resumed(self, stage: str, name: str, *arguments: str) -> tuple[Path, str, int]:
        """Kill a run one step after a checkpoint, then rerun its command: (folder, checkpoint and step it died at)."""
        out = self.base / name
        command, log = self.command(stage, out, *arguments), out / "metrics.jsonl"

        def step_after_the_checkpoint_is_logged() -> bool:
            return log.exists() and f'{{"step":{SAVE_FREQ + 1},' in log.read_text()

        self.run(command, kill_when=step_after_the_checkpoint_is_logged)
        died_at = (out / "latest_checkpointed_iteration.txt").read_text(), max(metrics(out))
        result = self.run(command)
        assert result.returncode == 0, result.stdout[-4000:]
        return out, *died_at

    def stopped_and_resumed(self, stage: str, name: str, send: Callable, *arguments: str) -> tuple[Path, str, str]:
        """Signal a run after its first step, then rerun its command: (folder, checkpoint, output of the first)."""
        out = self.base / name
        command, log = self.command(stage, out, *arguments), out / "metrics.jsonl"
        result = self.run(
            command, signal_when=lambda: log.exists() and '{"step":1,' in log.read_text(), send=lambda p: send(p)
        )
        assert result.returncode == 0, result.stdout[-4000:]
        stopped_at = (out / "latest_checkpointed_iteration.txt").read_text()
        assert max(metrics(out)) == int(stopped_at), "the last step is logged"
        assert not (out / "stop_requested").exists()
        again = self.run(command)
        assert again.returncode == 0, again.stdout[-4000:]
        return out, stopped_at, result.stdout

    def stock_grpo(self, name: str, env: dict[str, str]) -> list[dict]:
        """Logged steps of two steps of stock GRPO in an environment."""
        out = self.base / name
        out.mkdir()
        rows = pq.read_table(self.problem / "train.parquet").to_pylist()
        for row in rows:
            row["reward_model"] = {"style": "rule", "ground_truth": row.pop("teacher_response")}
        data, log = out / "stock.parquet", out / "metrics.jsonl"
        pq.write_table(pa.Table.from_pylist(rows), data)
        command = [
            sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", "pkg://recipe.gad.config",
            "--config-name", "gad_trainer", "device=cpu", "trainer.v1.trainer_mode=sync", "critic.enable=False",
            "data.teacher_key=null",
            f"reward.custom_reward_function.path={ROOT}/recipe/gad/reward.py",
            f"actor_rollout_ref.model.path={self.problem}/model", f"data.train_files={data}",
            f"data.val_files={data}",
            f"trainer.default_local_dir={out}/checkpoints", *self.small, "trainer.total_training_steps=2",
            "trainer.test_freq=-1",
            "trainer.val_before_train=False", "trainer.save_freq=-1", f"hydra.run.dir={out}/hydra",
        ]  # fmt: skip
        result = self.run(command, env={**env, "VERL_FILE_LOGGER_PATH": str(log), "HYDRA_FULL_ERROR": "1"})
        assert result.returncode == 0, result.stdout[-4000:]
        return [json.loads(line) for line in log.read_text().splitlines()]


def metrics(out: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {
        line["step"]: {key: value for key, value in line["data"].items() if not key.startswith(NOT_REPEATABLE)}
        for line in lines
    }


# ------------------------------------------------------------------ runs, two at a time


JOBS: dict[str, Callable] = {}
"""Name of a fixture -> the runs that make its value, in the order in which they start."""


def in_background(job: Callable) -> Callable:
    """Fixture with what ``job(runner, *values)`` returns; its further parameters name jobs that must end before it."""
    JOBS[job.__name__] = job

    @pytest.fixture(scope="module", name=job.__name__)
    def value(futures):
        return futures[job.__name__].result()

    return value


@pytest.fixture(scope="module")
def futures(request, runner):
    """The jobs that the selected tests ask for, and those that they build on.

    Two run at a time: a run mostly waits for processes that start one after the other, so it leaves a core idle.
    """
    started: dict[str, Future] = {}

    def start(name: str) -> Future:
        if name not in started:
            earlier = [start(needed) for needed in list(inspect.signature(JOBS[name]).parameters)[1:]]
            started[name] = pool.submit(lambda: JOBS[name](runner, *(future.result() for future in earlier)))
        return started[name]

    wanted = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(max_workers=2) as pool:  # first in, first out: what a job waits for has a thread already
        for name in JOBS:
            if name in wanted:
                start(name)
        yield started
        for future in started.values():
            future.cancel()


@in_background
def warmup(runner):
    return runner.stage("warmup", "warmup", "--model", f"{runner.problem}/model", "trainer.critic_warmup=2")


@in_background
def seqkd(runner):
    rollouts = f"trainer.rollout_data_dir={runner.base}/rollouts"  # there are none, which is no reason to fail
    return runner.stage("seqkd", "seqkd", "--model", f"{runner.problem}/model", rollouts)


@in_background
def seqkd_without_validation(runner):
    quiet = ["trainer.test_freq=-1", "trainer.val_before_train=False"]
    return runner.stage("seqkd", "seqkd-quiet", "--model", f"{runner.problem}/model", *quiet)


@in_background
def soda(runner):
    rollouts = f"trainer.rollout_data_dir={runner.base}/rollouts"  # there are none in its steps
    return runner.stage("soda", "soda", "--model", f"{runner.problem}/model", rollouts)


@in_background
def soda_on_two_ranks(runner):
    return runner.stage("soda", "soda-2", "--model", f"{runner.problem}/model", "trainer.n_gpus_per_node=2")


@in_background
def killed_soda(runner):
    return runner.killed_and_resumed("soda", "killed-soda", "--model", f"{runner.problem}/model")


@in_background
def online_dpo(runner):
    flags = ["--online", "--beta", "0.3"]
    return runner.stage("soda", "online", *flags, "--model", f"{runner.problem}/model", "gad.imitation_coef=0.2")


@in_background
def gad(runner, warmup):
    return runner.stage("gad", "gad", "--warmup_dir", str(warmup))


def fresh_discriminators(runner) -> list[str]:
    settings = f"model={runner.problem}/model", "epochs=1", "lr=1e-3"
    return [f"gad.fresh_discriminator.{value}" for value in settings]


@in_background
def with_fresh_discriminators(runner, warmup):
    return runner.stage("gad", "fresh", "--warmup_dir", str(warmup), *fresh_discriminators(runner))


@in_background
def with_weightless_reward_and_probe(runner, warmup):
    reward = f"reward.custom_reward_function.path={ROOT}/examples/gad/task_reward/json_form.py"
    settings = [reward, "gad.task_reward.weight=0", "gad.shortcut_probe=True"]
    return runner.stage("gad", "weightless", "--warmup_dir", str(warmup), *settings)


@in_background
def olmo_warmup(runner):
    from transformers import AutoTokenizer, Olmo2Config, Olmo2ForCausalLM

    from recipe.gad.quickstart.problem import tiny_llama

    tokenizer = AutoTokenizer.from_pretrained(runner.problem / "model")
    sizes = {name: value for name, value in tiny_llama(tokenizer).to_diff_dict().items() if name != "model_type"}
    Olmo2ForCausalLM(Olmo2Config(**sizes)).save_pretrained(runner.base / "olmo2")
    tokenizer.save_pretrained(runner.base / "olmo2")
    return runner.stage("warmup", "olmo-warmup", "--model", f"{runner.base}/olmo2")


@in_background
def olmo_gad(runner, olmo_warmup):
    return runner.stage("gad", "olmo-gad", "--warmup_dir", str(olmo_warmup))


@in_background
def moe(runner):
    """Both stages of the example with a mixture-of-experts student, two steps each."""
    out = runner.base / "moe"
    script = f"{ROOT}/examples/gad/moe_gspo/tiny.sh"
    few = ["trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.test_freq=2", "trainer.critic_warmup=1"]
    result = runner.run(["bash", script, "--output_dir", str(out), "--skip-doctor", *few])
    assert result.returncode == 0, result.stdout[-4000:]
    return out


@in_background
def gspo(runner):
    """GSPO with two optimizer steps a batch, on the quickstart's problem."""
    from recipe.gad.quickstart.problem import build_problem

    toy = build_problem(runner.base / "toy", n_train=256)
    keys = [f"data.train_files={toy}/train.parquet", f"data.val_files={toy}/val.parquet", "data.train_batch_size=16"]
    keys += ["actor_rollout_ref.rollout.temperature=1.0"]
    start = runner.stage("warmup", "toy-warmup", "--model", f"{toy}/model", *keys)
    clip = ["clip_ratio_low=0.005", "clip_ratio_high=0.01", "clip_ratio_c=10", "ppo_mini_batch_size=8"]
    clip += ["policy_loss.loss_mode=gspo", "loss_agg_mode=seq-mean-token-mean"]
    clip = [f"actor_rollout_ref.actor.{key}" for key in clip]
    return runner.stage("gad", "gspo", "--warmup_dir", str(start), *keys, *clip)


@in_background
def gad_on_two_ranks(runner, warmup):
    return runner.stage("gad", "gad-2", "--warmup_dir", str(warmup), "trainer.n_gpus_per_node=2")


@in_background
def still_on_two_ranks(runner, warmup):
    """The GAD stage on two ranks with learning rates of zero."""
    rates = ["actor_rollout_ref.actor.optim.lr=0", "critic.optim.lr=0"]
    return runner.stage("gad", "still-2", "--warmup_dir", str(warmup), "trainer.n_gpus_per_node=2", *rates)


@in_background
def gad_from_two_ranks(runner, still_on_two_ranks):
    return runner.stage("gad", "gad-from-still-2", "--warmup_dir", str(still_on_two_ranks))


@in_background
def killed_gad_on_two_ranks(runner, warmup):
    arguments = ["--warmup_dir", str(warmup), "trainer.n_gpus_per_node=2"]
    return runner.killed_and_resumed("gad", "killed-gad-2", *arguments)


@in_background
def killed_warmup(runner):
    arguments = ["--model", f"{runner.problem}/model", "trainer.critic_warmup=2"]
    return runner.killed_and_resumed("warmup", "killed-warmup", *arguments)


@in_background
def killed_gad(runner, warmup):
    return runner.killed_and_resumed("gad", "killed-gad", "--warmup_dir", str(warmup))


VARIANTS = (
    "gad.imitation_coef=0.3",
    "gad.teacher_in_group=True",
    "gad.policy_gate=0.5",
    "algorithm.norm_adv_by_std_in_grpo=False",
)


@in_background
def variants(runner, warmup):
    return runner.stage("gad", "variants", "--warmup_dir", str(warmup), *VARIANTS)


@in_background
def variants_on_two_ranks(runner, warmup):
    ranks = ["trainer.n_gpus_per_node=2", *fresh_discriminators(runner)]
    return runner.stage("gad", "variants-2", "--warmup_dir", str(warmup), *VARIANTS, *ranks)


@in_background
def killed_variants(runner, warmup):
    return runner.killed_and_resumed("gad", "killed-variants", "--warmup_dir", str(warmup), *VARIANTS)


def discriminator_variants(runner, warmup) -> list[str]:
    """Arguments of a GAD run with every variant of the discriminator; it leads in the first steps."""
    lead = ("max_steps=4", "patience=1", "min_delta=0.9")
    return [
        *("--warmup_dir", str(warmup), "trainer.test_freq=1", "critic.ppo_mini_batch_size=4"),
        *(f"gad.discriminator_lead.{key}" for key in lead),
        *("gad.discriminator_ema=0.5", "gad.replay=0.67", "gad.replay_capacity=10", "gad.label_smoothing=0.1"),
        *(f"gad.unlabelled_files=[{runner.problem}/val.parquet]", "gad.unlabelled_ratio=0.25"),
    ]


@in_background
def d_variants(runner, warmup):
    return runner.stage("gad", "d-variants", *discriminator_variants(runner, warmup))


@in_background
def killed_d_variants(runner, warmup):
    return runner.killed_and_resumed("gad", "killed-d-variants", *discriminator_variants(runner, warmup))


@in_background
def stopped_warmup(runner):
    """Ctrl-C: the terminal sends SIGINT to every process of the run's group."""
    arguments = ["--model", f"{runner.problem}/model", "trainer.critic_warmup=2"]
    return runner.stopped_and_resumed("warmup", "stopped-warmup", lambda p: os.killpg(p.pid, signal.SIGINT), *arguments)


@in_background
def stopped_gad(runner, warmup):
    return runner.stopped_and_resumed(
        "gad", "stopped-gad", lambda p: p.send_signal(signal.SIGTERM), "--warmup_dir", str(warmup)
    )


@in_background
def two_ranks_from_two_ranks(runner):
    model = ["--model", f"{runner.problem}/model"]
    out = runner.stage("warmup", "warmup-2", *model, "trainer.n_gpus_per_node=2", "trainer.critic_warmup=2")
    return runner.stage("gad", "gad-from-2", "--warmup_dir", str(out), "trainer.n_gpus_per_node=2")


LORA = (
    "actor_rollout_ref.model.lora_rank=4",
    "actor_rollout_ref.model.lora.merge=True",
    "actor_rollout_ref.rollout.load_format=auto",
    "critic.model.lora_rank=4",
)
FASTER = ("actor_rollout_ref.actor.optim.lr=1e-2", "critic.optim.lr=1e-2")  # so that adapters do something in 5 steps


@in_background
def lora(runner, warmup):
    return runner.stage("gad", "lora", "--warmup_dir", str(warmup), *LORA)


@in_background
def lora_warmup(runner):
    return runner.stage(
        "warmup", "lora-warmup", "--model", f"{runner.problem}/model", "trainer.critic_warmup=2", *LORA, *FASTER
    )


@in_background
def lora_gad(runner, lora_warmup):
    return runner.stage("gad", "lora-gad", "--warmup_dir", str(lora_warmup), *LORA, *FASTER)


@in_background
def lora_gad_on_two_ranks(runner, lora_warmup):
    two = "trainer.n_gpus_per_node=2"
    return runner.stage("gad", "lora-gad-2", "--warmup_dir", str(lora_warmup), *LORA, *FASTER, two)


@in_background
def killed_lora_gad(runner, lora_warmup):
    return runner.killed_and_resumed("gad", "killed-lora-gad", "--warmup_dir", str(lora_warmup), *LORA, *FASTER)


@in_background
def stock_with_the_plugin(runner):
    return runner.stock_grpo("stock-with", {"VERL_PLATFORM": "cpu"})


@in_background
def stock_without_the_plugin(runner):
    return runner.stock_grpo("stock-without", cpu_only_plugin(runner.base / "site"))


# ------------------------------------------------------------------ stages


def test_warmup_then_gad_through_the_launch_scripts(warmup, gad):
    log = metrics(warmup)
    assert sorted(log) == list(range(STEPS + 1))  # 0: validation before training
    assert "actor/sft_loss" not in log[1] and "actor/sft_loss" in log[2]  # trainer.critic_warmup=2
    assert log[STEPS]["critic/d_loss"] < log[1]["critic/d_loss"]
    assert log[STEPS]["actor/sft_loss"] < log[2]["actor/sft_loss"]
    log = metrics(gad)
    assert all("actor/pg_loss" in log[step] and "actor/kl_loss" in log[step] for step in range(1, STEPS + 1))
    assert log[1]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)  # reference = warmup actor = start of the actor
    assert log[STEPS]["actor/kl_loss"] > log[1]["actor/kl_loss"]
    assert any(key.startswith("val-aux/tiny/rouge_l/mean") for key in log[STEPS])
    assert json.loads((gad / "gad_stage.json").read_text())["stage"] == "gad"


def test_hand_over_takes_actor_and_critic_of_the_warmup(runner, warmup, gad):
    command = runner.command("gad", runner.base / "dry", "--warmup_dir", str(warmup), "--resume_step", str(SAVE_FREQ))
    dry = subprocess.run(
        [*command[:2], "--dry-run", *command[2:]],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert f"actor_rollout_ref.model.path={warmup}/global_step_{SAVE_FREQ}/actor/huggingface" in dry.stdout
    assert f"critic.model.path={warmup}/global_step_{SAVE_FREQ}/critic/huggingface" in dry.stdout
    # D goes on where the warmup left it: it tells the warmup's samples at least as well as a fresh one
    assert metrics(gad)[1]["critic/d_loss"] < metrics(warmup)[1]["critic/d_loss"]


def same_metrics(killed: tuple[Path, str, int], uninterrupted: Path) -> None:
    """A run that was killed and resumed logged what an uninterrupted one did."""
    out, last_checkpoint, last_step = killed
    assert last_checkpoint == str(SAVE_FREQ)
    assert last_step == SAVE_FREQ + 1, "the run was over before it could be killed"
    same_steps(metrics(out), metrics(uninterrupted))


def same_steps(got: dict, expected: dict) -> None:
    assert sorted(got) == sorted(expected)
    for step in range(1, STEPS + 1):
        # validation answers are summed in order of arrival, so their means (alone) may differ in the last digit
        means = {name: pytest.approx(v, rel=1e-12, abs=0) for name, v in expected[step].items() if "val-" in name}
        assert got[step] == expected[step] | means, f"step {step}"


def test_sigkill_between_checkpoints_then_the_same_command_gives_the_same_metrics(gad, killed_gad):
    same_metrics(killed_gad, gad)


@pytest.mark.long
def test_a_reward_without_weight_and_a_probe_change_no_other_number(gad, with_weightless_reward_and_probe):
    log, expected = metrics(with_weightless_reward_and_probe), metrics(gad)
    for step in range(1, STEPS + 1):
        trained = {name: value for name, value in expected[step].items() if "val-" not in name}
        assert {name: log[step][name] for name in trained} == trained, f"step {step}"
        assert ("critic/shortcut_length_acc" in log[step]) == (step > 1), "the probe learns from the steps before"
    assert {"val-core/tiny/acc/mean@1", "val-aux/d_acc"} <= log[STEPS].keys(), "validation shows both rewards"


@pytest.mark.long
def test_a_run_with_fresh_discriminators_trains_as_one_without(gad, with_fresh_discriminators):
    log = metrics(with_fresh_discriminators)
    fresh = {step: found.pop("val-aux/two_sample") for step, found in log.items() if "val-aux/two_sample" in found}
    assert sorted(fresh) == [0, STEPS] and all(0.0 <= accuracy <= 1.0 for accuracy in fresh.values())
    same_steps(log, metrics(gad))


@pytest.mark.long
def test_sigkill_of_a_warmup_then_the_same_command_gives_the_same_metrics(warmup, killed_warmup):
    same_metrics(killed_warmup, warmup)


@pytest.mark.long
def test_the_variants_of_the_objective_resume_with_the_same_metrics(variants, killed_variants):
    log = metrics(variants)
    assert all(0.0 < log[step]["gad/policy_gate"] < 1.0 for step in (SAVE_FREQ, SAVE_FREQ + 1))
    same_metrics(killed_variants, variants)


@pytest.mark.long
def test_the_variants_of_the_objective_do_the_same_on_two_ranks(variants, variants_on_two_ranks):
    names = ["actor/imitation_loss", "actor/teacher_pg_loss", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm"]
    one_log, two_log = metrics(variants), metrics(variants_on_two_ranks)
    assert 0.0 <= two_log[STEPS]["val-aux/two_sample"] <= 1.0, "the ranks share the seeds"
    for step in range(1, STEPS + 1):
        for name in [*names, "gad/policy_gate", "critic/d_loss"]:
            assert two_log[step][name] == pytest.approx(one_log[step][name], rel=2e-3, abs=1e-4), (step, name)


@pytest.mark.long
def test_every_variant_of_the_discriminator_at_once_resumes_with_the_same_metrics(d_variants, killed_d_variants):
    log = metrics(d_variants)
    leading = [log[step]["gad/leading"] for step in range(1, STEPS + 1)]
    assert leading[0] == 1.0 and leading[-1] == 0.0 and leading == sorted(leading, reverse=True)
    assert [("actor/pg_loss" in log[step]) for step in range(1, STEPS + 1)] == [not led for led in leading]
    assert "critic/replay_d_acc" not in log[1] and all("critic/replay_d_acc" in log[step] for step in (2, STEPS))
    assert all(0.0 <= log[step]["val-aux/d_acc"] <= 1.0 for step in range(STEPS + 1))
    same_metrics(killed_d_variants, d_variants)


def nothing_is_lost(stopped: tuple[Path, str, str], expected: dict) -> None:
    out, stopped_at, text = stopped
    assert int(stopped_at) < STEPS, "the run was over before the signal reached it"
    assert f"the run stopped after step {stopped_at} of {STEPS}" in text and "Traceback" not in text
    same_steps(metrics(out), expected)


def test_sigterm_ends_a_run_after_its_step_and_nothing_is_lost(gad, stopped_gad):
    nothing_is_lost(stopped_gad, metrics(gad))


@pytest.mark.long
def test_ctrl_c_ends_a_run_after_its_step_and_nothing_is_lost(warmup, stopped_warmup):
    nothing_is_lost(stopped_warmup, metrics(warmup))


@pytest.mark.long
def test_a_discriminator_of_a_built_class_goes_through_both_stages(olmo_warmup, olmo_gad):
    warmup_log, gad_log = metrics(olmo_warmup), metrics(olmo_gad)
    # the hand-over brings the trained head: D starts about where it ended, not at log 2
    assert warmup_log[STEPS]["critic/d_loss"] < warmup_log[1]["critic/d_loss"]
    assert gad_log[1]["critic/d_loss"] < warmup_log[1]["critic/d_loss"]
    assert all(math.isfinite(gad_log[step]["critic/grad_norm"]) for step in range(1, STEPS + 1))


@pytest.mark.long
def test_gspo_with_two_optimizer_steps_a_batch_clips_a_tenth_to_two_fifths(gspo):
    fractions = [metrics(gspo)[step]["actor/pg_clipfrac"] for step in range(1, STEPS + 1)]
    assert all(0.0 < fraction < 0.5 for fraction in fractions), fractions
    assert 0.1 <= sum(fractions) / STEPS <= 0.4, fractions


@pytest.mark.long
def test_a_mixture_of_experts_student_goes_through_both_stages(moe):
    warmup_log, gad_log = metrics(moe / "warmup"), metrics(moe / "gad")
    assert warmup_log[2]["actor/sft_loss"] < warmup_log[1]["actor/sft_loss"]
    assert gad_log[1]["critic/d_loss"] < warmup_log[1]["critic/d_loss"], "the hand-over brings the discriminator"
    for log in (gad_log[1], gad_log[2]):
        # the rollout engine has the policy's experts: its probabilities are the actor's
        assert log["training/rollout_probs_diff_max"] < 1e-4
        assert 0.0 < log["actor/pg_clipfrac"] < 0.5 and log["actor/kl_loss"] > 0.0
        assert log["critic/task_reward_mean"] == pytest.approx(0.0), "a random student writes no JSON"
    assert {"val-core/json/acc/mean@1", "val-aux/d_acc"} <= gad_log[2].keys(), "validation shows both rewards"
    assert all(any((moe / "tensorboard" / stage).iterdir()) for stage in ("warmup", "gad"))


def test_two_ranks_do_what_one_does(gad, gad_on_two_ranks):
    names = [
        "critic/d_loss",
        "critic/d_acc",
        "critic/grad_norm",
        "actor/pg_loss",
        "actor/grad_norm",
        "critic/score_gap",
    ]
    one_log, two_log = metrics(gad), metrics(gad_on_two_ranks)
    for step in range(1, STEPS + 1):
        assert two_log[step]["response_length/mean"] == one_log[step]["response_length/mean"], "the same rollouts"
        for name in names:
            assert two_log[step][name] == pytest.approx(one_log[step][name], rel=1e-4, abs=1e-6), (step, name)


@pytest.mark.long
def test_two_ranks_repeat_to_the_digit_also_after_sigkill(gad_on_two_ranks, killed_gad_on_two_ranks):
    same_metrics(killed_gad_on_two_ranks, gad_on_two_ranks)


@pytest.mark.long
def test_a_stage_hands_over_to_another_number_of_ranks(warmup, gad, still_on_two_ranks, gad_from_two_ranks):
    """One rank to two, where nothing moves, and back to one: the same models, so the same run as without the detour."""
    for role in ("actor", "critic"):
        before, after = hf_weights(warmup, role), hf_weights(still_on_two_ranks, role)
        assert before.keys() == after.keys()
        assert [name for name in before if not before[name].equal(after[name])] == [], role
    same_steps(metrics(gad_from_two_ranks), metrics(gad))


@pytest.mark.long
def test_a_run_with_fewer_ranks_than_its_checkpoint_is_refused(runner, warmup, gad_on_two_ranks):
    before = (gad_on_two_ranks / "metrics.jsonl").read_text()
    result = runner.run(runner.command("gad", gad_on_two_ranks, "--warmup_dir", str(warmup)))
    step = f"{gad_on_two_ranks}/global_step_{STEPS}"
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert f"2 workers saved {step}" in result.stdout and "this run has 1" in result.stdout
    assert f"--model {step}/actor/huggingface --reward_model {step}/critic/huggingface" in result.stdout
    assert (gad_on_two_ranks / "metrics.jsonl").read_text() == before


@pytest.mark.long
def test_warmup_on_two_ranks_hands_over_to_two_ranks(two_ranks_from_two_ranks):
    assert metrics(two_ranks_from_two_ranks)[1]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)


def test_seqkd_trains_on_the_teacher_alone(seqkd):
    log = metrics(seqkd)
    assert log[STEPS]["actor/sft_loss"] < log[1]["actor/sft_loss"]
    assert not any(key.startswith("critic/") for key in log[STEPS])
    assert any(key.startswith("val-aux/tiny/rouge_l/mean") for key in log[STEPS])
    lines = [json.loads(line) for line in (seqkd / "metrics.jsonl").read_text().splitlines()]
    sent = [line["step"] for line in lines if "timing_s/update_weights" in line["data"]]
    assert sent == [STEPS], "the rollout engine gets weights where a step validates, and there alone"


def test_a_seqkd_run_that_never_validates_learns_the_same_without_a_rollout_engine(seqkd, seqkd_without_validation):
    log, quiet = metrics(seqkd), metrics(seqkd_without_validation)
    assert sorted(quiet) == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        assert quiet[step] == {name: value for name, value in log[step].items() if "val-" not in name}, f"step {step}"


def test_soda_and_online_dpo_start_at_the_reference_and_leave_it(soda, online_dpo):
    for out, stage in ((soda, "soda"), (online_dpo, "online_dpo")):
        log = metrics(out)
        assert sorted(log) == list(range(STEPS + 1))
        assert log[1]["actor/dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
        assert log[1]["actor/dpo_margin"] == pytest.approx(0.0, abs=1e-4)
        assert abs(log[STEPS]["actor/dpo_margin"]) > 1e-3
        assert log[STEPS]["gad/missing_rollouts"] == 0 and log[STEPS]["response_length/mean"] > 0
        assert not any(key.startswith("critic/") for key in log[STEPS])
        assert any(key.startswith("val-aux/tiny/rouge_l/mean") for key in log[STEPS])
        assert json.loads((out / "gad_stage.json").read_text())["stage"] == stage
    assert len((soda / "start_answers.jsonl").read_text().splitlines()) == 5 * 8, "the prompts of the run, no others"
    assert not (online_dpo / "start_answers.jsonl").exists()
    assert 0 < metrics(online_dpo)[STEPS]["actor/imitation_loss"] < 20
    assert "actor/imitation_loss" not in metrics(soda)[STEPS]


def test_soda_learns_to_prefer_the_teacher(soda):
    """Only SODA's pairs stay the same: five steps of online DPO on a random model show no trend."""
    log = metrics(soda)
    assert log[STEPS]["actor/dpo_loss"] < log[1]["actor/dpo_loss"]
    assert log[STEPS]["actor/dpo_margin"] > 0.005 and log[STEPS]["actor/dpo_acc"] > 0.5


@pytest.mark.long
def test_soda_on_two_ranks_does_what_it_does_on_one(soda, soda_on_two_ranks):
    one_log, two_log = metrics(soda), metrics(soda_on_two_ranks)
    for step in range(1, STEPS + 1):
        for name in ("actor/dpo_loss", "actor/dpo_margin", "actor/grad_norm"):
            assert two_log[step][name] == pytest.approx(one_log[step][name], rel=2e-3, abs=1e-4), (step, name)


@pytest.mark.long
def test_a_killed_soda_run_resumes_with_its_stored_answers(soda, killed_soda):
    out, last_checkpoint, last_step = killed_soda
    assert (last_checkpoint, last_step) == (str(SAVE_FREQ), SAVE_FREQ + 1)
    same_steps(metrics(out), metrics(soda))
    assert (out / "start_answers.jsonl").read_text() == (soda / "start_answers.jsonl").read_text()


def hf_weights(out: Path, role: str) -> dict:
    from safetensors.torch import load_file

    return load_file(out / f"global_step_{STEPS}" / role / "huggingface" / "model.safetensors")


def frozen_weights(out: Path, role: str) -> dict:
    """The weights beside the adapters in the shard of a run with one rank, by the names of a plain model."""
    import torch
    import torch.distributed.tensor

    shard = torch.load(out / f"global_step_{STEPS}" / role / "model_world_size_1_rank_0.pt", weights_only=True)
    plain = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): v for name, v in shard.items()}
    frozen = {name: v for name, v in plain.items() if "lora_" not in name and not name.startswith("score.")}
    return {name: v.to_local() if hasattr(v, "to_local") else v for name, v in frozen.items()}


def check_trained_by_lora(before: dict, after: dict, role: str) -> None:
    """The linear maps of the layers and D's score head have changed; every other weight is the same, bit for bit."""
    assert before.keys() == after.keys()
    for name, weight in after.items():
        trained = name.endswith("_proj.weight") or name.startswith("score.")
        assert before[name].equal(weight) != trained, (role, name)


def test_lora_on_both_sides(lora, warmup):
    log = metrics(lora)
    assert log[1]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)  # adapters start at zero; reference = base weights
    assert log[STEPS]["actor/kl_loss"] > 1e-7
    assert all(math.isfinite(log[step]["critic/grad_norm"]) for step in range(1, STEPS + 1))
    for role in ("actor", "critic"):
        check_trained_by_lora(hf_weights(warmup, role), hf_weights(lora, role), role)


@pytest.mark.long
def test_a_warmup_with_lora_hands_over_its_trained_models(lora_warmup, lora_gad):
    warmup_log, gad_log = metrics(lora_warmup), metrics(lora_gad)
    assert warmup_log[STEPS]["critic/d_loss"] < warmup_log[1]["critic/d_loss"]
    assert warmup_log[STEPS]["actor/sft_loss"] < warmup_log[2]["actor/sft_loss"]
    assert gad_log[1]["critic/d_loss"] < warmup_log[1]["critic/d_loss"]
    assert gad_log[1]["actor/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert gad_log[STEPS]["actor/kl_loss"] > 1e-7
    for role in ("actor", "critic"):
        merged = hf_weights(lora_warmup, role)
        check_trained_by_lora(merged, hf_weights(lora_gad, role), role)
        # without their adapters, the models of the GAD stage are the merged warmup: so is the reference
        for name, weight in frozen_weights(lora_gad, role).items():
            assert merged[name].equal(weight), (role, name)


@pytest.mark.long
def test_a_killed_lora_run_resumes_with_the_same_metrics(lora_gad, killed_lora_gad):
    same_metrics(killed_lora_gad, lora_gad)


@pytest.mark.long
def test_lora_does_the_same_on_two_ranks(lora_gad, lora_gad_on_two_ranks):
    one_log, two_log = metrics(lora_gad), metrics(lora_gad_on_two_ranks)
    for name in ("critic/d_loss", "critic/grad_norm", "critic/score_gap", "actor/pg_loss", "actor/grad_norm"):
        assert two_log[1][name] == pytest.approx(one_log[1][name], rel=2e-3, abs=1e-4), name


@pytest.mark.long
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_lora_roles_are_exported_with_their_adapters_merged(lora_gad, role, tmp_path):
    from safetensors.torch import load_file

    from recipe.gad.export import export_model

    export_model(lora_gad, tmp_path / role, role, dtype="float32")
    exported, saved = load_file(tmp_path / role / "model.safetensors"), hf_weights(lora_gad, role)
    assert all(saved[name].equal(weight) for name, weight in exported.items()) and exported


def test_a_gad_run_without_a_trained_score_head_stops_before_anything_is_written(runner):
    out = runner.base / "refused"
    result = runner.run(runner.command("gad", out, "--model", f"{runner.problem}/model"))
    assert result.returncode == 1  # the doctor's
    assert "score" in result.stdout and "Traceback" not in result.stdout
    assert not out.exists()


# ------------------------------------------------------------------ stock verl


def cpu_only_plugin(site: Path) -> dict[str, str]:
    """Environment of a plugin with the overlay's CPU parts alone: stock verl does not run on CPUs."""
    package = site / "cpu_only_verl"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "recipe/gad/plugin.py", package / "plugin.py")
    (package / "__init__.py").touch()
    cpu_parts = [
        "utils/distributed.py",
        "utils/model.py",
        "workers/engine/fsdp/transformer_impl.py",
        "workers/rollout/base.py",
        "workers/rollout/replica.py",
        "experimental/agent_loop/single_turn_agent_loop.py",
    ]
    for name in cpu_parts:
        target = package / "_overlay" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = (ROOT / "verl" / name).read_text().splitlines(keepends=True)
        target.write_text("".join(line for line in lines if "log_probs" not in line))  # the stock loop over tokens
    info = site / "cpu_only_verl-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-only-verl\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\ncpu_only = cpu_only_verl.plugin\n")
    return {"PYTHONPATH": str(site), "VERL_USE_EXTERNAL_PLUGINS": "cpu_only", "VERL_PLATFORM": "cpu"}


def test_stock_grpo_with_the_plugin_logs_what_stock_verl_logs(stock_with_the_plugin, stock_without_the_plugin):
    with_plugin, without_plugin = stock_with_the_plugin, stock_without_the_plugin
    assert len(with_plugin) == len(without_plugin) == 2
    for ours, stock in zip(with_plugin, without_plugin, strict=True):
        assert set(ours["data"]) == set(stock["data"])
        for key, value in stock["data"].items():
            if not key.startswith(NOT_REPEATABLE):
                # the stock trainer takes rows in order of arrival, so sums differ in the last digits from run to run
                assert ours["data"][key] == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), key

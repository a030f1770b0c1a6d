"""Faults injected into real runs of the launch scripts: what the user sees, and what the same command then gives.

    python benchmarks/faults.py --list
    python benchmarks/faults.py [--folder DIR] [--jobs N] [--row N] [NAME ...]   runs these faults (default: all)
    python benchmarks/faults.py [--folder DIR] --table                            prints what these faults have given

Every fault hits a GAD run of four steps on the quickstart's problem (CPU, real Ray) that saves and validates every
second step. After it, the same command is started again. A fault passes if

- its metrics then equal those of an uninterrupted run, clocks and memory apart, or no run could follow;
- the console named the cause, unless the process that writes it was killed;
- no process of the run is left over, and no file in /dev/shm or in the folder for temporary files, apart from the
  empty lock files (ckpt_*.lock) that verl leaves there.

Faults inside a run come from :func:`inside`, which Ray calls in each of its processes. It asks the phases of
recipe/gad/run/watchdog.py when to strike. Disks are small tmpfs mounts, and a network is a bridge between two network
namespaces (iproute2), so those faults need root. A memory limit (RLIMIT_AS) takes the place of a full memory, and a
clock jumps for ``time.time`` in Python, not for the machine.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 4, 2
TIMEOUT = 400.0
"""Seconds after which a run counts as lost."""
GRACE = 20.0
"""Seconds that the processes of a run get to end after it."""
CUT_OFF = 300.0
"""The same on two nodes: Ray on a node that is cut off ends itself minutes after the network has dropped."""
DISK = "60m"
NOT_REPEATABLE = ("timing", "perf/", "critic/perf", "actor/perf")
ROLLOUT, ACTOR, D, SAVE = "the rollout", "the update of the actor", "the update of the discriminator", "the save"
PHASE = {ROLLOUT: "the rollout", SAVE: "the save of a checkpoint"}
"""Short name of a phase -> its name in recipe/gad/run/watchdog.py, where they differ."""
PROCESS = {
    "driver": "verl.trainer.main_ppo",
    "trainer": "ray::TaskRunner",
    "actor's worker": "ray::WorkerDict",
    "discriminator's worker": "ray::WorkerDict",  # the process of the actor too
    "rollout server": "ray::HFServer",
    "queue's storage": "ray::SimpleStorageUnit",
    "queue's controller": "ray::TransferQueueController",
}
"""Part of a run -> how its command line starts (or, of the driver, what it holds)."""


# ---------------------------------------------------------------------- inside a run


def inside() -> None:
    """Ray's setup hook of every process of a run: waits for the phase of a step and strikes once.

    The variable GAD_FAULT holds {"step", "phase", "do", ...}: the keyword arguments of the function ``do`` follow.
    """
    plan = json.loads(os.environ["GAD_FAULT"])
    if plan["do"] == "shift_clock":
        threading.Thread(target=_shift_clock, args=(Path(plan["flag"]), plan["seconds"]), daemon=True).start()

    def strike_in_its_step(watchdog, step: int) -> None:
        if step == plan["step"]:
            threading.Thread(target=_strike, args=(plan, watchdog._watched), daemon=True).start()

    threading.Thread(target=after_each_beat, args=(strike_in_its_step,), daemon=True).start()


def after_each_beat(call: Callable) -> None:
    """``call(watchdog, step)`` at the start of each step of the trainer; in other processes it waits without end."""
    name = "recipe.gad.run.watchdog"
    while not hasattr(sys.modules.get(name), "Watchdog"):
        time.sleep(0.05)
    watchdog = sys.modules[name]
    beat = watchdog.Watchdog.beat

    def calling_beat(self, step: int) -> None:
        beat(self, step)
        call(self, step)

    watchdog.Watchdog.beat = calling_beat


def _strike(plan: dict, thread: int) -> None:
    from recipe.gad.run.watchdog import phase_of

    while phase_of(sys._current_frames().get(thread)) != PHASE.get(plan["phase"], plan["phase"]):
        time.sleep(0.001)
    Path(plan["record"]).write_text(plan["do"])  # the strike may end this process
    done = STRIKES[plan["do"]](plan)
    Path(plan["record"]).write_text(done)


def _pids(part: str) -> list[int]:
    """Processes of this run that are ``part`` of it."""
    import psutil

    mark, found = os.environ["GAD_FAULTS_ID"], []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            ours = process.environ().get("GAD_FAULTS_ID") == mark
        except psutil.Error:
            continue
        if ours and (PROCESS[part] in line if part == "driver" else line.startswith(PROCESS[part])):
            found.append(process.pid)
    return found


def _send(plan: dict) -> str:
    pids = _pids(plan["part"])
    for pid in pids:
        os.kill(pid, plan["signal"])
    return f"{signal.Signals(plan['signal']).name} to {plan['part']} {pids}"


def _limit_memory(plan: dict) -> str:
    """Less address space than the process has: its next allocation from the system fails."""
    pids = _pids(plan["part"])
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    return f"RLIMIT_AS of {plan['part']} {pids}"


def _fill(plan: dict) -> str:
    fill(Path(plan["folder"]), plan["leave"])
    return f"filled {plan['folder']}"


def _raise_flag(plan: dict) -> str:
    Path(plan["flag"]).touch()
    return f"clock shifted by {plan['seconds']} s"


def _shift_clock(flag: Path, seconds: float) -> None:
    while not flag.exists():
        time.sleep(0.02)
    real = time.time
    time.time = lambda: real() + seconds


def _cut(plan: dict) -> str:
    ip(f"-n {plan['switch']} link set bridge down")
    return f"network down; the trainer is on node {os.environ['GAD_FAULTS_NODE']}"


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


def _infinite_score(plan: dict) -> str:
    """The discriminator's first score of every batch is infinite from now on."""
    trainer = sys.modules["verl.trainer.ppo.v1.trainer_gad"].PPOTrainerGAD
    put = trainer._put_scores

    def put_with_infinite_one(self, batch, scores, metrics):
        scores = scores.clone()
        scores[0] = float("inf")
        put(self, batch, scores, metrics)

    trainer._put_scores = put_with_infinite_one
    return "an infinite score"


STRIKES: dict[str, Callable[[dict], str]] = {
    "cut": _cut,
    "infinite_score": _infinite_score,
    "send": _send,
    "limit_memory": _limit_memory,
    "fill": _fill,
    "shift_clock": _raise_flag,
}


def fill(folder: Path, leave: int = 0) -> None:
    """Fill the disk of a folder up to ``leave`` free bytes, while others may write there too."""
    with (folder / "ballast").open("wb") as file:
        for size in (1 << 20, 1 << 12):
            try:
                while shutil.disk_usage(folder).free > leave:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:  # no room for this size
                continue


# ---------------------------------------------------------------------- a run from outside


@dataclass
class Ended:
    """A run that has ended; ``left`` names its processes and files that outlived it."""

    code: int | None
    text: str
    left: list[str]
    struck: str = ""
    late: float = 0.0
    gone: float = 0.0
    """Seconds from the strike to the end of the run, and of its last process."""


class Skip(Exception):
    """The fault cannot be injected on this machine."""


class Bench:
    """Problem, warmup and reference run, which all faults share, and their folder."""

    def __init__(self, base: Path, timeout: float = TIMEOUT, nodes: "TwoNodes | None" = None):
        self.base = base
        self.timeout = timeout
        self.nodes = nodes
        self.problem = base / "problem"
        self.warmup = base / "warmup"

    def prepare(self) -> None:
        """Make what all faults share, unless an earlier call has."""
        self.base.mkdir(parents=True, exist_ok=True)
        if not (self.base / "ready").exists():
            from recipe.gad.quickstart.problem import build_problem

            build_problem(self.problem, n_train=64, n_val=8)
            for ended in (self.run(self.command("warmup", self.warmup)), self.run(self.gad(self.base / "reference"))):
                if ended.code != 0:
                    raise SystemExit(f"the run without a fault failed:\n{ended.text}")
            (self.base / "ready").touch()
        self.expected = metrics(self.base / "reference")

    def rows(self) -> list[dict]:
        import pyarrow.parquet as pq

        return pq.read_table(self.problem / "train.parquet").to_pylist()

    def command(self, stage: str, out: Path, *extra: str, data: Path | None = None) -> list[str]:
        data = data or self.problem / "train.parquet"
        start = ["bash", f"{ROOT}/examples/gad/run_{stage}.sh", "--device", "cpu", "--output_dir", str(out)]
        flags = ["--train_files", str(data), "--val_files", f"{self.problem}/val.parquet", "--skip-doctor"]
        model = ["--model", f"{self.problem}/model"] if stage == "warmup" else []
        overrides = (
            "data.train_batch_size=8", "data.max_prompt_length=16", "data.max_response_length=12",
            "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.optim.lr=1e-3", "critic.optim.lr=1e-3",
            "gad.poll_interval=0.02", "trainer.logger=[file]", f"trainer.total_training_steps={STEPS}",
            f"trainer.save_freq={EVERY}", f"trainer.test_freq={EVERY}",
        )  # fmt: skip
        extra = ("trainer.critic_warmup=1", *extra) if stage == "warmup" else extra
        more = [e for e in extra if "=" not in e]
        return [*start, *flags, *model, *more, *overrides, *(e for e in extra if "=" in e)]

    def gad(self, out: Path, *extra: str, warmup: Path | None = None, data: Path | None = None) -> list[str]:
        return self.command("gad", out, "--warmup_dir", str(warmup or self.warmup), *extra, data=data)

    def run(
        self, command: list[str], plan: dict | None = None, outside: Callable | None = None, hook: str = "faults.inside"
    ) -> Ended:
        """Run a command to its end, with a strike inside or a call ``outside(process)`` in parallel."""
        tmp = Path(tempfile.mkdtemp(prefix="gad-fault-", dir="/tmp"))
        mark, temporary = uuid.uuid4().hex, tmp / "tmp"
        temporary.mkdir()
        own = {"GAD_FAULTS_ID": mark, "TMPDIR": str(temporary)}
        command = [*command]
        record = tmp / "struck"
        if plan:
            own["GAD_FAULT"] = json.dumps({"record": str(record), **plan})
            command.append(f"+ray_kwargs.ray_init.runtime_env.worker_process_setup_hook={hook}")
        if self.nodes:
            command, own = self.nodes.command(command, own)
        elif command[0] == "bash":
            command.append(f"+ray_kwargs.ray_init._temp_dir={tmp}/ray")
        before = shared_memory()
        with (tmp / "console").open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment(own), cwd=tmp, start_new_session=True
            )
            if outside is not None:
                outside(process)
            try:
                code: int | None = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                code = None
        grace = CUT_OFF if self.nodes else GRACE
        since = record.stat().st_mtime if record.exists() else time.time()
        late = time.time() - since
        left = leftover_processes(mark, 0 if code is None else grace)
        gone = time.time() - since
        files = [path for path in temporary.rglob("*") if not path.is_dir() and not path.name.startswith("ckpt_")]
        left += [str(path.relative_to(temporary)) for path in files] + sorted(shared_memory() - before - held())
        text = (tmp / "console").read_text(errors="replace")
        struck = record.read_text() if record.exists() else ""
        shutil.rmtree(tmp, ignore_errors=True)
        return Ended(code, text, left, struck, late, gone)


def environment(own: dict[str, str]) -> dict[str, str]:
    """Environment of a run or of a Ray node; ``own``: variables of this one alone."""
    paths = [str(ROOT), f"{ROOT}/benchmarks", os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": ":".join(filter(None, paths)),
        "HYDRA_FULL_ERROR": "0",
        "RAY_prestart_worker_first_driver": "0",  # no idle workers: a run starts faster
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **own,
    }


class TwoNodes:
    """Ray nodes 1 and 2, each in its own network namespace, joined by a bridge in a third one; a context manager."""

    ADDRESS = "192.0.2.1:6379"  # a network for documentation (RFC 5737)

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.name = f"gad-{self.mark[:6]}"
        self.switch = f"{self.name}-switch"
        self.spaces = [self.switch, *(self.space(node) for node in (1, 2))]
        self.folder = Path(tempfile.mkdtemp(prefix="gad-net-", dir="/tmp"))
        self.shared = {"GAD_FAULTS_ID": self.mark, "RAY_ADDRESS": self.ADDRESS, "RAY_AUTH_MODE": "disabled"}
        self.ray: dict[int, subprocess.Popen] = {}

    def space(self, node: int) -> str:
        return f"{self.name}-{node}"

    def on(self, node: int) -> list[str]:
        return ["ip", "netns", "exec", self.space(node)]

    def __enter__(self) -> "TwoNodes":
        try:
            self._link()
            for node in (1, 2):
                self.start(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _link(self) -> None:
        try:
            for space in self.spaces:
                ip(f"netns add {space}")
            ip(f"-n {self.switch} link add bridge type bridge")
            ip(f"-n {self.switch} link set bridge up")
            for node in (1, 2):
                ip(f"-n {self.space(node)} link add gad0 type veth peer name port{node} netns {self.switch}")
                ip(f"-n {self.switch} link set port{node} master bridge up")
                ip(f"-n {self.space(node)} addr add 192.0.2.{node}/24 dev gad0")
                for device in ("gad0", "lo"):
                    ip(f"-n {self.space(node)} link set {device} up")
        except (OSError, subprocess.CalledProcessError) as problem:
            raise Skip(f"{problem} {getattr(problem, 'stderr', '')}".strip()) from None

    def __exit__(self, *exception: object) -> None:
        for process in self.ray.values():
            process.terminate()
        leftover_processes(self.mark, GRACE)
        for space in self.spaces:
            with suppress(OSError, subprocess.CalledProcessError):  # it was never made
                ip(f"netns del {space}")  # its links go with it
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, node: int) -> None:
        """Start Ray on a node and wait until it has joined."""
        role = ["--head", "--port=6379", "--include-dashboard=false"] if node == 1 else [f"--address={self.ADDRESS}"]
        size = ["--num-cpus=8", "--num-gpus=1", "--object-store-memory=150000000"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address=192.0.2.{node}"]
        own = {"GAD_FAULTS_NODE": str(node), "GLOO_SOCKET_IFNAME": "gad0", "RAY_TMPDIR": str(self.folder)}
        variables, log = environment({**self.shared, **own}), self.folder / f"node{node}.log"
        with log.open("a") as output:
            command = [*self.on(node), *ray, *role, *size]
            self.ray[node] = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
            )
        wait = [*self.on(1), sys.executable, f"{ROOT}/examples/cluster/wait_for_nodes.py", str(node), "60"]
        done = subprocess.run(wait, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"node {node} did not join: {done.stderr[-2000:]} {log.read_text()[-2000:]}")

    def command(self, command: list[str], own: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """The command on node 1 and its variables; Ray passes ``own`` on to the run's processes on both nodes."""
        carried = [f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}='{value}'" for name, value in own.items()]
        return [*self.on(1), *command, *carried], {**self.shared, **own}

    def mend(self) -> None:
        """The network is up again, and Ray is started on node 2, where it has ended without its head."""
        self.ray[2].wait(GRACE)
        ip(f"-n {self.switch} link set bridge up")
        self.start(2)


def metrics(out: Path) -> dict[int, dict[str, float]]:
    """Step -> logged metrics without clocks and memory; a step that was logged twice raises."""
    file = out / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if len({line["step"] for line in lines}) != len(lines):
        raise ValueError(f"{file} has a step twice")
    return {
        line["step"]: {name: value for name, value in line["data"].items() if not name.startswith(NOT_REPEATABLE)}
        for line in lines
    }


def leftover_processes(mark: str, grace: float) -> list[str]:
    """Processes with the mark of a run that outlive it; they are killed."""
    import psutil

    deadline = time.monotonic() + grace
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("GAD_FAULTS_ID") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
            except psutil.Error:
                continue
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    names = []
    for process in left:
        try:
            names.append(f"process {' '.join(process.cmdline())[:60]}")
            process.kill()
        except psutil.Error:
            continue
    return names


def shared_memory() -> set[str]:
    return {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}


def held() -> set[str]:
    """Files of /dev/shm that a living process has mapped: another run's."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found |= set(re.findall(r"/dev/shm/\S+", maps.read_text()))
        except OSError:
            continue
    return found


# ---------------------------------------------------------------------- faults


@dataclass
class Result:
    """One row of the table. ``again``: what the same command gave afterwards."""

    fault: str
    where: str
    code: int | None
    saw: str
    again: str
    left: list[str]
    passed: bool
    seconds: float = 0.0
    struck: str = ""


@dataclass(frozen=True)
class Fault:
    """``inject(bench, folder)`` gives the result; ``plan``: the strike, of a fault that may follow another one."""

    name: str
    where: str
    inject: Callable[[Bench, Path], Result]
    plan: dict | None = None


def last_words(text: str) -> str:
    """The line of the console that tells the user most: the last error with a remedy, the last error, the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    joined = [f"{a} {b}" if a.endswith(":") else a for a, b in zip(lines, [*lines[1:], ""], strict=False)]
    errors = [line for line in joined if line.startswith("error")]
    if errors and errors[-1].startswith("error: the run ends"):  # the watchdog's last line; those before say why
        return " ".join(errors[-3:])
    return ([line for line in errors if "Fix: " in line] or errors or lines or [""])[-1]


def judged(
    bench: Bench, out: Path, first: Ended, command: list[str], says: str = "", mend: Callable = lambda: None
) -> Result:
    """Start the command of a run that a fault has ended again, after ``mend()``, and compare."""
    mend()
    second = bench.run(command)
    equal = second.code == 0 and metrics(out) == bench.expected
    again = "equal" if equal else f"NOT equal (exit code {second.code}: {last_words(second.text)})"
    clear = first.code == -signal.SIGKILL or re.search(says, first.text) is not None
    left = [*first.left, *second.left]
    passed = equal and clear and not left and first.code not in (0, None)
    return Result("", "", first.code, last_words(first.text), again, left, passed, struck=first.struck)


def strike(
    says: str = "", mend: Callable = lambda out: None, disk: bool = False, extra: tuple = (), **plan
) -> Callable:
    """A fault inside a GAD run, and the same command afterwards."""

    def inject(bench: Bench, out: Path) -> Result:
        with small_disk(out) if disk else nullcontext(clean(out)):
            command = bench.gad(out, *extra)
            first = bench.run(command, {"folder": str(out), **plan})
            if not first.struck:
                tail = " | ".join(first.text.splitlines()[-3:])
                return Result("", "", first.code, f"the fault never struck: {tail}", "-", first.left, False)
            return judged(bench, out, first, command, says, lambda: mend(out))

    return inject


def send(part: str, step: int, phase: str, number: int = signal.SIGKILL, extra: tuple = (), says: str = "") -> Fault:
    """A signal to a part of the run in a phase of a step."""
    verb = {signal.SIGKILL: "kill", signal.SIGSTOP: "stop"}[signal.Signals(number)]
    name = f"{verb}-{part}-{phase}".replace("the ", "").replace("'s", "").replace(" ", "-")
    plan = {"do": "send", "part": part, "signal": int(number), "step": step, "phase": phase}
    follows = plan if EVERY < step < STEPS and not extra else None  # it strikes in a resumed run too
    where = f"{signal.Signals(number).name} to the {part}, step {step}, {phase}"
    return Fault(name, where, strike(says or "error", extra=extra, **plan), follows)


def in_a_row(bench: Bench, faults: list[Fault]) -> list[Result]:
    """Each fault hits the run that the same command has started after the one before; the last rerun is compared."""
    out = clean(bench.base / faults[0].name)
    command = bench.gad(out)
    ended = [bench.run(command, fault.plan) for fault in faults]
    last = judged(bench, out, ended[-1], command)
    results = []
    for number, run in enumerate(ended, 1):
        again = last.again + ("" if number == len(ended) else f", after {len(ended) - number} more of these faults")
        clear = run.code == -signal.SIGKILL or "error" in run.text
        left = last.left if number == len(ended) else run.left
        passed = last.again == "equal" and clear and bool(run.struck) and not left and run.code not in (0, None)
        results.append(Result("", "", run.code, last_words(run.text), again, left, passed, struck=run.struck))
    return results


def clean(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def small_disk(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(out)], capture_output=True, text=True
    )
    if done.returncode:
        raise Skip(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(out)], check=False)


def empty(out: Path) -> None:
    (out / "ballast").unlink()


def full_disk(name: str, where: str, step: int, phase: str, says: str, leave: int = 0, extra: tuple = ()) -> Fault:
    inject = strike(says, mend=empty, disk=True, extra=extra, do="fill", step=step, phase=phase, leave=leave)
    return Fault(name, f"{where}, step {step}", inject)


def cut(phase: str) -> Fault:
    """The network between two Ray nodes drops in a phase of step 3 and comes back after the run has ended."""

    def inject(bench: Bench, out: Path) -> Result:
        with TwoNodes() as nodes:
            pair = Bench(bench.base, nodes=nodes)
            size = ("--nnodes", "2", "ray_kwargs.ray_init.num_cpus=null", "ray_kwargs.ray_init.num_gpus=null")
            reference = pair.run(pair.gad(clean(out / "reference"), *size))
            if reference.code != 0:
                raise RuntimeError(f"the run without a fault failed: {last_words(reference.text)}")
            pair.expected = metrics(out / "reference")
            command = pair.gad(clean(out / "cut"), *size)
            plan = {"do": "cut", "switch": nodes.switch, "step": 3, "phase": phase}
            first = pair.run(command, plan)
            result = judged(pair, out / "cut", first, command, r"error: .*Ray has lost node 192\.0\.2\.", nodes.mend)
            times = f"{first.late:.0f} s after the drop, and the last process ended {first.gone:.0f} s after it"
            result.saw += f" ({times}; {first.struck.partition('; ')[2]})"
            return result

    where = f"the network between two Ray nodes drops, step 3, {phase}"
    return Fault(f"network-{phase}".replace("the ", "").replace(" ", "-"), where, inject)


def full_disk_at_hand_over(bench: Bench, out: Path) -> Result:
    with small_disk(out):
        fill(out)
        command = bench.gad(out)
        first = bench.run(command)
        return judged(bench, out, first, command, "No space left on device", lambda: empty(out))


def damaged_shard(damage: Callable[[Path], None], says: str) -> Callable:
    """Damage a shard of the newest checkpoint, start, do what the error says, and start again."""

    def inject(bench: Bench, out: Path) -> Result:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(bench.base / "reference", out)
        damage(next((out / f"global_step_{STEPS}/actor").glob("model_world_size_*.pt")))
        command = bench.gad(out)
        first = bench.run(command)
        tracker = out / "latest_checkpointed_iteration.txt"
        return judged(bench, out, first, command, says, lambda: tracker.write_text(str(STEPS - EVERY)))

    return inject


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damaged_warmup(bench: Bench, out: Path) -> Result:
    warmup = bench.base / "damaged-warmup"
    for folder in (warmup, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.warmup, warmup)
    weights = "actor/huggingface/model.safetensors"
    for step in (EVERY, STEPS):
        flip(warmup / f"global_step_{step}" / weights)
    command = bench.gad(out, warmup=warmup)
    first = bench.run(command)

    def mend() -> None:
        whole = bench.warmup / f"global_step_{STEPS}" / weights
        shutil.copy(whole, warmup / f"global_step_{STEPS}" / weights)

    return judged(bench, out, first, command, rf"{weights} has changed since it was saved", mend)


def broken_side(key: str) -> Callable:
    """An absurd learning rate; with the usual one, the error's advice gives the usual run."""

    def inject(bench: Bench, out: Path) -> Result:
        first = bench.run(bench.gad(clean(out), f"{key}=1e30"))
        return judged(bench, out, first, bench.gad(out, "trainer.resume_mode=disable"), "NaN or infinite")

    return inject


def two_runs(bench: Bench, out: Path) -> Result:
    from recipe.gad.run.atomic_io import LOCK

    command, second = bench.gad(clean(out)), []

    def start_another(process: subprocess.Popen) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not (out / LOCK).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        second.append(bench.run(command))

    first = bench.run(command, outside=start_another)
    refused = second[0]
    equal = first.code == 0 and metrics(out) == bench.expected
    passed = equal and refused.code == 2 and "another training run uses" in refused.text
    left = [*first.left, *refused.left]
    again = "equal (the first run)" if equal else f"NOT equal (exit code {first.code})"
    return Result("", "", refused.code, last_words(refused.text), again, left, passed and not left)


def clock(seconds: float) -> Callable:
    """The clock jumps in every process; the run must not notice."""

    def inject(bench: Bench, out: Path) -> Result:
        flag = bench.base / f"{out.name}.flag"
        flag.unlink(missing_ok=True)
        plan = {"do": "shift_clock", "step": 2, "phase": ROLLOUT, "seconds": seconds, "flag": str(flag)}
        ended = bench.run(bench.gad(clean(out)), plan)
        equal = ended.code == 0 and bool(ended.struck) and metrics(out) == bench.expected
        again = "equal (the same run)" if equal else "NOT equal"
        return Result("", "", ended.code, last_words(ended.text), again, ended.left, equal and not ended.left)

    return inject


def poisoned(text: str, says: str) -> Callable:
    """A teacher's answer in JSON Lines goes through ``gad prepare`` and trains; ``says``: what prepare must print."""

    def inject(bench: Bench, out: Path) -> Result:
        rows = bench.rows()
        rows[3]["teacher_response"] = text
        data = clean(bench.base / f"{out.name}-data")
        turns = [[*row["content"], {"role": "assistant", "content": row["teacher_response"]}] for row in rows]
        (data / "rows.jsonl").write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
        prepare = [sys.executable, "-m", "recipe.gad.cli", "prepare", f"{data}/rows.jsonl", "--output_dir", str(data)]
        limits = ["--val_fraction", "0", "--max_response_length", "12"]
        prepared = bench.run([*prepare, "--tokenizer", f"{bench.problem}/model", *limits])
        ended = bench.run(bench.gad(clean(out), data=data / "train.parquet"))
        trained = ended.code == 0 and max(metrics(out)) == STEPS
        lines = [line.strip() for line in prepared.text.splitlines() if re.search(says, line)]
        saw = lines[-1] if lines else "NOTHING about the row: " + last_words(prepared.text)
        left = [*prepared.left, *ended.left]
        again = f"all {STEPS} steps train" if trained else f"NOT trained: {last_words(ended.text)}"
        passed = bool(lines) and prepared.code == 0 and trained and not left
        return Result("", "", prepared.code, saw, again, left, passed)

    return inject


def unprepared(text: str | None, says: str) -> Callable:
    """The same in a parquet file that no ``gad prepare`` has seen; the file is then replaced by the good one."""

    def inject(bench: Bench, out: Path) -> Result:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = bench.rows()
        rows[3]["teacher_response"] = text
        file = clean(bench.base / f"{out.name}-data") / "train.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        command = bench.gad(clean(out), data=file)
        first = bench.run(command)
        return judged(bench, out, first, command, says, lambda: shutil.copy(bench.problem / "train.parquet", file))

    return inject


ONE_BAD_STEP = "gad.stop_after_bad_steps=1"
ALL_ROWS = "61 rows in"
"""What ``gad prepare`` prints if it rejects no row: 3 of the 64 rows repeat a prompt."""
NO_SPACE = r"disk .*is full|No space left on device: .*{}"
FAULTS = (
    send("driver", 3, ROLLOUT),
    send("driver", 4, SAVE),
    send("trainer", 3, ACTOR),
    send("trainer", 4, SAVE),
    send("actor's worker", 3, ACTOR),
    send("actor's worker", 4, SAVE),
    send("discriminator's worker", 3, D),
    send("rollout server", 3, ROLLOUT),
    send("rollout server", 2, "validation"),
    send("rollout server", 3, "sending weights to the rollout"),
    send("queue's storage", 3, ROLLOUT),
    send("queue's controller", 3, "the reference's log-probabilities"),
    send("rollout server", 3, ROLLOUT, signal.SIGSTOP, ("gad.step_timeout=40",), "silent: .*hf_server"),
    Fault(
        "memory-actor-worker",
        f"no memory for the actor's worker, step 3, {ACTOR}",
        strike("error", do="limit_memory", part="actor's worker", step=3, phase=ACTOR),
    ),
    full_disk("disk-metrics", "disk full before the metrics", 3, ROLLOUT, NO_SPACE.format("metrics.jsonl")),
    full_disk("disk-samples", "disk full before validation samples", 2, "validation", NO_SPACE.format("val_samples")),
    full_disk("disk-save", "disk full in the save", 4, SAVE, "disk .*is full"),
    full_disk("disk-before-save", "disk too small for the next save", 4, ROLLOUT, "needs about", leave=1 << 20),
    Fault("disk-hand-over", "disk full before the hand-over", full_disk_at_hand_over),
    Fault("shard-truncated", "shard of the newest checkpoint", damaged_shard(truncate, "bytes, and .* were saved")),
    Fault("shard-missing", "shard of the newest checkpoint", damaged_shard(Path.unlink, "is missing|has 0 of 1")),
    Fault("shard-flipped", "one bit of a shard", damaged_shard(flip, "has changed since it was saved")),
    Fault("warmup-flipped", "one bit of the warmup's weights, hand-over", damaged_warmup),
    Fault("nan-policy", "actor's learning rate 1e30", broken_side("actor_rollout_ref.actor.optim.lr")),
    Fault("nan-discriminator", "discriminator's learning rate 1e30", broken_side("critic.optim.lr")),
    Fault(
        "inf-score",
        f"an infinite score of the discriminator, step 3, {ONE_BAD_STEP}",
        strike("NaN or infinite", extra=(ONE_BAD_STEP,), do="infinite_score", step=3, phase=ROLLOUT),
    ),
    Fault("two-runs", "a second run in the folder of a living one", two_runs),
    cut(ROLLOUT),
    cut(ACTOR),
    Fault("clock-forward", "clock + 10 hours, step 2", clock(36000.0)),
    Fault("clock-back", "clock - 10 hours, step 2", clock(-36000.0)),
    Fault("row-long", "teacher answer of a million characters", poisoned("um " * 333_333, "longer than 12")),
    Fault("row-nul", "teacher answer with a NUL", poisoned("well \0 a", ALL_ROWS)),
    Fault("row-surrogate", "teacher answer with half a surrogate pair", poisoned("well \ud800 a", "rejected: .*row 3")),
    Fault("row-blank", "teacher answer of white space", poisoned(" \n\t ", "rejected: .*row 3")),
    Fault("row-blank-parquet", "the same in an unprepared file", unprepared(" \n\t ", "row 3")),
    Fault("row-null-parquet", "no teacher answer in an unprepared file", unprepared(None, "row 3")),
)


def inject(bench: Bench, faults: list[Fault]) -> list[Result]:
    """Run one fault, or several in a row; an exception of the bench is a failed fault."""
    start = time.monotonic()
    try:
        results = in_a_row(bench, faults) if len(faults) > 1 else [faults[0].inject(bench, bench.base / faults[0].name)]
    except Skip as reason:
        results = [Result("", "", None, f"skipped: {reason}", "-", [], True) for _ in faults]
    except Exception as problem:
        results = [Result("", "", None, f"{type(problem).__name__}: {problem}", "-", [], False) for _ in faults]
    for fault, result in zip(faults, results, strict=True):
        result.fault, result.where, result.seconds = fault.name, fault.where, time.monotonic() - start
        with (bench.base / "results.jsonl").open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        verdict = "passed" if result.passed else "FAILED"
        print(f"{verdict} {result.seconds:4.0f} s  {json.dumps(asdict(result))}", flush=True)
    return results


def in_rows(faults: list[Fault], length: int) -> list[list[Fault]]:
    """Faults that may follow each other, ``length`` in a row, and the others alone."""
    follow = [fault for fault in faults if fault.plan]
    rows = [follow[i : i + length] for i in range(0, len(follow), length)]
    return rows + [[fault] for fault in faults if not fault.plan]


def table(base: Path) -> str:
    """Markdown of the newest result of every fault."""
    rows = [json.loads(line) for line in (base / "results.jsonl").read_text().splitlines()]
    newest = {row["fault"]: row for row in rows}
    lines = ["| fault | where | exit code | what the user saw | the same command again | left over |", "|" + "---|" * 6]
    for row in (newest[fault.name] for fault in FAULTS if fault.name in newest):
        saw = re.sub(rf"{re.escape(str(base))}/[\w-]+", "DIR", row["saw"]).replace("|", "\\|")
        saw = re.sub(r"\(process \d+ on \S+, since [\d :-]+\)", "(process N on HOST, since TIME)", saw)
        code = "SIGKILL" if row["code"] == -signal.SIGKILL else row["code"]
        left = ", ".join(row["left"]) or "nothing"
        lines.append(f"| `{row['fault']}` | {row['where']} | {code} | {saw} | {row['again']} | {left} |")
    failed = [row["fault"] for row in newest.values() if not row["passed"]]
    return "\n".join([*lines, "", f"{len(newest)} faults, {len(failed)} failed {failed or ''}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the faults")
    parser.add_argument("--table", action="store_true", help="print the table of the folder's results")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gad-faults"), help="runs and results")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--row", type=int, default=1, help="SIGKILLs that hit one run after the other: saves reruns")
    options = parser.parse_args()
    if unknown := set(options.names) - {fault.name for fault in FAULTS}:
        parser.error(f"no fault is named {', '.join(sorted(unknown))}; see --list")
    if options.list:
        print("\n".join(f"{fault.name:52}{fault.where}" for fault in FAULTS))
        return 0
    base = options.folder.absolute()
    if options.table:
        print(table(base))
        return 0
    bench = Bench(base)
    bench.prepare()
    chosen = [fault for fault in FAULTS if not options.names or fault.name in options.names]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda faults: inject(bench, faults), in_rows(chosen, options.row)))
    print(table(base))
    return int(not all(result.passed for row in results for result in row))


if __name__ == "__main__":
    sys.exit(main())

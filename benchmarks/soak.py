"""Does a long run grow? Memory, file handles, step time and queue keys over the steps of a GAD run on the toy problem.

    python benchmarks/soak.py [--steps 300] [--folder DIR] [--plot docs/soak.png]
    python benchmarks/soak.py --folder DIR --report [--plot FILE]        only table and plot of an earlier run

At the start of every step, the trainer's process notes the resident memory and the open file handles of every process
of the run, and the keys in the TransferQueue, of which a step must leave none. A slope is fitted through the means of
blocks of BLOCK steps after the first FIRST steps; the interval (95 %, t) holds as far as the blocks are independent.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from faults import Bench  # the folder of this script comes first in sys.path

FIRST, BLOCK = 60, 10
MIB = 1 << 20


# ---------------------------------------------------------------------- inside the run


def inside() -> None:
    """Ray's setup hook of every process of the run: the trainer's process samples at each step."""
    threading.Thread(target=_wait_for_trainer, daemon=True).start()


def _wait_for_trainer() -> None:
    name = "recipe.gad.run.watchdog"
    while not hasattr(sys.modules.get(name), "Watchdog"):
        time.sleep(0.05)
    watchdog = sys.modules[name]
    beat = watchdog.Watchdog.beat

    def sampling_beat(self, step: int) -> None:
        beat(self, step)
        with open(json.loads(os.environ["GAD_FAULT"])["record"], "a") as file:
            file.write(json.dumps({"step": step, "time": time.monotonic(), **sample()}) + "\n")

    watchdog.Watchdog.beat = sampling_beat


def sample() -> dict:
    """Keys in the TransferQueue, and [bytes, file handles] by process of the run."""
    import psutil
    import transfer_queue as tq

    mark, processes = os.environ["GAD_FAULTS_ID"], {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("GAD_FAULTS_ID") == mark:
                name = process.cmdline()[0].split("/")[-1].split(" ")[0]
                processes[f"{name} {process.pid}"] = [process.memory_info().rss, process.num_fds()]
        except (psutil.Error, IndexError):
            continue
    return {"keys": sum(map(len, (tq.kv_list() or {}).values())), "processes": processes}


# ---------------------------------------------------------------------- from outside


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float, float, float]:
    """(mean, slope per 1,000 steps, its 95 % interval) of a curve after its first FIRST steps."""
    from scipy import stats

    late = steps > FIRST
    n = late.sum() // BLOCK
    x, y = (a[late][-n * BLOCK :].reshape(n, BLOCK).mean(axis=1) for a in (steps, values))
    fit = stats.linregress(x, y)
    width = fit.stderr * stats.t.ppf(0.975, n - 2)
    return y.mean(), *(1000 * value for value in (fit.slope, fit.slope - width, fit.slope + width))


def curves(file: Path) -> dict[str, tuple[str, np.ndarray, np.ndarray]]:
    """Name -> (unit, steps, values): of each process that lives through the run, and of the run."""
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    steps = np.array([s["step"] for s in samples])
    found = {}
    lives = [name for name in samples[-1]["processes"] if name in samples[FIRST]["processes"]]
    by_kind = defaultdict(list)
    for name in lives:
        by_kind[name.split(" ")[0]].append(name)
    for kind, names in sorted(by_kind.items()):
        rows = [[s["processes"][name] for name in names if name in s["processes"]] for s in samples]
        complete = np.array([len(row) == len(names) for row in rows])
        totals = np.array([np.sum(row, axis=0) for row, whole in zip(rows, complete, strict=True) if whole])
        label = kind if len(names) == 1 else f"{kind} ({len(names)})"
        found[f"memory, {label}"] = ("MiB", steps[complete], totals[:, 0] / MIB)
        found[f"handles, {label}"] = ("", steps[complete], totals[:, 1])
    found["keys in the queue"] = ("", steps, np.array([s["keys"] for s in samples]))
    found["step time"] = ("s", steps[:-1], np.diff([s["time"] for s in samples]))
    return found


def table(found: dict) -> str:
    lines = ["| curve | mean | slope per 1,000 steps (95 %) |", "|---|---|---|"]
    for name, (unit, steps, values) in found.items():
        if unit == "" and values[FIRST:].min() == values[FIRST:].max():
            lines.append(f"| {name} | {values[-1]:.0f} | constant |")
            continue
        mean, *numbers = slope(steps, values)
        change, low, high = (f"{number:+.3g}" for number in numbers)
        lines.append(f"| {name} | {mean:.4g} {unit} | {change} ({low} to {high}) |")
    return "\n".join(lines)


def draw(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    panels = {"memory": "resident memory, MiB", "handles": "open file handles", "step": "seconds per step"}
    for ax, (start, title) in zip(
        axes.flat, [*panels.items(), ("keys", "keys in the queue after a step")], strict=True
    ):
        for name, (_, steps, values) in found.items():
            if name.startswith(start):
                ax.plot(steps, values, linewidth=1, label=name.partition(", ")[2].removeprefix("ray::"))
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_ylim(*((-0.1, 1) if ax.get_ylim()[1] < 1 else (0, None)))
    axes.flat[0].legend(fontsize=6, ncols=2, loc="center", bbox_to_anchor=(0.5, 0.37))
    figure.savefig(file, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gad-soak"), help="run and samples")
    parser.add_argument("--report", action="store_true", help="no run: table and plot of the samples in the folder")
    parser.add_argument("--plot", type=Path, help="write the curves here (PNG)")
    options = parser.parse_args()
    base = options.folder.absolute()
    file = base / "samples.jsonl"
    if not options.report:
        bench = Bench(base, timeout=36000.0)
        bench.prepare()
        file.unlink(missing_ok=True)
        every = max(1, options.steps // 6)
        keys = (f"trainer.total_training_steps={options.steps}", "trainer.total_epochs=1000")
        keys += (f"trainer.save_freq={every}", f"trainer.test_freq={every}")
        keys += ("trainer.max_actor_ckpt_to_keep=2", "trainer.max_critic_ckpt_to_keep=2")
        ended = bench.run(bench.gad(base / "soak", *keys), {"record": str(file)}, hook="soak.inside")
        if ended.code != 0 or ended.left:
            print(ended.text, ended.left)
            return 1
    found = curves(file)
    print(table(found))
    if options.plot:
        draw(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

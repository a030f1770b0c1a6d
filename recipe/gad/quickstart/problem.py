"""The small self-made problem of the CPU quickstart, and the report at its end. No download, the same for every seed.

The student reads three letters and repeats them between filler words: ``c a f`` -> ``well um c then a and um f right``.
Which words it likes is its style. The teacher draws its words at random, so its style is a distribution that imitation
and GAD approach; the base student does the same task in another style.

    python -m recipe.gad.quickstart.problem build --out DIR --seed 0
    python -m recipe.gad.quickstart.problem report --warmup_dir DIR --gad_dir DIR

Run folders hold ``metrics.jsonl`` (verl's file logger) and ``val_samples/<step>.jsonl`` (verl's validation dump).
"""

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.gad.run.log import (
    MetricLog,
    Metrics,
    answers_over_training,
    dump_files,
    load_metrics,
    read_dump,
    running_mean,
    series,
)

LETTERS = "abcdefghij"
# the words of an answer, slot by slot: opener, then for each letter [joiner] [filler] letter, then closer
SLOTS = {
    "opener": ["well", "so", "sure", "okay"],
    "joiner": ["then", "and", "plus", "next"],
    "filler": ["um", "like", "just", ""],
    "closer": ["right", "see", "done", "bye"],
}
# how often each word of a slot is said (per cent), and how often the letters keep the order of the prompt
STYLES: dict[str, dict[str, Any]] = {
    "teacher": {
        "opener": [70, 20, 5, 5],
        "joiner": [70, 20, 5, 5],
        "filler": [60, 10, 5, 25],
        "closer": [60, 30, 5, 5],
        "in_order": 0.9,
    },
    "base": {
        "opener": [4, 8, 66, 22],
        "joiner": [4, 8, 66, 22],
        "filler": [4, 4, 12, 80],
        "closer": [4, 8, 66, 22],
        "in_order": 1.0,
    },
}
MAX_RESPONSE_LENGTH = 12
"""Tokens of the longest answer, the end-of-turn token included (data.max_response_length)."""

SPECIAL = ["<pad>", "<bos>", "<end>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{{ '<assistant>' if m['role'] == 'assistant' else '<user>' }} {{ m['content'] }} <end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROBLEM_FILES = ("model/model.safetensors", "model/tokenizer.json", "train.parquet", "val.parquet")


# ---------------------------------------------------------------------------------------------------------- problem


def answer(prompt: str, style: str, rng: random.Random) -> str:
    """One answer to ``prompt`` ("c a f") drawn from ``style`` ("teacher" or "base"); at most 10 words."""
    weights = STYLES[style]

    def draw(slot: str) -> str:
        return rng.choices(SLOTS[slot], weights[slot])[0]

    letters = prompt.split()
    if rng.random() >= weights["in_order"]:
        i = rng.randrange(len(letters) - 1)
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    words = [draw("opener")]
    for i, letter in enumerate(letters):
        words += [draw("joiner")] if i else []
        words += [draw("filler"), letter]
    words.append(draw("closer"))
    return " ".join(word for word in words if word)


def build_tokenizer():
    """Word-level fast tokenizer (32 words); every turn of its chat template ends with the eos token ``<end>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [word for slot in SLOTS.values() for word in slot if word]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate([*SPECIAL, *LETTERS, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def tiny_llama(tokenizer, **sizes):
    """LlamaConfig of a two-layer model with the vocabulary and special tokens of ``tokenizer``; ``sizes`` overrides."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**settings, **sizes})


def train_base_student(tokenizer, prompts: Sequence[str], seed: int, steps: int = 300, lr: float = 5e-3):
    """LlamaForCausalLM (84K parameters, fp32) trained on the base style of ``prompts``; 10-20 s on one core."""
    import torch
    from tqdm import trange
    from transformers import LlamaForCausalLM

    config = tiny_llama(tokenizer, hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    rng = random.Random(f"base {seed}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order on every machine size
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config).float()
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
            for step in trange(steps, desc="training the base student", unit="step", mininterval=0.5):
                optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (steps - step) / steps)
                chats = [_chat(prompt, answer(prompt, "base", rng)) for prompt in rng.choices(prompts, k=64)]
                rows = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
                labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
                labels[:, : len(_prompt_ids(tokenizer, prompts[0]))] = -100
                loss = model(**rows, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return model


def _chat(prompt: str, response: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": prompt}]
    return turns if response is None else [*turns, {"role": "assistant", "content": response}]


def _prompt_ids(tokenizer, prompt: str) -> list[int]:
    return tokenizer.apply_chat_template(_chat(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]


def build_problem(out_dir: str | Path, seed: int = 0, n_train: int = 4096, n_val: int = 192) -> Path:
    """Write the base student and the teacher's data; reuse a complete problem built with the same arguments.

    Args:
        out_dir: gets ``model/``, ``train.parquet``, ``val.parquet`` (columns content, teacher_response, data_source,
            extra_info) and ``problem.json``. It appears whole or not at all.
        seed: of the prompts, the teacher's answers and the base student; same seed, same contents.
        n_train: training rows, drawn with repetition from the prompts that are not held out.
        n_val: held-out prompts, one row each; at most 360 of the 720 prompts.

    Raises:
        ValueError: a count is out of range, or ``out_dir`` holds anything else.
    """
    out_dir = Path(out_dir)
    prompts = [" ".join(letters) for letters in itertools.permutations(LETTERS, 3)]
    if n_train < 1 or not 1 <= n_val <= len(prompts) // 2:
        raise ValueError(f"need n_train >= 1 and 1 <= n_val <= {len(prompts) // 2}, got {n_train} and {n_val}")
    arguments = {"problem": 1, "seed": seed, "n_train": n_train, "n_val": n_val}
    if _is_complete(out_dir, arguments):
        return out_dir

    random.Random(f"prompts {seed}").shuffle(prompts)
    rng = random.Random(f"teacher {seed}")
    val, train = prompts[:n_val], prompts[n_val:]
    tokenizer = build_tokenizer()
    temporary = out_dir.absolute().with_name(f".{out_dir.absolute().name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_rows(temporary / "train.parquet", rng.choices(train, k=n_train), rng)
        _write_rows(temporary / "val.parquet", val, rng)
        train_base_student(tokenizer, train, seed).save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        (temporary / "problem.json").write_text(json.dumps(arguments) + "\n", encoding="utf-8")
        try:
            temporary.rename(out_dir)
        except OSError:  # somebody else was faster
            if not _is_complete(out_dir, arguments):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def _is_complete(out_dir: Path, arguments: dict) -> bool:
    """True: a complete problem of these arguments. False: free to write. ValueError: something else is there."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is not a folder")
    if not out_dir.exists() or not any(out_dir.iterdir()):
        return False
    try:
        found = json.loads((out_dir / "problem.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = "no toy problem"
    missing = [name for name in PROBLEM_FILES if not (out_dir / name).is_file()]
    if found == arguments and not missing:
        return True
    reason = f"lacks {', '.join(missing)}" if found == arguments else f"holds {found}, asked for {arguments}"
    raise ValueError(f"{out_dir} is not empty and {reason}; choose another folder or delete this one")


def _write_rows(path: Path, prompts: Sequence[str], rng: random.Random) -> None:
    import pandas as pd

    rows = [
        {
            "content": _chat(prompt),
            "teacher_response": answer(prompt, "teacher", rng),
            "data_source": "toy",
            "extra_info": {"index": i},
        }
        for i, prompt in enumerate(prompts)
    ]
    pd.DataFrame(rows).to_parquet(path, index=False)


# ---------------------------------------------------------------------------------------------------------- measure


def style_bigrams(responses: Sequence[str]) -> Counter:
    """Counts of neighbouring words; ``^`` and ``$`` are the ends of an answer, every letter of the task is ``x``."""
    counts: Counter = Counter()
    for response in responses:
        words = ["^", *("x" if word in LETTERS else word for word in response.split()), "$"]
        counts.update(itertools.pairwise(words))
    return counts


def closeness(responses: Sequence[str], teacher_responses: Sequence[str]) -> float:
    """How close two sets of answers are in style: 1 - total variation distance of their style bigrams.

        closeness = 1 - 1/2 * sum_b |p(b) - q(b)| = sum_b min(p(b), q(b)),   p, q = frequencies of bigram b

    The letters themselves do not count (they belong to the prompt), so it says nothing about right or wrong letters.

    Returns:
        a number in [0, 1]: 0 = no bigram in common, 1 = same frequencies. Two samples of the same style stay below 1
        by sampling noise: about 0.95 for 200 answers.

    Raises:
        ValueError: one side is empty.
    """
    if not responses or not teacher_responses:
        raise ValueError(f"closeness needs answers, got {len(responses)} and {len(teacher_responses)} of the teacher")
    p, q = style_bigrams(responses), style_bigrams(teacher_responses)
    p_total, q_total = sum(p.values()), sum(q.values())
    return min(1.0, sum(min(p[b] / p_total, q[b] / q_total) for b in p))


def letters_right(prompts: Sequence[str], responses: Sequence[str]) -> float:
    """Share of answers in [0, 1] that say exactly the letters of their prompt, in any order."""

    def letters(text: str) -> list[str]:
        return sorted(word for word in text.split() if word in LETTERS)

    return sum(letters(p) == letters(r) for p, r in zip(prompts, responses, strict=True)) / len(prompts)


# ----------------------------------------------------------------------------------------------------------- report


def _dump_files(folder: Path) -> dict[int, Path]:
    """Validation dumps of a folder by step; at least one."""
    files = dump_files(folder)
    if not files:
        raise ValueError(f"no validation dumps <step>.jsonl in {folder}")
    return files


def _column(rows: Sequence[dict], key: str) -> list[str]:
    return [row[key] for row in rows]


def closeness_from_dumps(folder: str | Path) -> dict[int, float]:
    """Closeness in [0, 1] of each validation dump ``<step>.jsonl`` of ``folder`` to its teacher texts, by step."""
    dumps = {step: read_dump(path) for step, path in _dump_files(Path(folder)).items()}
    return {step: closeness(_column(rows, "output"), _column(rows, "gts")) for step, rows in dumps.items()}


def sample_triples(before: str | Path, after: str | Path, k: int = 3) -> list[tuple[str, str, str, str]]:
    """First ``k`` prompts that both validation dumps hold, as (prompt, teacher, student before, student after)."""
    rows = answers_over_training([read_dump(before), read_dump(after)], k)
    return [(prompt, teacher, early["output"], late["output"]) for prompt, teacher, (early, late) in rows]


def _series(metrics: Metrics, name: str) -> dict[int, float]:
    found = series(metrics, name)
    if not found:
        raise ValueError(f"no step has the metric {name}")
    return found


def _join(warmup: dict[int, float], gad: dict[int, float]) -> tuple[dict[int, float], int]:
    """Both stages on one axis, GAD's steps counted on from the warmup's last; and that last step."""
    last = max(warmup)
    return {**warmup, **{last + step: value for step, value in gad.items()}}, last


def plot_curves(
    warmup_metrics: Metrics,
    gad_metrics: Metrics,
    closeness_by_step: dict[int, float],
    out_png: str | Path,
    title: str,
) -> None:
    """One picture of both stages: the discriminator's accuracy falls while the answers come closer to the teacher.

    Args:
        warmup_metrics, gad_metrics: from :func:`recipe.gad.run.log.load_metrics`, each counting its steps from 1.
        closeness_by_step: closeness of the validation answers on the joint axis (GAD's step s at warmup's last + s).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    d_acc, handover = _join(_series(warmup_metrics, "critic/d_acc"), _series(gad_metrics, "critic/d_acc"))
    steps, values = list(d_acc), list(d_acc.values())
    smooth = running_mean(values, 5)

    figure = Figure(figsize=(9, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.subplots()
    right = left.twinx()
    blue, orange, grey = "#1f5fa8", "#d1600a", "#666666"
    left.plot(steps, values, color=blue, alpha=0.25, lw=1)
    (line_d,) = left.plot(steps, smooth, color=blue, lw=2.2, label="discriminator accuracy (mean of 5 steps)")
    points = dict(sorted(closeness_by_step.items()))
    (line_c,) = right.plot(
        list(points), list(points.values()), color=orange, lw=2.2, marker="o", ms=5, label="closeness to the teacher"
    )
    left.axhline(0.5, color=blue, lw=1, ls=":")
    left.axvline(handover, color=grey, lw=1.2, ls="--")
    for x, text, side in ((handover, "warmup ", "right"), (handover, " GAD", "left")):
        left.text(x, 1.035, text, ha=side, va="center", color=grey, fontsize=11, fontweight="bold")
    left.text(steps[-1], 0.505, "coin toss", ha="right", va="bottom", color=blue, fontsize=9)
    left.set_xlabel("training step", fontsize=11)
    left.set_ylabel("discriminator accuracy", color=blue, fontsize=11)
    right.set_ylabel("closeness of validation answers", color=orange, fontsize=11)
    for axis, color in ((left, blue), (right, orange)):
        axis.set_ylim(0, 1.07)
        axis.tick_params(axis="y", colors=color, labelsize=10)
        axis.spines["top"].set_visible(False)
    left.set_xlim(0, max(*steps, *points) * 1.01)
    left.grid(axis="y", alpha=0.2)
    left.legend(handles=[line_d, line_c], loc="lower right", fontsize=10, framealpha=0.9)
    figure.suptitle(title, fontsize=13)
    figure.savefig(out_png)


def summary(warmup_dir: str | Path, gad_dir: str | Path) -> str:
    """Table of the two run folders as text: base student (if dumped), end of warmup, end of GAD, change in GAD.

    Discriminator accuracy is the mean of the last 10 steps of a stage; the other rows are of its last validation.
    """
    runs = [Path(warmup_dir), Path(gad_dir)]
    metrics = [load_metrics(run / "metrics.jsonl") for run in runs]
    files = [_dump_files(run / "val_samples") for run in runs]
    dumps = [read_dump(list(f.values())[-1]) for f in files]
    if 0 in files[0] and len(files[0]) > 1:
        dumps.insert(0, read_dump(files[0][0]))

    def last_steps(run: Metrics, name: str) -> float:
        values = list(_series(run, name).values())[-10:]
        return sum(values) / len(values)

    def words(texts: list[str]) -> float:
        return sum(len(text.split()) for text in texts) / len(texts)

    table = {"discriminator accuracy": [last_steps(run, "critic/d_acc") for run in metrics]}
    table["closeness to the teacher"] = [closeness(_column(d, "output"), _column(d, "gts")) for d in dumps]
    rouge = next((n for run in metrics for row in run.values() for n in row if "rouge" in n and "mean" in n), None)
    if rouge and all(any(rouge in row for row in run.values()) for run in metrics):
        table["ROUGE-L to the teacher"] = [list(_series(run, rouge).values())[-1] for run in metrics]
    table["letters right"] = [letters_right(_column(d, "input"), _column(d, "output")) for d in dumps]
    table["words of an answer"] = [words(_column(d, "output")) for d in dumps]

    lines = [f"{'':26}{'base':>9}{'warmup':>9}{'GAD':>9}{'change':>9}"]
    for name, values in table.items():
        cells = ["-"] * (3 - len(values)) + [f"{value:.3f}" for value in values] + [f"{values[-1] - values[-2]:+.3f}"]
        lines.append(f"{name:26}" + "".join(f"{cell:>9}" for cell in cells))
    teacher = _column(dumps[-1], "gts")
    rng = random.Random(0)
    again = [answer(row["input"], "teacher", rng) for row in dumps[-1]]
    lines.append(
        f"The teacher itself: closeness of a second sample {closeness(again, teacher):.3f}, {words(teacher):.3f} words."
    )
    return "\n".join(lines)


def report(warmup_dir: str | Path, gad_dir: str | Path, out_png: str | Path | None = None, samples: int = 3) -> str:
    """Draw the curves of the two run folders (default ``gad_dir/curves.png``); return the table and sample answers."""
    runs = [Path(warmup_dir), Path(gad_dir)]
    out_png = Path(out_png or runs[1] / "curves.png")
    warmup, gad = (load_metrics(run / "metrics.jsonl") for run in runs)
    handover = max(_series(warmup, "critic/d_acc"))
    near = closeness_from_dumps(runs[0] / "val_samples")
    near |= {handover + step: value for step, value in closeness_from_dumps(runs[1] / "val_samples").items()}
    plot_curves(warmup, gad, near, out_png, "GAD on the toy problem")

    before, after = (list(_dump_files(run / "val_samples").values())[-1] for run in runs)
    lines = [summary(*runs), ""]
    for prompt, teacher, early, late in sample_triples(before, after, samples):
        lines += [f"prompt     {prompt}", f"  teacher  {teacher}", f"  warmup   {early}", f"  GAD      {late}"]
    return "\n".join([*lines, "", f"curves: {out_png}"])


def follow(metrics_path: str | Path, pid: int, steps: int | None = None, interval: float = 1.0) -> None:
    """Progress bar on stderr over the steps that process ``pid`` logs to ``metrics_path``; returns when it ends."""
    from tqdm import tqdm

    log, running = MetricLog(metrics_path), True
    with tqdm(total=steps, unit="step") as bar:
        while running:
            running = _is_running(pid)
            log.update()
            accuracy = series(log.metrics, "critic/d_acc")
            if accuracy:
                last = max(accuracy)
                bar.set_postfix_str(f"d_acc {accuracy[last]:.2f}", refresh=False)
                bar.update(last - bar.n)
            if running:
                time.sleep(interval)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.gad.quickstart.problem", description="The CPU quickstart's problem."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write the base student and the teacher's data")
    build.add_argument("--out", required=True, help="folder to write; a complete one of the same arguments is reused")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--n_train", type=int, default=4096, help="training rows")
    build.add_argument("--n_val", type=int, default=192, help="held-out prompts")
    progress = commands.add_parser("progress", help="progress bar of a running stage, until its process ends")
    progress.add_argument("--metrics", required=True, help="metrics.jsonl of the run")
    progress.add_argument("--pid", type=int, required=True, help="process to wait for")
    progress.add_argument("--steps", type=int, help="steps of the stage, for the remaining time")
    show = commands.add_parser("report", help="table, sample answers and picture of a finished quickstart")
    show.add_argument("--warmup_dir", required=True, help="run folder of the warmup stage")
    show.add_argument("--gad_dir", required=True, help="run folder of the GAD stage")
    show.add_argument("--out", help="picture to write (default: curves.png in --gad_dir)")
    args = parser.parse_args(argv)
    try:
        if args.command == "build":
            print(f"toy problem: {build_problem(args.out, args.seed, args.n_train, args.n_val)}")
        elif args.command == "progress":
            follow(args.metrics, args.pid, args.steps)
        else:
            print(report(args.warmup_dir, args.gad_dir, args.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

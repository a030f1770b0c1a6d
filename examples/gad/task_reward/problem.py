"""The example's data and measures: a teacher that answers in JSON, but often gets the form wrong.

    python examples/gad/task_reward/problem.py data --output_dir DIR [--seed 0]
    python examples/gad/task_reward/problem.py show RUN [RUN ...]

A prompt names a person and a city by letters, such as ``c f``. Two of three teacher answers are then
``{ "name" : "c" , "city" : "f" }``. The others use another key, forget the brace or tell it in words, but name the
right letters. The student is a small model with random weights.
"""

import argparse
import itertools
import json
import random
import re
from pathlib import Path

import pandas as pd
import torch
from json_form import compute_score
from transformers import LlamaForCausalLM

from recipe.gad.quickstart.problem import build_tokenizer, tiny_llama

LETTERS = "abcdefghijklmnop"
FORMS = {
    '{{ "name" : "{0}" , "city" : "{1}" }}': 65,
    '{{ "name" : "{0}" , "town" : "{1}" }}': 15,
    '{{ "name" : "{0}" , "city" : "{1}"': 10,
    '"{0}" lives in "{1}"': 10,
}
"""Form of an answer -> per cent of the teacher's answers that have it."""
N_TRAIN, N_VAL = 1024, 48


def teacher_answer(name: str, city: str, rng: random.Random) -> str:
    """One answer of the teacher."""
    return rng.choices(list(FORMS), list(FORMS.values()))[0].format(name, city)


def letters_right(prompt: str, answer: str) -> bool:
    """Does the answer name the prompt's letters, in order and no others?"""
    return re.findall(r'"([a-p])"', answer) == re.findall(r"\b[a-p]\b", prompt)


def write_data(folder: Path, seed: int) -> None:
    """model/, train.parquet and val.parquet; the same seed gives the same files."""
    rng = random.Random(seed)
    pairs = list(itertools.permutations(LETTERS, 2))
    rng.shuffle(pairs)
    parts = {"val": pairs[:N_VAL], "train": rng.choices(pairs[N_VAL:], k=N_TRAIN)}
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in parts.items():
        rows = [
            {
                "content": [{"role": "user", "content": f"{name} {city}"}],
                "teacher_response": teacher_answer(name, city, rng),
                "data_source": "json",
            }
            for name, city in chosen
        ]
        pd.DataFrame(rows).to_parquet(folder / f"{part}.parquet", index=False)
    words = {word for form in FORMS for word in form.format("a", "b").split()} | {f'"{letter}"' for letter in LETTERS}
    tokenizer = build_tokenizer([*LETTERS, *sorted(words)])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama(tokenizer, hidden_size=64, intermediate_size=128))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def measures(run: Path) -> dict[str, float]:
    """Shares of the answers of a run's last validation."""
    last = max((run / "val_samples").glob("*.jsonl"), key=lambda file: int(file.stem))
    rows = [json.loads(line) for line in last.read_text(encoding="utf-8").splitlines()]
    form = [compute_score(row["output"]) for row in rows]
    right = [letters_right(row["input"], row["output"]) for row in rows]
    return {"answers": len(rows), "form right": sum(form) / len(rows), "letters right": sum(right) / len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("--output_dir", type=Path, required=True)
    data.add_argument("--seed", type=int, default=0)
    commands.add_parser("show").add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "data":
        write_data(options.output_dir, options.seed)
        return
    for run in options.runs:
        print(f"{run.name:20}", "  ".join(f"{name} {value:.3g}" for name, value in measures(run).items()))


if __name__ == "__main__":
    main()

"""The CPU quickstart's problem: a small student, a stochastic teacher, and measures of how close the two are.

The student reads three letters and repeats them between filler words: ``c a f`` -> ``well um c then a and um f right``.
The words it prefers are its style. The teacher draws its words at random, so its style is a distribution, and both
imitation and GAD move the student towards it. The base student solves the same task in another style.

    python -m recipe.gad.quickstart.problem --out DIR --seed 0

Nothing is downloaded, and the same seed gives the same files.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.gad.run.findings import InputError

LETTERS = "abcdefghij"
# the words of an answer, slot by slot: opener, then for each letter [joiner] [filler] letter, then closer
SLOTS = {
    "opener": ["well", "so", "sure", "okay"],
    "joiner": ["then", "and", "plus", "next"],
    "filler": ["um", "like", "just", ""],
    "closer": ["right", "see", "done", "bye"],
}
WORDS = [*LETTERS, *itertools.chain.from_iterable(filter(None, words) for words in SLOTS.values())]
# per cent of each word of a slot, and the share of answers that keep the letters in the prompt's order
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
N_TRAIN, N_VAL = 4096, 192
"""Training rows and held-out prompts, unless the caller asks for other numbers."""

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


def build_tokenizer(words: Sequence[str] = WORDS):
    """Word-level fast tokenizer of ``words``; every turn of its chat template ends with the eos token ``<end>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
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
    torch.set_num_threads(1)  # sums run in the same order whatever the number of cores
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


def build_problem(out_dir: str | Path, seed: int = 0, n_train: int = N_TRAIN, n_val: int = N_VAL) -> Path:
    """Write the base student and the teacher's data, or reuse a complete problem built with the same arguments.

    Args:
        out_dir: folder for ``model/``, ``train.parquet``, ``val.parquet`` (columns content, teacher_response,
            data_source, extra_info) and ``problem.json``. It is renamed into place when it is complete.
        seed: seeds the prompts, the teacher's answers and the base student; the same seed gives the same files.
        n_train: training rows, drawn with repetition from the prompts that are not held out.
        n_val: held-out prompts, one row each; at most 360 of the 720 prompts.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: a count is out of range, or ``out_dir`` holds something else.
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
        except OSError:  # another process built the same problem first
            if not _is_complete(out_dir, arguments):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def _is_complete(out_dir: Path, arguments: dict) -> bool:
    """True: a complete problem with these arguments. False: nothing is there yet. ValueError: something else is."""
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
    raise InputError(f"{out_dir} is not empty and {reason}", fix="choose another folder, or delete this one")


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
    """Counts of adjacent word pairs; ``^`` and ``$`` mark the ends of an answer, and every letter counts as ``x``."""
    counts: Counter = Counter()
    for response in responses:
        words = ["^", *("x" if word in LETTERS else word for word in response.split()), "$"]
        counts.update(itertools.pairwise(words))
    return counts


def closeness(responses: Sequence[str], teacher_responses: Sequence[str]) -> float:
    """How close two sets of answers are in style: 1 - total variation distance of their style bigrams.

        closeness = 1 - 1/2 * sum_b |p(b) - q(b)| = sum_b min(p(b), q(b)),   p, q = frequencies of bigram b

    The letters themselves do not count (they belong to the prompt), so a wrong letter changes nothing.

    Returns:
        a number in [0, 1]: 0 = no bigram in common, 1 = equal frequencies. Sampling noise keeps two samples of one
        style below 1: 200 answers give about 0.95.

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.gad.quickstart.problem", description="Write the base student and the teacher's data."
    )
    parser.add_argument("--out", required=True, help="folder to write; a complete one is reused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n_train", type=int, default=N_TRAIN, help="training rows")
    parser.add_argument("--n_val", type=int, default=N_VAL, help="held-out prompts")
    args = parser.parse_args(argv)
    try:
        print(f"toy problem: {build_problem(args.out, args.seed, args.n_train, args.n_val)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

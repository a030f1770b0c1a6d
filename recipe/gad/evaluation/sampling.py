"""Samples a model's answers to validation prompts, and stores each with the teacher's: the input of all metrics.

An evaluation folder holds ``settings.json`` (what the answers depend on) and ``answers.jsonl``, one line per answer:

    index            row of the validation data, counted from 0 after long prompts are dropped
    sample           0 .. n-1, which of the n answers to this prompt
    data_source      as in the data
    messages         the prompt as chat messages
    teacher, student texts, decoded from token ids by the model's tokenizer without special tokens
    teacher_tokens, student_tokens   lengths in tokens of that tokenizer, the end token included
    teacher_cut, student_cut         the answer was cut at max_response_length: it has no end token

Prompts, teacher tokens and end tokens are those of training: the rows come from the trainer's own dataset class.
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from recipe.gad.run.atomic_io import read_object, write_atomically
from recipe.gad.run.checkpoint import TOKENIZER_FILES, actor_folder
from recipe.gad.run.findings import InputError
from recipe.gad.run.log import recorded_config
from recipe.gad.run.progress import progress

ANSWERS = "answers.jsonl"
SETTINGS = "settings.json"
BACKENDS = ("vllm", "hf")
MOST_TOKENS, MOST_ANSWERS = 1 << 24, 10_000
"""Limits of a prompt's or an answer's tokens, and of the answers to one prompt; more is a slip of the keyboard."""
HF_BATCH_ANSWERS = 64
"""Answers that the hf backend samples in one batch."""


@dataclass(frozen=True)
class Settings:
    """What answers depend on.

    Raises:
        ValueError: a value is out of its range, or a file is missing.
    """

    model: str
    """Hugging Face folder or hub id; a run, its ``global_step_N`` or an actor folder becomes the folder inside it."""
    val_files: tuple[str, ...]
    backend: str
    temperature: float = 0.8
    max_prompt_length: int = 512
    max_response_length: int = 256
    seed: int = 0
    n: int = 1
    prompt_key: str = "content"
    teacher_key: str = "teacher_response"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", actor_folder(self.model))
        object.__setattr__(self, "val_files", tuple(os.path.abspath(Path(f).expanduser()) for f in self.val_files))
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r}: expected one of {', '.join(BACKENDS)}")
        if self.backend == "vllm" and not importlib.util.find_spec("vllm"):
            raise InputError("backend vllm: not installed", fix='pip install "verl-gad[vllm]", or --backend hf')
        if not 0 <= self.temperature < math.inf or (self.temperature == 0 and self.n > 1):
            raise ValueError(
                f"temperature {self.temperature} with n={self.n}: expected above 0, or 0 (greedy) with n=1"
            )
        for name, low, high in (
            ("max_prompt_length", 1, MOST_TOKENS),
            ("max_response_length", 1, MOST_TOKENS),
            ("n", 1, MOST_ANSWERS),
            ("seed", 0, 2**32 - 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} {getattr(self, name)}: expected a whole number from {low} to {high}")

    def record(self) -> dict[str, Any]:
        """The settings as JSON, with the hash of the data and the time of a model folder's newest file."""
        patterns = ("*.safetensors", "*.bin", *TOKENIZER_FILES)
        times = [file.stat().st_mtime for pattern in patterns for file in Path(self.model).glob(pattern)]
        return {
            **dataclasses.asdict(self),
            "val_files": list(self.val_files),
            "val_sha256": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in self.val_files],
            "model_written": datetime.fromtimestamp(max(times)).isoformat() if times else None,
        }


RUN_KEYS = {
    "temperature": "actor_rollout_ref.rollout.val_kwargs.temperature",
    "max_prompt_length": "data.max_prompt_length",
    "max_response_length": "data.max_response_length",
    "prompt_key": "data.prompt_key",
    "teacher_key": "data.teacher_key",
    "chat_template_kwargs": "data.apply_chat_template_kwargs",
}
"""Setting -> key of a run's configuration that decides it in the run's own validation."""
MODEL_SETTINGS = ("model", "model_written")
"""Settings in which two models differ; all others must agree before their answers are compared."""
ANSWER_KEYS = {"index", "sample", "messages", "teacher", "student"}
"""Keys that every line of ``answers.jsonl`` has, among others."""
DIGEST = "answers_sha256"
"""Hash of the finished answers, in ``settings.json``."""
NOT_COMPARED = ("val_files", DIGEST)
"""Entries of ``settings.json`` that do not decide the answers; the data is known by its hash, not by its paths."""


def recorded_settings(model: str) -> tuple[Path | None, dict[str, Any]]:
    """Settings that the run recorded which trained the model, by :data:`RUN_KEYS`.

    Args:
        model: as in :class:`Settings`. A run is recognised by its folder or any folder of a checkpoint in it.

    Returns:
        The run's folder, and the settings that its configuration sets; None and {} for any other model.

    Raises:
        ValueError: the recorded configuration cannot be read.
    """
    from omegaconf import OmegaConf

    folder = Path(os.path.abspath(Path(model).expanduser()))
    for run in (folder, *folder.parents[:3]):  # RUN/global_step_N/actor/huggingface
        if values := recorded_config(run):
            config = OmegaConf.create(values)
            found = {name: OmegaConf.select(config, key) for name, key in RUN_KEYS.items()}
            plain = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in found.items()}
            return run, {name: value for name, value in plain.items() if value is not None}
    return None, {}


def default_backend() -> str:
    """vllm if it is installed and there is a GPU, else hf."""
    import torch

    return "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "hf"


def differences(first: dict[str, Any], second: dict[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """A text "name: first value and second value" for every setting in which the two records differ."""
    names = dict.fromkeys([*first, *second])
    return [
        f"{name}: {first.get(name)!r} and {second.get(name)!r}"
        for name in names
        if name not in {*ignore, *NOT_COMPARED} and first.get(name) != second.get(name)
    ]


def read_settings(folder: str | Path) -> dict[str, Any]:
    """``settings.json`` of an evaluation folder.

    Raises:
        ValueError: it is missing or not JSON.
    """
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise InputError(f"{folder} is no evaluation folder: it has no {SETTINGS}", fix="run gad eval first")
    return read_object(path, "run gad eval --overwrite")


def read_answers(folder: str | Path) -> list[dict[str, Any]]:
    """``answers.jsonl`` of an evaluation folder, at least one answer.

    Raises:
        ValueError: it is missing, empty, not JSON, or not what ``gad eval`` wrote there.
    """
    from recipe.gad.run.data_file import json_rows

    path = Path(folder) / ANSWERS
    if not path.is_file():
        raise InputError(f"{folder} has no {ANSWERS}", fix="run gad eval first")
    answers: list[dict[str, Any]] = []
    try:
        rows = list(json_rows(path))
    except ValueError as error:
        raise InputError(f"{path}: {error}", fix="run gad eval --overwrite") from None
    for row, problem in rows:
        if problem is not None:
            raise InputError(f"{path} {problem}", fix="run gad eval --overwrite")
        if not isinstance(row, dict) or not row.keys() >= ANSWER_KEYS:
            raise InputError(f"{path}, row {len(answers)}: not written by gad eval", fix="run gad eval --overwrite")
        answers.append(row)
    if not answers:
        raise InputError(f"{path} is empty", fix="run gad eval --overwrite")
    if read_settings(folder).get(DIGEST, digest := answers_hash(folder)) != digest:
        raise InputError(f"{path} has changed since gad eval wrote it", fix="run gad eval --overwrite")
    return answers


def answers_hash(folder: str | Path) -> str:
    """SHA-256 of ``answers.jsonl``."""
    return hashlib.sha256((Path(folder) / ANSWERS).read_bytes()).hexdigest()


def make_answers(
    settings: Settings,
    output_dir: str | Path,
    overwrite: bool = False,
    vllm_options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Sample the answers into ``output_dir``, or reuse those that the same settings made before.

    Args:
        settings: what the answers depend on.
        output_dir: evaluation folder; made if missing.
        overwrite: delete answers that were made there with other settings.
        vllm_options: arguments of vllm.LLM that do not change the distribution (memory, CUDA graphs).

    Returns:
        The lines of ``answers.jsonl``.

    Raises:
        ValueError: the folder holds answers made with other settings, or the data cannot be used.
    """
    folder, record = Path(output_dir), settings.record()
    path = folder / ANSWERS
    if path.is_file() and not overwrite:
        if changed := differences(read_settings(folder), record):
            raise InputError(
                f"{folder} holds answers made with other settings (there and now): {'; '.join(changed)}",
                fix="choose another --output_dir, or --overwrite",
            )
        print(f"{path}: made with the same settings, reused")
        return read_answers(folder)
    rows = load_rows(settings)
    path.unlink(missing_ok=True)
    write_atomically(folder / SETTINGS, json.dumps(record, indent=2) + "\n")
    prompts = [row["prompt_ids"] for row in rows.rows]
    if settings.backend == "vllm":
        sampled = _sample_vllm(settings, prompts, rows.stop_ids, vllm_options or {})
    else:
        sampled = _sample_hf(settings, prompts, rows.stop_ids)
    return write_answers(folder, record, rows, sampled)


def write_answers(
    folder: Path, record: dict[str, Any], rows: "TokenizedRows", sampled: list[list[list[int]]]
) -> list[dict[str, Any]]:
    """Write sampled token ids, a list of answers for each row, as ``answers.jsonl``; returns its lines."""
    answers = [
        rows.answer(index, sample, ids) for index, group in enumerate(sampled) for sample, ids in enumerate(group)
    ]
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    write_atomically(folder / ANSWERS, text)
    write_atomically(folder / SETTINGS, json.dumps({**record, DIGEST: answers_hash(folder)}, indent=2) + "\n")
    return answers


# ---------------------------------------------------------------------- prompts and teacher, as in training


@dataclass(frozen=True)
class TokenizedRows:
    """Validation rows as token ids: dicts of prompt_ids, teacher_ids, messages, data_source."""

    rows: list[dict[str, Any]]
    tokenizer: Any
    stop_ids: list[int]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def answer(self, index: int, sample: int, student_ids: list[int]) -> dict[str, Any]:
        """One line of ``answers.jsonl``; ids after the first end token are dropped."""
        end = next((i + 1 for i, token in enumerate(student_ids) if token in self.stop_ids), len(student_ids))
        student_ids, row = student_ids[:end], self.rows[index]
        return {
            "index": index,
            "sample": sample,
            "data_source": row["data_source"],
            "messages": row["messages"],
            "teacher": self.text(row["teacher_ids"]),
            "student": self.text(student_ids),
            "teacher_tokens": len(row["teacher_ids"]),
            "student_tokens": len(student_ids),
            "teacher_cut": row["teacher_ids"][-1] not in self.stop_ids,
            "student_cut": student_ids[-1] not in self.stop_ids,
        }


def load_rows(settings: Settings) -> TokenizedRows:
    """Rows of the validation files, read by the trainer's dataset class; it drops prompts that are too long."""
    from omegaconf import OmegaConf

    import recipe.gad.plugin  # noqa: F401  (activates the overlay)
    from recipe.gad.training.trajectory import TEACHER_IDS, build_prompt_ids, stop_token_ids
    from verl.utils import hf_tokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    tokenizer = hf_tokenizer(settings.model)
    config = OmegaConf.create(
        {
            "prompt_key": settings.prompt_key,
            "teacher_key": settings.teacher_key,
            "max_prompt_length": settings.max_prompt_length,
            "max_response_length": settings.max_response_length,
            "truncation": "right",
            "filter_overlong_prompts": True,
            "filter_overlong_prompts_workers": 1,
            "apply_chat_template_kwargs": settings.chat_template_kwargs,
        }
    )
    dataset = RLHFDataset(data_files=list(settings.val_files), tokenizer=tokenizer, config=config)
    rows = [
        {
            "prompt_ids": build_prompt_ids(tokenizer, row["raw_prompt"], settings.chat_template_kwargs),
            "teacher_ids": row[TEACHER_IDS],
            "messages": row["raw_prompt"],
            "data_source": row["data_source"],
        }
        for row in map(dataset.__getitem__, range(len(dataset)))
    ]
    return TokenizedRows(rows, tokenizer, sorted(stop_token_ids(tokenizer)))


# ---------------------------------------------------------------------- sampling


def _sample_vllm(
    settings: Settings,
    prompts: list[list[int]],
    stop_ids: list[int],
    options: dict[str, Any],
) -> list[list[list[int]]]:
    """Sample with vLLM: n lists of token ids per prompt."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # CUDA may already be in use here
    from vllm import LLM, SamplingParams

    llm = LLM(
        settings.model,
        dtype="bfloat16",
        seed=settings.seed,
        max_model_len=settings.max_prompt_length + settings.max_response_length,
        **options,
    )
    params = SamplingParams(
        n=settings.n,
        temperature=settings.temperature,
        top_p=1.0,
        max_tokens=settings.max_response_length,
        stop_token_ids=stop_ids,
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    llm.llm_engine.engine_core.shutdown()  # frees the GPU for the two-sample test
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def _sample_hf(settings: Settings, prompts: list[list[int]], stop_ids: list[int]) -> list[list[list[int]]]:
    """Sample with Hugging Face ``generate`` instead: float32 on a CPU, bfloat16 on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).to(device).eval()
    model.generation_config = GenerationConfig()  # the folder's own defaults would change the distribution
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(settings.seed)
    step = max(HF_BATCH_ANSWERS // settings.n, 1)
    sampled = []
    for start in progress(range(0, len(prompts), step), desc="answers", unit=" batches"):
        batch = prompts[start : start + step]
        width = max(map(len, batch))
        input_ids = torch.tensor([[stop_ids[0]] * (width - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        with torch.inference_mode():
            ids = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=settings.max_response_length,
                num_return_sequences=settings.n,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
                **sampling,
            )[:, width:].tolist()
        sampled += [ids[row : row + settings.n] for row in range(0, len(ids), settings.n)]
    return sampled

"""SeqKD, DPO and GAD in one process a run: many seeds of a small student in minutes, to find and confirm settings.

    python benchmarks/plain_gad.py PLAN --folder DIR [--gpus 0,1] [--jobs N]    runs what is missing, then the table
    python benchmarks/plain_gad.py PLAN --folder DIR --table                    only the table

At 135M parameters, the trainer's step is mostly messages between processes. Here, student, discriminator and sampler
share a process, without Ray and vLLM. The losses, the discriminator, the tokens and the judge are the product's; the
loops around them are written anew, so the trainer and this script check each other. ``benchmarks/plans`` holds plans:

    model, data, watch      the student's folder, the teacher's answers, and rows for the discriminator's accuracy
    shuffle                 seed with which pandas shuffles the rows of data first; null (the default) keeps their order
    held_out                the first rows of data: no stage trains on them, and the judge reads no others
    rows                    answers that are sampled at a time
    stages                  name -> what it does, from which student (default: model), and its settings (class Stage)
    controls, arms          stages that are judged, or base, which is model; every arm is compared with every control
    answers, judge          answers per held-out prompt, and the two-sample test (class TwoSampleSettings)
    compile                 true: torch.compile fuses the kernels of the models' layers in training

A stage of a seed is a job of the scheduler of ``gad referee``. A stopped stage starts from its beginning.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from recipe.gad.evaluation.sampling import Settings, TokenizedRows, load_rows, write_answers
from recipe.gad.evaluation.scores import text_section, update_scores
from recipe.gad.evaluation.two_sample import run_two_sample_test
from recipe.gad.referee.plan import (
    check_count,
    check_names,
    check_one_of,
    check_path,
    check_positive,
    check_seeds,
    read_yaml,
    values_of,
)
from recipe.gad.referee.results import differences, mean, read_values
from recipe.gad.referee.schedule import Job, Scheduler, State
from recipe.gad.referee.verdict import METRICS
from recipe.gad.run.config import is_number
from recipe.gad.run.findings import either
from recipe.gad.run.two_sample import TwoSampleSettings
from recipe.gad.training.fresh import (
    MAX_BATCH_TOKENS,
    batches_by_tokens,
    fresh_discriminator,
    last_token_values,
    load_base,
    score,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP = 0.2
"""Largest gradient norm of both sides, the default of recipe/gad/config/gad_trainer.yaml."""
KL_TYPE = "low_var_kl"
"""Estimator of the KL to the reference, the default of the same file."""
STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as in verl's GRPO."""
PREFERENCE = ("soda", "online_dpo")
"""What a stage of DPO does."""
BASE = "base"
"""Name of the untrained model among controls and arms."""
WATCH_EVERY = 20
LOOK_EVERY = 16
"""Tokens after which the sampler looks whether all rows have ended."""
WIDTHS = 64
"""Prompts are padded to a multiple of this, so that few CUDA graphs are needed."""

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of an answer."""


@dataclass(frozen=True)
class Stage:
    """A training of one plan."""

    does: str
    """imitate (SeqKD), lead (the discriminator alone), gad, soda or online_dpo: DPO of the teacher's answer against the
    student's. soda draws these once for a prompt, from the student that it starts with; online_dpo in every step."""
    steps: int
    lr: float
    """Of the side that trains; the student's falls to 0 along half a cosine, the discriminator's is constant."""
    student: str | None = None
    discriminator: str | None = None
    d_lr: float | None = None
    """gad: of the discriminator."""
    prompts: int = 32
    imitation: float = 0.0
    """gad and DPO: weight of the mean of -log pi over the teacher's tokens, beside the policy gradient or DPO."""
    normalise: bool = False
    """gad: divide advantages by the standard deviation of the prompt's scores."""
    kl: float = 0.0
    """gad: weight of the KL to the student from which the stage starts, the mean over the tokens of the answers."""
    beta: float = 0.1
    """Of DPO. The default is that of gad.dpo_beta."""
    max_seconds: float = math.inf
    """The stage takes no longer, if need be with fewer steps: the student's rate then falls over the seconds."""

    def __post_init__(self) -> None:
        check_one_of("does", self.does, ("imitate", "lead", "gad", *PREFERENCE))
        check_count(self, "steps", "prompts")
        check_positive(self, "lr", "d_lr", "max_seconds", "beta")
        for key in ("imitation", "kl"):
            if not is_number(value := getattr(self, key)) or not value >= 0:
                raise ValueError(f"{key} {value!r}: expected a number of at least 0")
        _check_switch(self, "normalise")
        readers = {"imitation": ("gad", *PREFERENCE), "normalise": ("gad",), "kl": ("gad",), "beta": PREFERENCE}
        for key, stages in readers.items():
            if self.does not in stages and (value := getattr(self, key)) != getattr(Stage, key):
                raise ValueError(f"{key} {value!r}: a stage that does {self.does} takes none, only {either(stages)}")
        if self.does == "gad" and self.d_lr is None:
            raise ValueError("a stage that does gad needs d_lr, the discriminator's rate")

    def student_lr(self, step: int, seconds: float) -> float:
        """Rate of a step, counted from 0, that begins ``seconds`` after the first."""
        done = min(max(step / self.steps, seconds / self.max_seconds), 1.0)
        return self.lr * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Plan:
    """The YAML file."""

    model: str
    data: str
    watch: str
    held_out: int
    seeds: tuple[int, ...]
    stages: dict[str, Stage]
    controls: tuple[str, ...]
    arms: tuple[str, ...]
    answers: int
    judge: dict[str, Any]
    rows: int = 256
    max_prompt_length: int = 512
    max_response_length: int = 256
    temperature: float = 0.8
    compile: bool = False
    shuffle: int | None = None

    def __post_init__(self) -> None:
        _check_switch(self, "compile")
        check_path(self, "model", "data", "watch")
        check_seeds(self.seeds)
        if self.shuffle is not None and (type(self.shuffle) is not int or self.shuffle not in range(2**32)):
            raise ValueError(f"shuffle {self.shuffle!r}: expected null or a whole number from 0 to {2**32 - 1}")
        if BASE in self.stages:
            raise ValueError(f"stage {BASE!r}: the name of the untrained model. Fix: another name")
        for key in ("controls", "arms"):
            check_names(key, getattr(self, key), (*self.stages, BASE))
        check_count(self, "held_out", "answers", "rows", "max_prompt_length", "max_response_length")
        check_positive(self, "temperature")
        prompts = {stage.prompts for stage in self.stages.values() if stage.does != "imitate"}
        if uneven := [size for size in (*prompts, self.answers) if self.rows % size]:
            raise ValueError(f"rows {self.rows} is no multiple of {uneven} (prompts of a stage, or answers)")
        if alone := [name for name, stage in self.stages.items() if stage.normalise and stage.prompts == self.rows]:
            raise ValueError(f"stage {alone[0]!r}: normalise needs two answers to a prompt. Fix: more rows")

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan in a YAML file; raises what :func:`read_yaml` does."""
        return read_yaml(path, cls.parse)

    @classmethod
    def parse(cls, value: Any) -> "Plan":
        """The plan in what a YAML file holds. ValueError: the first mistake in it."""
        values = values_of(cls, value, "the plan")
        stages = values["stages"]
        if not isinstance(stages, dict):
            raise ValueError(f"stages: found {stages!r}, expected names with the settings of a stage each")
        values["stages"] = {name: _stage(name, settings, tuple(stages)) for name, settings in stages.items()}
        values["judge"] = _judge(values["judge"])
        return cls(**values)

    def rows_of(self, file: str | Path) -> TokenizedRows:
        return load_rows(self.settings(file))

    def settings(self, file: str | Path, model: str | None = None) -> Settings:
        return Settings(
            model=model or self.model,
            val_files=(str(file),),
            backend="hf",
            temperature=self.temperature,
            max_prompt_length=self.max_prompt_length,
            max_response_length=self.max_response_length,
            n=self.answers,
        )


def _check_switch(owner: Any, key: str) -> None:
    if not isinstance(value := getattr(owner, key), bool):
        raise ValueError(f"{key} {value!r}: expected true or false")


def _stage(name: str, settings: Any, names: tuple[str, ...]) -> Stage:
    """One stage of a plan with the stages ``names``."""
    values = values_of(Stage, settings, f"stage {name!r}")
    try:
        for key in ("student", "discriminator"):
            if values.get(key) is not None:
                check_one_of(key, values[key], names)
        return Stage(**values)
    except ValueError as error:
        raise ValueError(f"stage {name!r}: {error}") from None


def _judge(value: Any) -> dict[str, Any]:
    """Settings of the two-sample test, all but its model."""
    values = values_of(TwoSampleSettings, value, "judge", given=("model",))
    whole = SimpleNamespace(**{entry.name: entry.default for entry in fields(TwoSampleSettings)} | values)
    try:
        check_seeds(whole.seeds)
        check_count(whole, "epochs", "batch_pairs")
        check_positive(whole, "lr")
    except ValueError as error:
        raise ValueError(f"judge: {error}") from None
    return values


# ---------------------------------------------------------------------- sampling


class Sampler:
    """Answers of a model of the Llama family: a static cache of keys and values, and one CUDA graph per token.

    Suffixes of names: B rows, S new tokens of a row, L columns of the cache. Prompts are padded on the left, so a token
    of all rows goes to the same column.

    Args:
        model: ``LlamaForCausalLM``. Its weights are copied at every call, on a GPU to bfloat16.
        stop_ids: tokens that end an answer.
        rows: answers of a call.
        max_tokens: of an answer.
        temperature: of the samples.
    """

    def __init__(self, model, stop_ids: Sequence[int], rows: int, max_tokens: int, temperature: float):
        self.model, self.rows, self.max_tokens, self.temperature = model, rows, max_tokens, temperature
        self.config = config = model.config
        self.dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        self.stop_ids = torch.tensor(list(stop_ids), device=DEVICE)
        self.weights = {name: p.detach().to(self.dtype, copy=True) for name, p in model.named_parameters()}
        self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.kv_heads, self.head = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        self.groups = config.num_attention_heads // self.kv_heads
        self.frequencies = model.model.rotary_emb.inv_freq.float()
        self.steps: dict[int, Any] = {}
        self.cache = torch.empty(0)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.config.rms_norm_eps)

    def _forward(self, ids_BS, positions_BS, mask_B11SL, cache, columns_S) -> torch.Tensor:
        """Float32 logits (B, V) of the token after the last one; writes keys and values into ``columns_S``.

        ``mask_B11SL`` is 0 where a token may look, else -inf; ``cache`` is (2, layers, B, kv_heads, L, head).
        """
        batch, width = ids_BS.shape
        angles = (positions_BS[..., None].float() * self.frequencies).repeat(1, 1, 2)
        cos, sin = angles.cos().to(self.dtype)[:, None], angles.sin().to(self.dtype)[:, None]

        def rotate(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        def heads(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(x, self.weights[name]).unflatten(-1, (-1, self.head)).transpose(1, 2)

        x = F.embedding(ids_BS, self.weights["model.embed_tokens.weight"])
        for layer in range(self.config.num_hidden_layers):
            at = f"model.layers.{layer}."
            normed = self._norm(x, at + "input_layernorm.weight")
            keys, values = cache[0, layer], cache[1, layer]
            keys.index_copy_(2, columns_S, rotate(heads(normed, at + "self_attn.k_proj.weight")))
            values.index_copy_(2, columns_S, heads(normed, at + "self_attn.v_proj.weight"))
            query = rotate(heads(normed, at + "self_attn.q_proj.weight")).unflatten(1, (self.kv_heads, self.groups))
            scores = query.flatten(2, 3) @ keys.transpose(-1, -2) / math.sqrt(self.head)
            scores = scores.unflatten(2, (self.groups, width)).float() + mask_B11SL
            mixed = scores.softmax(-1).to(self.dtype).flatten(2, 3) @ values
            mixed = mixed.unflatten(2, (self.groups, width)).permute(0, 3, 1, 2, 4).reshape(batch, width, -1)
            x = x + F.linear(mixed, self.weights[at + "self_attn.o_proj.weight"])
            normed = self._norm(x, at + "post_attention_layernorm.weight")
            gate = F.silu(F.linear(normed, self.weights[at + "mlp.gate_proj.weight"]))
            inner = gate * F.linear(normed, self.weights[at + "mlp.up_proj.weight"])
            x = x + F.linear(inner, self.weights[at + "mlp.down_proj.weight"])
        return F.linear(self._norm(x[:, -1], "model.norm.weight"), self.weights["lm_head.weight"]).float()

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """One token per row: the largest of logits plus Gumbel noise."""
        return (logits / self.temperature - torch.empty_like(logits).exponential_().log()).argmax(-1)

    def _step(self, state: dict[str, torch.Tensor]) -> None:
        """Read the last token of every row, draw the next one and store it."""
        state["mask"].index_fill_(4, state["column"], 0.0)
        logits = self._forward(state["token"], state["position"], state["mask"], state["cache"], state["column"])
        self._store(state, self._draw(logits))
        state["column"] += 1
        state["position"] += 1

    def _store(self, state: dict[str, torch.Tensor], token: torch.Tensor) -> None:
        state["token"].copy_(token[:, None])
        state["answers"].index_copy_(1, state["count"], token[:, None])
        state["ended"] |= (token[:, None] == self.stop_ids).any(dim=1)
        state["count"] += 1

    def _state(self, width: int) -> tuple[dict[str, torch.Tensor], Any]:
        """The tensors of a call with prompts of ``width`` tokens, and the function that replays a step on them."""
        if width in self.steps:
            return self.steps[width]
        columns, layers = width + self.max_tokens, self.config.num_hidden_layers
        if self.cache.numel() == 0 or self.cache.shape[4] < columns:
            shape = (2, layers, self.rows, self.kv_heads, columns, self.head)
            self.cache, self.steps = torch.zeros(shape, dtype=self.dtype, device=DEVICE), {}
        whole = {"dtype": torch.long, "device": DEVICE}
        state = {
            "cache": self.cache[..., :columns, :],
            "token": torch.zeros(self.rows, 1, **whole),
            "position": torch.zeros(self.rows, 1, **whole),
            "column": torch.zeros(1, **whole),
            "count": torch.zeros(1, **whole),
            "answers": torch.zeros(self.rows, self.max_tokens, **whole),
            "ended": torch.zeros(self.rows, dtype=torch.bool, device=DEVICE),
            "mask": torch.zeros(self.rows, 1, 1, 1, columns, device=DEVICE),
        }
        replay = (lambda: self._step(state)) if DEVICE == "cpu" else self._captured(state)
        self.steps[width] = state, replay
        return self.steps[width]

    def _captured(self, state: dict[str, torch.Tensor]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(state)
        return graph.replay

    @torch.no_grad()
    def answers(self, prompts: Sequence[list[int]]) -> list[list[list[int]]]:
        """``rows / len(prompts)`` answers to every prompt, each up to and with its stop token."""
        for name, parameter in self.model.named_parameters():
            self.weights[name].copy_(parameter)
        n, longest = self.rows // len(prompts), max(map(len, prompts))
        width = -(-longest // WIDTHS) * WIDTHS
        state, step = self._state(width)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        padding = torch.tensor([width - len(p) for p in prompts], device=DEVICE)
        columns = torch.arange(width, device=DEVICE)
        hidden = columns < padding[:, None]
        looks = (columns[:, None] >= columns) & ~hidden[:, None, :]
        looks |= torch.eye(width, dtype=torch.bool, device=DEVICE)  # padding sees itself: no row of a softmax is empty
        mask = torch.zeros(looks.shape, device=DEVICE).masked_fill(~looks, -math.inf)[:, None, None]
        shape = (*self.cache.shape[:2], len(prompts), self.kv_heads, width, self.head)
        cache = torch.zeros(shape, dtype=self.dtype, device=DEVICE)
        logits = self._forward(ids, (columns - padding[:, None]).clamp(min=0), mask, cache, columns)
        state["cache"][..., :width, :] = cache.repeat_interleave(n, dim=2)
        state["mask"].fill_(-math.inf)
        state["mask"][..., :width] = hidden.repeat_interleave(n, dim=0)[:, None, None, None].float() * -1e30
        state["column"].fill_(width)
        state["position"].copy_((width - padding).repeat_interleave(n)[:, None])
        state["count"].zero_()
        state["ended"].zero_()
        self._store(state, self._draw(logits.repeat_interleave(n, dim=0)))
        for count in range(1, self.max_tokens):
            if count % LOOK_EVERY == 0 and bool(state["ended"].all()):
                break
            step()
        table = state["answers"][:, : int(state["count"])].tolist()
        stops = set(self.stop_ids.tolist())
        cut = [row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))] for row in table]
        return [cut[start : start + n] for start in range(0, len(cut), n)]


# ---------------------------------------------------------------------- both sides


def answer_log_probs(model, rows: Sequence[Row], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all tokens of the answers, and the row of each: (tokens,) and (tokens,)."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.tensor([[*p, *a, *[0] * (width - len(p) - len(a))] for p, a in rows], device=DEVICE)
    of = torch.tensor([row for row, (_, answer) in enumerate(rows) for _ in answer], device=DEVICE)
    at = torch.tensor([len(p) + i for p, answer in rows for i in range(len(answer))], device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[of, at - 1])
    return -F.cross_entropy(logits.float() / temperature, ids[of, at], reduction="none"), of


def parts(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Positions of the rows of each micro-batch, rows of like length together."""
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for part in batches_by_tokens([lengths[i] for i in order], MAX_BATCH_TOKENS):
        yield [order[i] for i in part]


def step_of(model, optimizer) -> float:
    """One optimizer step on the gradients that are there; the gradient's norm before clipping."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
    if not math.isfinite(norm):
        raise ValueError(f"the gradient's norm is {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def optimizer_of(model, lr: float):
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=DEVICE == "cuda")


def imitation_gradient(student, teachers: Sequence[Row], weight: float) -> float:
    """Add the gradient of weight x the mean of -log pi over the teacher's tokens; returns that mean."""
    from verl.trainer.ppo.core_algos import compute_sft_loss

    tokens, total = sum(len(answer) for _, answer in teachers), 0.0
    for part in parts(teachers):
        log_probs, _ = answer_log_probs(student, [teachers[i] for i in part], 1.0)
        loss, _ = compute_sft_loss(
            log_probs[None], torch.ones_like(log_probs)[None], dp_size=1, batch_num_tokens=tokens
        )
        (weight * loss).backward()
        total += float(loss.detach())
    return total


def advantages_of(scores: torch.Tensor, normalise: bool) -> torch.Tensor:
    """Scores (prompts, n) less the mean of the prompt's answers; ``normalise`` divides by their standard deviation."""
    advantages = scores - scores.mean(dim=1, keepdim=True)
    return advantages / (scores.std(dim=1, keepdim=True) + STD_EPSILON) if normalise else advantages


def policy_gradient(
    student, rows: Sequence[Row], advantages: Sequence[float], temperature: float, reference=None, kl: float = 0.0
) -> float:
    """Add the gradient of the mean over all tokens of -advantage x log pi + kl x KL: one on-policy step.

    Returns:
        the mean of the KL to ``reference``, from before the step; 0 if ``kl`` is 0, for then no reference is read.
    """
    from verl.trainer.ppo.core_algos import kl_penalty

    tokens, total = sum(len(answer) for _, answer in rows), 0.0
    for part in parts(rows):
        members = [rows[i] for i in part]
        log_probs, of = answer_log_probs(student, members, temperature)
        weights = torch.tensor([advantages[i] for i in part], device=DEVICE)
        loss = -(weights[of] * log_probs).sum() / tokens
        if kl:
            with torch.no_grad():
                fixed, _ = answer_log_probs(reference, members, temperature)
            distance = kl_penalty(log_probs, fixed, KL_TYPE).sum() / tokens
            total += float(distance.detach())
            loss = loss + kl * distance
        loss.backward()
    return total


@torch.no_grad()
def whole_log_probs(model, rows: Sequence[Row]) -> torch.Tensor:
    """Log-probabilities of whole answers at temperature 1, (rows,) in float64."""
    sums = torch.zeros(len(rows), dtype=torch.float64, device=DEVICE)
    for part in parts(rows):
        log_probs, of = answer_log_probs(model, [rows[i] for i in part], 1.0)
        sums.index_add_(0, torch.tensor(part, device=DEVICE)[of], log_probs.double())
    return sums


def dpo_gradient(
    student, reference, teachers: Sequence[Row], groups: Sequence[list[list[int]]], beta: float
) -> dict[str, float]:
    """Add the gradient of the mean DPO loss over all pairs of a teacher's answer and one of the prompt's n others.

    A pair may be in two micro-batches, so this takes the two passes of recipe/gad/training/preference.py.

    Returns:
        the loss, accuracy and margin of the pairs, from before the step, under the trainer's names.
    """
    from recipe.gad.training.preference import compute_dpo_loss

    n = len(groups[0])
    rows = [(p, answer) for (p, teacher), group in zip(teachers, groups, strict=True) for answer in (teacher, *group)]
    policy = whole_log_probs(student, rows).requires_grad_()
    weights = torch.full_like(policy, 1 / (len(teachers) * n))
    loss, found = compute_dpo_loss(policy, whole_log_probs(reference, rows), weights, n, beta)
    [coefficients] = torch.autograd.grad(loss, policy)
    tokens = sum(len(answer) for _, answer in rows)
    policy_gradient(student, rows, (-tokens * coefficients).tolist(), 1.0)
    return {f"actor/{name}": float(metric.aggregate()) for name, metric in found.items()}


def discriminator_gradient(
    d, prompts: Sequence[list[int]], groups: Sequence[list[list[int]]], teachers: Sequence[list[int]]
) -> tuple[torch.Tensor, float]:
    """Add the gradient of the mean Bradley-Terry loss over all pairs.

    Returns:
        the scores of the students' answers (prompts, n), from before the step, and the share of right pairs.
    """
    from verl.trainer.ppo.core_algos import compute_grouped_discriminator_loss

    n = len(groups[0])
    scores, right = torch.empty(len(prompts), n), 0.0
    longest = [max(map(len, [*group, teacher])) for group, teacher in zip(groups, teachers, strict=True)]
    lengths = [len(prompt) + length for prompt, length in zip(prompts, longest, strict=True)]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    for part in batches_by_tokens([lengths[i] for i in order], max(MAX_BATCH_TOKENS // (n + 1), 1)):
        members = [order[i] for i in part]
        sequences = [prompts[i] + answer for i in members for answer in (teachers[i], *groups[i])]
        values = last_token_values(d, sequences).unflatten(0, (len(members), n + 1))
        weights = torch.full((len(members), n), 1 / (len(prompts) * n), device=DEVICE)
        loss, metrics = compute_grouped_discriminator_loss(values[:, 1:], values[:, 0], weights)
        loss.backward()
        scores[members] = values[:, 1:].detach().cpu()
        right += float(metrics["d_acc"].aggregate())
    return scores, right


# ---------------------------------------------------------------------- a stage


def batches(rows: Sequence[Any], size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Batches without end: every epoch is a new order, and its incomplete last batch is left out."""
    if len(rows) < size:
        raise ValueError(f"{len(rows)} rows are no batch of {size}")
    while True:
        shuffled = rng.sample(rows, len(rows))
        yield from (shuffled[start : start + size] for start in range(0, len(rows) - size + 1, size))


def fused(plan: Plan, model):
    """The model, whose layers run compiled if the plan says so; the layers share one compilation."""
    if plan.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    return model


def run_stage(plan: Plan, folder: Path, seed: int, name: str, until: float = math.inf) -> None:
    """Train one stage of one seed; its folder gets the student or discriminator, and metrics.jsonl.

    ``until`` is a time of day in seconds (time.time()) at which the training ends, as ``max_seconds`` ends it.
    """
    from transformers import AutoModelForCausalLM

    stage, out = plan.stages[name], folder / f"{name}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    own = seed + zlib.crc32(name.encode())
    torch.manual_seed(own)
    data = plan.rows_of(folder / "train.parquet")
    rows = [(row["prompt_ids"], row["teacher_ids"]) for row in data.rows]
    start = folder / f"{stage.student}-{seed}" if stage.student else plan.model
    student = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="sdpa").to(DEVICE)
    student.train()
    reference = copy.deepcopy(student) if stage.does in PREFERENCE or stage.kl else None
    for model in filter(None, (student, reference)):
        fused(plan, model)
    trains_student, trains_d, samples = stage.does != "lead", stage.does in ("lead", "gad"), stage.does != "imitate"
    if trains_student:
        optimizer = optimizer_of(student, stage.lr)
    if trains_d:
        watched = [(row["prompt_ids"], row["teacher_ids"]) for row in plan.rows_of(plan.watch).rows]
        d = fresh_discriminator(load_base(plan.model), seed)
        if stage.discriminator:
            d.load_state_dict(torch.load(folder / f"{stage.discriminator}-{seed}" / "d.pt", weights_only=True))
        fused(plan, d).train()
        d_optimizer = optimizer_of(d, stage.lr if stage.does == "lead" else stage.d_lr)
    if samples:
        answering = reference if stage.does == "soda" else student
        sampler = Sampler(answering, data.stop_ids, plan.rows, plan.max_response_length, plan.temperature)
        drawn: dict[tuple[int, ...], list[list[int]]] = {}
    if (left := until - time.time()) <= 0:
        raise ValueError(f"no time is left for {name}-{seed}. Fix: a larger --seconds")
    stage = replace(stage, max_seconds=min(stage.max_seconds, left))
    with (out / "metrics.jsonl").open("w") as log:
        source, first = batches(rows, stage.prompts, random.Random(own)), time.monotonic()
        for step in range(1, stage.steps + 1):
            batch = next(source)
            began, metrics = time.monotonic(), {}
            if (seconds := began - first) >= stage.max_seconds:
                break
            prompts, teachers = [prompt for prompt, _ in batch], [answer for _, answer in batch]
            if samples and not all(tuple(prompt) in drawn for prompt in prompts):
                groups = sampler.answers(prompts)
                metrics["timing_s/gen"] = time.monotonic() - began
                if stage.does == "soda":  # a prompt keeps its first answers
                    drawn = {tuple(p): group for p, group in zip(prompts, groups, strict=True)} | drawn
            if stage.does == "soda":
                groups = [drawn[tuple(p)] for p in prompts]
            if trains_d:
                scores, metrics["critic/d_acc"] = discriminator_gradient(d, prompts, groups, teachers)
                metrics["critic/grad_norm"] = step_of(d, d_optimizer)
            if stage.does in PREFERENCE:
                metrics |= dpo_gradient(student, reference, batch, groups, stage.beta)
            if samples:
                answers = [(prompt, a) for prompt, group in zip(prompts, groups, strict=True) for a in group]
                metrics["response_length/mean"] = sum(len(a) for _, a in answers) / len(answers)
            if stage.does == "gad":
                advantages = advantages_of(scores, stage.normalise).flatten().tolist()
                distance = policy_gradient(student, answers, advantages, plan.temperature, reference, stage.kl)
                if stage.kl:
                    metrics["actor/kl_loss"] = distance
            if weight := 1.0 if stage.does == "imitate" else stage.imitation:
                metrics["actor/imitation_loss"] = imitation_gradient(student, batch, weight)
            if trains_student:
                for group in optimizer.param_groups:
                    group["lr"] = metrics["actor/lr"] = stage.student_lr(step - 1, seconds)
                metrics["actor/grad_norm"] = step_of(student, optimizer)
            if trains_d and (step % WATCH_EVERY == 0 or step == stage.steps):
                metrics["val-aux/d_acc"] = held_out_accuracy(d, sampler, watched, stage.prompts)
            if samples and DEVICE == "cuda":
                torch.cuda.empty_cache()  # batches of many shapes would fill a GPU that others share
            metrics["timing_s/step"] = time.monotonic() - began
            print(json.dumps({"step": step, "data": metrics}), file=log, flush=True)
    if trains_student:
        student.save_pretrained(out)
        data.tokenizer.save_pretrained(out)
    if trains_d:
        torch.save(d.state_dict(), out / "d.pt")
    (out / "done").touch()


def held_out_accuracy(d, sampler: Sampler, rows: Sequence[Row], prompts: int) -> float:
    """Share of pairs in which D is right, on the first ``prompts`` rows and fresh answers to them."""
    rows = rows[:prompts]
    if len(rows) < prompts:
        raise ValueError(f"{len(rows)} rows to watch, expected at least {prompts}")
    groups = sampler.answers([prompt for prompt, _ in rows])
    teacher = score(d, [prompt + answer for prompt, answer in rows])
    student = score(d, [p + answer for (p, _), group in zip(rows, groups, strict=True) for answer in group])
    d.train()
    return float((teacher[:, None] > student.unflatten(0, (len(rows), -1))).float().mean())


# ---------------------------------------------------------------------- the judge and the table


def run_judge(plan: Plan, folder: Path, seed: int, name: str) -> None:
    """Answers of a stage's student, or ``base``, to the held-out prompts, and scores, as ``gad eval`` writes them."""
    from transformers import AutoModelForCausalLM

    model = plan.model if name == BASE else folder / f"{name}-{seed}"
    out = folder / "eval" / f"{name}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    settings = plan.settings(folder / "held_out.parquet", str(model))
    data = load_rows(settings)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(DEVICE)
    torch.manual_seed(seed)
    sampler = Sampler(student, data.stop_ids, plan.rows, plan.max_response_length, plan.temperature)
    prompts, size = [row["prompt_ids"] for row in data.rows], plan.rows // plan.answers
    sampled: list[list[list[int]]] = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        sampled += sampler.answers(batch + batch[:1] * (size - len(batch)))[: len(batch)]
    answers = write_answers(out, settings.record(), data, sampled)
    del sampler, student
    test = TwoSampleSettings(model=plan.model, **plan.judge)
    update_scores(out, text=text_section(answers, 0), two_sample=run_two_sample_test(answers, test))
    (out / "done").touch()


def table(plan: Plan, folder: Path) -> str:
    """Means of every judged stage, and every arm less every control, as ``gad referee`` compares them.

    All prompts count: a stage has no checkpoints to choose from.
    """
    lines, values = [], {}
    titles = [metric.title for metric in METRICS.values()]
    lines += [f"| stage | {' | '.join(titles)} | by seed |", "|---" * (len(titles) + 2) + "|"]
    for name in (*plan.controls, *plan.arms):
        values[name] = [read_values(folder / "eval" / f"{name}-{seed}") for seed in plan.seeds]
        prompts = list(values[name][0].metrics["rouge_l"])
        means = {m: [mean(one, m, prompts) for one in values[name]] for m in METRICS}
        cells = [f"{sum(means[m]) / len(plan.seeds):.{metric.digits}f}" for m, metric in METRICS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} | {' '.join(f'{x:.3f}' for x in means['two_sample'])} |")
    lines += ["", f"| difference | {' | '.join(titles)} | two-sample accuracy by seed |", lines[1]]
    for arm in plan.arms:
        for control in plan.controls:
            found = differences(values[arm], values[control], prompts)
            cells = [
                f"{d.estimate.value:+.3f} ({d.estimate.low:+.3f} to {d.estimate.high:+.3f})" for d in found.values()
            ]
            by_seed = " ".join(f"{x:+.3f}" for x in found["two_sample"].by_seed)
            lines.append(f"| {arm} - {control} | {' | '.join(cells)} | {by_seed} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------- all of it


def jobs_of(plan: Plan, path: Path, folder: Path, until: float = math.inf) -> list[Job]:
    """The stages of every seed and their judges, those that most others wait for first."""

    common = (sys.executable, __file__, str(path), "--folder", str(folder), "--until", str(until), "--run")

    def job(kind: str, name: str, seed: int) -> Job:
        label = f"{name}-{seed}"
        if kind == "judge":
            stage, out, needs = None, folder / "eval" / label, [name] if name != BASE else []
        else:
            stage, out = plan.stages[name], folder / label
            needs = [n for n in (stage.student, stage.discriminator) if n]
        return Job(
            name=f"{kind}-{label}",
            command=(*common, kind, name, str(seed)),
            log=folder / "logs" / f"{kind}-{label}.log",
            is_finished=lambda: (out / "done").exists(),
            needs=tuple(f"stage-{need}-{seed}" for need in needs),
            metrics=out / "metrics.jsonl" if stage else None,
            steps=stage.steps if stage else None,
        )

    stages = [job("stage", name, seed) for name in plan.stages for seed in plan.seeds]
    return stages + [job("judge", name, seed) for name in (*plan.controls, *plan.arms) for seed in plan.seeds]


def split(plan: Plan, folder: Path) -> None:
    """train.parquet and held_out.parquet of the folder, from the rows of the plan's data, shuffled if it says so."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    frame = pd.read_parquet(plan.data)
    if plan.shuffle is not None:
        frame = frame.sample(frac=1, random_state=plan.shuffle, ignore_index=True)
    frame[: plan.held_out].to_parquet(folder / "held_out.parquet")
    frame[plan.held_out :].to_parquet(folder / "train.parquet")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="models, answers and scores")
    parser.add_argument("--gpus", default="", help="CUDA_VISIBLE_DEVICES of the jobs, in turn: 0,1,2,3")
    parser.add_argument("--jobs", type=int, default=1, help="jobs side by side")
    parser.add_argument("--seconds", type=float, default=math.inf, help="trainings end by then, with fewer steps")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, metavar=("KIND", "STAGE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan, folder = Plan.read(options.plan), options.folder.absolute()
    if options.run:
        kind, name, seed = options.run
        if kind == "stage":
            run_stage(plan, folder, int(seed), name, options.until)
        else:
            run_judge(plan, folder, int(seed), name)
        return 0
    if not options.table:
        split(plan, folder)
        jobs = jobs_of(plan, options.plan, folder, time.time() + options.seconds)
        gpus = [gpu for gpu in options.gpus.split(",") if gpu]
        scheduler = Scheduler(jobs, State(folder / "state.json"), options.jobs, gpus)
        if stopped := scheduler.run():
            return 128 + stopped
        if scheduler.failed:
            return 1
    print(table(plan, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

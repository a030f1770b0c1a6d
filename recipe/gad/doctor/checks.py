"""What ``gad doctor`` checks beyond recipe/gad/run/checks.py: packages, end token, lengths, GPU memory, disk.

The checks have the form that check.py describes. They read tokenizers and a sample of the data, so they take seconds,
and they run in the doctor only; the trainer itself runs those of check.py.
"""

import functools
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from recipe.gad.data.tokenizers import token_counter
from recipe.gad.doctor.memory import (
    GIB,
    ModelShape,
    RoleMemory,
    checkpoint_bytes,
    checkpoints_on_disk,
    kv_tokens,
    model_shape,
    role_memory,
    roles,
    rollout_weight_bytes,
    trained_roles,
    training,
)
from recipe.gad.run.checks import CHECKS
from recipe.gad.run.config import (
    ACTOR,
    ACTOR_MODEL,
    REF,
    ROLLOUT,
    compose_config,
    files_of,
    get,
    has_discriminator,
    integer,
)
from recipe.gad.run.data_file import sample_rows
from recipe.gad.run.findings import Check, ConfigError, Finding, Messages, Note, Warn, run_checks
from recipe.gad.run.hub import HUB_ID, cached_model, load_tokenizer

SAMPLE_ROWS = 1000
"""Rows per data key whose lengths are counted: a second of work, and a share that is known to about 3 points."""
OVERLONG_SHARE = 0.05
"""Share of prompts or answers over the limit above which the doctor warns."""
COVERED_SHARE = 0.99
"""Share of rows that the suggested limit holds."""
MEMORY_SHARE = 0.9
"""Share of a GPU above which the doctor warns: the rest is for what docs/memory.md leaves out (CUDA context, NCCL
buffers, fragmentation)."""
PACKAGES = ("torch", "transformers", "vllm", "sglang")
ROLLOUT_EXTRAS = ("vllm", "sglang")


class Wants(NamedTuple):
    """A check and the checks of check.py without whose errors it can run."""

    check: Check
    needs: frozenset[str]


def diagnose(overrides: list[str], config_name: str = "gad_trainer", gpu_memory: float | None = None) -> list[Finding]:
    """Every finding about a run that has not started.

    Args:
        overrides: Hydra overrides, as the launch scripts pass them.
        config_name: configuration of recipe/gad/config.
        gpu_memory: bytes of one GPU; None: asked of this machine's first GPU, if there is one.

    Raises:
        ValueError: the overrides do not compose.
    """
    config = compose_config(overrides, config_name)
    findings = run_checks(config, CHECKS)
    failed = {finding.check for finding in findings if finding.level == "error"}
    for check, needs in doctor_checks(gpu_memory):
        if blocking := sorted(failed & (needs | {"configuration"})):
            message = f"not checked, because of the errors of {', '.join(blocking)}. Fix: mend those first"
            findings.append(Finding("warning", check.__name__.removeprefix("check_"), message))
        else:
            findings.extend(run_checks(config, [check]))
    return findings


def doctor_checks(gpu_memory: float | None) -> list[Wants]:
    """The doctor's own checks, in the order of the report."""

    def check_gpu_memory(config: DictConfig) -> Messages:
        """Every role fits the GPU."""
        yield from memory_messages(config, gpu_memory)

    return [
        Wants(check_versions, frozenset()),
        Wants(check_end_token, frozenset({"plugin", "models", "tokenizers"})),
        Wants(check_chat_ids, frozenset({"plugin", "models", "tokenizers"})),
        Wants(check_lengths, frozenset({"plugin", "models", "tokenizers", "data"})),
        Wants(check_rollout_heads, frozenset({"models"})),
        Wants(check_gpu_memory, frozenset({"models", "batches", "tokens"})),
        Wants(check_disk, frozenset({"models", "batches", "tokens", "data", "output"})),
    ]


# ---------------------------------------------------------------------- packages


def check_versions(config: DictConfig) -> Messages:
    """The installed packages are those that verl asks for."""
    from packaging.requirements import Requirement

    engine = get(config, f"{ROLLOUT}.name")
    extra = engine if engine in ROLLOUT_EXTRAS else ""
    found: dict[str, str] = {}
    for requirement in map(Requirement, requires("verl") or ()):
        marker, name = requirement.marker, requirement.name
        if name not in PACKAGES or (marker is not None and not marker.evaluate({"extra": extra})):
            continue
        fix = f"Fix: pip install -e '.[{extra}]'" if extra else "Fix: pip install -e ."
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if find_spec(name) is None:
                yield f"{name} is not installed, and {ROLLOUT}.name={engine}. {fix}"
            else:
                wanted = f"verl {version('verl')} asks for {requirement.specifier}"
                yield Warn(f"{name} can be imported, but has no metadata that names its version; {wanted}. {fix}")
            continue
        if not requirement.specifier.contains(found[name], prereleases=True):
            message = f"{name} {found[name]} is installed, verl {version('verl')} asks for {requirement.specifier}"
            yield f"{message}. {fix}" if marker is None else Warn(f"{message}. {fix}")
    yield Note(f"verl {version('verl')}, " + ", ".join(f"{name} {found[name]}" for name in found))


# ---------------------------------------------------------------------- tokenizer and data


def _local(path: Any) -> Path | None:
    """Folder of a model that is on this machine, given as a folder or a hub id; else None."""
    if not isinstance(path, str):
        return None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    return cached_model(path) if HUB_ID.fullmatch(path) else None


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: Path, trust_remote_code: bool, template: str | None) -> Any:
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _student_tokenizer(config: DictConfig) -> Any:
    """The student's tokenizer, None if it is not on this machine."""
    folder = _local(get(config, f"{ACTOR_MODEL}.tokenizer_path") or get(config, f"{ACTOR_MODEL}.path"))
    trust, template = (get(config, f"{ACTOR_MODEL}.{key}") for key in ("trust_remote_code", "custom_chat_template"))
    return None if folder is None else _tokenizer(folder, bool(trust), template)


NO_TOKENIZER = Warn("the student's tokenizer is not on this machine. Fix: download the model first")


def _template_kwargs(config: DictConfig) -> dict:
    return dict(get(config, "data.apply_chat_template_kwargs", {}))


def check_end_token(config: DictConfig) -> Messages:
    """Teacher answers end with the token that ends the student's rollouts."""
    tokenizer = _student_tokenizer(config)
    if tokenizer is None:
        yield NO_TOKENIZER
        return
    from jinja2 import TemplateError

    from verl.utils.model import get_generation_config
    from verl.workers.rollout.teacher_trajectory import end_of_turn_ids, stop_token_ids, turn_suffix_ids

    folder = tokenizer.name_or_path
    if not tokenizer.chat_template:
        key = f"{ACTOR_MODEL}.custom_chat_template"
        yield f"{folder} has no chat template. Fix: save one with the tokenizer, or set {key}"
        return
    try:
        stops = stop_token_ids(tokenizer)
        suffix = turn_suffix_ids(tokenizer, _template_kwargs(config))
    except (ValueError, TemplateError) as error:
        yield f"no end of turn in {folder}: {error}. Fix: eos_token in tokenizer_config.json, or the chat template"
        return
    names = tokenizer.convert_ids_to_tokens
    special = [token for token in suffix if token in tokenizer.added_tokens_decoder]
    wanted = special[0] if special else None
    end = next((token for token in suffix if token in stops), None)
    if end is None or (wanted is not None and end != wanted):
        ends = end_of_turn_ids(tokenizer, stops, _template_kwargs(config))
        turns = tokenizer.apply_chat_template(
            [*PROBE, PROBE[0]], tokenize=True, return_dict=False, **_template_kwargs(config)
        )
        fix = "a template that ends its turns with a special token" if wanted is None else (
            f"set eos_token {names(wanted)!r} in {folder}/tokenizer_config.json and eos_token_id {wanted} in its "
            "generation_config.json"
        )  # fmt: skip
        message = (
            f"the chat template of {folder} ends an assistant turn with {names(suffix)}, but a rollout stops at "
            f"{names(sorted(stops))}, and teacher answers are given the end {names(ends)}"
        )
        if end is None and ends[-1] in turns[1:]:  # the first may be a bos token that is eos as well
            yield f"{message}, which the template writes elsewhere: it ends no turn. Fix: {fix}"
        else:
            yield Warn(
                f"{message}. The student learns that end (as of a base model); one that already ends its turns as the "
                f"template does goes on behind it, and D tells it apart by that alone. Fix: {fix}"
            )
        return
    generation = get_generation_config(folder)
    listed = generation.eos_token_id if generation is not None else None
    ends = [] if listed is None else [listed] if isinstance(listed, int) else listed
    if tokenizer.eos_token_id != end:
        yield Warn(
            f"tokenizer.eos_token is {tokenizer.eos_token!r}, but a turn ends with {names(end)!r}; a rollout stops at "
            f"both. Fix: set eos_token to {names(end)!r} in {folder}/tokenizer_config.json"
        )
    if ends and end not in ends:
        yield Warn(
            f"generation_config.eos_token_id is {ends} ({names(ends)}), but a turn ends with {names(end)!r} ({end}); "
            f"without verl, generation would not stop there. Fix: add {end} in {folder}/generation_config.json"
        )
    yield Note(f"teacher answers end with {names(end)!r} ({end}), at which a rollout stops")


PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


def check_chat_ids(config: DictConfig) -> Messages:
    """The chat templates of actor and critic give the same token ids."""
    student = _student_tokenizer(config)
    path = get(config, "critic.model.tokenizer_path") or get(config, "critic.model.path")
    critic = _local(path) if has_discriminator(config) else None
    if student is None or critic is None or str(critic) == student.name_or_path:
        return
    other = _tokenizer(critic, bool(get(config, "critic.model.trust_remote_code")), None)
    if not (student.chat_template and other.chat_template):
        return
    first, second = (list(t.apply_chat_template([*PROBE], tokenize=True, return_dict=False)) for t in (student, other))
    if first != second:
        yield Warn(
            f"the chat templates of {student.name_or_path} and {critic} (critic) give different ids for one question "
            f"and answer ({first[:8]}... and {second[:8]}...); D reads the actor's. "
            "Fix: start the discriminator from the student or a model of its family"
        )


def check_lengths(config: DictConfig) -> Messages:
    """Prompts and teacher answers fit their limits, in a sample of the data files."""
    tokenizer = _student_tokenizer(config)
    if tokenizer is None:
        yield NO_TOKENIZER
        return
    try:
        count = token_counter(tokenizer, _template_kwargs(config))
    except ValueError as error:
        yield Warn(f"not checked, since answers have no end ({error}). Fix: see end_token")
        return
    seen: set[tuple[str, ...]] = set()
    for key in ("data.train_files", "data.val_files"):
        files = tuple(file for file in files_of(get(config, key)) if not file.startswith("hdfs://"))
        if not files or files in seen:
            continue
        seen.add(files)
        lengths: list[tuple[int, int]] = []
        refused: list[str] = []
        total = 0
        columns = get(config, "data.prompt_key"), get(config, "data.teacher_key")
        for file in files:
            rows, messages, texts = sample_rows(file, *columns, max(1, SAMPLE_ROWS // len(files)))
            total += rows
            for row in zip(messages, texts, strict=True):
                try:
                    lengths.append(count(*row))
                except ValueError as error:
                    refused.append(str(error))
        read = len(lengths) + len(refused)
        part = f"{read} of {total} rows, evenly spaced" if read < total else f"all {total} rows"
        where = f"{key} ({part})"
        if refused:
            message = f"{where}: {len(refused)} rows cannot be used ({refused[0]}). Fix: repair those rows"
            yield Warn(message) if lengths else message
        if not lengths:
            continue
        prompts, answers = map(list, zip(*lengths, strict=True))
        dropped = bool(get(config, "data.filter_overlong_prompts"))
        yield _length_message(
            where, "prompts", prompts, "data.max_prompt_length", integer(config, "data.max_prompt_length"),
            "their rows are dropped" if dropped else "data.filter_overlong_prompts=True would drop their rows",
            fatal=not dropped,
        )  # fmt: skip
        cut = get(config, "data.truncation")
        yield _length_message(
            where, "teacher answers", answers, "data.max_response_length", integer(config, "data.max_response_length"),
            "data.truncation=error stops there" if cut == "error" else f"cut by data.truncation={cut}",
            fatal=cut == "error",
        )  # fmt: skip


def _length_message(where: str, what: str, lengths: list[int], key: str, limit: int, then: str, fatal: bool) -> str:
    """One line about lengths: an error if some are too long and that is ``fatal``, or if all are."""
    over = sum(length > limit for length in lengths) / len(lengths)
    lost = sum(max(0, length - limit) for length in lengths) / sum(lengths)
    covered = sorted(lengths)[int(COVERED_SHARE * (len(lengths) - 1))]
    message = f"{where}: {what} of {sum(lengths) / len(lengths):.0f} tokens on average, longest {max(lengths)}; "
    message += f"{over:.1%} longer than {key}={limit}"
    if not over:
        return Note(message)
    message += f" ({then}; {lost:.1%} of all tokens lie behind the limit)"
    fix = f". Fix: {key}={covered} holds {COVERED_SHARE:.0%} of them" if covered > limit else ""
    fix = fix or f". Fix: {key}={max(lengths)} holds all of them"
    if fatal or over == 1:
        return message + fix
    return Warn(message + fix) if over > OVERLONG_SHARE else Note(message)


# ---------------------------------------------------------------------- memory and disk


@functools.lru_cache(maxsize=2)
def _shape(folder: Path, value_model: bool, trust_remote_code: bool) -> ModelShape:
    return model_shape(folder, value_model, trust_remote_code)


def _role_shape(config: DictConfig, role: str, key: str) -> ModelShape | None:
    folder = _local(get(config, key))
    trust = bool(get(config, key.removesuffix("path") + "trust_remote_code"))
    return None if folder is None else _shape(folder, role == "critic", trust)


def check_rollout_heads(config: DictConfig) -> Messages:
    """The attention heads split evenly over the GPUs of a rollout engine."""
    shape = _role_shape(config, ACTOR, f"{ACTOR_MODEL}.path")
    key = f"{ROLLOUT}.tensor_model_parallel_size"
    size = integer(config, key, 1)
    if shape is not None and shape.heads % size:
        fits = [str(n) for n in range(1, shape.heads + 1) if shape.heads % n == 0]
        yield f"{key}={size} does not divide the model's {shape.heads} attention heads. Fix: {key}={' or '.join(fits)}"


def this_gpu_bytes() -> float | None:
    """Memory of this machine's first GPU in bytes, None if there is none."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def memory_messages(config: DictConfig, gpu_memory: float | None) -> Messages:
    """Estimate of docs/memory.md for every role, and what works on a GPU at once against its memory."""
    if get(config, "trainer.device") == "cpu":
        yield Note("no GPU: trainer.device=cpu")
        return
    parts: dict[str, RoleMemory] = {}
    shapes: dict[str, ModelShape] = {}
    for role, key in roles(config):
        shape = _role_shape(config, role, key)
        if shape is None:
            yield Warn(f"{key}={get(config, key)} is not on this machine: no estimate. Fix: download the model first")
            return
        run = training(config, role, shape)
        if run is None:
            yield Warn(f"{role}.strategy={get(config, f'{role}.strategy')}: the estimate knows fsdp and fsdp2 only")
            return
        shapes[role], parts[role] = shape, (memory := role_memory(shape, run))
        yield Note(
            f"{role}: {shape.parameters:,} parameters over {run.shards} GPUs; GiB per GPU: "
            f"weights {memory.weights / GIB:.2f}, gradients {memory.gradients / GIB:.2f}, Adam "
            f"{memory.optimizer / GIB:.2f}, gathered {memory.gathered / GIB:.2f}, activations of {run.tokens} tokens "
            f"{memory.activations / GIB:.2f}, logits {memory.logits / GIB:.2f}; peak {memory.peak / GIB:.2f}, "
            f"between its turns {memory.resident / GIB:.2f}"
        )
    gpu_memory = this_gpu_bytes() if gpu_memory is None else gpu_memory
    if gpu_memory is None:
        yield Warn("not compared with a GPU: there is none here. Fix: --gpu_memory_gb N (GiB of one GPU of the run)")
        return
    yield from _phase_messages(config, shapes[ACTOR], parts, gpu_memory)


def _phase_messages(config: DictConfig, actor: ModelShape, parts: dict[str, RoleMemory], gpu_memory: float) -> Messages:
    """What is on a GPU at once: the rollout, and every role at work."""
    key = f"{ROLLOUT}.gpu_memory_utilization"
    rollout = float(get(config, key, 0.5)) * gpu_memory
    resident = {role: memory.resident for role, memory in parts.items()}
    needed = sum(resident.values()) + rollout
    line = f"rollout: {sum(resident.values()) / GIB:.1f} of actor and critic + {rollout / GIB:.1f} of the engine "
    line += f"({key}={get(config, key)}) = {needed / GIB:.1f} of {gpu_memory / GIB:.1f} GiB"
    offload = "param_offload=True and optimizer_offload=True (actor.fsdp_config, critic.fsdp)"
    if needed > gpu_memory:
        free = max(0.0, 1 - sum(resident.values()) / gpu_memory)
        yield f"{line}. Fix: {key}={int(free * 100) / 100} or less, {offload}, or more GPUs"
    else:
        yield Note(line)
    row = integer(config, "data.max_prompt_length") + integer(config, "data.max_response_length")
    tokens = kv_tokens(config, actor, rollout)
    if tokens < row:
        weights = rollout_weight_bytes(config, actor) / GIB
        yield (
            f"{key}={get(config, key)}: beside {weights:.1f} GiB of weights the engine has room for {max(0, tokens)} "
            f"tokens, and prompt + response = {row}. Fix: a higher {key}, or a larger tensor_model_parallel_size"
        )
    else:
        yield Note(f"rollout engine: KV cache of about {tokens} tokens, {tokens // row} answers of full length at once")
    asleep = 0.0 if get(config, f"{ROLLOUT}.free_cache_engine") else rollout
    for role, memory in parts.items():
        others = sum(size for other, size in resident.items() if other != role) + asleep
        states, peak = memory.states + others, memory.peak + others
        line = f"{role} at work: about {peak / GIB:.1f} of {gpu_memory / GIB:.1f} GiB"
        limit = f"{REF}.log_prob" if role == REF else f"{role}.ppo"
        if states > gpu_memory:
            yield f"{line}; weights, gradients and Adam alone take {states / GIB:.1f}. Fix: {offload}, or more GPUs"
        elif peak > MEMORY_SHARE * gpu_memory:
            yield Warn(f"{line}. Fix: a smaller {limit}_max_token_len_per_gpu, {offload}, or more GPUs")
        else:
            yield Note(line)


def free_bytes(folder: Path) -> int:
    """Free bytes where ``folder`` is, or will be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_disk(config: DictConfig) -> Messages:
    """The checkpoints fit the disk."""
    every = integer(config, "trainer.save_freq", -1, minimum=-1)
    if every <= 0:
        yield Note(f"trainer.save_freq={every}: no checkpoint is written")
        return
    saves = _saves(config, every)
    total, parts = 0, []
    for role, key in trained_roles(config):
        shape = _role_shape(config, role, key)
        run = None if shape is None else training(config, role, shape)
        if shape is None or run is None:
            yield Warn(f"{key}={get(config, key)}, {role}.strategy: no estimate of a checkpoint's size")
            return
        keep = "trainer.max_critic_ckpt_to_keep" if role == "critic" else "trainer.max_actor_ckpt_to_keep"
        count = checkpoints_on_disk(saves, integer(config, keep, 0, minimum=-1))
        if count is None:
            yield Warn(f"{keep}={get(config, keep)}: every checkpoint is kept; one is counted here. Fix: {keep}=3")
            count = 1
        size = checkpoint_bytes(shape, run, get(config, f"{role}.checkpoint.save_contents", []))
        parts.append(f"{role} {count} x {size / GIB:.1f} GiB")
        total += size * count
    folder = Path(get(config, "trainer.default_local_dir")).absolute()
    free = free_bytes(folder)
    line = f"{', '.join(parts)} = {total / GIB:.1f} GiB at once; {free / GIB:.1f} GiB are free at {folder}"
    if total > free:
        yield (
            f"{line}. Fix: a smaller trainer.max_actor_ckpt_to_keep and max_critic_ckpt_to_keep, another "
            "trainer.default_local_dir, or fewer checkpoint.save_contents"
        )
    else:
        yield Note(line)


def _saves(config: DictConfig, every: int) -> int | None:
    """Checkpoints that the run writes at most, None if its steps are not known before the data is read."""
    steps = get(config, "trainer.total_training_steps")
    return None if steps is None else -(-int(steps) // every)


# ---------------------------------------------------------------------- report


def report(findings: list[Finding], show: Callable[[str], None]) -> None:
    """Show the findings line by line, worst last, and then their numbers."""
    for finding in sorted(findings, key=lambda finding: ("ok", "warning", "error").index(finding.level)):
        show(f"{finding.level:8}{finding.check}: {' '.join(finding.message.split())}")
    errors, warnings = (sum(finding.level == level for finding in findings) for level in ("error", "warning"))
    counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    show(counts + (": this run cannot start" if errors else ""))

"""What ``gad doctor`` checks beyond recipe/gad/run/checks.py: packages, end token, lengths, GPU memory, disk.

These checks read tokenizers and a sample of the data, which takes seconds, so only the doctor runs them. The trainer
runs the checks in recipe/gad/run/checks.py.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from recipe.gad.data.tokenizers import token_counter
from recipe.gad.doctor.memory import (
    GIB,
    ModelShape,
    RoleMemory,
    checkpoint_bytes,
    checkpoints_on_disk,
    fresh_memory,
    kv_tokens,
    model_shape,
    role_memory,
    roles,
    rollout_weight_bytes,
    trained_roles,
    training,
)
from recipe.gad.run.atomic_io import check_free
from recipe.gad.run.checks import CHECKS, name_of, run_check
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
    is_number,
    resolved,
    tokenizer_key,
    validates,
)
from recipe.gad.run.data_file import sample_rows
from recipe.gad.run.disk import free_bytes, shown
from recipe.gad.run.findings import (
    LEVELS,
    Check,
    Finding,
    Findings,
    InputError,
    either,
    error,
    line,
    note,
    one_line,
    warning,
)
from recipe.gad.run.hold import WRITER
from recipe.gad.run.hub import load_tokenizer, local_model
from recipe.gad.run.thinking import OTHER_TEMPLATE, Turn, difference, think_end
from recipe.gad.run.two_sample import FRESH, fresh_settings
from recipe.gad.training.fresh import MAX_BATCH_TOKENS

SAMPLE_ROWS = 1000
"""Rows per data key whose lengths are counted. This takes a second and gives shares to about 3 percentage points."""
OVERLONG_SHARE = 0.05
"""Share of prompts or answers over the limit above which the doctor warns."""
COVERED_SHARE = 0.99
"""Share of rows that fit the suggested limit."""
MEMORY_SHARE = 0.9
"""Share of a GPU above which the doctor warns. The rest is for what docs/memory.md does not count: CUDA context, NCCL
buffers, fragmentation."""
OFFLOAD = "param_offload=True and optimizer_offload=True (actor.fsdp_config, critic.fsdp)"
"""Keys that take weights and optimizer states off the GPU while another role works."""
ERROR_CHARS = 300
"""Characters of an unexpected error that are shown."""
SAME_SIZE = 0.01
"""Two models whose parameters differ by less than this share count as equally large."""
PACKAGES = ("torch", "transformers", "vllm", "sglang")
ROLLOUT_EXTRAS = ("vllm", "sglang")


class Prerequisites(NamedTuple):
    """A check and the checks of recipe/gad/run/checks.py that must pass before it can run."""

    check: Check
    needs: frozenset[str]


OF_THE_MACHINE = {"ray": "logical CPUs", "versions": "installed packages", "disk": "free disk space"}
"""Checks whose errors concern the machine on which the doctor runs, and what they look at."""


def examine(
    overrides: list[str],
    config_name: str = "gad_trainer",
    gpu_memory: float | None = None,
    elsewhere: bool = False,
    cpus: int | None = None,
) -> list[Finding]:
    """Every finding about a run that has not started.

    Args:
        overrides: Hydra overrides, as the launch scripts pass them.
        config_name: configuration of recipe/gad/config.
        gpu_memory: bytes of one GPU; None: those of this machine's first GPU, if it has one.
        elsewhere: the run is for another machine, whose CPUs, packages and disk this one does not tell.
        cpus: CPUs of the other machine, which are then checked.

    Raises:
        ValueError: the overrides do not compose, or refer to a missing key.
    """
    config = compose_config(overrides, config_name)
    if cpus is not None and get(config, "ray_kwargs.ray_init.num_cpus") is None:
        OmegaConf.update(config, "ray_kwargs.ray_init.num_cpus", cpus, force_add=True)
    config = resolved(config)
    findings = [finding for check in CHECKS for finding in run_check(config, finishing(check))]
    failed = {finding.where for finding in findings if finding.level == "error"}
    skipped: dict[str, list[str]] = {}
    for check, needs in doctor_checks(gpu_memory):
        if blocking := sorted(failed & needs):
            skipped.setdefault(" and ".join(blocking), []).append(name_of(check))
        else:
            findings.extend(run_check(config, finishing(check)))
    for blocking_checks, names in skipped.items():
        what = f"{', '.join(names)}, because of the errors of {blocking_checks}"
        findings.append(Finding("warning", "skipped", what, fix="resolve those errors first"))
    return [_of_another_machine(finding, cpus) for finding in findings] if elsewhere else findings


def _of_another_machine(finding: Finding, cpus: int | None) -> Finding:
    """The finding, or that nothing was checked if it is an error of this machine."""
    if finding.level != "error" or finding.where not in OF_THE_MACHINE or (finding.where == "ray" and cpus is not None):
        return finding
    what = f"not checked: {OF_THE_MACHINE[finding.where]} of the other machine. On this one: {finding.what}"
    return replace(finding, level="ok", what=what)


def finishing(check: Check) -> Check:
    """The check, with any exception as an error: broken files of a model can raise anything, and others still run."""

    @functools.wraps(check)
    def run(config: DictConfig) -> Findings:
        try:
            yield from check(config)
        except InputError:
            raise
        except Exception as problem:
            what = f"could not be checked ({type(problem).__name__}: {one_line(problem)[:ERROR_CHARS]})"
            yield error(what, fix="repair the files that this check reads; if they are whole, report it as a bug")

    return run


def doctor_checks(gpu_memory: float | None) -> list[Prerequisites]:
    """The checks that only the doctor runs, in the order of the report."""

    def check_gpu_memory(config: DictConfig) -> Findings:
        """Every role fits the GPU."""
        yield from memory_findings(config, gpu_memory)

    return [
        Prerequisites(check_unused, frozenset({"output"})),
        Prerequisites(check_versions, frozenset()),
        Prerequisites(check_numbers, frozenset()),
        Prerequisites(check_positions, frozenset({"models"})),
        Prerequisites(check_vocabulary, frozenset({"plugin", "models", "tokenizers"})),
        Prerequisites(check_end_token, frozenset({"plugin", "models", "tokenizers"})),
        Prerequisites(check_generation_prompt, frozenset({"plugin", "models", "tokenizers", "thinking"})),
        Prerequisites(check_prompt_date, frozenset({"plugin", "models", "tokenizers"})),
        Prerequisites(check_chat_ids, frozenset({"plugin", "models", "tokenizers"})),
        Prerequisites(check_agent_loop, frozenset({"plugin", "models", "tokenizers"})),
        Prerequisites(check_lengths, frozenset({"plugin", "models", "tokenizers", "data"})),
        Prerequisites(check_rollout_heads, frozenset({"models"})),
        Prerequisites(check_discriminator_size, frozenset({"models"})),
        Prerequisites(check_gpu_memory, frozenset({"models", "batches", "tokens"})),
        Prerequisites(check_disk, frozenset({"models", "batches", "tokens", "data", "output"})),
    ]


def check_unused(config: DictConfig) -> Findings:
    """No other process uses the output folder."""
    check_free(Path(get(config, "trainer.default_local_dir")), WRITER)
    yield from ()


# ---------------------------------------------------------------------- packages


def check_versions(config: DictConfig) -> Findings:
    """The installed packages are the ones that verl requires."""
    from packaging.requirements import Requirement

    engine = get(config, f"{ROLLOUT}.name")
    extra = engine if engine in ROLLOUT_EXTRAS else ""
    found: dict[str, str] = {}
    for requirement in map(Requirement, requires("verl") or ()):
        marker, name = requirement.marker, requirement.name
        if name not in PACKAGES or (marker is not None and not marker.evaluate({"extra": extra})):
            continue
        fix = f"pip install -e '.[{extra}]'" if extra else "pip install -e ."
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if find_spec(name) is None:
                yield error(f"{name} is not installed, and {ROLLOUT}.name={engine}", fix)
            else:
                required = f"verl {version('verl')} asks for {requirement.specifier}"
                yield warning(f"{name} can be imported, but has no metadata that names its version; {required}", fix)
            continue
        if not requirement.specifier.contains(found[name], prereleases=True):
            what = f"{name} {found[name]} is installed, verl {version('verl')} asks for {requirement.specifier}"
            yield error(what, fix) if marker is None else warning(what, fix)
    yield note(f"verl {version('verl')}, " + ", ".join(f"{name} {found[name]}" for name in found))


# ---------------------------------------------------------------------- numbers

RATES = {f"{ACTOR}.optim.lr": ACTOR, "critic.optim.lr": "critic"}
"""Learning rates, and who uses them."""
TEMPERATURES = (f"{ROLLOUT}.temperature", f"{ROLLOUT}.val_kwargs.temperature")


def check_numbers(config: DictConfig) -> Findings:
    """Learning rates, temperatures and numbers of steps can be used."""
    for key, role in RATES.items():
        if role == ACTOR or has_discriminator(config):
            yield from _finite(config, key, "1e-6")
    for key in TEMPERATURES:
        yield from _finite(config, key, "0.8")
    for key in ("trainer.total_training_steps", "trainer.total_epochs"):
        if get(config, key) is not None:
            integer(config, key)


def _finite(config: DictConfig, key: str, example: str) -> Findings:
    value = get(config, key, 0)
    if not is_number(value) or not 0 <= value < math.inf:
        yield error(f"{key}={value}: expected a number of 0 or more", fix=f"{key}={example}")


# ---------------------------------------------------------------------- tokenizer and data


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: Path, trust_remote_code: bool, template: str | None) -> Any:
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _student_tokenizer(config: DictConfig) -> Any:
    """The student's tokenizer; None if it is not on this machine."""
    folder = local_model(get(config, tokenizer_key(config)))
    trust, template = (get(config, f"{ACTOR_MODEL}.{key}") for key in ("trust_remote_code", "custom_chat_template"))
    return None if folder is None else _tokenizer(folder, bool(trust), template)


def check_positions(config: DictConfig) -> Findings:
    """The models have a position for every token of prompt and response."""
    tokens = integer(config, "data.max_prompt_length") + integer(config, "data.max_response_length")
    for key, model in _model_configs(config):
        positions = getattr(model, "max_position_embeddings", None)
        if isinstance(positions, int) and positions < tokens:
            what = f"{key}: max_position_embeddings is {positions}, and prompt + response = {tokens} tokens"
            fix = "lower data.max_prompt_length or data.max_response_length, or take a model with more positions"
            yield (warning if get(config, f"{ROLLOUT}.name") == "hf" else error)(what, fix)


def check_vocabulary(config: DictConfig) -> Findings:
    """The models have an embedding for every token of the student's tokenizer."""
    tokenizer = _student_tokenizer(config)
    if tokenizer is None:
        yield NO_TOKENIZER
        return
    largest = max(tokenizer.get_vocab().values(), default=0)
    for key, model in _model_configs(config):
        if model.vocab_size <= largest:
            yield error(
                f"{key}: the model has {model.vocab_size} embeddings, and the tokenizer {tokenizer.name_or_path} gives "
                f"ids up to {largest}",
                fix="take the model's own tokenizer, or resize the embeddings",
            )


def _model_configs(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """(key, text configuration) of the student and the discriminator, if they are on this machine."""
    from transformers import AutoConfig

    for key in (f"{ACTOR_MODEL}.path", *(["critic.model.path"] if has_discriminator(config) else [])):
        if (folder := local_model(get(config, key))) is not None:
            trust = bool(get(config, key.removesuffix("path") + "trust_remote_code"))
            yield key, AutoConfig.from_pretrained(folder, trust_remote_code=trust).get_text_config()


NO_TOKENIZER = warning("the student's tokenizer is not on this machine", fix="download the model first")
SEE_END_TOKEN = note("not checked: see end_token")
PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


def _template_kwargs(config: DictConfig) -> dict:
    return dict(get(config, "data.apply_chat_template_kwargs", {}))


@dataclass(frozen=True)
class TurnEnd:
    """Token ids with which an assistant turn ends, for the chat template, a rollout and a teacher answer."""

    template: Sequence[int]
    """What the template writes after an answer."""
    special: int | None
    """First special token of ``template``."""
    stops: Sequence[int]
    """Tokens at which a rollout stops, ascending."""
    common: int | None
    """First token of ``template`` at which a rollout stops."""
    teacher: Sequence[int]
    """What teacher answers end with."""
    opens_a_turn: bool
    """The last token of ``teacher`` is written by the template, though not first and not at the end of an answer."""

    @property
    def agrees(self) -> bool:
        """True if rollouts stop where the template ends a turn."""
        return self.common is not None and self.special in (None, self.common)


def turn_end(tokenizer: Any, template_kwargs: dict) -> TurnEnd:
    """How the turns of a tokenizer with a chat template end.

    Raises:
        ValueError: the tokenizer names no end token.
        jinja2.TemplateError: the template refuses a question and its answer.
    """
    from recipe.gad.training.trajectory import end_of_turn_ids, stop_token_ids, turn_suffix_ids

    stops = stop_token_ids(tokenizer)
    template = turn_suffix_ids(tokenizer, template_kwargs)
    teacher = end_of_turn_ids(tokenizer, stops, template_kwargs)
    common = next((token for token in template if token in stops), None)
    opens_a_turn = False
    if common is None:
        turns = tokenizer.apply_chat_template([*PROBE, PROBE[0]], tokenize=True, return_dict=False, **template_kwargs)
        opens_a_turn = teacher[-1] in turns[1:]  # the first may be a bos token that is eos as well
    return TurnEnd(
        template=template,
        special=next((token for token in template if token in tokenizer.added_tokens_decoder), None),
        stops=sorted(stops),
        common=common,
        teacher=teacher,
        opens_a_turn=opens_a_turn,
    )


def check_end_token(config: DictConfig) -> Findings:
    """Teacher answers end with the token that ends the student's rollouts."""
    from jinja2 import TemplateError

    tokenizer = _student_tokenizer(config)
    if tokenizer is None:
        yield NO_TOKENIZER
        return
    folder = tokenizer.name_or_path
    if not tokenizer.chat_template:
        key = f"{ACTOR_MODEL}.custom_chat_template"
        yield error(f"{folder} has no chat template", fix=f"save one with the tokenizer, or set {key}")
        return
    try:
        end = turn_end(tokenizer, _template_kwargs(config))
    except (ValueError, TemplateError) as problem:
        fix = f"set eos_token in tokenizer_config.json, or {ACTOR_MODEL}.custom_chat_template to another template"
        yield error(f"no end of turn in {folder}: {problem}", fix)
        return
    yield from _agreeing_end(tokenizer, end) if end.agrees else _differing_end(tokenizer, end)


def _differing_end(tokenizer: Any, end: TurnEnd) -> Findings:
    """Rollouts do not stop where the template ends a turn."""
    folder, names = tokenizer.name_or_path, tokenizer.convert_ids_to_tokens
    what = (
        f"the chat template of {folder} ends an assistant turn with {names(end.template)}, but a rollout stops at "
        f"{names(end.stops)}, and teacher answers are given the end {names(end.teacher)}"
    )
    fix = "use a template that ends its turns with a special token"
    if end.special is not None:
        fix = (
            f"set eos_token {names(end.special)!r} in {folder}/tokenizer_config.json and eos_token_id {end.special} "
            "in its generation_config.json"
        )
    if end.opens_a_turn:
        yield error(f"{what}, which the template writes elsewhere: it ends no turn", fix)
    else:
        evidence = (
            "The student learns that end, which is fine for a base model. A student that already ends its turns as the "
            "template does writes more after it, and the discriminator tells it apart by that alone"
        )
        yield warning(what, fix, evidence)


def _agreeing_end(tokenizer: Any, end: TurnEnd) -> Findings:
    """Rollouts stop where the template ends a turn; the model's files may still name another token."""
    from verl.utils.model import get_generation_config

    folder, names = tokenizer.name_or_path, tokenizer.convert_ids_to_tokens
    shown = f"{names(end.common)!r}"
    if tokenizer.eos_token_id != end.common:
        yield warning(
            f"tokenizer.eos_token is {tokenizer.eos_token!r}, but a turn ends with {shown}; a rollout stops at both",
            fix=f"set eos_token to {shown} in {folder}/tokenizer_config.json",
        )
    generation = get_generation_config(folder)
    listed = generation.eos_token_id if generation is not None else None
    listed = [] if listed is None else [listed] if isinstance(listed, int) else listed
    if listed and end.common not in listed:
        yield warning(
            f"generation_config.eos_token_id is {listed} ({names(listed)}), but a turn ends with {shown} "
            f"({end.common}); outside verl, generation would not stop there",
            fix=f"add {end.common} in {folder}/generation_config.json",
        )
    yield note(f"teacher answers end with {shown} ({end.common}), at which a rollout stops")


def check_generation_prompt(config: DictConfig) -> Findings:
    """Rollouts begin where the chat template begins an answer, as teacher answers do."""
    from jinja2 import TemplateError

    tokenizer, kwargs, span = _student_tokenizer(config), _template_kwargs(config), get(config, "gad.score_span")
    if tokenizer is None or not tokenizer.chat_template:
        yield SEE_END_TOKEN
        return
    end = think_end(get(config, "gad.think_end"), tokenizer)
    try:
        turn, found = Turn.of(tokenizer, kwargs), difference(tokenizer, kwargs, end)
    except (ValueError, TemplateError):
        yield SEE_END_TOKEN
        return
    if found is None:
        yield from _first_tokens(config, tokenizer, turn)
        if end is not None and end not in turn.opening() and has_discriminator(config) and span != "answer":
            yield note(
                f"the chat template names {end}, and no prompt begins to think; if the student thinks on its own, use "
                "gad.score_span=answer"
            )
        return
    what, fix, thinks = found
    if not thinks:
        yield warning(f"{what}; rollouts begin otherwise than teacher answers", fix)
    elif _imitates(config):
        yield warning(
            f"{what}: the student thinks before it answers, and imitation of the teacher teaches it not to",
            fix="in stage warmup, set trainer.critic_warmup above the number of steps, so that only the discriminator "
            "trains; in stage gad, gad.imitation_coef=0 gad.teacher_in_group=False",
        )


def _first_tokens(config: DictConfig, tokenizer: Any, turn: Turn) -> Findings:
    """The tokens with which the template begins an answer are those with which teacher answers begin."""
    spaced = turn.only_in_answer() != ""
    if turn.only_in_prompt() or not has_discriminator(config) or (get(config, "gad.retokenize") and not spaced):
        return
    from recipe.gad.training.trajectory import build_prompt_ids, tokenize_teacher

    kwargs, text = _template_kwargs(config), PROBE[1]["content"]
    prompt = build_prompt_ids(tokenizer, [PROBE[0]], kwargs)
    teacher = tokenize_teacher(tokenizer, [text], [])[0]
    ids = tokenizer.apply_chat_template([*PROBE], tokenize=True, return_dict=False, **kwargs)[len(prompt) :]
    if ids[: len(teacher)] != teacher:
        first, other = (tokenizer.convert_ids_to_tokens(tokens)[:3] for tokens in (ids, teacher))
        yield warning(
            f"the chat template of {tokenizer.name_or_path} begins the answer {text!r} with the tokens {first}, and "
            f"teacher answers begin with {other}: a student that answers as the template does is told apart by that "
            "alone",
            fix=OTHER_TEMPLATE if spaced else "gad.retokenize=True",
        )


def check_prompt_date(config: DictConfig) -> Findings:
    """Prompts are the same on another day."""
    from jinja2 import TemplateError

    tokenizer, kwargs = _student_tokenizer(config), _template_kwargs(config)
    if tokenizer is None or not tokenizer.chat_template:
        yield SEE_END_TOKEN
        return

    def changes(**more: Any) -> bool:
        """Does the template write the date, which it gets from a function?"""
        prompts = {
            tokenizer.apply_chat_template(
                [PROBE[0]], tokenize=False, **{"strftime_now": datetime(2001, 2, day).strftime, **kwargs, **more}
            )
            for day in (3, 4)
        }
        return len(prompts) > 1

    today = datetime.now().strftime("%d %b %Y")
    try:
        if not changes():
            return
        fix = f"set {ACTOR_MODEL}.custom_chat_template to one with a fixed date"
        if not changes(date_string=today):
            fix = f"'++data.apply_chat_template_kwargs.date_string={today}'"
    except (ValueError, TemplateError):
        yield SEE_END_TOKEN
        return
    yield warning(
        f"the chat template of {tokenizer.name_or_path} writes the current date into prompts: those of a run that is "
        "resumed or repeated on another day differ",
        fix,
    )


def _imitates(config: DictConfig) -> bool:
    """Do teacher answers train the actor?"""
    terms = ("gad.imitation_coef", "gad.teacher_in_group")
    return get(config, "gad.actor_objective") == "imitation" or any(get(config, term) for term in terms)


def check_chat_ids(config: DictConfig) -> Findings:
    """The chat templates of actor and critic give the same token ids."""
    student = _student_tokenizer(config)
    critic = local_model(get(config, tokenizer_key(config, "critic.model"))) if has_discriminator(config) else None
    if student is None or (critic is None and has_discriminator(config)):
        yield warning("not checked: a model is not on this machine", fix="download the models first")
        return
    if critic is None or str(critic) == student.name_or_path:
        return
    other = _tokenizer(critic, bool(get(config, "critic.model.trust_remote_code")), None)
    if not (student.chat_template and other.chat_template):
        return
    first, second = (list(t.apply_chat_template([*PROBE], tokenize=True, return_dict=False)) for t in (student, other))
    if first != second:
        yield warning(
            f"the chat templates of {student.name_or_path} and {critic} (critic) give different ids for one question "
            f"and answer ({first[:8]}... and {second[:8]}...); the discriminator reads the actor's",
            fix="start the discriminator from the student or a model of its family",
        )


def check_agent_loop(config: DictConfig) -> Findings:
    """The agent loop, which asks the rollout engine, takes the student's tokenizer."""
    tokenizer, folder = _student_tokenizer(config), local_model(get(config, f"{ACTOR_MODEL}.path"))
    if not _samples(config):
        yield note(f"stage {get(config, 'gad.stage')} without validation has no agent loop")
        return
    if tokenizer is None or folder is None:
        yield NO_TOKENIZER
        return
    from transformers import AutoConfig

    from verl.utils import hf_processor
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    trust = bool(get(config, f"{ACTOR_MODEL}.trust_remote_code"))
    family = AutoConfig.from_pretrained(folder, trust_remote_code=trust).model_type
    processor = hf_processor(tokenizer.name_or_path, trust_remote_code=trust)
    logging.disable(logging.WARNING)  # verl warns of families that need nothing of their tokenizer
    try:
        create_continuous_token_builder(tokenizer, hf_model_type=family, processor=processor)
    except ValueError as problem:
        yield error(
            f"verl's agent loop refuses {tokenizer.name_or_path} for a model of the family {family}, at the first "
            f"rollout: {problem}",
            fix=f"use the tokenizer of a {family} model, or a student of another family",
        )
    finally:
        logging.disable(logging.NOTSET)


def _samples(config: DictConfig) -> bool:
    """Does the run ask a rollout engine, in training or in validation?"""
    return get(config, "gad.stage") != "seqkd" or validates(config)


def check_lengths(config: DictConfig) -> Findings:
    """Prompts and teacher answers fit their limits, in a sample of the data files."""
    tokenizer = _student_tokenizer(config)
    if tokenizer is None:
        yield NO_TOKENIZER
        return
    if not tokenizer.chat_template:
        yield warning("not checked, because the student's tokenizer has no chat template", fix="see end_token")
        return
    try:
        count = token_counter(tokenizer, _template_kwargs(config))
    except ValueError as problem:
        yield warning(f"not checked, because answers have no end ({problem})", fix="see end_token")
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
                except ValueError as problem:
                    refused.append(str(problem))
        read = len(lengths) + len(refused)
        part = f"{read} of {total} rows, evenly spaced" if read < total else f"all {total} rows"
        where = f"{key} ({part})"
        if refused:
            what = f"{where}: {len(refused)} rows cannot be used ({refused[0]})"
            yield (warning if lengths else error)(what, fix="repair those rows")
        if not lengths:
            continue
        prompts, answers = map(list, zip(*lengths, strict=True))
        dropped = bool(get(config, "data.filter_overlong_prompts"))
        yield _length_finding(
            where, "prompts", prompts, "data.max_prompt_length", integer(config, "data.max_prompt_length"),
            "their rows are dropped" if dropped else "data.filter_overlong_prompts=True would drop their rows",
            fatal=not dropped,
        )  # fmt: skip
        cut = get(config, "data.truncation")
        yield _length_finding(
            where, "teacher answers", answers, "data.max_response_length", integer(config, "data.max_response_length"),
            "data.truncation=error stops there" if cut == "error" else f"cut by data.truncation={cut}",
            fatal=cut == "error",
        )  # fmt: skip


def _length_finding(where: str, what: str, lengths: list[int], key: str, limit: int, then: str, fatal: bool) -> Finding:
    """One line about lengths: an error if all are too long, or if some are and that is ``fatal``."""
    over = sum(length > limit for length in lengths) / len(lengths)
    lost = sum(max(0, length - limit) for length in lengths) / sum(lengths)
    covered = sorted(lengths)[int(COVERED_SHARE * (len(lengths) - 1))]
    found = f"{where}: {what} of {sum(lengths) / len(lengths):.0f} tokens on average, longest {max(lengths)}; "
    found += f"{over:.1%} longer than {key}={limit}"
    if not over:
        return note(found)
    found += f" ({then}; {lost:.1%} of all tokens lie beyond the limit)"
    fix = f"{key}={covered} holds {COVERED_SHARE:.0%} of them"
    if covered <= limit:
        fix = f"{key}={max(lengths)} holds all of them"
    if fatal or over == 1:
        return error(found, fix)
    return warning(found, fix) if over > OVERLONG_SHARE else note(found)


# ---------------------------------------------------------------------- memory and disk


@functools.lru_cache(maxsize=2)
def _shape(folder: Path, value_model: bool, trust_remote_code: bool) -> ModelShape:
    return model_shape(folder, value_model, trust_remote_code)


def _role_shape(config: DictConfig, role: str, key: str) -> ModelShape | None:
    folder = local_model(get(config, key))
    trust = bool(get(config, key.removesuffix("path") + "trust_remote_code"))
    return None if folder is None else _shape(folder, role == "critic", trust)


def check_rollout_heads(config: DictConfig) -> Findings:
    """The attention heads split evenly over the GPUs of a rollout engine."""
    shape = _role_shape(config, ACTOR, f"{ACTOR_MODEL}.path")
    key = f"{ROLLOUT}.tensor_model_parallel_size"
    size = integer(config, key, 1)
    if shape is None:
        yield warning("not checked: the model is not on this machine", fix="download the model first")
    elif shape.heads % size:
        fits = (n for n in range(1, shape.heads + 1) if shape.heads % n == 0)
        yield error(
            f"{key}={size} does not divide the model's {shape.heads} attention heads", fix=f"{key}={either(fits)}"
        )


def check_discriminator_size(config: DictConfig) -> Findings:
    """A discriminator, if there is one, is compared with the student in size."""
    if not has_discriminator(config):
        return
    key = "critic.model.path"
    shapes = _role_shape(config, ACTOR, f"{ACTOR_MODEL}.path"), _role_shape(config, "critic", key)
    if shapes[0] is None or shapes[1] is None:
        return
    # without embedding and language-model head, which only the student has, and without experts that a token skips
    student, discriminator = (shape.active_layer_parameters for shape in shapes if shape is not None)
    active = "active " if any(shape.experts for shape in shapes if shape is not None) else ""
    found = f"{key}: the discriminator's layers have {discriminator:,} {active}parameters, the student's {student:,}"
    fix = "start the discriminator from a larger model with the same vocabulary: --reward_model of the warmup"
    if discriminator < (1 - SAME_SIZE) * student:
        yield warning(f"{found}: a discriminator weaker than the student cannot lead it", fix=fix)
    elif discriminator > (1 + SAME_SIZE) * student:
        yield note(found)
    else:
        yield note(f"{found}: it is no stronger than the student", fix=fix)


def this_gpu_bytes() -> float | None:
    """Memory of this machine's first GPU in bytes; None if it has no GPU."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def memory_findings(config: DictConfig, gpu_memory: float | None) -> Findings:
    """The estimate of docs/memory.md for every role, and whether it fits ``gpu_memory`` bytes (None: this GPU's)."""
    if get(config, "trainer.device") == "cpu":
        yield note("no GPU: trainer.device=cpu")
        return
    parts: dict[str, RoleMemory] = {}
    shapes: dict[str, ModelShape] = {}
    for role, key in roles(config):
        shape = _role_shape(config, role, key)
        if shape is None:
            what = f"{key}={get(config, key)} is not on this machine: no estimate"
            yield warning(what, fix="download the model first")
            return
        run = training(config, role, shape)
        if run is None:
            yield warning(f"{role}.strategy={get(config, f'{role}.strategy')}: the estimate covers fsdp and fsdp2 only")
            return
        shapes[role], parts[role] = shape, (memory := role_memory(shape, run))
        yield note(
            f"{role}: {shape.parameters:,} parameters over {run.shards} GPUs; GiB per GPU: "
            f"weights {memory.weights / GIB:.2f}, gradients {memory.gradients / GIB:.2f}, Adam "
            f"{memory.optimizer / GIB:.2f}, gathered {memory.gathered / GIB:.2f}, activations of {run.tokens} tokens "
            f"{memory.activations / GIB:.2f}, logits {memory.logits / GIB:.2f}; peak {memory.peak / GIB:.2f}, "
            f"while other roles work {memory.resident / GIB:.2f}"
        )
    if (settings := fresh_settings(config)) is not None:
        if (folder := local_model(settings.model)) is None:
            yield warning(
                f"{FRESH}.model={settings.model} is not on this machine: no estimate", fix="download it first"
            )
            return
        shape = _shape(folder, True, False)
        row = integer(config, "data.max_prompt_length") + integer(config, "data.max_response_length")
        tokens = max(2 * row, min(MAX_BATCH_TOKENS, 2 * settings.batch_pairs * row))
        parts[FRESH] = memory = fresh_memory(shape, tokens)
        yield note(
            f"{FRESH}: {shape.parameters:,} parameters, whole on a GPU; GiB: weights, gradients and Adam "
            f"{memory.states / GIB:.2f}, activations of {tokens} tokens {memory.activations / GIB:.2f}; peak "
            f"{memory.peak / GIB:.2f}"
        )
    gpu_memory = this_gpu_bytes() if gpu_memory is None else gpu_memory
    if gpu_memory is None:
        yield warning(
            "not compared with a GPU: this machine has none", fix="--gpu_memory_gb N (GiB of one GPU of the run)"
        )
        return
    yield from _phase_findings(config, shapes[ACTOR], parts, gpu_memory)


def _phase_findings(config: DictConfig, actor: ModelShape, parts: dict[str, RoleMemory], gpu_memory: float) -> Findings:
    """What is on a GPU at the same time: during the rollout, and while each role works."""
    resident = {role: memory.resident for role, memory in parts.items()}
    rollout = 0.0
    if _samples(config):
        rollout = float(get(config, f"{ROLLOUT}.gpu_memory_utilization", 0.5)) * gpu_memory
        yield from _rollout_findings(config, actor, resident, rollout, gpu_memory)
    asleep = 0.0 if get(config, f"{ROLLOUT}.free_cache_engine") else rollout
    for role, memory in parts.items():
        others = sum(size for other, size in resident.items() if other != role) + asleep
        states, peak = memory.states + others, memory.peak + others
        found = f"{role} at work: about {peak / GIB:.1f} of {gpu_memory / GIB:.1f} GiB"
        more = f"{OFFLOAD}, more GPUs, or {FRESH}.model=null" if role == FRESH else f"{OFFLOAD}, or more GPUs"
        limit = f"{role}.{'log_prob' if role == REF else 'ppo'}_max_token_len_per_gpu"
        if states > gpu_memory:
            yield error(f"{found}; weights, gradients and Adam alone take {states / GIB:.1f}", fix=more)
        elif peak > MEMORY_SHARE * gpu_memory:
            yield warning(found, fix=more if role == FRESH else f"a smaller {limit}, {more}")
        else:
            yield note(found)


def _rollout_findings(
    config: DictConfig, actor: ModelShape, resident: dict[str, float], rollout: float, gpu_memory: float
) -> Findings:
    """The engine, which may use ``rollout`` bytes of a GPU, beside what the roles leave there."""
    key = f"{ROLLOUT}.gpu_memory_utilization"
    needed = sum(resident.values()) + rollout
    found = f"rollout: {sum(resident.values()) / GIB:.1f} of actor and critic + {rollout / GIB:.1f} of the engine "
    found += f"({key}={get(config, key)}) = {needed / GIB:.1f} of {gpu_memory / GIB:.1f} GiB"
    if needed > gpu_memory:
        free = max(0.0, 1 - sum(resident.values()) / gpu_memory)
        yield error(found, fix=f"{key}={int(free * 100) / 100} or less, {OFFLOAD}, or more GPUs")
    else:
        yield note(found)
    row = integer(config, "data.max_prompt_length") + integer(config, "data.max_response_length")
    tokens = kv_tokens(config, actor, rollout)
    if tokens < row:
        weights = rollout_weight_bytes(config, actor) / GIB
        yield error(
            f"{key}={get(config, key)}: beside {weights:.1f} GiB of weights the engine has room for {max(0, tokens)} "
            f"tokens, and prompt + response = {row}",
            fix=f"raise {key} or tensor_model_parallel_size",
        )
    else:
        yield note(f"rollout engine: KV cache of about {tokens} tokens, {tokens // row} answers of full length at once")


def check_disk(config: DictConfig) -> Findings:
    """The checkpoints fit the disk."""
    every = integer(config, "trainer.save_freq", -1, minimum=-1)
    if every <= 0:
        yield note(f"trainer.save_freq={every}: no checkpoint is written")
        return
    saves = _saves(config, every)
    total, parts = 0, []
    for role, key in trained_roles(config):
        shape = _role_shape(config, role, key)
        run = None if shape is None else training(config, role, shape)
        if shape is None or run is None:
            yield warning(f"{key}={get(config, key)}, {role}.strategy: no estimate of a checkpoint's size")
            return
        keep = "trainer.max_critic_ckpt_to_keep" if role == "critic" else "trainer.max_actor_ckpt_to_keep"
        count = checkpoints_on_disk(saves, integer(config, keep, 0, minimum=-1))
        if count is None:
            what = f"{keep}={get(config, keep)}: every checkpoint is kept; one is counted here"
            yield warning(what, fix=f"{keep}=3")
            count = 1
        size = checkpoint_bytes(shape, run, get(config, f"{role}.checkpoint.save_contents", []))
        parts.append(f"{role} {count} x {shown(size)}")
        total += size * count
    folder = Path(get(config, "trainer.default_local_dir")).absolute()
    free = free_bytes(folder)
    found = f"{', '.join(parts)} = {shown(total)} at once; {shown(free)} are free at {folder}"
    if total > free:
        yield error(
            found,
            fix="a smaller trainer.max_actor_ckpt_to_keep and max_critic_ckpt_to_keep, another "
            "trainer.default_local_dir, or fewer checkpoint.save_contents",
        )
    else:
        yield note(found)


def _saves(config: DictConfig, every: int) -> int | None:
    """Most checkpoints that the run writes; None if only reading the data would tell its number of steps."""
    steps = get(config, "trainer.total_training_steps")
    return None if steps is None else -(-int(steps) // every)


# ---------------------------------------------------------------------- report


def report(findings: list[Finding], show: Callable[[str], None], brief: bool = False) -> None:
    """Show the findings line by line, worst last, and then how many errors and warnings there are.

    Several checks that have found the same share a line.

    Args:
        brief: leave out what is as it should be.
    """
    same: dict[Finding, list[str]] = {}
    for finding in findings:
        same.setdefault(replace(finding, where=""), []).append(finding.where)
    findings = [replace(finding, where=", ".join(dict.fromkeys(checks))) for finding, checks in same.items()]
    for finding in sorted(findings, key=lambda finding: LEVELS.index(finding.level)):
        if finding.level != "ok" or not brief:
            show(line(finding))
    errors, warnings = (sum(finding.level == level for finding in findings) for level in ("error", "warning"))
    counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    show(counts + (": this run cannot start" if errors else ""))

"""Students that think before they answer: the text that ends the thinking, and the chat template's part in it."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from recipe.gad.run.config import ACTOR_MODEL, files_of, get, has_discriminator, tokenizer_key
from recipe.gad.run.data_file import answers_that
from recipe.gad.run.findings import Findings, either, error, note
from recipe.gad.run.hub import load_tokenizer, local_model

SPANS = ("all", "answer")
"""Values of gad.score_span."""
THINK_ENDS = {
    "</think>": "<think>",
    "<|channel|>final<|message|>": "<|channel|>analysis",
    "<channel|>": "<|channel>",
    "</seed:think>": "<seed:think>",
    "[/THINK]": "[THINK]",
    "<|START_TEXT|>": "<|START_TEXT|>",
}
"""Text that ends the thinking -> text that begins it: of most families, gpt-oss, Gemma 4, Seed-OSS, Mistral and
Command, which marks the beginning of the answer instead. Some chat templates name only the text that begins it."""

SWITCHES = {"enable_thinking": False, "thinking": False, "reasoning": False, "thinking_budget": 0}
"""Arguments of chat templates, and the value with which a student does not think."""

OTHER_TEMPLATE = (
    f"set {ACTOR_MODEL}.custom_chat_template to one whose generation prompt is all that comes before an answer"
)

_PROBE = "xyzzy"


def think_end(configured: str | None, tokenizer: Any) -> str | None:
    """Text that ends a student's thinking: ``gad.think_end``, or what the chat template names; None: neither."""
    if configured is not None:
        return configured
    template = str(tokenizer.chat_template or "")
    ends = [end for end in THINK_ENDS if end in template]
    begun = [end for end, begin in THINK_ENDS.items() if begin in template]
    return next(iter(ends + begun), None)


def _after_common(text: str, other: str) -> str:
    """``text`` without what it shares with the beginning of ``other``; tags such as ``<think>`` stay whole."""
    common = os.path.commonprefix([text, other])
    if common.rfind("<") > common.rfind(">") and len(common) < max(len(text), len(other)):
        common = common[: common.rindex("<")]
    return text.removeprefix(common)


class Turn(NamedTuple):
    """What the chat template writes before an assistant's text."""

    prompt: str
    """Before a rollout: question and generation prompt."""
    answer: str
    """Before the answer in a finished conversation: the question and the beginning of its turn."""
    bare: str
    """Of the question alone."""

    @classmethod
    def of(cls, tokenizer: Any, template_kwargs: dict) -> "Turn":
        """Raises jinja2.TemplateError if the template refuses the turn, ValueError if it leaves out its text."""
        question = [{"role": "user", "content": "question"}]
        kwargs = {**template_kwargs, "tokenize": False}
        turn = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": _PROBE}], **kwargs)
        return cls(
            prompt=tokenizer.apply_chat_template(question, add_generation_prompt=True, **kwargs),
            answer=turn[: turn.rindex(_PROBE)],
            bare=tokenizer.apply_chat_template(question, add_generation_prompt=False, **kwargs),
        )

    def opening(self) -> str:
        """The generation prompt."""
        return _after_common(self.prompt, self.bare)

    def only_in_answer(self) -> str:
        """What the template writes before an answer, and the prompt of a rollout lacks."""
        return _after_common(self.answer, self.prompt)

    def only_in_prompt(self) -> str:
        """What the prompt of a rollout has, and the template does not write before an answer."""
        return _after_common(self.prompt, self.answer)

    def adds_text(self, end: str | None) -> bool:
        """Does the generation prompt hold text that no answer begins with, other than thinking that it ends?"""
        return self.only_in_prompt().strip() != "" and (end is None or end not in self.only_in_prompt())

    def thinks(self, end: str | None) -> bool:
        """Does a rollout begin with thinking, which ends with ``end``?"""
        return end is not None and (self.adds_text(end) or end in self.only_in_answer())

    def agrees(self, end: str | None) -> bool:
        """Do rollouts begin where the template begins an answer? A teacher's row starts with the rollouts' prompt, so
        thinking that the generation prompt begins and ends is on both sides."""
        return not self.only_in_answer().strip() and not self.adds_text(end)


def switch_off(tokenizer: Any, template_kwargs: dict, end: str | None) -> tuple[str, Any] | None:
    """Name and value of the one of :data:`SWITCHES` with which rollouts begin where the template begins an answer.

    None: no switch does that. If rollouts begin there anyway, only a switch that changes the prompt counts: without it,
    the student may think, even though the template shows no thinking.
    """
    turn = Turn.of(tokenizer, template_kwargs)
    for name, value in SWITCHES.items():
        off = Turn.of(tokenizer, {**template_kwargs, name: value})
        if off.agrees(end) and (off.prompt != turn.prompt or not turn.agrees(end)):
            return name, value
    return None


def difference(tokenizer: Any, template_kwargs: dict, end: str | None) -> tuple[str, str, bool] | None:
    """How rollouts begin otherwise than the template begins an answer, or would if a switch were off, the fix, and
    whether it is thinking. None: they begin alike. Raises what :meth:`Turn.of` does."""
    turn, switch = Turn.of(tokenizer, template_kwargs), switch_off(tokenizer, template_kwargs, end)
    if turn.agrees(end) and switch is None:
        return None
    folder, off = tokenizer.name_or_path, "" if switch is None else f"{switch[0]}={switch[1]}"
    if turn.agrees(end):
        what = f"the chat template of {folder} writes another prompt with {off}, which switches thinking off"
    elif turn.only_in_answer().strip():
        what = f"the chat template of {folder} begins an answer with {turn.only_in_answer()!r} after {turn.prompt!r}"
    else:
        what = f"the generation prompt of {folder} ends with {turn.only_in_prompt()!r}, which an answer does not have"
    fix = f"++data.apply_chat_template_kwargs.{off}" if off else OTHER_TEMPLATE
    return what, fix, turn.agrees(end) or turn.thinks(end)


def check_thinking(config: DictConfig) -> Findings:
    """The student does not think before it answers, or the discriminator reads only the answer."""
    from jinja2 import TemplateError

    if get(config, "gad.score_span") == "answer":
        return
    if (folder := local_model(get(config, tokenizer_key(config)))) is None:
        yield note("not checked: the student's tokenizer is not on this machine")
        return
    try:
        tokenizer = _tokenizer(config, folder)
        kwargs = dict(get(config, "data.apply_chat_template_kwargs", {}))
        found = difference(tokenizer, kwargs, think_end(get(config, "gad.think_end"), tokenizer))
    except (ValueError, TypeError, TemplateError):
        yield note("not checked: see end_token")
        return
    if found is not None and found[2]:
        think = "; if the student is to think, gad.score_span=answer" if has_discriminator(config) else ""
        yield error(f"{found[0]}: the student thinks before it answers, and teacher answers do not", found[1] + think)


def _tokenizer(config: DictConfig, name: str | Path) -> Any:
    """The student's, from a folder or the hub. InputError: it cannot be loaded."""
    tokenizer = load_tokenizer(name, bool(get(config, f"{ACTOR_MODEL}.trust_remote_code")))
    if (custom := get(config, f"{ACTOR_MODEL}.custom_chat_template")) is not None:
        tokenizer.chat_template = custom
    return tokenizer


def check_score_span(config: DictConfig) -> Findings:
    """The discriminator reads whole answers, or students think in a way that can be cut out."""
    span, end = get(config, "gad.score_span"), get(config, "gad.think_end")
    if span not in SPANS:
        yield error(f"gad.score_span={span}: expected {either(SPANS)}", fix="gad.score_span=all")
        return
    if end is not None and (not isinstance(end, str) or not end.strip()):
        yield error(f"gad.think_end={end!r}: expected the text that ends the thinking", fix="gad.think_end=null")
        return
    if span == "all":
        if end is not None:
            yield error(
                f"gad.think_end={end}: gad.score_span=all would not read it",
                fix="gad.think_end=null, or gad.score_span=answer",
            )
        return
    if not has_discriminator(config):
        yield error(
            f"gad.score_span=answer: stage {get(config, 'gad.stage')} trains no discriminator", fix="gad.score_span=all"
        )
        return
    if get(config, "gad.credit") == "token":
        yield error(
            "gad.credit=token credits every token that was sampled, and gad.score_span=answer scores the answer alone",
            fix="gad.score_span=all, or gad.credit=sequence",
        )
    if get(config, "gad.shortcut_probe") is True:
        yield error(
            "gad.shortcut_probe=True looks at whole answers, and gad.score_span=answer hides the thinking from the "
            "discriminator",
            fix="gad.shortcut_probe=False, or gad.score_span=all",
        )
    yield from _template_findings(config, end)


def _template_findings(config: DictConfig, configured: str | None) -> Findings:
    """Does the student think, and where does that end?"""
    path = get(config, tokenizer_key(config))
    folder = local_model(path)
    if folder is None and configured is not None:
        yield from _teacher_findings(config, configured)
        return
    tokenizer = _tokenizer(config, folder or str(path))
    end = think_end(configured, tokenizer)
    if end is None:
        yield error(
            f"gad.score_span=answer: the chat template of {path} names no end of the thinking ({either(THINK_ENDS)})",
            fix="set gad.think_end to the text after which the student's answer begins, or gad.score_span=all",
        )
        return
    yield from _teacher_findings(config, end)
    if not tokenizer.chat_template:
        return  # the doctor says so
    from jinja2 import TemplateError

    kwargs = dict(get(config, "data.apply_chat_template_kwargs", {}))
    try:
        opening = Turn.of(tokenizer, kwargs).opening()
    except (ValueError, TemplateError):
        return  # the doctor says so
    if end in opening:
        yield error(
            f"gad.score_span=answer: the generation prompt {opening!r} already ends the thinking with {end}, so no "
            "answer would contain it, and all would count as empty",
            fix="gad.score_span=all, or change data.apply_chat_template_kwargs so that the student thinks",
        )


def _teacher_findings(config: DictConfig, end: str) -> Findings:
    """The teacher's answers have no thinking: the discriminator reads them whole."""

    def thinking(text: str) -> str | None:
        if end in text:
            return f"contains {end!r}, the end of the thinking"
        begin = next((begin for begin in THINK_ENDS.values() if text.lstrip().startswith(begin)), None)
        return None if begin is None else f"begins with {begin!r}"

    teacher = get(config, "data.teacher_key")
    files = {file: key for key in ("data.val_files", "data.train_files") for file in files_of(get(config, key))}
    for file, key in files.items() if teacher else ():
        try:
            rows = answers_that(file, teacher, thinking)
        except (ValueError, OSError):
            continue  # check_data reports files that cannot be read
        for row in rows:
            yield error(
                f"{key}: {file}, {row}: gad.score_span=answer cuts the thinking out of the student's answers alone, so "
                "the discriminator would see it on the teacher's side",
                fix="write the file again with the answers after the thinking (gad prepare keeps answers whole), drop "
                "the row, or gad.score_span=all",
            )

"""Tokenizers, and the lengths of rows as the student reads them."""

from collections.abc import Callable
from typing import Any

TokenCounter = Callable[[list[dict[str, str]], str], tuple[int, int]]
"""Tokens of (prompt with generation prompt, answer with its end of turn) of a prompt and a teacher's text."""


def token_counter(tokenizer: Any, apply_chat_template_kwargs: dict | None = None) -> TokenCounter:
    """Counts tokens as the trainer does: chat template and generation prompt on one side, end of turn on the other.

    Raises:
        ValueError: answers have no end of turn. The counter: the template refuses the prompt.
    """
    from jinja2 import TemplateError

    from verl.workers.rollout.teacher_trajectory import (
        build_prompt_ids,
        end_of_turn_ids,
        stop_token_ids,
        tokenize_teacher,
    )

    try:
        end_ids = end_of_turn_ids(tokenizer, stop_token_ids(tokenizer), apply_chat_template_kwargs)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a question with its answer: {error}") from None

    def count(prompt: list[dict[str, str]], teacher: str) -> tuple[int, int]:
        try:
            prompt_ids = build_prompt_ids(tokenizer, prompt, apply_chat_template_kwargs)
        except TemplateError as error:
            raise ValueError(f"the student's chat template refuses the prompt: {error}") from None
        return len(prompt_ids), len(tokenize_teacher(tokenizer, [teacher], end_ids)[0])

    return count

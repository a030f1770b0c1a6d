"""Tokenizers, and the lengths of rows as the student reads them."""

from collections.abc import Callable
from typing import Any

TokenCounter = Callable[[list[dict[str, str]], str], tuple[int, int]]
"""(prompt, teacher's text) -> (tokens of the prompt with generation prompt, tokens of the text with end of turn)."""


def token_counter(tokenizer: Any, apply_chat_template_kwargs: dict | None = None) -> TokenCounter:
    """Counter that counts tokens as the trainer does, with chat template, generation prompt and end of turn.

    Raises:
        ValueError: the template ends no turn; the counter raises it for a prompt that the template refuses.
    """
    from jinja2 import TemplateError

    from recipe.gad.training.trajectory import (
        build_prompt_ids,
        end_of_turn_ids,
        stop_token_ids,
        tokenize_teacher,
    )

    try:
        end_ids = end_of_turn_ids(tokenizer, stop_token_ids(tokenizer), apply_chat_template_kwargs)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a question and its answer: {error}") from None

    def count(prompt: list[dict[str, str]], teacher: str) -> tuple[int, int]:
        try:
            prompt_ids = build_prompt_ids(tokenizer, prompt, apply_chat_template_kwargs)
        except TemplateError as error:
            raise ValueError(f"the student's chat template refuses the prompt: {error}") from None
        return len(prompt_ids), len(tokenize_teacher(tokenizer, [teacher], end_ids)[0])

    return count

"""What D reads of a student's answer: all that was sampled, or the answer without its thinking (``gad.score_span``),
as the tokens of its text if wanted (``gad.retokenize``). The policy trains on what was sampled in any case."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from recipe.gad.run.thinking import think_end
from recipe.gad.training import shortcuts
from recipe.gad.training.rows import length_statistics
from recipe.gad.training.trajectory import end_of_turn_ids, stop_token_ids, tokenize_teacher


class Span(NamedTuple):
    """A sampled response: its tokens of thinking, and the ids of the answer after them (as sampled, but for spaces)."""

    thinking: int
    answer: list[int]


def answer_span(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], end: str) -> Span:
    """Where the answer begins: after the first ``end`` in the text of ``ids``, and after the white space that follows.

    A token that holds more than the end of ``end`` or than white space is replaced by the tokens of the rest of it, and
    counts as answer. Without ``end``, all is thinking and the answer is empty.
    """
    ids = list(ids)
    start = bisect_left(range(len(ids) + 1), True, key=lambda n: end in shortcuts.text_of(tokenizer, ids[:n]))
    if start > len(ids):
        return Span(len(ids), [])
    rest = shortcuts.text_of(tokenizer, ids[:start]).partition(end)[2]
    mixed = rest.strip() != ""
    while not mixed and start < len(ids):
        rest = shortcuts.text_of(tokenizer, ids[start : start + 1])
        if rest.strip() and not rest[0].isspace():
            break  # the answer begins with a token
        start, mixed = start + 1, rest.strip() != ""
    first = tokenize_teacher(tokenizer, [rest.lstrip()], [])[0] if mixed else []
    return Span(start - mixed, first + ids[start:])


@dataclass(frozen=True)
class Reading:
    """How D reads students' responses.

    Attributes:
        tokenizer: the student's.
        end: text that ends the thinking; None: D reads that too.
        empty: ids that D reads if the answer is empty: the end of a turn, as after a teacher's answer.
        retokenize: does D read the tokens of the text?
    """

    tokenizer: PreTrainedTokenizerBase
    end: str | None
    empty: list[int]
    retokenize: bool

    @classmethod
    def of(cls, config: DictConfig, tokenizer: PreTrainedTokenizerBase) -> "Reading | None":
        """None if D reads responses as they were sampled."""
        gad, end, empty = config.gad, None, []
        if gad.score_span == "answer":
            end = think_end(gad.think_end, tokenizer)
            assert end is not None, "check_score_span refuses such a run"
            kwargs: dict[str, Any] = dict(config.data.get("apply_chat_template_kwargs") or {})
            empty = end_of_turn_ids(tokenizer, stop_token_ids(tokenizer), kwargs)
        return cls(tokenizer, end, empty, gad.retokenize) if end is not None or gad.retokenize else None

    def read(self, responses: Iterable[Sequence[int]]) -> tuple[list[list[int]], dict[str, float]]:
        """What D reads in place of responses (token ids; an empty one stays empty), and metrics.

        Returns:
            ids, and if the thinking is cut out ``thinking_length/*`` and ``answer_length/*`` in sampled tokens, with
            ``answer_length/empty_ratio``: the share of responses that end before an answer begins.
        """
        sampled = [list(ids) for ids in responses]
        metrics: dict[str, float] = {}
        read = sampled
        if self.end is not None:
            spans = [answer_span(self.tokenizer, ids, self.end) for ids in sampled]
            thinking = [span.thinking for span in spans]
            answers = [len(ids) - n for ids, n in zip(sampled, thinking, strict=True)]
            metrics = length_statistics("thinking_length", thinking) | length_statistics("answer_length", answers)
            metrics["answer_length/empty_ratio"] = float(np.mean([length == 0 for length in answers]))
            read = [span.answer or self.empty if ids else [] for ids, span in zip(sampled, spans, strict=True)]
        if self.retokenize:
            read = [shortcuts.canonical_ids(self.tokenizer, ids) for ids in read]
        return read, metrics

"""The teacher's answer as token ids and as a trajectory beside the student's rollouts, and the names of GAD's rows
and fields in TransferQueue.

vLLM, SGLang and the Hugging Face replica need the same teacher trajectory, and no engine should know about it: it
depends only on the prompt ids that the student really got and on the teacher's token ids.
"""

import logging
from collections.abc import Iterable

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEACHER_TEXT, TEACHER_IDS = "teacher_response", "teacher_response_ids"
"""Fields of a prompt, and of each of its student rows: the teacher's answer as text and as token ids."""
PAIR_WEIGHT, ROW_NUMBER = "pair_weight", "row"
"""Fields of a row in D's update: its weight in the loss, and the number under which its score comes back."""
IMITATION_WEIGHT, POLICY_WEIGHT, TEMPERATURE = "imitation_weight", "policy_weight", "temperature"
"""Fields of a row in an actor's update on students and teachers: ``teacher_terms.RowWeights``; verl's temperature."""

_PROBE = "xyzzy"  # in no name of a special token (Gemma: "<end_of_turn>")


def split_key(key: str) -> tuple[str, int, int]:
    """(uid of the prompt, sample, output) of a student row's key, which stock verl writes."""
    uid, sample, output = key.rsplit("_", 2)
    return uid, int(sample), int(output)


def teacher_key(uid: str, i: int = 0) -> str:
    """Key of the teacher's row of a prompt, or of its i-th further answer (``gad.teacher_answers=all``)."""
    return f"{uid}_teacher_{i}"


def filler_key(uid: str, i: int) -> str:
    """Key of the row that replaces the i-th missing student of a prompt."""
    return f"{uid}_filler_{i}"


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a rollout: ``generation_config.eos_token_id`` of the model folder and the tokenizer's eos."""
    from verl.utils.model import get_generation_config

    ids: set[int] = set()
    config = get_generation_config(tokenizer.name_or_path) if tokenizer.name_or_path else None
    for source in (tokenizer.eos_token_id, config.eos_token_id if config is not None else None):
        if source is not None:
            ids.update([source] if isinstance(source, int) else source)
    if not ids:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} names no eos token, nor does a generation_config.json "
            "(eos_token_id), so a rollout never ends; set tokenizer.eos_token"
        )
    return ids


def _ids_of_part(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> list[int]:
    """Token ids of ``text[start:end]`` as they follow the text before: SentencePiece would put a space in front of a
    part that stands alone."""
    parts = (text[:start], text[:end], text[start:end])
    before, whole, alone = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    return whole[len(before) :] if whole[: len(before)] == before else alone


def turn_suffix_ids(tokenizer: PreTrainedTokenizerBase, apply_chat_template_kwargs: dict | None = None) -> list[int]:
    """Tokens that the chat template puts after the text of an assistant turn, such as "<|im_end|>" and a newline.

    Some templates write no special token there unless another turn follows (GLM: "<|user|>"). Then the tokens between
    the answer and a next question count.

    Raises:
        ValueError: the template leaves out the text of an answer.
    """
    question = {"role": "user", "content": "question"}
    messages = [question, {"role": "assistant", "content": _PROBE}]
    kwargs = {**(apply_chat_template_kwargs or {}), "tokenize": False}
    text = tokenizer.apply_chat_template(messages, **kwargs)
    if _PROBE not in text:
        raise ValueError("the chat template leaves out the text of an answer")
    suffix = _ids_of_part(tokenizer, text, text.rindex(_PROBE) + len(_PROBE), len(text))
    special = tokenizer.added_tokens_decoder.keys() - {tokenizer.unk_token_id}
    if special & set(suffix):
        return suffix
    try:
        text = tokenizer.apply_chat_template([*messages, question], **kwargs)
    except TemplateError:  # takes no second question
        return suffix
    start = text.rindex(_PROBE) + len(_PROBE)
    end = text.find(question["content"], start)
    between = _ids_of_part(tokenizer, text, start, end) if end >= 0 else suffix
    return between if special & set(between) else suffix


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], apply_chat_template_kwargs: dict | None = None
) -> list[int]:
    """Tokens a student emits after the text of its answer: from the chat template, up to and with the first stop token.

    A template may append more tokens to an assistant turn ("<|im_end|>" and a newline); a rollout stops at the first
    stop token, which may also be the one that begins the next turn. Without a chat template, or if its end of turn
    holds no stop token (with a warning), the answer ends with the tokenizer's eos token. ``stop_ids`` come from
    :func:`stop_token_ids`.
    """
    fallback = [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(stop_ids)]
    if not tokenizer.chat_template:
        return fallback
    suffix = turn_suffix_ids(tokenizer, apply_chat_template_kwargs)
    for position, token in enumerate(suffix):
        if token in stop_ids:
            return suffix[: position + 1]
    logger.warning(
        "the chat template ends an assistant turn with %s, which holds none of the stop tokens %s; teacher answers end "
        "with %s. Set tokenizer.eos_token / generation_config.eos_token_id to the token that ends a turn.",
        *(tokenizer.convert_ids_to_tokens(ids) for ids in (suffix, sorted(stop_ids), fallback)),
    )
    return fallback


def tokenize_teacher(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], end_ids: list[int]) -> list[list[int]]:
    """Teacher texts as response token ids that end the way a rollout ends, uncut.

    A special token that is spelled out in the text stays text: it is never encoded as the special token.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [ids + end_ids for ids in encoded]


def cut_teacher(ids: list[int], max_response_length: int, truncation: str) -> list[int]:
    """Teacher ids within ``max_response_length``: "right" keeps the start (as a cut rollout: no end token), "left"
    the end.

    Raises:
        ValueError: the answer is longer and ``truncation`` is "error" (or unknown).
    """
    if len(ids) <= max_response_length:
        return ids
    if truncation == "right":
        return ids[:max_response_length]
    if truncation == "left":
        return ids[-max_response_length:]
    raise ValueError(
        f"teacher answer of {len(ids)} tokens is longer than data.max_response_length={max_response_length} "
        f"(data.truncation={truncation}); raise the length or set data.truncation to left or right"
    )


def build_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], apply_chat_template_kwargs: dict | None = None
) -> list[int]:
    """Prompt token ids of chat messages with the generation prompt, as verl's rollout builds them."""
    kwargs = {**(apply_chat_template_kwargs or {}), "tokenize": True, "add_generation_prompt": True}
    return list(tokenizer.apply_chat_template(messages, **kwargs, return_dict=False))


def build_teacher_trajectory(prompt_ids: torch.Tensor, teacher_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The teacher's trajectory with the fields of a student's, so that whatever reads a trajectory can read it.

    Positions continue from the prompt, never from a student's sequence.

    Args:
        prompt_ids: prompt ids that the student got, (prompt_length,), at least one (else ValueError).
        teacher_ids: teacher response ids, (response_length,), at least one.

    Returns:
        prompts, responses, input_ids, attention_mask, position_ids, response_mask, loss_mask, all int64 and 1-D.
    """
    if prompt_ids.numel() == 0 or teacher_ids.numel() == 0:
        raise ValueError(
            f"a trajectory needs a prompt and an answer, got {prompt_ids.numel()} and {teacher_ids.numel()} tokens"
        )
    input_ids = torch.cat([prompt_ids, teacher_ids]).to(torch.int64)
    response_mask = torch.ones(teacher_ids.numel(), dtype=torch.int64)
    return {
        "prompts": prompt_ids.to(torch.int64),
        "responses": teacher_ids.to(torch.int64),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.arange(input_ids.numel()),
        "response_mask": response_mask,
        "loss_mask": response_mask.clone(),
    }


def teacher_tensors(prompt_ids: torch.Tensor, teacher_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same trajectory under the names of the paper's code: teacher_input_ids, teacher_attention_mask, ..."""
    trajectory = build_teacher_trajectory(prompt_ids, teacher_ids)
    return {f"teacher_{key}": trajectory[key] for key in ("input_ids", "attention_mask", "position_ids")}

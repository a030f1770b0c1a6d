"""What D reads of students that think (recipe/gad/training/reading.py): ids by hand, byte by byte."""

import pytest

from recipe.gad.training.reading import Reading, answer_span

END = "</think>"


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    """Bytes, some merges such as "hello", " w" and "|>", and special tokens."""
    specials = ("<|endoftext|>", "<|im_end|>", "</think>", "<|channel|>", "<|message|>")
    return byte_tokenizer(specials=specials)


def ids(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.mark.parametrize(
    ("sampled", "end", "thinking", "answer"),
    [
        (["h", "</think>", "hello", "<|im_end|>"], END, 2, ["hello", "<|im_end|>"]),
        (["h", "</think>", "Ċ", "Ċ", "Ġ", "hello"], END, 5, ["hello"]),
        (["</think>", "Ġw", "hello"], END, 1, ["w", "hello"]),  # a token of white space and text is split
        ([*"</think>", "h", "e"], END, 8, ["h", "e"]),  # spelled out, and "h" + "e" is left as sampled
        (["h", "a", "|>", "Ġ", "h"], "a|", 2, [">", "Ġ", "h"]),  # so is a token of marker and text
        (["<|channel|>", *"final", "<|message|>", "h"], "<|channel|>final<|message|>", 7, ["h"]),
        (["h", "</think>", "h", "</think>", "w"], END, 2, ["h", "</think>", "w"]),  # the first one counts
        (["</think>", "Ċ", "<|im_end|>"], END, 2, ["<|im_end|>"]),
        (["h", "</think>", "Ċ"], END, 3, []),
        (["h", "h", "<|im_end|>"], END, 3, []),  # never closed
        ([], END, 0, []),
        (["</think>", "Ã", "©"], END, 1, ["Ã", "©"]),  # the two bytes of é
    ],
)
def test_the_answer_is_what_follows_the_end_of_the_thinking(tokenizer, sampled, end, thinking, answer):
    assert answer_span(tokenizer, ids(tokenizer, *sampled), end) == (thinking, ids(tokenizer, *answer))


def test_an_empty_answer_is_read_as_an_empty_turn_and_lengths_are_of_sampled_tokens(tokenizer):
    reading = Reading(tokenizer, END, empty=ids(tokenizer, "<|im_end|>"), retokenize=False)
    sampled = [
        ids(tokenizer, *tokens)
        for tokens in (["h", "</think>", "h", "e", "<|im_end|>"], ["h"] * 4, ["</think>", "Ġw"], [])
    ]
    read, metrics = reading.read(sampled)
    assert read == [ids(tokenizer, *tokens) for tokens in (["h", "e", "<|im_end|>"], ["<|im_end|>"], ["w"], [])]
    assert metrics == {
        "thinking_length/mean": 7 / 4, "thinking_length/max": 4, "thinking_length/min": 0,
        "answer_length/mean": 1, "answer_length/max": 3, "answer_length/min": 0, "answer_length/empty_ratio": 0.5,
    }  # fmt: skip
    retokenizing = Reading(tokenizer, END, empty=reading.empty, retokenize=True)
    assert retokenizing.read(sampled)[0][0] == ids(tokenizer, "he", "<|im_end|>")


def test_responses_are_read_as_sampled_unless_a_switch_is_on(tokenizer, compose_config):
    assert Reading.of(compose_config(), tokenizer) is None
    only_tokens = Reading.of(compose_config("gad.retokenize=True"), tokenizer)
    sampled = [ids(tokenizer, "h", *"</think>", "h")]
    assert only_tokens.end is None and only_tokens.read(sampled) == (sampled, {})
    both = Reading.of(compose_config("gad.retokenize=True", "gad.score_span=answer", "gad.think_end=h"), tokenizer)
    assert both == Reading(tokenizer, "h", ids(tokenizer, "<|im_end|>"), True)

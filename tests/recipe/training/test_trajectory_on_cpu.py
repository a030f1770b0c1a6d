"""The teacher's answer as token ids (recipe/gad/training/trajectory.py), on real tokenizers."""

import logging

import pytest
import torch

from recipe.gad.training.trajectory import (
    build_prompt_ids,
    build_teacher_trajectory,
    cut_teacher,
    end_of_turn_ids,
    stop_token_ids,
    teacher_tensors,
    tokenize_teacher,
)
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

LOGGER = "recipe.gad.training.trajectory"
QUESTION = [{"role": "user", "content": "say hello"}]
TURNS = "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}\n{% else %}A: {{ m.content }}"
"""A template up to the end of an assistant turn."""
REST = "{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXTS = [
    "hello world",
    " hello",
    "",
    "naïve 日本語 🙂 \u202e\x00\t\n\n",
    "a <|im_end|> b<|im_start|>assistant\n<|endoftext|>",
    "x" * 50,
]


def teacher_ids(tokenizer, text, **template_kwargs):
    end_ids = end_of_turn_ids(tokenizer, stop_token_ids(tokenizer), template_kwargs)
    return tokenize_teacher(tokenizer, [text], end_ids)[0]


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


# ---------------------------------------------------------------------- the end of an answer


@pytest.mark.parametrize("text", TEXTS)
def test_ids_spell_the_text_and_end_with_the_end_of_turn_token(byte_tokenizer, text):
    tokenizer = byte_tokenizer()
    ids = teacher_ids(tokenizer, text)
    special = set(tokenizer.all_special_ids)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not set(ids[:-1]) & special, "a special token spelled out in the text must stay text"
    assert tokenizer.decode(ids[:-1]) == tokenizer.decode(ids, skip_special_tokens=True) == text
    # a later call of the tokenizer reads special tokens again
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["hello world", "", "日本語 🙂", "x" * 50])
def test_student_answer_equal_to_the_teachers_text_has_the_same_ids(byte_tokenizer, text):
    """A rollout that says the text stops at its first stop token; rendering the finished chat gives the same ids."""
    tokenizer = byte_tokenizer()
    chat = [*QUESTION, {"role": "assistant", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    prompt = build_prompt_ids(tokenizer, QUESTION)
    assert rendered[: len(prompt)] == prompt
    rollout = rendered[len(prompt) : rendered.index(tokenizer.eos_token_id, len(prompt)) + 1]
    assert teacher_ids(tokenizer, text) == rollout


@pytest.mark.parametrize(
    ("template", "specials", "eos", "expected"),
    [
        (None, ("</s>", "<pad>"), "</s>", ["</s>"]),  # base model without a template
        (TURNS + "</s>" + REST, ("</s>", "<pad>"), "</s>", ["</s>"]),
        (TURNS + "</s>\n" + REST, ("</s>", "<pad>"), "</s>", ["</s>"]),  # nothing behind the stop token is kept
        (TURNS + "\n\n</s>" + REST, ("</s>", "<pad>"), "</s>", ["Ċ", "Ċ", "</s>"]),  # what comes before it is
        (TURNS + "<|end|></s>" + REST, ("<|end|>", "</s>", "<pad>"), "</s>", ["<|end|>", "</s>"]),
    ],
)
def test_end_of_turn_comes_from_the_template(byte_tokenizer, caplog, template, specials, eos, expected):
    tokenizer = byte_tokenizer(template, specials, eos=eos, pad="<pad>")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert tokens(tokenizer, end_of_turn_ids(tokenizer, stop_token_ids(tokenizer))) == expected
    assert not caplog.records


@pytest.mark.parametrize("token", ["<end_of_turn>", "<turn|>", "<|eot|>"])
def test_stop_tokens_of_generation_config_count_whatever_they_are_called(byte_tokenizer, tmp_path, caplog, token):
    """Gemma's turns end with a token that only generation_config.json lists, and whose name holds the word turn."""
    template = GEMMA.replace("<end_of_turn>", token)
    specials = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", token)
    tokenizer = byte_tokenizer(template, specials, eos="<eos>", pad="<pad>")
    tokenizer.save_pretrained(tmp_path)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(token)]
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {stops}}}')
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert stop_token_ids(loaded) == set(stops)
    with caplog.at_level(logging.WARNING, LOGGER):
        assert tokens(loaded, teacher_ids(loaded, "hi")) == ["h", "i", token]
    assert not caplog.records


def test_a_template_whose_turn_does_not_stop_a_rollout_warns_and_takes_eos(byte_tokenizer, caplog):
    tokenizer = byte_tokenizer(TURNS + "\n" + REST, ("</s>", "<pad>"), eos="</s>", pad="<pad>")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert tokens(tokenizer, end_of_turn_ids(tokenizer, stop_token_ids(tokenizer))) == ["</s>"]
    (record,) = caplog.records
    assert "</s>" in record.getMessage() and "generation_config.eos_token_id" in record.getMessage()


USERS = "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}"


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        # GLM: an answer ends where the next question begins
        (USERS + "{% endfor %}", "<|user|>", ["<|user|>"]),
        # Apertus, Qwen1.5: the end of a turn is left out at the end of the conversation
        (USERS + "{% if not loop.last %}<|end|>\n{% endif %}{% endfor %}", "<|end|>", ["<|end|>"]),
        # a question alone ends the turn before it
        (USERS + "{% if not loop.last %}{{ '\n' }}<|end|>{% endif %}{% endfor %}", "<|end|>", ["Ċ", "<|end|>"]),
        # the end of a turn counts first
        (USERS + "<|end|>{% endfor %}", "<|end|>", ["<|end|>"]),
        # a second question is refused
        (USERS + "{% if loop.index > 2 %}{{ raise_exception('no') }}{% endif %}{% endfor %}", "</s>", ["</s>"]),
    ],
)
def test_a_turn_may_end_where_the_next_begins(byte_tokenizer, template, eos, expected):
    tokenizer = byte_tokenizer(template, ("<|user|>", "<|assistant|>", "<|end|>", "</s>"), eos=eos, pad="</s>")
    assert tokens(tokenizer, end_of_turn_ids(tokenizer, stop_token_ids(tokenizer))) == expected


SYSTEM = [{"role": "system", "content": "be brief"}]
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAPES = {
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}",
        "<|im_end|>",
    ),
    # a bos token, and texts without white space at their ends
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>{{ '\n\n' + m.content | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>{{ '\n\n' }}{% endif %}",
        "<|eot|>",
    ),
    # no generation prompt, and the system prompt in the first question
    "Mistral": (
        "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]{{ system if loop.first }}"
        "{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
        "</s>",
    ),
    # a turn ends where the next begins
    "GLM": (
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
        "<|user|>",
    ),
    # earlier answers have no thinking, and the last has an empty one
    "Qwen 3": (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{% if m.role == 'assistant' and 'user' not in messages[loop.index:] | map(attribute='role') %}"
        "<think></think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}<think></think>{% endif %}",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chat", [QUESTION, SYSTEM + QUESTION, EARLIER + QUESTION, SYSTEM + EARLIER + QUESTION])
def test_a_teachers_row_is_what_the_template_writes(byte_tokenizer, name, chat):
    from tokenizers.processors import TemplateProcessing

    template, eos = SHAPES[name]
    specials = "<s> </s> <pad> [INST] [/INST] <|im_start|> <|im_end|> <|head|> <|/head|> <|eot|> <|user|> <|assistant|>"
    tokenizer = byte_tokenizer(template, tuple(specials.split()), eos=eos, pad="<pad>")
    tokenizer.bos_token = "<s>"
    adds_bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds_bos  # as Llama's: texts get one, conversations have one
    finished = [*chat, {"role": "assistant", "content": "hello world"}]
    if name == "GLM":
        finished += [{"role": "user", "content": "and now?"}]
    rendered = tokenizer.apply_chat_template(finished, tokenize=True, return_dict=False)
    prompt, answer = build_prompt_ids(tokenizer, chat), teacher_ids(tokenizer, "hello world")
    row = build_teacher_trajectory(torch.tensor(prompt), torch.tensor(answer))
    assert row["input_ids"].tolist() == rendered[: len(prompt) + len(answer)]
    assert tokens(tokenizer, answer) == ["hello", "Ġw", "o", "r", "l", "d", eos]
    assert row["loss_mask"].tolist() == [1] * len(answer)
    assert prompt.count(tokenizer.bos_token_id) == ("bos_token" in template)


def test_a_template_without_the_text_of_an_answer_is_refused(byte_tokenizer):
    """Of a question with the same text, the end would be that of the question."""
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="leaves out the text of an answer"):
        end_of_turn_ids(tokenizer, stop_token_ids(tokenizer))


def test_the_end_of_a_turn_is_tokenized_after_the_answer(spaced_tokenizer):
    """As Llama 2: the template has a space before the end of a turn, to which the tokenizer would add one."""
    tokenizer = spaced_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    chat = [*QUESTION, {"role": "assistant", "content": "answer"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert tokens(tokenizer, rendered)[-8:] == [*"answer", "▁", "</s>"]
    assert tokens(tokenizer, teacher_ids(tokenizer, "answer")) == ["▁", *"answer", "▁", "</s>"]
    assert rendered[len(build_prompt_ids(tokenizer, QUESTION)) :] == teacher_ids(tokenizer, "answer")


def test_template_kwargs_reach_the_template(byte_tokenizer):
    template = TURNS + "{{ closing }}</s>" + REST
    tokenizer = byte_tokenizer(template, ("</s>", "<pad>"), eos="</s>", pad="<pad>")
    assert tokens(tokenizer, teacher_ids(tokenizer, "", closing="ok")) == ["o", "k", "</s>"]
    assert tokenizer.decode(build_prompt_ids(tokenizer, QUESTION, {"closing": "ok"})) == "U: say hello\nA: "


@pytest.mark.parametrize("template", [None, TURNS + "</s>" + REST])
def test_pad_equal_to_eos_keeps_the_end_token(byte_tokenizer, template):
    tokenizer = byte_tokenizer(template, ("</s>",), eos="</s>", pad="</s>")
    assert tokens(tokenizer, teacher_ids(tokenizer, "hi")) == ["h", "i", "</s>"]


def test_without_any_stop_token_the_error_says_what_to_set(byte_tokenizer):
    tokenizer = byte_tokenizer(None, ("<pad>",), eos=None, pad="<pad>")
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        stop_token_ids(tokenizer)


# ---------------------------------------------------------------------- cutting


@pytest.mark.parametrize("truncation", ["right", "left", "error"])
def test_cut_teacher(truncation):
    ids = [5, 6, 7, 8, 2]
    for limit in (5, 6):
        assert cut_teacher(ids, limit, truncation) == ids
    if truncation == "error":
        with pytest.raises(ValueError, match=r"5 tokens .* data.max_response_length=3 .*data.truncation=error"):
            cut_teacher(ids, 3, truncation)
    else:  # right: like a cut rollout, without the end token
        assert cut_teacher(ids, 3, truncation) == {"right": [5, 6, 7], "left": [7, 8, 2]}[truncation]


def test_unknown_truncation_is_refused():
    with pytest.raises(ValueError, match="data.truncation=middle"):
        cut_teacher([1, 2], 1, "middle")


# ---------------------------------------------------------------------- prompt and trajectory


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "messages",
    [
        QUESTION,
        [{"role": "system", "content": "be brief 日本"}, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "<|im_end|> again"}],
    ],
    ids=["user", "system", "turns"],
)
def test_prompt_ids_equal_what_the_agent_loop_builds(byte_tokenizer, model_type, messages):
    tokenizer = byte_tokenizer()
    builder = create_continuous_token_builder(tokenizer, hf_model_type=model_type, chat_template_kwargs={})
    assert build_prompt_ids(tokenizer, messages) == builder.build_initial_tokens(messages)


def test_prompt_ids_follow_apply_chat_template_kwargs_as_the_agent_loop_does(byte_tokenizer):
    tokenizer = byte_tokenizer("{{ mood }}" + TURNS + "</s>" + REST, ("</s>", "<pad>"), eos="</s>", pad="<pad>")
    kwargs = {"mood": "calm "}
    builder = create_continuous_token_builder(tokenizer, hf_model_type="llama", chat_template_kwargs=kwargs)
    ids = build_prompt_ids(tokenizer, QUESTION, kwargs)
    assert ids == builder.build_initial_tokens(QUESTION)
    assert tokenizer.decode(ids) == "calm U: say hello\nA: "


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_trajectory_continues_from_the_prompt(dtype):
    prompt, answer = torch.tensor([3, 1, 4], dtype=dtype), torch.tensor([1, 5], dtype=dtype)
    trajectory = build_teacher_trajectory(prompt, answer)
    expected = {
        "prompts": [3, 1, 4],
        "responses": [1, 5],
        "input_ids": [3, 1, 4, 1, 5],
        "attention_mask": [1, 1, 1, 1, 1],
        "position_ids": [0, 1, 2, 3, 4],
        "response_mask": [1, 1],
        "loss_mask": [1, 1],
    }
    assert {name: tensor.tolist() for name, tensor in trajectory.items()} == expected
    assert {tensor.dtype for tensor in trajectory.values()} == {torch.int64}
    trajectory["loss_mask"].zero_()
    assert trajectory["response_mask"].tolist() == [1, 1], "the masks must not share memory"

    named = teacher_tensors(prompt, answer)
    assert {name: tensor.tolist() for name, tensor in named.items()} == {
        "teacher_input_ids": [3, 1, 4, 1, 5],
        "teacher_attention_mask": [1, 1, 1, 1, 1],
        "teacher_position_ids": [0, 1, 2, 3, 4],
    }


@pytest.mark.parametrize(("prompt", "answer"), [([], [1]), ([1], []), ([], [])])
def test_trajectory_needs_a_prompt_and_an_answer(prompt, answer):
    with pytest.raises(ValueError, match=f"got {len(prompt)} and {len(answer)} tokens"):
        build_teacher_trajectory(torch.tensor(prompt), torch.tensor(answer))

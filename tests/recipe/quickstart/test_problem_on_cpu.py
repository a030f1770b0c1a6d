"""recipe/gad/quickstart/problem.py: the quickstart's problem and its measure of style."""

import os
import random

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.gad.quickstart import problem as toy

CHAT = [{"role": "user", "content": "c a f"}, {"role": "assistant", "content": "well um c then a and f right"}]


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """The quickstart's problem (seed 0), with fewer training rows."""
    return toy.build_problem(tmp_path_factory.mktemp("toy") / "problem", n_train=40)


@pytest.fixture
def fast_base(monkeypatch):
    """Base student after two steps: the builds of one test in a second."""
    train = toy.train_base_student
    monkeypatch.setattr(toy, "train_base_student", lambda tokenizer, prompts, seed: train(tokenizer, prompts, seed, 2))


# ---------------------------------------------------------------------------------------------------------- problem


@pytest.mark.slow
def test_rows(problem):
    train, val = pd.read_parquet(problem / "train.parquet"), pd.read_parquet(problem / "val.parquet")
    assert (len(train), len(val)) == (40, 192)
    for rows in (train, val):
        assert list(rows.columns) == ["content", "teacher_response", "data_source", "extra_info"]
        assert [info["index"] for info in rows["extra_info"]] == list(range(len(rows)))
        assert set(rows["data_source"]) == {"toy"}
        for content, teacher in zip(rows["content"], rows["teacher_response"], strict=True):
            assert [message["role"] for message in content] == ["user"]
            assert toy.letters_right([content[0]["content"]], [teacher]) == 1.0
            assert len(teacher.split()) + 1 <= toy.MAX_RESPONSE_LENGTH
    prompts = [{content[0]["content"] for content in rows["content"]} for rows in (train, val)]
    assert len(prompts[1]) == 192 and not prompts[0] & prompts[1]


def test_longest_answer_fits():
    longest = max(len(toy.answer("a b c", "teacher", random.Random(i)).split()) for i in range(300))
    assert longest == 10  # opener, closer, two joiners, three fillers, three letters


@pytest.mark.slow
def test_tokenizer(problem):
    tokenizer = AutoTokenizer.from_pretrained(problem / "model")
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    text = CHAT[1]["content"]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 8 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text

    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<bos>", "<user>", "c", "a", "f", "<end>", "<assistant>"]
    assert whole == [*prompt, *ids, tokenizer.eos_token_id]


@pytest.mark.slow
def test_model(problem):
    tokenizer = AutoTokenizer.from_pretrained(problem / "model")
    model = AutoModelForCausalLM.from_pretrained(problem / "model")
    assert model.config.model_type == "llama" and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 31
    assert 80_000 < sum(p.numel() for p in model.parameters()) < 90_000
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.slow
def test_base_student_answers_in_its_own_style(problem):
    """It ends its answers and mostly repeats the letters, but its style is far from the teacher's."""
    tokenizer = AutoTokenizer.from_pretrained(problem / "model")
    model = AutoModelForCausalLM.from_pretrained(problem / "model")
    val = pd.read_parquet(problem / "val.parquet")
    chats = [content.tolist() for content in val["content"]]
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    torch.manual_seed(0)
    tokens = model.generate(**rows, max_new_tokens=toy.MAX_RESPONSE_LENGTH, do_sample=True)[
        :, rows["input_ids"].shape[1] :
    ]
    assert (tokens == tokenizer.eos_token_id).any(1).float().mean() > 0.9
    answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert toy.letters_right([chat[0]["content"] for chat in chats], answers) > 0.8
    assert toy.closeness(answers, list(val["teacher_response"])) < 0.35


@pytest.mark.slow
def test_verl_tokenizes_the_prompt(problem):
    """verl's agent loop builds the prompt by a model-specific builder; for a Llama it is the chat template, as is."""
    wiring = pytest.importorskip("verl.utils.tokenizer.continuous_token_wiring")
    tokenizer = AutoTokenizer.from_pretrained(problem / "model")
    builder = wiring.create_continuous_token_builder(tokenizer, hf_model_type="llama")
    assert builder.build_initial_tokens(CHAT[:1]) == tokenizer.convert_tokens_to_ids(
        ["<bos>", "<user>", "c", "a", "f", "<end>", "<assistant>"]
    )


def test_same_seed_same_files(tmp_path, fast_base):
    folders = [
        toy.build_problem(tmp_path / name, seed=seed, n_train=9, n_val=4)
        for name, seed in zip("abc", (5, 5, 6), strict=True)
    ]
    for name in toy.PROBLEM_FILES:
        a, b, c = ((folder / name).read_bytes() for folder in folders)
        assert a == b, name
        assert a != c or name == "model/tokenizer.json", name
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]  # nothing temporary is left


def test_building_leaves_the_random_state_alone(tmp_path, fast_base):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    toy.build_problem(tmp_path / "a", n_train=2, n_val=2)
    assert torch.equal(torch.rand(1), expected) and torch.get_num_threads() == threads


def test_reuse_and_refuse(tmp_path, fast_base):
    folder = tmp_path / "problem"
    folder.mkdir()  # an empty folder is as good as none
    toy.build_problem(folder, seed=1, n_train=4, n_val=2)
    stamp = (folder / "model/model.safetensors").stat().st_mtime_ns
    assert toy.build_problem(folder, seed=1, n_train=4, n_val=2) == folder
    assert (folder / "model/model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="asked for"):
        toy.build_problem(folder, seed=2, n_train=4, n_val=2)
    (folder / "val.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks val\.parquet"):
        toy.build_problem(folder, seed=1, n_train=4, n_val=2)
    (folder / "problem.json").unlink()
    with pytest.raises(ValueError, match="holds no toy problem"):
        toy.build_problem(folder, seed=1, n_train=4, n_val=2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a folder"):
        toy.build_problem(tmp_path / "file")
    with pytest.raises(ValueError, match="n_val"):
        toy.build_problem(tmp_path / "new", n_val=721)
    assert not (tmp_path / "new").exists()


def test_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("stopped")

    monkeypatch.setattr(toy, "train_base_student", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        toy.build_problem(tmp_path / "problem", n_train=2, n_val=2)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------- measure


def test_closeness_by_hand():
    assert toy.style_bigrams(["well a"]) == {("^", "well"): 1, ("well", "x"): 1, ("x", "$"): 1}
    assert toy.closeness(["well a"], ["well b"]) == 1.0  # the letters themselves do not count
    assert toy.closeness(["well a"], ["so"]) == 0.0
    # {^ well, well x, x $} against {^ so, so x, x $}: one of three in common
    assert toy.closeness(["well a"], ["so a"]) == pytest.approx(1 / 3)
    # {^ well, well x, ^ so, so x: 1/6 each, x $: 1/3} against {^ well, well x, x $: 1/3 each}: 1 - 4 / 6 / 2
    assert toy.closeness(["well a", "so a"], ["well a"]) == pytest.approx(2 / 3)
    assert toy.closeness([""], ["well a"]) == 0.0
    with pytest.raises(ValueError, match="needs answers"):
        toy.closeness([], ["well a"])


def test_closeness_of_the_styles():
    rng = random.Random(0)
    prompts = [" ".join(rng.sample(toy.LETTERS, 3)) for _ in range(400)]
    teacher, again, base = ([toy.answer(p, s, rng) for p in prompts] for s in ("teacher", "teacher", "base"))
    assert toy.closeness(teacher, again) > 0.93
    assert toy.closeness(base, teacher) < 0.3


def test_letters_right():
    assert toy.letters_right(["a b c", "a b c"], ["well b so a c", "well a a c"]) == 0.5


def test_bad_input_exits_with_2(tmp_path, capsys):
    assert toy.main(["--out", str(tmp_path / "new"), "--n_train", "0"]) == 2
    assert "n_train" in capsys.readouterr().err

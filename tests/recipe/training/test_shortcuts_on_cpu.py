"""Shortcuts of the discriminator (recipe/gad/training/shortcuts.py): tokens by hand, probes against scipy's root."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipe.gad.training.replay import PastGroup
from recipe.gad.training.rows import Group, Row
from recipe.gad.training.shortcuts import ShortcutProbe, canonical_ids, fit_probe, read_as, replaced_rows
from recipe.gad.training.state import load_state, save_state
from recipe.gad.training.trajectory import tokenize_teacher


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and two merges: "h" + "e", and then "t" + "he"."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"he": len(vocab), "the": len(vocab) + 1}
    bpe = Tokenizer(models.BPE(vocab, [("h", "e"), ("t", "he")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")


def ids(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


def test_sampled_tokens_become_those_of_their_text(tokenizer):
    the = ids(tokenizer, "the", "<|im_end|>")
    assert tokenize_teacher(tokenizer, ["the"], the[1:]) == [the]
    for sampled in (("t", "he"), ("t", "h", "e"), ("the",)):
        assert canonical_ids(tokenizer, ids(tokenizer, *sampled, "<|im_end|>")) == the
    assert canonical_ids(tokenizer, ids(tokenizer, "t", "h")) == ids(tokenizer, "t", "h"), "a cut answer has no end"
    assert canonical_ids(tokenizer, []) == []


def test_special_tokens_stay_where_they_are(tokenizer):
    sampled = ids(tokenizer, "t", "<|pad|>", "h", "e", "<|im_end|>", "<|im_end|>")
    assert canonical_ids(tokenizer, sampled) == ids(tokenizer, "t", "<|pad|>", "he", "<|im_end|>", "<|im_end|>")
    spelled = ids(tokenizer, *"<|pad|>", "h", "e")
    assert canonical_ids(tokenizer, spelled) == ids(tokenizer, *"<|pad|>", "he"), "text that looks like one stays text"


def test_an_answer_cut_inside_a_character_stays_as_it_is(tokenizer):
    whole = ids(tokenizer, "Ã", "©")  # the two bytes of é
    assert tokenizer.decode(whole) == "é"
    sampled = ids(tokenizer, "t", "h", "e") + whole[:1]
    assert canonical_ids(tokenizer, sampled) == sampled
    assert canonical_ids(tokenizer, ids(tokenizer, "t", "h", "e") + whole) == ids(tokenizer, "the") + whole


def test_d_reads_the_replaced_rows_and_the_others_as_they_are(tokenizer):
    prompt = torch.tensor([5, 6, 7])
    texts = ids(tokenizer, *"the"), ids(tokenizer, "the"), []
    answers = [torch.tensor(text, dtype=torch.int64) for text in texts]
    keys = ["u_0_0", "u_1_0", "u_2_0"]
    read = [canonical_ids(tokenizer, text) for text in texts]
    replaced, rows = replaced_rows(keys, [prompt] * 3, answers, read)
    assert replaced == {"u_0_0": Row("u_0_0_read", 4)} and list(rows) == ["u_0_0_read"]
    assert rows["u_0_0_read"]["input_ids"].tolist() == [5, 6, 7, *ids(tokenizer, "the")]
    group = Group("u", 3, [Row("u_0_0", 6), Row("u_1_0", 4)], teacher_tokens=9)
    assert [row.key for row in read_as([group], replaced)[0].rows()] == [
        "u_teacher_0", "u_0_0_read", "u_1_0", "u_filler_0"
    ]  # fmt: skip
    assert read_as([group], replaced)[0].tokens == 9 + 4 + 4 + 2
    assert read_as([group], {}) == [group]


@pytest.mark.parametrize(("ups", "downs"), [(3, 1), (50, 50), (7, 0)])
def test_a_probe_of_one_feature_is_the_root_of_its_gradient(ups, downs):
    """Of f(w) = mean log(1 + exp(-w d)) + 0.001 w^2 with d = 1 or -1."""

    def slope(w):
        return (-ups / (1 + np.exp(w)) + downs / (1 + np.exp(-w))) / (ups + downs) + 2e-3 * w

    differences = np.array([1.0] * ups + [-1.0] * downs).reshape(-1, 1)
    assert fit_probe(differences)[0] == pytest.approx(brentq(slope, -20, 20), abs=1e-3)
    assert fit_probe(differences * 100)[0] == pytest.approx(brentq(slope, -20, 20) / 100, abs=1e-5), (
        "units do not count"
    )


def test_a_feature_that_never_differs_has_no_weight():
    differences = np.stack([np.ones(8), np.zeros(8)], axis=-1)
    weights = fit_probe(differences)
    assert weights[0] > 1 and weights[1] == 0.0


def step(tokenizer, teachers, students):
    """Groups of one prompt and one sample each; an answer is given as its tokens."""
    sides = ([torch.tensor(ids(tokenizer, *answer)) for answer in answers] for answers in (teachers, students))
    return [PastGroup.of(torch.tensor([1]), teacher, [student]) for teacher, student in zip(*sides, strict=True)]


def test_probes_see_lengths_and_tokens_and_nothing_else(tokenizer):
    probe = ShortcutProbe(tokenizer)
    equal = step(tokenizer, ["abcd", "xy"] * 4, ["dcba", "zz"] * 4)
    assert probe.note(equal) == {"critic/student_noncanonical": 0.0}, "no pairs yet to fit a probe to"
    assert probe.note(equal)["critic/shortcut_length_acc"] == 0.5

    probe = ShortcutProbe(tokenizer)
    shorter = step(tokenizer, ["abcdef"] * 8, ["abc"] * 7 + ["abcdefgh"])
    probe.note(shorter)
    metrics = probe.note(shorter)
    assert metrics["critic/shortcut_length_acc"] in (7 / 8, 1.0)  # the square can prefer the middle
    assert metrics["critic/shortcut_tokens_acc"] == 0.5

    probe = ShortcutProbe(tokenizer)
    odd = step(tokenizer, [["the"]] * 8, [["t", "he"]] * 2 + [["a"]] * 6)
    probe.note(odd)
    metrics = probe.note(odd)
    assert metrics["critic/student_noncanonical"] == 0.25
    assert metrics["critic/shortcut_tokens_acc"] == (2 * 1 + 6 * 0.5) / 8


def test_a_resumed_probe_has_the_same_metrics(tokenizer, tmp_path):
    steps = [step(tokenizer, ["abcdef"] * 4, ["abc"] * k + ["abcdefgh"] * (4 - k)) for k in (1, 3, 2)]
    whole, first = ShortcutProbe(tokenizer), ShortcutProbe(tokenizer)
    for groups in steps[:2]:
        whole.note(groups)
        first.note(groups)
    save_state(tmp_path, {"probe": first.state_dict()})
    resumed = ShortcutProbe(tokenizer)
    resumed.load_state_dict(load_state(tmp_path, {"probe"})["probe"])
    assert resumed.note(steps[2]) == whole.note(steps[2])

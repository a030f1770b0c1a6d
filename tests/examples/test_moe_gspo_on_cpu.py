"""examples/gad/moe_gspo/tiny.py: the sizes of its models by hand, and the models that it writes."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from recipe.gad.quickstart.problem import build_tokenizer


@pytest.fixture(scope="module")
def tiny(load_script):
    return load_script("tiny", "examples/gad/moe_gspo")


def test_the_slice_has_the_width_of_the_real_models(tiny):
    tokenizer = build_tokenizer()
    student, discriminator = tiny.configs(tokenizer, "slice", 3)
    # Qwen3-30B-A3B: queries and output, keys and values, two norms of heads; router, gate, up and down; two norms
    attention = 2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128 + 2 * 128
    sparse = attention + 128 * 2048 + 128 * 3 * 2048 * 768 + 2 * 2048
    dense = 2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128 + 3 * 4096 * 12288 + 2 * 4096  # Qwen3-8B without norms of heads
    for config, hidden, layer in ((student, 2048, sparse), (discriminator, 4096, dense)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters == 2 * len(tokenizer) * hidden + 3 * layer + hidden
    assert (student.num_experts_per_tok, student.norm_topk_prob) == (8, True)
    assert student.model_type != discriminator.model_type and student.vocab_size == discriminator.vocab_size


@pytest.mark.parametrize("shape", ["tiny", "slice"])
def test_both_models_are_written_and_read_the_same_tokens(tiny, tmp_path, monkeypatch, shape):
    if shape == "slice":  # narrow
        dense, sparse = tiny.SLICE
        narrow = {"hidden_size": 64, "intermediate_size": 48, "head_dim": 4}
        few = {"num_experts": 16, "moe_intermediate_size": 8}
        monkeypatch.setitem(tiny.SHAPES, "slice", ({**dense, **narrow}, {**sparse, **narrow, **few, "hidden_size": 32}))
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    folders = [str(tmp_path / name) for name in ("tokenizer", "student", "discriminator")]
    monkeypatch.setattr(sys, "argv", ["tiny.py", *folders, "--shape", shape, "--layers", "1"])
    tiny.main()
    student = AutoModelForCausalLM.from_pretrained(folders[1])
    discriminator = AutoModelForTokenClassification.from_pretrained(folders[2], num_labels=1)
    first, second = map(AutoTokenizer.from_pretrained, folders[1:])
    assert first.get_vocab() == second.get_vocab() and "\n" in first.get_vocab()
    ids = torch.tensor([first("a b c")["input_ids"]])
    for model in (student, discriminator):
        assert model.config.num_hidden_layers == 1
        assert model.dtype == (torch.bfloat16 if shape == "slice" else torch.float32)
        assert model(ids).logits.isfinite().all()
    assert student(ids).logits.shape[-1] == len(first)

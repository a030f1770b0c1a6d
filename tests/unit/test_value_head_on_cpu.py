"""How a critic is built (verl/utils/model.py)."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from recipe.gad.training.value_head import with_number_dropout
from verl.utils.model import load_valuehead_model
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithValueHead


def build(path, **settings):
    config = AutoConfig.from_pretrained(path, attn_implementation="sdpa", num_labels=1)
    for name, value in settings.items():
        setattr(config, name, value)
    return load_valuehead_model(str(path), torch.float32, config, trust_remote_code=False).eval()


@pytest.mark.parametrize("float32", [True, False])
def test_scores_are_float32_under_bfloat16_autocast_when_asked_for(tiny_problem, float32):
    torch.manual_seed(0)
    model = build(tiny_problem / "model", float32_score_head=float32)
    ids = torch.randint(6, 20, (64, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        scores = model(input_ids=ids).logits[:, -1, 0] + 2.0
    assert scores.dtype == (torch.float32 if float32 else torch.bfloat16)
    assert (len(scores.unique()) == 64) == float32  # in bfloat16 some of 64 different sequences share a score


def test_the_float32_head_keeps_name_weights_and_gradient(tiny_problem):
    torch.manual_seed(0)
    model = build(tiny_problem / "model", float32_score_head=True)
    assert {"score.weight", "score.bias"} <= set(model.state_dict())
    hidden = torch.randn(3, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    expected = hidden.double() @ model.score.weight.double().T + model.score.bias.double()
    torch.testing.assert_close(model.score(hidden).double(), expected, atol=1e-6, rtol=0)
    model.score(hidden).sum().backward()
    assert model.score.weight.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_the_attention_asked_for_is_used(tiny_problem):
    assert build(tiny_problem / "model").config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("model_type", "expected"), [("nemotron_h", 0.0), ("gpt_neox", 0.0), ("llama", "0")])
def test_a_dropout_that_must_be_a_number_is_one_while_stock_code_sets_a_text(model_type, expected):
    config = AutoConfig.for_model(model_type)

    def stock_build(engine):
        engine.model_config.hf_config.hidden_dropout = "0"  # as in stock FSDPEngine._build_module
        return "module"

    engine = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    assert with_number_dropout(stock_build)(engine) == "module"
    assert config.hidden_dropout == expected
    if expected == 0.0:  # as before once the module is built
        with pytest.raises(Exception, match="hidden_dropout"):
            config.hidden_dropout = "0"


def test_stock_critics_are_built_that_way():
    assert FSDPEngineWithValueHead._build_module.__wrapped__ is FSDPEngine._build_module

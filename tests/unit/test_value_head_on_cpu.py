"""How a critic is built (verl/utils/model.py)."""

import pytest
import torch
from transformers import AutoConfig

from verl.utils.model import load_valuehead_model


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

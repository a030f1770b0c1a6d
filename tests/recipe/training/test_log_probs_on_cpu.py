"""Log-probabilities of packed tokens (recipe/gad/training/log_probs.py): stock verl's, bit for bit."""

import pytest
import torch

from recipe.gad.training import log_probs
from recipe.gad.training.log_probs import CHUNK, logprobs_from_logits
from verl.utils import torch_functional as stock


def with_gradient(function, logits, labels, weights):
    leaf = logits.clone().requires_grad_()
    found = function(leaf, labels)
    (found * weights).sum().backward()
    return found.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 1])
def test_numbers_and_gradients_are_those_of_the_loop_over_tokens(dtype, tokens):
    torch.manual_seed(tokens)
    logits, labels = (5 * torch.randn(tokens, 97)).to(dtype), torch.randint(0, 97, (tokens,))
    weights = torch.randn(tokens).to(dtype)
    ours = with_gradient(logprobs_from_logits, logits, labels, weights)
    for found, expected in zip(ours, with_gradient(stock.logprobs_from_logits, logits, labels, weights), strict=True):
        assert found.dtype == dtype and torch.equal(found, expected)
    exact = logits.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(ours[0].double(), exact, rtol=0, atol=1e-4 if dtype != torch.bfloat16 else 0.1)


def test_padded_rows_are_left_to_stock_verl():
    logits, labels = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    assert torch.equal(logprobs_from_logits(logits, labels), stock.logprobs_from_logits(logits, labels))


@pytest.mark.parametrize("kernel", ["FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", "NPU_CROSS_ENTROPY_LOSS_AVAILABLE"])
def test_a_kernel_gets_all_tokens_at_once(monkeypatch, kernel):
    calls = []
    monkeypatch.setattr(stock, kernel, True)
    monkeypatch.setattr(stock, "logprobs_from_logits", lambda *arguments: calls.append(arguments))
    logits, labels = torch.randn(2 * CHUNK, 5), torch.zeros(2 * CHUNK, dtype=torch.int64)
    logprobs_from_logits(logits, labels, inplace_backward=False)
    assert len(calls) == 1 and calls[0] == (logits, labels, False)


def test_the_engines_of_fsdp_use_it():
    from verl.workers.engine.fsdp import transformer_impl

    assert transformer_impl.logprobs_from_logits is log_probs.logprobs_from_logits

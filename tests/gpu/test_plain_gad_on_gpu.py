"""benchmarks/plain_gad.py: tokens that come from a replayed CUDA graph follow the model's own distribution."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PROMPTS, SAMPLES, TOKENS, TEMPERATURE = 32, 8, 48, 0.8
HEAD_STD = 0.2
"""Logits spread by about 2."""


def surprise_less_entropy(model, prompts: list[list[int]], groups: list[list[list[int]]]) -> torch.Tensor:
    """-log p of every sampled token, less its expectation under transformers' distribution in float32: (tokens,)."""
    differences = []
    for prompt, group in zip(prompts, groups, strict=True):
        for answer in group:
            logits = model(input_ids=torch.tensor([prompt + answer], device="cuda")).logits[0, len(prompt) - 1 : -1]
            log_probs = (logits / TEMPERATURE).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            differences.append(-log_probs[range(len(answer)), answer] - entropy)
    return torch.cat(differences)


@torch.no_grad()
def test_the_graph_samples_from_the_weights_of_the_call(load_script):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    plain = load_script("plain_gad", "benchmarks")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).cuda().eval()
    sampler = plain.Sampler(model, [1], PROMPTS * SAMPLES, TOKENS, TEMPERATURE)
    for longest in (40, 100, 60):  # widths of 64, 128 and 64 tokens: the third call finds a graph
        for parameter in model.parameters():
            if parameter.dim() == 2:  # other weights at every call; small ones, so that bfloat16 stays close to float32
                torch.nn.init.normal_(parameter, std=HEAD_STD if parameter is model.lm_head.weight else 0.02)
        lengths = torch.randint(1, longest + 1, (PROMPTS,)).tolist()
        prompts = [torch.randint(2, 512, (length,)).tolist() for length in [longest, *lengths[1:]]]
        groups = sampler.answers(prompts)
        assert all(len(a) == TOKENS or a[-1] == 1 for group in groups for a in group)
        assert len({tuple(a) for group in groups for a in group}) > 0.9 * PROMPTS * SAMPLES  # a replay draws anew
        found = surprise_less_entropy(model, prompts, groups)
        assert abs(found.mean()) < 5 * found.std() / len(found) ** 0.5

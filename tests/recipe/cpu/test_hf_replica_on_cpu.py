"""The Hugging Face rollout (recipe/gad/cpu/hf_replica.py): sampling by hand-made logits, then a tiny model."""

import asyncio
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from recipe.gad.cpu.hf_replica import HFServer, SeededSampling
from recipe.gad.quickstart.problem import tiny_llama
from verl.workers.config import HFModelConfig, RolloutConfig

LOGITS = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 9.0, 9.0], dtype=torch.float64)
VOCAB = 5
"""The last two ids of LOGITS are padding of the embedding."""
PROBABILITIES = np.exp(LOGITS[:VOCAB].numpy()) / np.exp(LOGITS[:VOCAB].numpy()).sum()


def sample(seeds, logits=LOGITS, vocab_size=VOCAB):
    """(ids, log-probabilities) of one step with the same logits in every row."""
    rows = len(seeds) if seeds is not None else 1
    processor = SeededSampling(seeds, vocab_size)
    ids = processor(torch.zeros(rows, 1, dtype=torch.int64), logits.repeat(rows, 1)).argmax(-1)
    return ids, processor.log_probs[0]


# ---------------------------------------------------------------------- SeededSampling


def test_samples_are_distributed_as_softmax():
    ids, log_probs = sample(list(range(4000)))
    counts = np.bincount(ids.numpy(), minlength=len(LOGITS))
    assert counts[VOCAB:].sum() == 0, "padding of the vocabulary is never chosen"
    assert chisquare(counts[:VOCAB], PROBABILITIES * 4000).pvalue > 0.01
    np.testing.assert_allclose(log_probs.numpy(), np.log(PROBABILITIES)[ids.numpy()], rtol=1e-12)


def test_steps_of_one_row_are_independent_samples():
    processor = SeededSampling([7], VOCAB)
    ids = [processor(None, LOGITS.clone().unsqueeze(0)).argmax(-1).item() for _ in range(3000)]
    assert chisquare(np.bincount(ids, minlength=VOCAB), PROBABILITIES * 3000).pvalue > 0.01
    pairs = np.bincount(np.array(ids[::2]) * VOCAB + np.array(ids[1::2]), minlength=VOCAB**2)
    assert chisquare(pairs, np.outer(PROBABILITIES, PROBABILITIES).flatten() * 1500).pvalue > 0.01


def test_greedy_takes_the_most_probable_real_token():
    ids, log_probs = sample(None)
    assert ids.tolist() == [3]
    assert log_probs.item() == pytest.approx(np.log(PROBABILITIES[3]), rel=1e-12)


def test_a_row_depends_on_its_own_seed_only():
    alone = [sample([seed])[0].item() for seed in range(40)]
    assert len(set(alone)) > 1
    assert sample(list(range(40)))[0].tolist() == alone
    assert sample(list(range(39, -1, -1)))[0].tolist() == alone[::-1]
    assert sample([3, 3, 3])[0].tolist() == [alone[3]] * 3


def test_tokens_that_another_processor_removed_are_not_chosen():
    logits = LOGITS.clone()
    logits[[0, 3]] = -torch.inf
    ids, log_probs = sample(list(range(200)), logits)
    assert set(ids.tolist()) == {1, 2, 4} and torch.isfinite(log_probs).all()


# ---------------------------------------------------------------------- HFServer


@pytest.fixture(scope="module")
def model_dir(byte_tokenizer, tmp_path_factory):
    """A tiny Llama with untied weights and more embeddings than tokens, so that stop tokens turn up after a while."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = tiny_llama(
        tokenizer,
        vocab_size=len(tokenizer) + 22,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # padding of the vocabulary has the largest logits: it must still never be sampled
        model.lm_head.weight[len(tokenizer) :] *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_server(folder, **rollout):
    settings = {"prompt_length": 32, "response_length": 24, "dtype": "float64", "max_num_seqs": 8, **rollout}
    model_config = HFModelConfig(path=str(folder), override_config={"attn_implementation": "sdpa"})
    return HFServer(RolloutConfig(name="hf", **settings), model_config)


@pytest.fixture(scope="module")
def server(model_dir):
    return make_server(model_dir)


def ask(server, requests, together=True):
    """Outputs for (prompt ids, sampling parameters), sent at once or one after the other."""

    async def run():
        server._queue, server._loop_task = asyncio.Queue(), None  # a fresh event loop
        calls = [server.generate(prompt, params, str(i)) for i, (prompt, params) in enumerate(requests)]
        try:
            return await asyncio.gather(*calls) if together else [await call for call in calls]
        finally:
            server._loop_task.cancel()

    return asyncio.run(run())


def requests_of(lengths, **params):
    rng = np.random.default_rng(0)
    base = {"temperature": 0.8, "top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0}
    return [(rng.integers(0, 250, n).tolist(), {**base, "seed": 100 + i, **params}) for i, n in enumerate(lengths)]


@torch.no_grad()
def reference_log_probs(folder, prompt, answer, temperature):
    """Float64 log-probabilities of the answer by one forward, over the tokenizer's vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    vocab = model.config.vocab_size - 22
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :vocab] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1).tolist()


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.0}], ids=str)
def test_concurrent_requests_equal_requests_one_by_one(server, params):
    requests = requests_of([3, 17, 9, 1, 30, 12], **params)
    together, alone = ask(server, requests), ask(server, requests, together=False)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    for a, b in zip(together, alone, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-10)
        assert len(a.log_probs) == len(a.token_ids)
    assert len({tuple(output.token_ids) for output in together}) == len(requests)


def test_batches_are_split_by_max_num_seqs_and_by_settings(model_dir):
    server, sizes = make_server(model_dir, max_num_seqs=2), []
    original = server._generate
    server._generate = lambda batch: sizes.append(len(batch)) or original(batch)
    requests = requests_of([4] * 5) + requests_of([4] * 2, temperature=1.0, max_tokens=3)
    outputs = ask(server, requests)
    assert sorted(sizes) == [1, 2, 2, 2]
    assert all(len(output.token_ids) <= 3 for output in outputs[5:])


def test_log_probs_are_those_of_the_sampling_distribution(server, model_dir):
    requests = requests_of([5, 20])
    for (prompt, _), output in zip(requests, ask(server, requests), strict=True):
        expected = reference_log_probs(model_dir, prompt, output.token_ids, temperature=0.8)
        assert output.log_probs == pytest.approx(expected, abs=1e-5)  # generate hands logits over in float32


def test_answers_stop_behind_the_first_stop_token_or_at_the_limit(server):
    stop = server.tokenizer.eos_token_id
    outputs = ask(server, requests_of([6] * 60, temperature=3.0))
    stopped = [output.token_ids for output in outputs if stop in output.token_ids]
    assert stopped and len(stopped) < len(outputs), "the test needs both kinds"
    assert all(ids.index(stop) == len(ids) - 1 for ids in stopped)
    cut = [output.token_ids for output in outputs if stop not in output.token_ids]
    assert {len(ids) for ids in cut} == {24}
    assert all(max(output.token_ids) < len(server.tokenizer) for output in outputs)
    assert {output.stop_reason for output in outputs} == {"completed"}


@pytest.mark.parametrize(
    ("prompt_length", "params", "expected"),
    [(4, {}, 24), (4, {"max_tokens": 7}, 7), (50, {}, 6), (60, {}, 1)],
    ids=["response_length", "max_tokens", "a long prompt", "a prompt beyond the context"],
)
def test_number_of_tokens(model_dir, prompt_length, params, expected):
    server = make_server(model_dir, ignore_eos=True)
    (output,) = ask(server, requests_of([prompt_length], temperature=3.0, **params))
    assert len(output.token_ids) == len(output.log_probs) == expected


def test_ignore_eos_goes_on_behind_stop_tokens(model_dir):
    server = make_server(model_dir, ignore_eos=True)
    outputs = ask(server, requests_of([6] * 40, temperature=3.0))
    stop = server.tokenizer.eos_token_id
    assert {len(output.token_ids) for output in outputs} == {24}
    assert any(stop in output.token_ids[:-1] for output in outputs)


def test_every_stop_token_of_generation_config_stops_and_nothing_else_of_it_counts(server, model_dir, tmp_path):
    """A folder's own sampling defaults (repetition penalty, minimal length, ...) must not bend the policy."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    space = server.tokenizer("a b")["input_ids"][1]
    stops = [server.tokenizer.eos_token_id, space]
    bends = {"repetition_penalty": 5.0, "min_new_tokens": 20, "no_repeat_ngram_size": 1, "temperature": 0.1, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "do_sample": True, **bends}))
    requests = requests_of([6] * 30, temperature=3.0)
    expected = []
    for output in ask(server, requests):
        ids = output.token_ids
        expected.append(ids[: ids.index(space) + 1] if space in ids else ids)
    assert any(ids[-1] == space for ids in expected)
    assert [output.token_ids for output in ask(make_server(folder), requests)] == expected


def test_top_k_chooses_among_real_tokens(server):
    """top_k=1 is greedy over the tokenizer's vocabulary although padding ids have larger logits."""
    greedy = ask(server, requests_of([5, 9], temperature=0.0))
    top_1 = ask(server, requests_of([5, 9], temperature=1.0, top_k=1))
    assert [output.token_ids for output in top_1] == [output.token_ids for output in greedy]
    assert all(log_prob == pytest.approx(0.0, abs=1e-12) for output in top_1 for log_prob in output.log_probs)


def test_media_is_refused(server):
    with pytest.raises(ValueError, match="text only"):
        asyncio.run(server.generate([1], {}, "0", image_data=["picture"]))


def test_a_bad_batch_reaches_its_callers_and_the_server_lives_on(server):
    async def run():
        server._queue, server._loop_task = asyncio.Queue(), None
        (good,) = requests_of([4])
        bad = asyncio.create_task(server.generate([10**6], good[1], "bad"))
        gone = asyncio.create_task(server.generate(*requests_of([4], temperature=0.5)[0], "gone"))
        await asyncio.sleep(0)  # both are in the queue
        gone.cancel()
        results = await asyncio.gather(bad, gone, return_exceptions=True)
        output = await asyncio.wait_for(server.generate(*good, "good"), timeout=30)
        server._loop_task.cancel()
        return results, output

    (bad, gone), output = asyncio.run(run())
    assert isinstance(bad, IndexError) and isinstance(gone, asyncio.CancelledError)
    assert output.token_ids


# ---------------------------------------------------------------------- weights


def test_new_weights_change_the_answers(model_dir):
    server, requests = make_server(model_dir), requests_of([5, 9])
    before = ask(server, requests)
    assert [output.extra_fields["global_steps"] for output in before] == [None, None]
    state = {name: tensor.float() for name, tensor in server.model.state_dict().items()}
    torch.manual_seed(1)
    changed = {name: tensor + 0.5 * torch.randn_like(tensor) for name, tensor in state.items()}
    asyncio.run(server.update_weights(changed, 7))
    after = ask(server, requests)
    assert [output.token_ids for output in after] != [output.token_ids for output in before]
    assert [output.extra_fields["global_steps"] for output in after] == [7, 7]
    assert server.model.lm_head.weight.dtype == torch.float64
    asyncio.run(server.update_weights(state, 8))
    assert [output.token_ids for output in ask(server, requests)] == [output.token_ids for output in before]


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_missing_weights_are_refused(model_dir, name):
    server = make_server(model_dir)
    state = server.model.state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"missing .*{name}"):
        asyncio.run(server.update_weights(state, 1))


def test_unknown_weights_are_refused(server):
    state = {**server.model.state_dict(), "base_model.lora_A.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="(?s)unknown .*base_model.lora_A.weight.*LoRA"):
        asyncio.run(server.update_weights(state, 1))


def test_weights_of_another_shape_are_refused(server):
    state = {**server.model.state_dict(), "model.norm.weight": torch.zeros(1)}  # copying it would repeat it
    with pytest.raises(ValueError, match="of another shape .*model.norm.weight"):
        asyncio.run(server.update_weights(state, 1))


def test_the_experts_of_a_layer_arrive_one_by_one(byte_tokenizer, tmp_path):
    """Names and values as transformers writes them to disk: it splits the weight that it keeps fused in memory."""
    tokenizer = byte_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, moe_intermediate_size=8, intermediate_size=24, num_experts=3,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    server = make_server(tmp_path / "start")
    policy = Qwen3MoeForCausalLM(config)
    policy.save_pretrained(tmp_path / "policy")
    on_disk = load_file(tmp_path / "policy/model.safetensors")
    assert "model.layers.1.mlp.experts.2.gate_proj.weight" in on_disk
    asyncio.run(server.update_weights(on_disk, 1))
    loaded = server.model.state_dict()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded[name], tensor.double()), name
    (output,) = ask(server, requests_of([5], temperature=0.0))
    ids = torch.tensor([requests_of([5])[0][0] + output.token_ids])
    policy.double().set_experts_implementation("eager")
    with torch.no_grad():
        logits = policy(input_ids=ids).logits
    assert logits[0, 4:-1].argmax(-1).tolist() == output.token_ids
    fused = {name: tensor + 1 for name, tensor in policy.state_dict().items()}  # as merged LoRA arrives
    asyncio.run(server.update_weights(fused, 2))
    assert all(torch.equal(server.model.state_dict()[name], tensor.double()) for name, tensor in fused.items())
    del on_disk["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.layers.0.mlp.experts.1.up_proj.weight'\]"):
        asyncio.run(server.update_weights(on_disk, 3))


def test_a_tied_head_need_not_be_sent(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    config = model.config
    config.tie_word_embeddings = True
    shutil.copytree(model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    server = make_server(tmp_path / "model")
    state = {name: torch.zeros_like(tensor) for name, tensor in server.model.state_dict().items()}
    del state["lm_head.weight"]
    asyncio.run(server.update_weights(state, 1))
    assert (server.model.lm_head.weight == 0).all()

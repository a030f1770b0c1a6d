"""recipe/gad/training/lora.py: adapters of a discriminator against float64, and merged checkpoints."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from recipe.gad.run.checkpoint import LORA_META, has_score_head, verify_hf_folder
from recipe.gad.run.lora import adapter_problem
from recipe.gad.training.lora import add_adapters, merge_adapters
from verl.trainer.ppo.core_algos import compute_grouped_discriminator_loss
from verl.utils.model import load_valuehead_model

RANK, ALPHA, LR = 3, 12, 0.01
IDS = torch.tensor([[1, 9, 17, 22, 5, 2], [1, 9, 4, 4, 8, 2], [1, 9, 11, 3, 19, 2]])  # a teacher and two students
FAMILY = {"target_modules": "all-linear", "target_parameters": None, "exclude_modules": None}


MOE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip


def load(folder):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa", num_labels=1)
    config.float32_score_head = True
    return load_valuehead_model(str(folder), torch.float32, config, trust_remote_code=False)


def discriminator(tiny_problem):
    return load(tiny_problem / "model")


def adapted(tiny_problem, **settings):
    settings = SimpleNamespace(**{"lora_rank": RANK, "lora_alpha": ALPHA, **FAMILY, **settings})
    return add_adapters(discriminator(tiny_problem), settings, seed=7)


def loss_of(scores):
    return compute_grouped_discriminator_loss(scores[None, 1:], scores[:1], torch.full((1, 2), 0.5))[0]


def with_adapters(tiny_problem):
    return trained(adapted(tiny_problem))


def trained(model):
    """The model with adapters that are not zero, as after some training."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_one_update_is_that_of_plain_float64_code_and_frozen_weights_stay(tiny_problem):
    model = with_adapters(tiny_problem)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = model(input_ids=IDS, use_cache=False).logits[:, -1, 0]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss_of(scores).backward()
    optimizer.step()
    after = model.state_dict()

    # the same by hand: a plain model whose maps are W + alpha / r B A, with A, B and the head as the only variables
    plain = discriminator(tiny_problem).double()
    plain.score.__class__ = torch.nn.Linear  # computes in float64
    variables = {
        name: value.double().requires_grad_() for name, value in before.items() if "lora_" in name or ".score." in name
    }
    weights = {}
    for name, value in before.items():
        module = name.removeprefix("base_model.model.").removesuffix(".base_layer.weight")
        if name in variables and "lora_" not in name:
            weights[name.removeprefix("base_model.model.")] = variables[name]
        elif name.endswith(".base_layer.weight"):
            a, b = (variables[f"base_model.model.{module}.lora_{factor}.default.weight"] for factor in "AB")
            weights[f"{module}.weight"] = value.double() + ALPHA / RANK * b @ a
    expected_scores = torch.func.functional_call(plain, weights, (), {"input_ids": IDS}).logits[:, -1, 0]
    gaps = expected_scores[0] - expected_scores[1:]
    gradients = torch.autograd.grad(torch.nn.functional.softplus(-gaps).mean(), list(variables.values()))

    torch.testing.assert_close(scores.double(), expected_scores, atol=1e-5, rtol=1e-5)
    assert len(variables) == 2 * 2 * 7 + 2  # two layers of seven maps; weight and bias of the head
    for name, gradient in zip(variables, gradients, strict=True):
        step = (before[name].double() - after[name].double()) / LR
        torch.testing.assert_close(step, gradient, atol=2e-4, rtol=1e-3)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in variables)
    assert all(p.requires_grad == (name in variables) for name, p in model.named_parameters())


def test_new_adapters_come_from_the_seed_and_change_no_score(tiny_problem):
    first, second = adapted(tiny_problem), adapted(tiny_problem)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    with torch.no_grad():
        assert torch.equal(first(input_ids=IDS).logits, discriminator(tiny_problem)(input_ids=IDS).logits)


def test_the_head_gets_no_adapter_whatever_is_excluded(tiny_problem):
    def adapters(**settings):
        names = dict(adapted(tiny_problem, **settings).named_parameters())
        return {name.split(".")[-4] for name in names if "lora_A" in name}

    everywhere = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapters() == everywhere
    assert adapters(exclude_modules=r".*\.(q|k)_proj") == everywhere - {"q_proj", "k_proj"}
    assert adapters(exclude_modules=["q_proj"]) == everywhere - {"q_proj"}
    assert adapters(target_modules=["v_proj", "score"]) == {"v_proj"}


def save(model, role_folder, start, shards=1):
    """What verl saves of a model with adapters: weights under PEFT's names, rank and alpha."""
    folder = role_folder / "huggingface"
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (role_folder / LORA_META).write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}))
    state, names = model.state_dict(), sorted(model.state_dict())
    files = {
        name: f"model-{i % shards}.safetensors" if shards > 1 else "model.safetensors" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: state[name].clone() for name in names if files[name] == file}, folder / file)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merged_folder_gives_the_scores_of_the_model_with_its_adapters(tiny_problem, tmp_path, shards):
    model = with_adapters(tiny_problem).eval()
    folder = save(model, tmp_path, tiny_problem / "model", shards)
    assert any("PEFT" in problem for problem in verify_hf_folder(folder))
    merge_adapters(tmp_path)
    assert verify_hf_folder(folder) == [] and has_score_head(folder)
    assert not list(folder.glob(".*")), "no temporary file stays"
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    loaded, info = AutoModelForTokenClassification.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
        assert (discriminator(tiny_problem)(input_ids=IDS).logits - expected).abs().max() > 1e-3
    own = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, own[name], atol=1e-6, rtol=0)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    merge_adapters(tmp_path)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}, "merging again changes nothing"


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "qwen3_moe"])
def test_discriminators_of_other_families_are_merged(family, tmp_path):
    targets = ["q_proj", "v_proj"] if "moe" in family else "all-linear"
    start = tmp_path / "start"
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MOE, pad_token_id=0))
    lm.save_pretrained(start)
    settings = SimpleNamespace(lora_rank=RANK, lora_alpha=ALPHA, **{**FAMILY, "target_modules": targets})
    assert adapter_problem(start, "critic.model", settings, True, False) is None
    model = trained(add_adapters(load(start), settings, seed=0)).eval()
    folder = save(model, tmp_path / "critic", start)
    merge_adapters(tmp_path / "critic")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(load(folder).eval()(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)
        assert (load(start).eval()(input_ids=IDS).logits - expected).abs().max() > 1e-3


def test_adapters_of_another_kind_are_left_as_they_are(tiny_problem, tmp_path, caplog):
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["embed_tokens", "q_proj"])
    folder = save(get_peft_model(discriminator(tiny_problem), settings), tmp_path, tiny_problem / "model")
    before = load_file(folder / "model.safetensors")
    merge_adapters(tmp_path)
    assert "lora_embedding_A" in caplog.text and "not merged" in caplog.text
    assert load_file(folder / "model.safetensors").keys() == before.keys()
    assert any("gad export" in problem for problem in verify_hf_folder(folder))


def test_adapters_on_fused_experts_are_refused_before_the_run_and_never_merged(tmp_path, caplog):
    config = AutoConfig.for_model("qwen3_moe", **MOE, num_labels=1)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    settings = SimpleNamespace(lora_rank=RANK, lora_alpha=ALPHA, **FAMILY)
    attention = SimpleNamespace(**{**vars(settings), "target_modules": ["q_proj", "v_proj"]})
    for critic, key in ((True, "critic.model"), (False, "actor_rollout_ref.model")):
        finding = adapter_problem(tmp_path, key, settings, critic, False)
        assert re.search(rf"{key}.target_modules=all-linear puts an adapter on model.layers.0.mlp", str(finding))
        assert f"{key}.target_modules=[q_proj,k_proj,v_proj,o_proj]" in str(finding)
        assert adapter_problem(tmp_path, key, attention, critic, False) is None
        attention.target_modules = ["no_such"]
        assert "no adapters for" in str(adapter_problem(tmp_path, key, attention, critic, False))
        attention.target_modules = ["q_proj", "v_proj"]

    state = add_adapters(AutoModelForTokenClassification.from_config(config), settings, seed=0).state_dict()
    role = tmp_path / "critic"
    (role / "huggingface").mkdir(parents=True)
    (role / LORA_META).write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    save_file({name: value.clone() for name, value in state.items()}, role / "huggingface" / "model.safetensors")
    merge_adapters(role)
    assert load_file(role / "huggingface" / "model.safetensors").keys() == state.keys()
    assert "experts" in caplog.text and "not merged" in caplog.text

"""A discriminator of every family (recipe/gad/run/score_head.py): tiny random models against docs/models.md.

Run as a script, it prints the table of docs/models.md for the installed transformers.
"""

import inspect
import re
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recipe.gad.export import export_model
from recipe.gad.quickstart.problem import build_tokenizer
from recipe.gad.run.checkpoint import has_score_head
from recipe.gad.run.findings import InputError
from recipe.gad.run.score_head import check_loaded, discriminator_problem, register_discriminator
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.model import load_valuehead_model

PAGE = Path(__file__).resolve().parents[3] / "docs/models.md"
NEWER = " (not in 5.9.0)"
"""How the page marks families that only the newer of its two versions of transformers has."""
VOCABULARY = 64
MOST_PARAMETERS = 4_000_000
REPRESENTATIVE = ("gpt_bigcode", "llama", "llama4", "llama4_text", "nemotron_h", "qwen2_5_vl", "qwen3_5_moe_text")
"""Of each kind one: a head named classifier, transformers' class, no backbone, another prefix, a
hidden_dropout that must be a number, a wrapper with other names on disk, MoE."""

TINY = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_size": 32, "d_model": 32, "n_embd": 32, "n_embed": 32, "embed_dim": 32,
    "embedding_size": 32, "hidden_size_per_layer_input": 8, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "head_dim": 8, "rotary_dim": 4,
    "intermediate_size": 48, "intermediate_size_mlp": 48, "d_ff": 48, "ffn_dim": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_topk": 2,
    "top_k_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64,
    "n_positions": 64, "sliding_window": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "ssm_state_size": 8,
    "state_size": 8, "mamba_n_groups": 1, "n_groups": 1, "mamba_dt_rank": 4, "time_step_rank": 4, "chunk_size": 8,
    "mamba_chunk_size": 8,
}  # fmt: skip
"""Sizes by the names that configurations give them."""
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1,
    "num_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 32, "embed_dim": 32, "head_dim": 16,
    "num_key_value_heads": 2, "global_head_dim": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
    "num_position_embeddings": 16, "position_embedding_size": 16,
}  # fmt: skip
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
MLA = {"num_key_value_heads": 4}
SPECIAL = {
    "bamba": {"attn_layer_indices": [1]},
    "ctrl": {"n_positions": 64, "dff": 48},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": {**MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**MLA, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen2_5_vl_text": MROPE,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen3_vl_text": MROPE,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "youtu": MLA,
    "zamba": {"layer_types": ["mamba", "hybrid"], "n_mamba_heads": 2, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "mamba_ngroups": 1, "n_mamba_heads": 4},
}
"""What a family needs beside TINY."""
WRAPPERS = (
    "gemma3",
    "gemma4",
    "llama4",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
)
"""Configurations that wrap a language model in text_config."""
FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name for name in WRAPPERS if name in CONFIG_MAPPING)})


def sized(kind, sizes, **more):
    """A configuration of a class with those of the sizes that it knows."""
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
    return kind(**{name: value for name, value in sizes.items() if name in known}, **more)


def tiny_config(model_type):
    kind = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    if "text_config" not in kind.sub_configs:
        return sized(kind, {**TINY, **special})
    text = kind.sub_configs["text_config"]
    parts = {}
    for name, part in kind.sub_configs.items():
        if part is AutoConfig:
            part = type(getattr(kind(), name))
        if name == "text_config" or not hasattr(part, "model_type"):
            continue
        parts[name] = sized(part, VISION).to_dict()
    if text.__name__ == "AutoConfig":
        parts["text_config"] = sized(CONFIG_MAPPING["mistral"], TINY).to_dict()
    else:
        parts["text_config"] = sized(text, {**TINY, **SPECIAL.get(text.model_type, {})}).to_dict()
    return kind(**parts)


def auto_of(kind):
    """The auto class with which verl loads an actor of this configuration class."""
    image = AutoModelForImageTextToText
    return image if kind in image._model_mapping else AutoModelForCausalLM


def language_model(config):
    """The family's language model with random weights, as the actor of training has it."""
    auto = auto_of(type(config))
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config, attn_implementation="eager").parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    return auto.from_config(config, attn_implementation="eager").float().eval()


def load(folder, **settings):
    """As a critic of GAD is loaded."""
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager", num_labels=1, **settings)
    config.classifier_dropout, config.float32_score_head = 0.0, True
    torch.manual_seed(1)
    return aligned(load_valuehead_model(str(folder), torch.float32, config, trust_remote_code=False).eval())


def aligned(model):
    """The same model, with its weights copied out of the mapped file: their place in it changes how kernels round."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


IDS = torch.randint(3, 30, (4, 9), generator=torch.Generator().manual_seed(2))


def scores(model):
    return model(input_ids=IDS, use_cache=False).logits[..., 0]


def loss(model):
    student, teacher = scores(model)[:, -1].chunk(2)
    return F.softplus(student - teacher).mean()


def refused(model_type, folder):
    """The finding with which the check refuses the family, or None."""
    kind = CONFIG_MAPPING[model_type]
    config = kind() if getattr(kind, "is_encoder_decoder", False) else tiny_config(model_type)
    lm = auto_of(kind)._model_mapping[kind]
    config.architectures = [lm.__name__]
    config.save_pretrained(folder)
    return discriminator_problem(folder)


def exercise(model_type, folder):
    """Everything that a discriminator goes through, with its values; returns the name of its class."""
    lm = language_model(tiny_config(model_type))
    lm.save_pretrained(folder / "lm")
    model = load(folder / "lm")
    head = getattr(model, "score", None) or model.classifier
    assert head(torch.zeros(1, head.in_features, dtype=torch.bfloat16)).dtype == torch.float32
    torch.nn.init.normal_(head.bias)

    # the language model's own backbone, without ours
    backbone = next(m for m in lm.modules() if type(m) is type(getattr(model, model.base_model_prefix)))
    with torch.no_grad():
        hidden = backbone(input_ids=IDS, use_cache=False).last_hidden_state
        expected = hidden.double() @ head.weight.double().T + head.bias.double()
        torch.testing.assert_close(scores(model).double(), expected[..., 0], atol=1e-5, rtol=1e-4)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = loss(model)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert loss(model) < before
        trained = scores(aligned(model))

    # verl's checkpoint of a run, and what starts from it: the next stage, gad export, a run from that export
    settings = {"save_contents": ["model", "hf_model"], "load_contents": ["model"]}
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    manager = FSDPCheckpointManager(model, optimizer, None, build_tokenizer(), settings)
    critic = folder / "global_step_1/critic"
    manager.save_checkpoint(str(critic), None, 1)
    assert has_score_head(critic / "huggingface")
    export_model(critic, folder / "export", dtype="float32")
    with torch.no_grad():
        for stored in (critic / "huggingface", folder / "export"):
            assert discriminator_problem(stored) is None
            again = load(stored)
            assert scores(again).equal(trained), stored.name
    return type(again).__name__


def outcome(model_type, folder):
    """The row of docs/models.md: (class, result)."""
    kind = CONFIG_MAPPING[model_type]
    stock = AutoModelForTokenClassification._model_mapping.get(kind, None)
    own = stock is not None and hasattr(sys.modules[stock.__module__], stock.__name__)
    try:
        problem = refused(model_type, folder / "config")
    except Exception as error:
        return "", f"not tried: no tiny configuration ({first_line(error)})"
    if problem is not None and "transformers cannot build" in problem.what:
        return "", f"not tried: no tiny model ({first_line(problem.what.split('discriminator (')[1][:-1])})"
    if problem is not None:
        return "", "refused: " + re.sub(r"^model type \S+ cannot be a discriminator: ", "", problem.what)
    try:
        language_model(tiny_config(model_type))(input_ids=IDS)
    except Exception as error:
        return "", f"not tried: no tiny model ({first_line(error)})"
    name = exercise(model_type, folder)
    return f"`{name}`", "ok, transformers' class" if own else "ok"


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:80].replace("|", "/").rstrip(" :")


def table():
    """model type -> (class, result) of docs/models.md."""
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) ?\| (.*?) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return {name: (built, result.removesuffix(NEWER)) for name, built, result in rows}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('rank')}/s", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_representative_families_are_as_the_page_says(model_type, tmp_path, one_rank):
    assert outcome(model_type, tmp_path) == table()[model_type]


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted({*FAMILIES} - {*REPRESENTATIVE}))
def test_every_other_family_is_as_the_page_says(model_type, tmp_path, one_rank):
    assert outcome(model_type, tmp_path) == table()[model_type]


def test_the_page_names_every_family_of_the_installed_transformers():
    newer = {*re.findall(rf"^\| `([\w-]+)` .*{re.escape(NEWER)} \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)}
    version = transformers.__version__
    assert newer and {*FAMILIES} == {*table()} - (newer if version.startswith("5.9.") else set()), version


# ---------------------------------------------------------------------- loading


def test_a_family_that_transformers_knows_gets_transformers_class_and_the_same_weights(tiny_problem):
    ours = load(tiny_problem / "model")
    config = AutoConfig.from_pretrained(tiny_problem / "model", attn_implementation="eager", num_labels=1)
    torch.manual_seed(1)
    stock = AutoModelForTokenClassification.from_pretrained(
        tiny_problem / "model", config=config, dtype=torch.float32
    ).eval()
    assert type(ours) is type(stock)
    assert all(ours.state_dict()[name].equal(value) for name, value in stock.state_dict().items())
    assert scores(ours).equal(scores(aligned(stock)))


def test_a_built_head_computes_in_float32_and_keeps_its_weights_dtype(tmp_path):
    language_model(tiny_config("olmo2")).save_pretrained(tmp_path)
    model = load(tmp_path).to(torch.bfloat16)
    hidden = torch.randn(3, 32, dtype=torch.bfloat16)
    expected = hidden.double() @ model.score.weight.double().T + model.score.bias.double()
    assert model.score(hidden).dtype == torch.float32 and model.score.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.score(hidden).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lost", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_would_be_random_stops_the_load(tmp_path, lost):
    language_model(tiny_config("olmo2")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"1 tensors .*would be random \\({lost}\\).*Fix: "):
        load(tmp_path)


def test_the_head_of_another_library_is_refused():
    loaded = {"missing_keys": {"score.weight", "score.bias"}, "unexpected_keys": {"lm_head.weight"}}
    check_loaded(loaded, "folder")
    with pytest.raises(InputError, match="folder holds a score head named v_head"):
        check_loaded({**loaded, "unexpected_keys": {"v_head.summary.weight"}}, "folder")


def test_without_gad_and_with_flash_attention_the_stock_function_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("verl.utils.model._stock_load_valuehead_model", lambda *arguments: arguments)
    config = AutoConfig.for_model("olmo2")
    assert load_valuehead_model("folder", torch.float32, config, False) == ("folder", torch.float32, config, False)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of_tomorrow"}')
    assert "cannot build this model" in discriminator_problem(tmp_path).what


def test_code_from_the_hub_is_refused_unless_it_brings_a_class():
    class Remote(PreTrainedConfig):
        model_type = "remote"

    config = Remote(auto_map={"AutoModelForCausalLM": "modeling.RemoteForCausalLM"})
    with pytest.raises(InputError, match="its code has no AutoModelForTokenClassification"):
        register_discriminator(config, trust_remote_code=True)
    config.auto_map["AutoModelForTokenClassification"] = "modeling.RemoteForTokenClassification"
    assert register_discriminator(config, trust_remote_code=True) == "RemoteForTokenClassification"


def main(names):
    from transformers.utils import logging

    from verl.utils.checkpoint.fsdp_checkpoint_manager import logger

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    logger.disabled = True
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name in names or FAMILIES:
            (Path(folder) / name).mkdir()
            try:
                built, result = outcome(name, Path(folder) / name)
            except Exception as error:
                built, result = "", f"FAILED: {type(error).__name__} {first_line(error)}"
            print(f"| `{name}` | {built} | {result} |".replace("|  |", "| |"), flush=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])

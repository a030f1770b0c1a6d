"""Shared by all tests: the CPU platform, and a tiny real model with real data on disk."""

import importlib.util
import os
import random
import sys
from pathlib import Path

os.environ["VERL_PLATFORM"] = "cpu"  # before the first import of verl
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
    del os.environ["CUDA_VISIBLE_DEVICES"]  # an empty string stops Ray

import pytest


@pytest.fixture(scope="session")
def load_script():
    """Function from a name to scripts/NAME.py as a module (no package: the verl wheel ships one so named)."""

    def load(name: str):
        file = Path(__file__).resolve().parents[1] / f"scripts/{name}.py"
        spec = importlib.util.spec_from_file_location(f"gad_{name}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tiny_problem(tmp_path_factory):
    """Folder with model/ (random 2-layer Llama, word tokens), train.parquet (64 rows) and val.parquet (8 rows)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from recipe.gad.quickstart.problem import build_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))
    rng = random.Random(0)

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    for name, size in (("train", 64), ("val", 8)):
        rows = [
            {
                "content": [{"role": "user", "content": sentence(2, 5)}],
                "teacher_response": sentence(2, 9),
                "data_source": "tiny",
                "extra_info": {"index": index},
            }
            for index in range(size)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="session")
def compose_config(tiny_problem):
    """Function composing gad_trainer for the tiny problem on one CPU rank, with overrides."""
    from hydra import compose, initialize_config_module

    def compose_config(*overrides: str):
        base = [
            "device=cpu",
            f"actor_rollout_ref.model.path={tiny_problem}/model",
            f"data.train_files={tiny_problem}/train.parquet",
            f"data.val_files={tiny_problem}/val.parquet",
            "data.train_batch_size=8",
            "data.max_prompt_length=16",
            "data.max_response_length=12",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "critic.optim.lr=1e-3",
            "gad.poll_interval=0.02",
            "trainer.logger=[console]",
        ]
        with initialize_config_module(config_module="recipe.gad.config", version_base=None):
            return compose("gad_trainer", overrides=[*base, *overrides])

    return compose_config

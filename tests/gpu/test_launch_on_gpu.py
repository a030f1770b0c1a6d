"""Two steps through the real launch scripts with vLLM on a GPU, and two GPUs against one: python -m pytest tests/gpu"""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipe.gad.run.checkpoint import has_score_head, latest_complete_checkpoint

ROOT = Path(__file__).parents[2]
TIMEOUT = 500  # seconds; vLLM's start is most of it
PROMPT, RESPONSE, PROMPTS, SAMPLES = 16, 32, 16, 4
SMALL = [
    f"data.train_batch_size={PROMPTS}",
    f"data.max_prompt_length={PROMPT}",
    f"data.max_response_length={RESPONSE}",
    "data.dataloader_num_workers=0",
    f"actor_rollout_ref.rollout.n={SAMPLES}",
    "actor_rollout_ref.rollout.enforce_eager=True",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.2",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=1073741824",  # others may use the GPU as well
    f"actor_rollout_ref.rollout.max_model_len={PROMPT + RESPONSE}",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "actor_rollout_ref.actor.optim.lr=1e-4",
    "critic.optim.lr=1e-4",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "trainer.n_gpus_per_node=1",
    "trainer.total_training_steps=2",
    "trainer.total_epochs=10",
    "+ray_kwargs.ray_init.include_dashboard=False",
]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """model/, discriminator/ (the same with a score head), train.parquet, val.parquet; sizes that flash-attn takes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import LlamaForCausalLM, LlamaForTokenClassification

    from recipe.gad.quickstart.problem import build_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("problem")
    tokenizer = build_tokenizer()
    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings |= {"max_position_embeddings": 128, "dtype": "bfloat16"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama(tokenizer, **settings)).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    discriminator = LlamaForTokenClassification(tiny_llama(tokenizer, **settings, num_labels=1))
    discriminator.model.load_state_dict(model.model.state_dict())
    discriminator.to(torch.bfloat16).save_pretrained(folder / "discriminator")
    words = sorted(word for word in tokenizer.get_vocab() if not word.startswith("<"))
    rng = random.Random(0)
    for name, size in (("train", 64), ("val", 8)):
        rows = [
            {
                "content": [{"role": "user", "content": " ".join(rng.choices(words, k=4))}],
                "teacher_response": " ".join(rng.choices(words, k=rng.randint(4, 20))),
                "data_source": "random",
                "extra_info": {"index": index},
            }
            for index in range(size)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    for part in ("model", "discriminator"):
        tokenizer.save_pretrained(folder / part)
    return folder


def launch(stage: str, problem: Path, out: Path, *arguments: str) -> list[dict[str, float]]:
    """Run a launch script to its end; returns the metrics of every logged step."""
    flags = [a for a in arguments if "=" not in a]
    data = ["--train_files", f"{problem}/train.parquet", "--val_files", f"{problem}/val.parquet"]
    command = ["bash", str(ROOT / f"examples/gad/run_{stage}.sh"), *data, "--output_dir", str(out), *flags, *SMALL]
    environment = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}  # set for CPU tests
    result = subprocess.run(
        [*command, *(a for a in arguments if "=" in a)],
        env={**environment, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return [json.loads(line)["data"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_steps_of_warmup_and_gad_with_vllm(problem, tmp_path):
    model = ["--model", f"{problem}/model"]
    warmup = launch("warmup", problem, tmp_path / "warmup", *model, "trainer.critic_warmup=2", "trainer.save_freq=2")
    assert "actor/sft_loss" in warmup[-1] and "actor/sft_loss" not in warmup[-2]
    checkpoint = latest_complete_checkpoint(tmp_path / "warmup")
    assert checkpoint.name == "global_step_2" and has_score_head(checkpoint / "critic/huggingface")
    gad = launch("gad", problem, tmp_path / "gad", "--warmup_dir", str(tmp_path / "warmup"), "trainer.save_freq=-1")
    steps = [step for step in gad if "critic/d_loss" in step]
    assert len(steps) == 2
    for step in steps:
        for name in ("critic/d_loss", "critic/grad_norm", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm"):
            assert math.isfinite(step[name]), name
        assert 0.0 <= step["critic/d_acc"] <= 1.0
        assert step["gad/missing_rollouts"] == 0
        assert step["training/rollout_probs_diff_mean"] < 0.01  # vLLM samples from the actor's weights
    assert abs(steps[0]["actor/kl_loss"]) < 1e-4 < steps[1]["actor/kl_loss"]  # the reference is the starting point
    assert any("rouge_l" in name for name in gad[-1])


def test_evaluation_with_vllm(problem, tmp_path):
    """`gad eval` samples with vLLM and trains the discriminators of its two-sample test on the GPU that vLLM leaves."""
    command = [sys.executable, "-m", "recipe.gad.cli", "eval", "--model", f"{problem}/model"]
    command += ["--val_files", f"{problem}/val.parquet", "--output_dir", str(tmp_path), "--backend", "vllm"]
    command += ["--max_prompt_length", str(PROMPT), "--max_response_length", str(RESPONSE)]
    command += ["--gpu_memory_utilization", "0.1", "--kv_cache_gib", "4", "--enforce_eager"]
    command += ["--two_sample_model", f"{problem}/model"]
    environment = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"[-6000:]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 0.0 <= scores["two_sample"]["accuracy"]["value"] <= 1.0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_with_fsdp2_and_tensor_parallel_rollout_equal_one(problem, tmp_path):
    """Rollouts of the two-GPU run are replayed on one GPU: the same data must give the same losses."""
    arguments = [
        *("--model", f"{problem}/model", "--reward_model", f"{problem}/discriminator", "--exp_name", "equal"),
        "actor_rollout_ref.actor.strategy=fsdp2",
        "critic.strategy=fsdp2",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        "skip.rollout_tq.enable=True",
        f"skip.rollout_tq.dump_dir={tmp_path}/rollouts",
        "skip.rollout_tq.steps=[1,2]",
    ]
    both = ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"]
    two = launch("gad", problem, tmp_path / "two", *arguments, *both)
    one = launch("gad", problem, tmp_path / "one", *arguments)
    assert len(two) == len(one) == 2
    for step_of_two, step_of_one in zip(two, one, strict=True):
        for name in ("critic/d_loss", "critic/d_acc", "critic/grad_norm", "actor/grad_norm"):
            print(name, step_of_two[name], step_of_one[name])
            assert step_of_two[name] == pytest.approx(step_of_one[name], rel=0.02), name  # bfloat16
        assert step_of_two["actor/pg_loss"] == pytest.approx(step_of_one["actor/pg_loss"], abs=2e-3)
        assert step_of_two["actor/kl_loss"] == pytest.approx(step_of_one["actor/kl_loss"], abs=2e-3)

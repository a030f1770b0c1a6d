"""recipe/gad/export.py on real checkpoints: two ranks, FSDP2, written by verl's own checkpoint manager.

Run as a script, this file writes those checkpoints (one process per rank).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recipe.gad.cli import main as cli
from recipe.gad.doctor.memory import Training, checkpoint_bytes, model_shape
from recipe.gad.export import export_model, find_sources
from recipe.gad.run.checkpoint import actor_folder, handover_problems, shard_counts, verify_hf_folder
from recipe.gad.run.checksums import write_checksums
from recipe.gad.training.lora import merge_adapters

pytestmark = pytest.mark.slow  # all read the runs that two processes write first

ROOT = Path(__file__).resolve().parents[2]
WHOLE, SHARDS = ["model", "optimizer", "extra", "hf_model"], ["model", "optimizer", "extra"]
RUNS = {"whole": WHOLE, "shards": SHARDS, "lora": WHOLE, "lora-d": WHOLE}
ROLES = {"lora": ("actor",), "lora-d": ("critic",)}
LORA_RANK, LORA_ALPHA = 4, 16
IDS = torch.tensor([[1, 9, 17, 22, 5, 2]])


def write_checkpoints(rank: int, folder: Path, model: str) -> None:
    """``folder/RUN/global_step_2/ROLE`` as verl writes it, and the full weights as ``folder/RUN-ROLE.pt``."""
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    from recipe.gad.training.lora import add_adapters
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    for run, contents in RUNS.items():
        for role in ROLES.get(run, ("actor", "critic")):
            torch.manual_seed(len(run) + len(role))
            config = AutoConfig.from_pretrained(model)
            kind = AutoModelForCausalLM
            if role == "critic":
                config.num_labels, kind = 1, AutoModelForTokenClassification
            network = kind.from_pretrained(model, config=config, dtype=torch.float32)
            if role == "critic":
                torch.nn.init.normal_(network.score.bias)
            if run == "lora":
                settings = LoraConfig(
                    task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear"
                )
                network = get_peft_model(network, settings)
            if run == "lora-d":
                names = {"target_modules": "all-linear", "target_parameters": None, "exclude_modules": None}
                settings = SimpleNamespace(lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA, **names)
                network = add_adapters(network, settings, seed=3)
            if "lora" in run:
                for name, parameter in network.named_parameters():
                    if "lora_B" in name:
                        torch.nn.init.normal_(parameter, std=0.05)
            if rank == 0:
                torch.save(network.state_dict(), folder / f"{run}-{role}.pt")
            fully_shard(network, mesh=mesh)
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=0.0)
            network(input_ids=IDS).logits.sum().backward()
            optimizer.step()
            tokenizer = AutoTokenizer.from_pretrained(model)
            settings = {"save_contents": contents, "load_contents": SHARDS}
            manager = FSDPCheckpointManager(network, optimizer, None, tokenizer, settings)
            manager.save_checkpoint(str(folder / run / "global_step_2" / role), None, 2)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tiny_problem, tmp_path_factory):
    """Folder with the runs ``whole`` (huggingface folders with weights), ``shards`` (without) and ``lora``."""
    folder = tmp_path_factory.mktemp("runs")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), folder, tiny_problem / "model"],
            env={**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output[-3000:]
    for run in RUNS:
        (folder / run / "global_step_2" / "data.pt").write_bytes(b"")
    return folder


def weights(runs, name) -> dict[str, torch.Tensor]:
    return torch.load(runs / f"{name}.pt")


def load(folder, critic=False):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    kind = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("run", ["whole", "shards"])
def test_an_actor_in_bfloat16(runs, run, tmp_path):
    from transformers import AutoTokenizer

    done = export_model(runs / run, tmp_path / "out")
    model, expected = load(tmp_path / "out"), weights(runs, f"{run}-actor")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in model.state_dict().items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<end>"
    assert verify_hf_folder(tmp_path / "out") == []
    assert done.architecture == "LlamaForCausalLM" and (done.rounding > 0) == (run == "whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"], "nothing else is left"


@pytest.mark.parametrize(("run", "dtype"), [("whole", "float32"), ("shards", "bfloat16")])
def test_a_critic_gives_its_score_at_the_last_token(runs, run, dtype, tmp_path):
    from transformers import LlamaModel

    export_model(runs / run / "global_step_2" / "critic", tmp_path / "out", dtype=dtype)
    model, expected = load(tmp_path / "out", critic=True), weights(runs, f"{run}-critic")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForTokenClassification"], dtype)
    rounded = {name: value.to(getattr(torch, dtype)).double() for name, value in expected.items()}
    body = LlamaModel(model.config).double().eval()
    body.load_state_dict({k.removeprefix("model."): v for k, v in rounded.items() if k.startswith("model.")})
    with torch.no_grad():
        hidden = body(input_ids=IDS).last_hidden_state[0, -1]
        score = model.float()(input_ids=IDS).logits[0, -1]
    torch.testing.assert_close(
        score.double(), rounded["score.weight"] @ hidden + rounded["score.bias"], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("run", ["whole", "shards"])
def test_a_run_with_flash_attention_is_exported_where_that_package_is_missing(runs, run, tmp_path):
    step = tmp_path / "run" / "global_step_2"
    shutil.copytree(runs / run / "global_step_2", step)
    file = step / "critic" / "huggingface" / "config.json"
    config = json.loads(file.read_text()) | {"attn_implementation": "flash_attention_2"}  # as verl writes it on a GPU
    file.write_text(json.dumps(config))
    export_model(step / "critic", tmp_path / "out")
    expected = weights(runs, f"{run}-critic")
    assert all(torch.equal(v, expected[k].bfloat16()) for k, v in load(tmp_path / "out", True).state_dict().items())
    assert "attn_implementation" not in json.loads((tmp_path / "out" / "config.json").read_text())


def by_hand(runs, run="lora-actor", dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """W + alpha / r B A of a LoRA run, float64, by the names of a plain model; from bfloat16, as the merger."""
    trained = weights(runs, run).items()
    stored = {name.removeprefix("base_model.model."): tensor.to(dtype).double() for name, tensor in trained}
    plain = {name.replace(".base_layer", ""): t for name, t in stored.items() if "lora_" not in name}
    for name, value in stored.items():
        if "lora_B" in name:
            product = value @ stored[name.replace("lora_B", "lora_A")]
            plain[name.replace(".lora_B.default", "")] += LORA_ALPHA / LORA_RANK * product
    return plain


def test_lora_is_merged(runs, tmp_path):
    export_model(runs / "lora", tmp_path / "out")
    found, expected = load(tmp_path / "out").state_dict(), by_hand(runs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=2**-8)
    changed = "model.layers.0.self_attn.q_proj.weight"
    before = weights(runs, "lora-actor")[f"base_model.model.{changed.replace('.weight', '.base_layer.weight')}"]
    assert (found[changed].float() - before).abs().max() > 0.01


def test_the_adapter_alone(runs, tiny_problem, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = export_model(runs / "lora", tmp_path / "out", lora="adapter")
    assert "adapter" in done.architecture and not (tmp_path / "out" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_problem / "model", dtype=torch.bfloat16).float()
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    expected = by_hand(runs)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(merged[name].double(), expected[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="trained without LoRA"):
        export_model(runs / "whole", tmp_path / "other", lora="adapter")


def merged(runs, run, tmp_path):
    """A run's folder with merged checkpoints, as the trainer leaves it."""
    shutil.copytree(runs / run, tmp_path / run)
    for role in ROLES[run]:
        merge_adapters(tmp_path / run / "global_step_2" / role)
    return tmp_path / run


@pytest.mark.parametrize(("run", "role"), [("lora", "actor"), ("lora-d", "critic")])
def test_merged_checkpoints_are_exported_in_float32(runs, run, role, tmp_path):
    export_model(merged(runs, run, tmp_path), tmp_path / "out", role, dtype="float32")
    found, expected = (
        load(tmp_path / "out", role == "critic").state_dict(),
        by_hand(runs, f"{run}-{role}", torch.float32),
    )
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-6)


def test_a_discriminator_of_shards_alone_is_merged(runs, tmp_path):
    export_model(runs / "lora-d", tmp_path / "out", "critic")
    found, expected = load(tmp_path / "out", critic=True).state_dict(), by_hand(runs, "lora-d-critic")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=2**-8)


def test_the_adapter_of_a_merged_checkpoint_comes_from_its_shards(runs, tmp_path):
    from safetensors.torch import load_file

    run = merged(runs, "lora", tmp_path)
    for source, name in ((runs / "lora", "before"), (run, "after")):
        export_model(source, tmp_path / name, lora="adapter")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    next((run / "global_step_2" / "actor").glob("model_world_size_2_rank_1.pt")).unlink()
    with pytest.raises(ValueError, match="1 of 2 model shards, which hold the adapter. Fix: pass --lora merge"):
        export_model(run, tmp_path / "none", lora="adapter")
    with pytest.raises(ValueError, match="whose score head is trained beside the adapter. Fix: pass --lora merge"):
        export_model(runs / "lora-d", tmp_path / "none", "critic", lora="adapter")


def test_a_folder_of_lora_names_is_no_start_for_the_next_stage(runs):
    from transformers import AutoModelForCausalLM

    folder = runs / "lora" / "global_step_2" / "actor" / "huggingface"
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert "model.layers.0.self_attn.q_proj.weight" in info["missing_keys"], "stock would draw these weights"
    problems = handover_problems(runs / "lora" / "global_step_2")
    assert any("LoRA weights under PEFT's names" in problem for problem in problems)
    assert handover_problems(runs / "whole" / "global_step_2") == []


def test_adapters_have_no_mean(runs, tmp_path):
    for step in (2, 4):
        shutil.copytree(runs / "lora" / "global_step_2", tmp_path / "run" / f"global_step_{step}")
    with pytest.raises(ValueError, match="--average 2: .*trained with LoRA.*Fix: export without --average"):
        export_model(tmp_path / "run", tmp_path / "out", average=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_mean_of_the_newest_checkpoints(runs, role, tmp_path):
    from safetensors.torch import load_file, save_file

    scales = {2: 100.0, 4: 1.0, 6: 2.0, 8: 6.0}  # the newest three: their mean is 3
    for step, scale in scales.items():
        folder = tmp_path / "run" / f"global_step_{step}" / role
        shutil.copytree(runs / "whole" / "global_step_2" / role, folder)
        file = folder / "huggingface" / "model.safetensors"
        tensors = {name: tensor * scale for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    done = export_model(tmp_path / "run", tmp_path / "out", role, dtype="float32", average=3)
    assert [source.parent.name for source in done.sources] == ["global_step_8", "global_step_6", "global_step_4"]
    mean, expected = load(tmp_path / "out", critic=role == "critic").state_dict(), weights(runs, f"whole-{role}")
    for name, value in mean.items():
        torch.testing.assert_close(value.double(), 3 * expected[name].double(), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=f"--average 5: .*has 4 complete checkpoints of the {role} .*global_step_8"):
        export_model(tmp_path / "run", tmp_path / "more", role, average=5)
    with pytest.raises(ValueError, match="has 1 complete checkpoints"):
        export_model(tmp_path / "run" / "global_step_8", tmp_path / "more", role, average=2)


def test_the_mean_of_joined_shards(runs, tmp_path):
    for step in (2, 4):
        shutil.copytree(runs / "shards" / "global_step_2", tmp_path / "run" / f"global_step_{step}")
    export_model(tmp_path / "run", tmp_path / "out", average=2)
    expected = weights(runs, "shards-actor")
    for name, value in load(tmp_path / "out").state_dict().items():
        assert torch.equal(value, expected[name].bfloat16())


# ---------------------------------------------------------------------- which checkpoint, and mistakes


def test_a_run_gives_its_newest_complete_checkpoint(runs, tmp_path, capsys):
    run = tmp_path / "run"
    for step in (2, 4, 10):
        shutil.copytree(runs / "whole" / "global_step_2", run / f"global_step_{step}")
    broken = run / "global_step_10" / "actor"
    (broken / "huggingface" / "model.safetensors").unlink()
    assert find_sources(run, "actor")[0] == [broken], "its shards are whole"
    (broken / "model_world_size_2_rank_1.pt").unlink()
    assert shard_counts(broken) == (1, 2)
    assert find_sources(run, None) == ([run / "global_step_4" / "actor"], "actor")
    assert f"skipped {broken}" in capsys.readouterr().err
    newest_two = [run / "global_step_4" / "actor", run / "global_step_2" / "actor"]
    assert find_sources(run, None, 2) == (newest_two, "actor")
    assert f"skipped {broken}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"has 2 complete checkpoints .*skipped: {broken}.* has 1 of 2 model shards"):
        find_sources(run, None, 3)
    assert find_sources(run, "critic") == ([run / "global_step_10" / "critic"], "critic")
    assert find_sources(run / "global_step_2", "critic") == ([run / "global_step_2" / "critic"], "critic")
    with pytest.raises(ValueError, match="1 of 2 model shards.*Fix: choose another checkpoint"):
        find_sources(broken, None)
    with pytest.raises(ValueError, match="is the actor's, and --role is critic"):
        find_sources(broken, "critic")


def test_mistakes(runs, tmp_path):
    whole, out = runs / "whole", tmp_path / "out"
    for path, options, message in [
        (tmp_path / "none", {}, "no such folder"),
        (tmp_path, {}, "holds no checkpoint of the actor"),
        (runs / "lora", {"role": "critic"}, "holds no checkpoint of the critic"),
        (whole, {"role": "ref"}, "--role ref: expected actor or critic"),
        (whole, {"dtype": "int8"}, "--dtype int8: expected bfloat16, float16, float32"),
        (whole, {"lora": "drop"}, "--lora drop: expected merge or adapter"),
        (whole, {"average": 0}, "--average 0: expected 1 or more"),
        (runs / "shards", {"dtype": "float32"}, "only FSDP shards.*Fix: pass --dtype bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_model(path, out, **options)
    out.mkdir()
    (out / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="exists. Fix: pass a new --output_dir"):
        export_model(whole, out)


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "whole", run)
    folder = run / "global_step_2" / "actor" / "huggingface"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    embeddings = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer["model"]["vocab"]["beyond"] = embeddings + 68
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = f"has {embeddings} embeddings, and its tokenizer gives ids up to {embeddings + 68}. Fix: "
    with pytest.raises(ValueError, match=message):
        export_model(run, tmp_path / "out")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"the tokenizer in {folder} cannot be loaded"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_modes_of_the_files_follow_the_umask(runs, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        export_model(runs / "whole", tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        path.name: mode for path in (tmp_path / "out").iterdir()
    }


class Code:
    """Unpickling it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("content", ["code", "a list", "half", "nothing"])
def test_a_shard_that_holds_more_than_tensors_is_refused_and_not_run(runs, tmp_path, content):
    run, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(runs / "shards", run)
    shard = run / "global_step_2" / "actor" / "model_world_size_2_rank_1.pt"
    whole = shard.read_bytes()
    if content == "code":
        torch.save({"weight": torch.zeros(1), "x": Code(ran)}, shard)
    elif content == "a list":
        torch.save([torch.zeros(1)], shard)
    else:
        shard.write_bytes(whole[: len(whole) // 2] if content == "half" else b"")
    with pytest.raises(ValueError, match=f"{shard} .*tensors.*Fix: choose another checkpoint"):
        export_model(run, tmp_path / "out")
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_an_export_that_differs_does_not_appear(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("recipe.gad.export.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="outputs differ by 0 .*nothing was written"):
        export_model(runs / "whole", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_the_wrong_role(runs, tmp_path):
    step = tmp_path / "global_step_2"
    shutil.copytree(runs / "whole" / "global_step_2" / "actor", step / "critic")
    with pytest.raises(ValueError, match="do not fit LlamaForTokenClassification.*score"):
        export_model(step, tmp_path / "out", role="critic")


def test_command_line(runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        cli(["export", str(runs / "whole"), "--output_dir", str(tmp_path / "out"), "--dtype", "float16"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/out: LlamaForCausalLM from {runs}/whole/global_step_2/actor, loaded again")
    assert load(tmp_path / "out").dtype == torch.float16
    with pytest.raises(SystemExit) as exit:
        cli(["export", str(runs / "whole"), "--output_dir", str(tmp_path / "out")])
    assert exit.value.code == 2 and f"\nerror: {tmp_path}/out exists. Fix: " in capsys.readouterr().err


# ---------------------------------------------------------------------- the doctor's estimate of a checkpoint


@pytest.mark.parametrize("run", ["whole", "shards"])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_size_of_a_checkpoint(runs, tiny_problem, run, role):
    """Files of this tiny model carry some 20 KB of names each, nothing of which grows with the model."""
    files = [file for file in (runs / run / "global_step_2" / role).rglob("*") if file.is_file()]
    written = sum(file.stat().st_size for file in files if file.suffix in (".pt", ".safetensors"))
    shape = model_shape(tiny_problem / "model", value_model=role == "critic")
    estimate = checkpoint_bytes(shape, Training(shards=2, tokens=1), RUNS[run])
    assert 0 < written - estimate < 45_000 * len(files) / 4, (written, estimate)
    assert estimate == 4 * shape.parameters * (4 if run == "whole" else 3)


if __name__ == "__main__":
    write_checkpoints(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])


def test_a_flipped_byte_is_found_before_and_after_the_export(runs, tmp_path):
    shutil.copytree(runs / "whole/global_step_2", tmp_path / "run/global_step_2")
    write_checksums(tmp_path / "run/global_step_2")
    export_model(tmp_path / "run", tmp_path / "out")
    assert actor_folder(str(tmp_path / "out")) == str(tmp_path / "out")
    for folder in (tmp_path / "run/global_step_2/actor/huggingface", tmp_path / "out"):
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1  # the last bit of a weight: still a finite number
        (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot be exported: .*model.safetensors has changed since it was saved"):
        export_model(tmp_path / "run", tmp_path / "again")
    with pytest.raises(ValueError, match=r"out cannot be loaded: .*model.safetensors has changed since it was saved"):
        actor_folder(str(tmp_path / "out"))

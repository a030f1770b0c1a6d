"""recipe/gad/run/checkpoint.py on small real checkpoint folders: which are complete, and whose they are."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from recipe.gad.export import find_sources
from recipe.gad.run.checkpoint import (
    MARKER,
    TRACKER,
    actor_folder,
    check_folder,
    claim_folder,
    has_score_head,
    latest_complete_checkpoint,
    main,
    stage_of,
    step_folders,
    verify_contents,
    verify_hf_folder,
)
from recipe.gad.run.checksums import forget_checksums, write_checksums

ROOT = Path(__file__).resolve().parents[3]


def write_hf_folder(folder: Path, head: str | None = None, shards: int = 1) -> Path:
    """A Hugging Face folder with a two-tensor model, in one file or in shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    tensors = {"model.embed.weight": np.ones((4, 2), np.float32), head or "lm_head.weight": np.ones((2, 2), np.float32)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = {}
    for i, (name, tensor) in enumerate(tensors.items(), start=1):
        names[name] = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensor}, folder / names[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def write_checkpoint(folder: Path, step: int, shards: int = 1) -> Path:
    path = folder / f"global_step_{step}"
    write_hf_folder(path / "actor" / "huggingface", shards=shards)
    write_hf_folder(path / "critic" / "huggingface", head="score.weight", shards=shards)
    (path / "data.pt").write_bytes(b"x")
    (folder / TRACKER).write_text(str(step))
    return path


@pytest.fixture
def warmup(tmp_path):
    """Output folder of a warmup run with two complete checkpoints."""
    folder = tmp_path / "warmup"
    claim_folder(folder, "warmup")
    for step in (5, 10):
        write_checkpoint(folder, step)
    return folder


# ---------------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize("shards", [1, 2])
def test_a_complete_folder_has_no_problems(tmp_path, shards):
    assert verify_hf_folder(write_hf_folder(tmp_path / "m", shards=shards)) == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda m: (m / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors is missing"),
        (lambda m: truncate(m / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors is truncated"),
        (lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b""), "is truncated: 0 bytes"),
        (lambda m: (m / "model-00001-of-00002.safetensors").write_bytes(b"\0" * 99), "not a safetensors file"),
        (lambda m: truncate(m / "model.safetensors.index.json"), "model.safetensors.index.json is not valid JSON"),
        (lambda m: (m / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
        (lambda m: (m / "config.json").unlink(), "config.json is missing"),
        (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda m: truncate(m / "tokenizer.json"), "tokenizer.json is not valid JSON"),
        (shutil.rmtree, "is missing (actor and critic need hf_model"),
        (
            lambda m: shutil.copy(m / "model-00001-of-00002.safetensors", m / "model-00002-of-00002.safetensors"),
            "model-00002-of-00002.safetensors lacks lm_head.weight",
        ),
    ],
)
def test_damage_is_named(tmp_path, damage, expected):
    folder = write_hf_folder(tmp_path / "m", shards=2)
    damage(folder)
    assert expected in "\n".join(verify_hf_folder(folder))


def test_file_with_bytes_after_its_tensors(tmp_path):
    folder = write_hf_folder(tmp_path / "m")
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"xx")
    assert "model.safetensors is too long" in verify_hf_folder(folder)[0]


def test_score_heads(tmp_path):
    heads = ["score.weight", "classifier.weight", "v_head.summary.weight", "model.score.weight"]
    others = ["lm_head.weight", "underscore.weight"]
    found = {name for name in heads + others if has_score_head(write_hf_folder(tmp_path / name, head=name, shards=2))}
    assert found == set(heads)
    assert not has_score_head(tmp_path / "absent")


# ---------------------------------------------------------------------- which checkpoint


def test_the_newest_complete_checkpoint_is_chosen(warmup, capsys):
    assert latest_complete_checkpoint(warmup) == warmup / "global_step_10"
    truncate(warmup / "global_step_10" / "critic" / "huggingface" / "model.safetensors")
    assert latest_complete_checkpoint(warmup) == warmup / "global_step_5"
    skipped = capsys.readouterr().err
    assert f"skipped {warmup}/global_step_10" in skipped and "model.safetensors is truncated" in skipped


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / TRACKER).write_text("100")
    assert latest_complete_checkpoint(tmp_path).name == "global_step_100"


def test_checkpoints_above_the_step_at_which_the_run_is_are_of_another_time_line(warmup, capsys):
    (warmup / TRACKER).write_text("5\n")  # the run went back from 10 to 5
    assert latest_complete_checkpoint(warmup) == warmup / "global_step_5"
    skipped = f"skipped global_step_10 of {warmup}: {TRACKER} says that the run is at step 5"
    assert skipped in capsys.readouterr().err
    assert actor_folder(str(warmup)) == str(warmup / "global_step_5/actor/huggingface")
    assert find_sources(warmup, "actor", 1)[0] == [warmup / "global_step_5/actor"]
    with pytest.raises(ValueError, match="--average 2: .* has 1 complete checkpoints"):
        find_sources(warmup, "actor", 2)
    assert latest_complete_checkpoint(warmup, 10).name == "global_step_10", "the user asked for it"
    (warmup / TRACKER).write_text("cut off")  # no step: every complete checkpoint counts
    assert latest_complete_checkpoint(warmup).name == "global_step_10"


def test_a_wanted_step(warmup):
    assert latest_complete_checkpoint(warmup, 5).name == "global_step_5"
    with pytest.raises(ValueError, match=r"no global_step_7; found global_step_5, global_step_10"):
        latest_complete_checkpoint(warmup, 7)
    (warmup / "global_step_5" / "data.pt").unlink()
    with pytest.raises(ValueError, match=r"global_step_5.*data.pt is missing.*Fix: choose another step"):
        latest_complete_checkpoint(warmup, 5)


def test_a_critic_without_score_head_is_no_discriminator(tmp_path):
    step = write_checkpoint(tmp_path, 3)
    shutil.rmtree(step / "critic")
    shutil.copytree(step / "actor", step / "critic")
    with pytest.raises(ValueError, match="has no score head"):
        latest_complete_checkpoint(tmp_path)


def test_folders_without_a_complete_checkpoint(tmp_path, warmup):
    with pytest.raises(ValueError, match="no such folder"):
        latest_complete_checkpoint(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"other.*found: readme.txt.*Fix: pass the output folder of a finished"):
        latest_complete_checkpoint(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"is one checkpoint.*Fix: pass {warmup} and the step 10"):
        latest_complete_checkpoint(warmup / "global_step_10")
    claim_folder(tmp_path / "seqkd", "seqkd")
    shutil.rmtree(write_checkpoint(tmp_path / "seqkd", 4) / "critic")
    with pytest.raises(ValueError, match="of a seqkd run, which has no discriminator"):
        latest_complete_checkpoint(tmp_path / "seqkd")


def test_command_line(warmup, capsys):
    assert main(["resolve", str(warmup), "--step", "5"]) == 0
    assert capsys.readouterr().out == f"{warmup / 'global_step_5'}\n"
    assert main(["resolve", str(warmup / "nothing")]) == 2
    assert main(["student", "runs/nothing"]) == 2, "no hub id"
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")


def test_command_line_prints_absolute_paths_and_imports_no_torch(warmup):
    script = (
        "import sys; from recipe.gad.run.checkpoint import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "resolve", os.path.relpath(warmup, ROOT)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{warmup / 'global_step_10'}\n", "")


# ---------------------------------------------------------------------- whose folder


def test_a_new_folder_is_claimed(tmp_path):
    folder = tmp_path / "a" / "run"
    assert stage_of(folder) is None
    check_folder(folder, "gad")
    claim_folder(folder, "gad")
    claim_folder(folder, "gad")
    assert stage_of(folder) == "gad"
    assert [path.name for path in folder.iterdir()] == [MARKER]


def test_a_claim_that_fails_leaves_the_old_marker(warmup, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    before = sorted(warmup.iterdir())
    with pytest.raises(OSError, match="disk full"):
        claim_folder(warmup, "warmup")
    assert stage_of(warmup) == "warmup" and sorted(warmup.iterdir()) == before


def test_own_checkpoints_can_be_resumed(warmup):
    check_folder(warmup, "warmup")


def test_checkpoints_of_another_stage(warmup):
    for refuse in (check_folder, claim_folder):
        with pytest.raises(ValueError, match=r"of stage warmup, and this run is of stage gad.*Fix: set trainer"):
            refuse(warmup, "gad")
    with pytest.raises(ValueError, match="of stage warmup"):
        check_folder(warmup, "gad", resume=False)
    assert stage_of(warmup) == "warmup"


def test_another_stage_without_checkpoints_does_not_matter(tmp_path):
    claim_folder(tmp_path, "warmup")
    check_folder(tmp_path, "gad")
    claim_folder(tmp_path, "gad")
    assert stage_of(tmp_path) == "gad"


def test_checkpoints_of_an_unknown_run(warmup):
    (warmup / MARKER).unlink()
    with pytest.raises(ValueError, match=rf"of an unknown run: it has no {MARKER}.*write {{\"stage\": \"gad\"}} into"):
        check_folder(warmup, "gad")
    (warmup / MARKER).write_text("{")
    with pytest.raises(ValueError, match=rf"{MARKER} cannot be read. Fix"):
        check_folder(warmup, "gad")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "holds ''"), ("abc", "holds 'abc'"), ("7", "names step 7, but .*global_step_7 is missing")],
)
def test_a_tracker_that_names_no_checkpoint(warmup, text, expected):
    (warmup / TRACKER).write_text(text)
    with pytest.raises(ValueError, match=rf"{TRACKER} {expected}.*Fix: write 10 into .*{TRACKER}"):
        check_folder(warmup, "warmup")
    check_folder(warmup, "warmup", resume=False)


def test_a_tracker_without_any_usable_checkpoint(tmp_path):
    claim_folder(tmp_path, "gad")
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(ValueError, match=rf"Fix: delete .*{TRACKER}"):
        check_folder(tmp_path, "gad")


@pytest.mark.parametrize("part", ["actor", "critic", "data.pt"])
def test_a_tracker_that_names_an_incomplete_checkpoint(warmup, part):
    path = warmup / "global_step_10" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=rf"names step 10, .* not complete: .*{part} is missing.*Fix: write 5 into"):
        check_folder(warmup, "warmup")


def test_checkpoints_without_a_tracker(warmup):
    (warmup / TRACKER).unlink()
    with pytest.raises(ValueError, match=rf"no {TRACKER}: verl would overwrite them. Fix: write 10 into"):
        check_folder(warmup, "warmup")
    for step in (5, 10):  # a first save that was cut off: the run simply starts again
        (warmup / f"global_step_{step}" / "data.pt").unlink()
    check_folder(warmup, "warmup")


@pytest.mark.parametrize("stage", ["seqkd", "soda", "online_dpo"])
def test_a_stage_without_a_discriminator_resumes_from_a_checkpoint_without_one(tmp_path, stage):
    folder = write_checkpoint(tmp_path, 4)
    shutil.rmtree(folder / "critic")
    verify_contents(folder, stage)
    with pytest.raises(ValueError, match="critic is missing"):
        verify_contents(folder, "gad")


def test_seqkd_needs_no_critic(warmup):
    shutil.rmtree(warmup / "global_step_10" / "critic")
    (warmup / MARKER).write_text('{"stage": "seqkd"}')
    check_folder(warmup, "seqkd")


def test_fsdp_shards_must_be_all_there_and_of_as_many_workers(warmup):
    for role in ("actor", "critic"):
        for rank in range(2):
            (warmup / "global_step_10" / role / f"model_world_size_2_rank_{rank}.pt").write_bytes(b"")
    check_folder(warmup, "warmup", world_size=2)
    with pytest.raises(ValueError, match="2 workers saved .*, and only as many can resume it; this run has 1") as error:
        check_folder(warmup, "warmup", world_size=1)
    step = warmup / "global_step_10"
    models = f"--model {step}/actor/huggingface --reward_model {step}/critic/huggingface"
    assert "Fix: run with 2, or start a new run from its models: in another --output_dir" in str(error.value)
    assert f"with {models} in place of --warmup_dir or --seqkd_dir; gad export" in str(error.value)
    (warmup / "global_step_10" / "critic" / "model_world_size_2_rank_0.pt").unlink()
    with pytest.raises(ValueError, match="critic has 1 of 2 model shards"):
        check_folder(warmup, "warmup", world_size=2)


def flip(file: Path) -> None:
    """One bit of the last weight, which neither size nor header shows."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture
def saved(warmup):
    """The same, with FSDP shards and checksums as the trainer saves them."""
    for step in step_folders(warmup).values():
        for role in ("actor", "critic"):
            for kind in ("model", "optim", "extra_state"):
                (step / role / f"{kind}_world_size_1_rank_0.pt").write_bytes(kind.encode() * 1000)
        write_checksums(step)
    return warmup


def test_checksums_are_those_of_another_program(saved):
    record = json.loads((saved / "global_step_10/checksums.json").read_text())
    assert len(record) == 2 * (3 + 3) + 1
    for name, (size, crc) in record.items():
        data = (saved / "global_step_10" / name).read_bytes()
        assert size == len(data)
        assert crc == gzip.compress(data)[-8:-4][::-1].hex()  # gzip ends with CRC-32 and size, little-endian


@pytest.mark.parametrize(
    "name", ["actor/model_world_size_1_rank_0.pt", "critic/optim_world_size_1_rank_0.pt", "data.pt"]
)
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_a_damaged_shard_is_found_before_a_run_resumes(saved, name, harm):
    verify_contents(saved / "global_step_10", "warmup")
    harm(saved / "global_step_10" / name)
    fix = rf"Fix: write 5 into {saved / TRACKER} to resume from global_step_5"
    if harm is not flip:  # sizes are compared by every check, also by the doctor
        with pytest.raises(ValueError, match=f"{name.split('_')[0]}.*{fix}"):
            check_folder(saved, "warmup")
    with pytest.raises(ValueError, match=f"global_step_10 is damaged: .*{name}.*{fix}"):
        verify_contents(saved / "global_step_10", "warmup")
    assert latest_complete_checkpoint(saved).name == "global_step_10" or name == "data.pt", "no hand-over reads it"


@pytest.mark.parametrize("harm", [truncate, flip])
def test_a_damaged_model_is_not_handed_over_and_does_not_keep_a_run_from_resuming(saved, harm, capsys):
    harm(saved / "global_step_10/critic/huggingface/model.safetensors")
    assert latest_complete_checkpoint(saved).name == "global_step_5"
    assert "skipped " in (skipped := capsys.readouterr().err) and "critic/huggingface/model.safetensors" in skipped
    check_folder(saved, "warmup")
    verify_contents(saved / "global_step_10", "warmup")


def test_a_damaged_record_is_damage_and_none_is_not(saved):
    truncate(saved / "global_step_10/checksums.json")
    with pytest.raises(ValueError, match="checksums.json is not valid JSON.*Fix: write 5 into"):
        check_folder(saved, "warmup")
    forget_checksums(saved / "global_step_10")
    check_folder(saved, "warmup")
    assert latest_complete_checkpoint(saved).name == "global_step_10"


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run is a file, expected a folder"):
        check_folder(tmp_path / "run", "gad")

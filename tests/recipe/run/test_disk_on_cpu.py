"""The disk under a run's checkpoints."""

import errno
import shutil

import pytest
from omegaconf import OmegaConf

from recipe.gad.run import disk
from recipe.gad.run.findings import InputError


def checkpoint(run, step: int, actor: int, critic: int) -> None:
    for role, size in (("actor", actor), ("critic", critic)):
        (run / f"global_step_{step}" / role).mkdir(parents=True)
        (run / f"global_step_{step}" / role / "model.pt").write_bytes(bytes(size))
    (run / f"global_step_{step}" / "data.pt").write_bytes(bytes(24))
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))


def watch(run, keep: int | None = None) -> disk.DiskWatch:
    trainer = {"default_local_dir": str(run), "max_actor_ckpt_to_keep": keep, "max_critic_ckpt_to_keep": None}
    return disk.DiskWatch(OmegaConf.create({"trainer": trainer}))


def test_a_save_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    checkpoint(tmp_path, 2, 3000, 1000)  # 4,024 bytes
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 4023)
    begun = False
    with pytest.raises(
        InputError, match="needs about 3.9 KiB, as global_step_2 takes, and 3.9 KiB are free at"
    ) as found:
        with watch(tmp_path).save(tmp_path / "global_step_4"):
            begun = True
    text = str(found.value)
    assert not begun and "the last good checkpoint is global_step_2" in text and str(tmp_path) in text
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 4024)
    with watch(tmp_path).save(tmp_path / "global_step_4"):
        begun = True
    assert begun


def test_what_a_save_overwrites_and_what_verl_removes_before_it_counts_as_free(tmp_path, monkeypatch):
    checkpoint(tmp_path, 2, 3000, 1000)
    half = tmp_path / "global_step_4"
    half.mkdir()
    (half / "half_written").write_bytes(bytes(1024))
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 3000)
    with watch(tmp_path).save(half):
        pass
    shutil.rmtree(half)
    saves = watch(tmp_path, keep=2)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1024)  # what the critic and data.pt need
    with pytest.raises(InputError, match="needs about"), saves.save(half):
        pass
    saves._saves = 2  # the third save of this process removes the actor of the first
    with saves.save(half):
        pass


def test_a_checkpoint_above_the_step_of_the_run_is_no_measure(tmp_path, monkeypatch):
    checkpoint(tmp_path, 6, 3000, 1000)
    checkpoint(tmp_path, 2, 10, 10)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 44)
    with watch(tmp_path).save(tmp_path / "global_step_8"):
        pass


@pytest.mark.parametrize(
    "problem",
    [RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "full")],
)
def test_a_failed_save_on_a_full_disk_names_disk_and_last_checkpoint(tmp_path, monkeypatch, problem):
    checkpoint(tmp_path, 2, 10, 10)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1 << 30)
    with pytest.raises(InputError) as found, watch(tmp_path).save(tmp_path / "global_step_4"):
        monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
        raise problem
    assert str(found.value).startswith(
        f"the disk of {tmp_path} is full (0.0 B are free), so the save of global_step_4 failed; the last good "
        "checkpoint is global_step_2. Fix: free space there"
    )
    assert found.value.__cause__ is problem


def test_a_save_that_was_cut_off_names_the_disk_that_has_room_again(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 3 << 30)
    with pytest.raises(InputError) as found, watch(tmp_path).save(tmp_path / "global_step_4"):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 128 vs 0")
    assert str(found.value).startswith(
        "the save of global_step_4 failed because a file was cut off, as on a full disk; 3.0 GiB are free now at "
        f"{tmp_path}; no checkpoint was saved before it. Fix: free space there"
    )


def test_another_failure_of_a_save_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 1 << 30)
    with pytest.raises(KeyError, match="lost"), watch(tmp_path).save(tmp_path / "global_step_1"):
        raise KeyError("lost")
    with pytest.raises(InputError, match="no checkpoint was saved before it"):
        with watch(tmp_path).save(tmp_path / "global_step_1"):
            raise OSError("I/O error: No space left on device (os error 28)")

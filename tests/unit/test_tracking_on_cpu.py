"""The metric file of a resumed run (verl/utils/tracking.py)."""

import errno
import json
import resource

import pytest

from verl.utils.tracking import FileLogger, Tracking


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    monkeypatch.setenv("VERL_FILE_LOGGER_APPEND", "1")
    return tmp_path / "metrics.jsonl"


def run(steps, **data):
    """One attempt of a run that logs the steps and dies."""
    logger = FileLogger("project", "experiment")
    for step in steps:
        logger.log({"value": step, "training/global_step": step, **data}, step=step)
    logger.finish()


def lines(path):
    return [(line["step"], line["data"].get("attempt")) for line in map(json.loads, path.read_text().splitlines())]


def test_a_resumed_run_keeps_earlier_steps_and_replaces_later_ones(path):
    run(range(6), attempt=1)
    run(range(4, 8), attempt=2)  # resumed from the checkpoint of step 3
    assert lines(path) == [(step, 1) for step in range(4)] + [(step, 2) for step in range(4, 8)]
    run([7, 8], attempt=3)
    assert lines(path)[-3:] == [(6, 2), (7, 3), (8, 3)]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"], "no scratch file is left"


def test_several_lines_of_one_step_are_kept_or_dropped_together(path):
    run([1, 2, 2, 3, 3], attempt=1)
    run([3], attempt=2)
    assert lines(path) == [(1, 1), (2, 1), (2, 1), (3, 2)]


def test_a_run_from_the_start_replaces_everything(path):
    run(range(5), attempt=1)
    run([0], attempt=2)
    assert lines(path) == [(0, 2)]


@pytest.mark.parametrize("torn", [b'{"step": 3, "da', b"{", b'{"step": 3, "data": {"attempt": 1}}'])
def test_a_torn_last_line_is_dropped(path, torn):
    run(range(3), attempt=1)
    path.write_bytes(path.read_bytes() + torn)
    run([4], attempt=2)
    assert lines(path) == [(0, 1), (1, 1), (2, 1), (4, 2)]


@pytest.mark.parametrize("crashes", [1, 2])
def test_attempts_that_die_before_their_first_line_lose_nothing(path, crashes):
    run(range(3), attempt=1)
    for _ in range(crashes):
        run([])
    run([3], attempt=2)
    assert lines(path) == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_a_fresh_folder_starts_an_empty_file(path):
    run([0, 1], attempt=1)
    assert lines(path) == [(0, 1), (1, 1)]


def test_through_verls_tracking(path):
    run(range(3), attempt=1)
    tracking = Tracking("project", "experiment", default_backend=["file"], config={})
    tracking.log({"training/global_step": 2, "attempt": 2}, step=2)
    assert lines(path) == [(0, 1), (1, 1), (2, 2)]


def test_the_validation_that_opens_a_resumed_run_does_not_replace_the_step_it_follows(path):
    run(range(5), attempt=1)
    logger = FileLogger("project", "experiment")  # resumed from the checkpoint of step 3
    logger.log({"val-core/x": 0.5, "attempt": 2}, step=3)
    logger.log({"training/global_step": 4, "attempt": 2}, step=4)
    logger.finish()
    assert lines(path) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_new_run_in_an_old_folder_logs_its_own_validation_of_step_0(path):
    run(range(5), attempt=1)
    logger = FileLogger("project", "experiment")  # trainer.resume_mode=disable
    logger.log({"val-core/x": 0.77, "attempt": 2}, step=0)
    logger.log({"training/global_step": 1, "attempt": 2}, step=1)
    logger.finish()
    assert lines(path) == [(0, 2), (1, 2)]


@pytest.mark.parametrize("value", [None, "0"])
def test_without_the_variable_the_logger_is_stock(path, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("VERL_FILE_LOGGER_APPEND")
    else:
        monkeypatch.setenv("VERL_FILE_LOGGER_APPEND", value)
    run(range(3), attempt=1)
    run([5], attempt=2)
    assert lines(path) == [(5, 2)]


def test_without_a_path_the_logger_is_stock(path, monkeypatch):
    monkeypatch.delenv("VERL_FILE_LOGGER_PATH")
    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(path.parent))
    for _ in range(2):
        run([1], attempt=1)
    assert lines(path.parent / "project/experiment.jsonl") == [(1, 1)]


def test_a_line_that_does_not_fit_raises_at_once_and_names_the_file(path):
    logger = FileLogger("project", "experiment")
    logger.log({"value": "a" * 5000, "training/global_step": 1}, step=1)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, unlimited[1]))  # the next line fits in part, as on a full disk
    try:
        with pytest.raises(OSError) as found:
            logger.log({"value": "b" * 5000, "training/global_step": 2}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert (found.value.errno, found.value.filename) == (errno.EFBIG, str(path))

"""recipe/gad/run/log.py: what a run leaves in its folder, read back while it is written."""

import json
import math

import pytest

from recipe.gad.run import log as run_log


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def line(step, **data) -> str:
    return json.dumps({"step": step, "data": data}) + "\n"


def test_two_lines_of_a_step_are_one_and_null_is_nan(tmp_path):
    path = write(tmp_path / "m.jsonl", line(0, a=1) + line(1, a=2, name="text", b=None) + line(1, c=3.5) + '{"step": 2')
    metrics = run_log.load_metrics(path)
    assert metrics[0] == {"a": 1.0} and list(metrics) == [0, 1]  # the torn line does not count yet
    assert metrics[1].keys() == {"a", "b", "c"} and math.isnan(metrics[1]["b"])
    assert run_log.series(metrics, "a") == {0: 1.0, 1: 2.0} and run_log.series(metrics, "none") == {}
    assert run_log.matching_names(metrics, "?") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no complete line"),
        ('{"step": 1', "no complete line"),
        (line(1, a=1) + "{\n", "line 2: not JSON"),
        ("[1]\n", "line 1: expected a JSON object"),
        ("{}\n", 'line 1: expected {"step"'),
    ],
)
def test_bad_logs(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        run_log.load_metrics(write(tmp_path / "m.jsonl", text))


def test_no_log(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        run_log.load_metrics(tmp_path / "m.jsonl")


def test_a_growing_log_is_read_on(tmp_path):
    log = run_log.MetricLog(tmp_path / "m.jsonl")
    assert not log.update() and log.metrics == {}
    with open(log.path, "w", encoding="utf-8") as file:
        file.write(line(1, a=1) + line(2, a=2)[:9])
        file.flush()
        assert log.update() and log.metrics == {1: {"a": 1.0}}
        assert not log.update()
        file.write(line(2, a=2)[9:])
        file.flush()
        assert log.update() and log.metrics == {1: {"a": 1.0}, 2: {"a": 2.0}}
        file.write("oops\n")
        file.flush()
        assert log.update() and len(log.metrics) == 2 and "m.jsonl, line 3: not JSON" in log.damaged[0]
        file.write(line(4, a=4))
        file.flush()
        assert log.update() and list(log.metrics) == [1, 2, 4] and len(log.damaged) == 1


def test_damaged_lines_are_left_out_and_named(tmp_path):
    path = write(tmp_path / "m.jsonl", line(1, a=1) + "[1]\n" + f'{{"step": {10**30}, "data": {{}}}}\n' + line(3, a=3))
    damaged: list[str] = []
    assert run_log.load_metrics(path, damaged) == {1: {"a": 1.0}, 3: {"a": 3.0}}
    assert [text.partition(": ")[0] for text in damaged] == [f"{path}, line 2", f"{path}, line 3"]
    with pytest.raises(ValueError, match="line 1"):
        run_log.load_metrics(write(tmp_path / "all.jsonl", "oops\n"), damaged)


def test_a_resumed_run_replaces_its_log(tmp_path):
    log = run_log.MetricLog(write(tmp_path / "m.jsonl", line(1, a=1) + line(2, a=2)))
    log.update()
    write(tmp_path / "new", line(1, a=1) + line(2, a=7) + line(3, a=8)).replace(log.path)
    assert log.update() and log.metrics == {1: {"a": 1.0}, 2: {"a": 7.0}, 3: {"a": 8.0}}
    log.path.write_text("")  # emptied in place
    assert log.update() and log.metrics == {}


def test_running_mean():
    assert run_log.running_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]


def test_phases_add_up_to_the_step():
    row = {"timing_s/gen": 1.0, "timing_s/adv": 0.5, "timing_s/step": 2.0, "timing_per_token_ms/gen": 9.0}
    assert run_log.phase_seconds(row) == {"gen": 1.0, "adv": 0.5, "other": 0.5}
    assert run_log.phase_seconds({"a": 1.0}) == {}


def test_samples(tmp_path):
    for step in range(0, 100, 10):
        row = {"input": "p", "output": f"at {step}", "gts": "t"}
        write(tmp_path / f"val_samples/{step}.jsonl", json.dumps(row) + '\n{"torn')
    samples, left_out = run_log.read_samples(tmp_path, 4, {})
    assert list(samples) == [0, 30, 60, 90] and left_out == []
    assert list(run_log.read_samples(tmp_path, 1, {})[0]) == [90]
    assert len(run_log.read_samples(tmp_path, 99, {})[0]) == 10
    assert run_log.answers_over_training([samples[0], samples[90]], 5) == [("p", "t", [samples[0][0], samples[90][0]])]
    write(tmp_path / "val_samples/90.jsonl", '{"input": "p", "output": "o", "gts": null}\n')
    samples, (note,) = run_log.read_samples(tmp_path, 2, {})
    assert list(samples) == [0] and "step 90" in note and "input, output and gts" in note
    assert run_log.read_samples(tmp_path / "none", 3, {}) == ({}, [])


def test_samples_of_another_time_line_are_left_out(tmp_path):
    for step in (0, 10, 20, 30):
        write(tmp_path / f"val_samples/{step}.jsonl", json.dumps({"input": "p", "output": "o", "gts": "t"}) + "\n")
    metrics = {0: {"val-aux/a/rouge_l/mean@1": 0.1}, 5: {"actor/x": 1.0}, 10: {"val-aux/a/rouge_l/mean@1": 0.2}, 20: {}}
    samples, (note,) = run_log.read_samples(tmp_path, 9, metrics)  # went back from 30 to 10, and is at 20 again
    assert list(samples) == [0, 10] and "samples of step 20, 30 are left out" in note


def test_settings(tmp_path):
    assert run_log.read_overrides(tmp_path) == {} and run_log.total_training_steps(tmp_path) is None
    text = "- a.b=1\n- +c='x=y'\n- a.b=2\n- +ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY='secret'\n"
    write(tmp_path / "hydra/.hydra/overrides.yaml", text)
    write(tmp_path / "hydra/.hydra/config.yaml", "trainer:\n  total_training_steps: 110\n")
    assert run_log.read_overrides(tmp_path) == {"a.b": "2", "c": "'x=y'"}
    assert run_log.total_training_steps(tmp_path) == 110
    for unset in ("null", "-1", "${other}"):
        write(tmp_path / "hydra/.hydra/config.yaml", f"trainer:\n  total_training_steps: {unset}\n")
        assert run_log.total_training_steps(tmp_path) is None


def test_recorded_loss_mode(tmp_path):
    assert run_log.recorded_loss_mode(tmp_path) == "vanilla"
    actor = "actor_rollout_ref: {actor: {policy_loss: "
    for text, mode in (("{loss_mode: gspo}}}", "gspo"), ("5}}", "vanilla"), ("{loss_mode: null}}}", "vanilla")):
        write(tmp_path / "hydra/.hydra/config.yaml", actor + text + "\n")
        assert run_log.recorded_loss_mode(tmp_path) == mode


@pytest.mark.parametrize("text", ["a: [", "text", "[1]"])
def test_settings_that_cannot_be_read(tmp_path, text):
    write(tmp_path / "hydra/.hydra/config.yaml", text)
    with pytest.raises(ValueError, match="config.yaml"):
        run_log.total_training_steps(tmp_path)

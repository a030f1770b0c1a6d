"""recipe/gad/training/bad_steps.py: which steps are bad, when a run stops, and what it says and leaves."""

import json

import pytest

from recipe.gad.training.bad_steps import BadSteps, BrokenRunError, not_finite

GOOD = {"actor/pg_loss": 0.1, "critic/d_loss": 0.6}
BAD = {**GOOD, "critic/grad_norm": float("nan")}


def test_losses_gradients_and_scores_of_both_sides_must_be_finite():
    bad = {"actor/grad_norm": float("inf"), "critic/student_value_mean": float("-inf"), "critic/d_loss": float("nan")}
    assert not_finite({**GOOD, **bad, "perf/mfu/actor": float("nan")}) == sorted(bad)
    assert not_finite(GOOD) == []


@pytest.mark.parametrize(
    ("limit", "steps", "stops_at"), [(3, "bbgbbb", 6), (1, "gb", 2), (3, "bbgbbg", None), (0, "bbbbbb", None)]
)
def test_only_bad_steps_in_a_row_stop_a_run(limit, steps, stops_at):
    bad_steps = BadSteps(limit)
    rows = [dict(BAD if kind == "b" else GOOD) for kind in steps]
    stops = [number for number, row in enumerate(rows, start=1) if bad_steps.must_stop(row)]
    assert stops[:1] == ([stops_at] if stops_at else [])
    assert [row["gad/bad_steps"] for row in rows] == {
        "bbgbbb": [1, 2, 0, 1, 2, 3],
        "gb": [0, 1],
        "bbgbbg": [1, 2, 0, 1, 2, 0],
        "bbbbbb": [1, 2, 3, 4, 5, 6],
    }[steps]


@pytest.mark.parametrize(("checkpoints", "named"), [((2, 4, 6), 4), ((6,), None)])
def test_the_message_names_the_last_checkpoint_before_the_first_bad_step(tmp_path, checkpoints, named):
    for step in checkpoints:
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
        (tmp_path / f"global_step_{step}" / "data.pt").write_bytes(b"")
    bad_steps = BadSteps(2)
    assert not bad_steps.must_stop(dict(BAD))
    assert bad_steps.must_stop(metrics := dict(BAD))
    with pytest.raises(BrokenRunError) as stopped:
        bad_steps.stop(tmp_path, 6, metrics, [{"key": "u_0_0", "prompt": "p", "answer": "ä\ud800"}])
    text = str(stopped.value)
    assert "steps 5 to 6" in text and "critic/grad_norm" in text and "optim.lr" in text
    if named:
        assert f"trainer.resume_from_path={tmp_path}/global_step_{named}" in text
    else:
        assert "no checkpoint was saved before it" in text
    assert json.loads((tmp_path / "bad_step_6/metrics.json").read_text())["critic/grad_norm"] == "nan"
    assert json.loads((tmp_path / "bad_step_6/rows.jsonl").read_text())["key"] == "u_0_0"
    assert (only := BadSteps(1)).must_stop(metrics := dict(BAD))
    with pytest.raises(BrokenRunError, match="step 6 has NaN"):
        only.stop(tmp_path, 6, metrics, [])

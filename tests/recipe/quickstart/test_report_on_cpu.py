"""recipe/gad/quickstart/report.py: the table, samples, curves and progress bar of the quickstart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.gad.quickstart import report


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def runs(tmp_path):
    """Run folders as verl writes them: 6 warmup steps (d_acc .4 -> .9), 12 SeqKD steps, 12 GAD steps (.9 -> .68)."""
    accuracy = {
        "warmup": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "seqkd": [None] * 12,
        "gad": [0.9 - 0.02 * i for i in range(12)],
    }
    style = {
        "warmup": {0: "so {} bye", 6: "well {} bye"},
        "seqkd": {0: "well {} bye", 12: "well a a a right"},
        "gad": {0: "well {} bye", 12: "well {} right"},
    }
    for stage, values in accuracy.items():
        rows = [
            {"step": i, "data": {"actor/loss": 1.0} if v is None else {"critic/d_acc": v}}
            for i, v in enumerate(values, start=1)
        ]
        rows.insert(0, {"step": 0, "data": {"val-aux/toy/rouge_l/mean@1": 0.25}})
        rows.append({"step": len(values), "data": {"val-aux/toy/rouge_l/mean@1": 0.5}})
        write_lines(tmp_path / stage / "metrics.jsonl", rows)
        for step, pattern in style[stage].items():
            dump = [
                {"input": x, "output": pattern.format(x), "gts": f"well {x} right", "score": 0.5, "step": step}
                for x in ("a b c", "d e f")
            ]
            write_lines(tmp_path / stage / "val_samples" / f"{step}.jsonl", dump if step else dump[::-1])
    return tmp_path / "warmup", tmp_path / "seqkd", tmp_path / "gad"


def test_dumps(runs, tmp_path):
    # bigrams of "so a b c bye" against "well a b c right": x x twice of six; "well a b c bye" shares four
    assert report.closeness_from_dumps(runs[0] / "val_samples") == pytest.approx({0: 1 / 3, 6: 2 / 3})
    assert report.closeness_from_dumps(runs[2] / "val_samples") == pytest.approx({0: 2 / 3, 12: 1.0})
    before, after = runs[2] / "val_samples/0.jsonl", runs[2] / "val_samples/12.jsonl"  # rows in another order
    assert report.sample_triples(before, after, 1) == [
        ("a b c", "well a b c right", "well a b c bye", "well a b c right")
    ]
    assert len(report.sample_triples(before, after, 5)) == 2
    with pytest.raises(ValueError, match="no validation dumps"):
        report.closeness_from_dumps(tmp_path)
    write_lines(tmp_path / "x" / "3.jsonl", [{"input": "a", "output": "b", "gts": None}])
    with pytest.raises(ValueError, match="input, output and gts"):
        report.closeness_from_dumps(tmp_path / "x")


def test_summary(runs):
    lines = report.summary(*runs).splitlines()
    cells = {line[:26].strip(): line[26:].split() for line in lines[1:-1]}
    # warmup has 6 steps, mean .65; the last 10 of GAD run from .86 down to .68, mean .77
    assert cells["discriminator accuracy"] == ["-", "0.650", "-", "0.770"]
    assert cells["closeness to the teacher"] == ["0.333", "0.667", "1.000", "1.000"]
    assert cells["ROUGE-L to the teacher"] == ["-", "0.500", "0.500", "0.500"]
    assert cells["letters right"] == ["1.000", "1.000", "0.000", "1.000"]
    assert cells["words of an answer"] == ["5.000", "5.000", "5.000", "5.000"]


def test_summary_says_which_side_is_closer(runs):
    last = "({} SeqKD steps, 12 GAD steps)."
    letters = "GAD has {} of the letters right against SeqKD and +0.000 against the warmup " + last.format(12)
    warmup, seqkd, gad = runs
    said = report.summary(warmup, seqkd, gad).splitlines()[-1]
    assert said == "GAD is closer to the teacher by 0.000; " + letters.format("+1.000")
    dump = [{"input": x, "output": f"well {x} bye", "gts": f"well {x} right"} for x in ("a b c", "d e f")]
    write_lines(gad / "val_samples" / "12.jsonl", dump)  # shares four of six bigrams
    said = report.summary(warmup, seqkd, gad).splitlines()[-1]
    assert said == "SeqKD is closer to the teacher by 0.333; " + letters.format("+1.000")


def test_report_draws_the_curves(runs, capsys):
    folders = [f"--{run.name}_dir={run}" for run in runs]
    assert report.main(["show", *folders]) == 0
    printed = capsys.readouterr().out
    assert "closeness to the teacher" in printed and "  GAD      well a b c right" in printed
    picture = (runs[2] / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    width = int.from_bytes(picture[16:20], "big")
    assert 900 <= width <= 1100


def test_a_run_without_discriminator_has_no_curve(tmp_path):
    with pytest.raises(ValueError, match="critic/d_acc"):
        report.plot_curves({1: {}}, {1: {"critic/d_acc": 0.9}}, {0: 0.5}, {0: 0.5}, tmp_path / "x.png", "title")


def test_progress_follows_a_process_to_its_end(runs, capfd):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.communicate(b"\n")
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "da')  # being written
    report.follow_progress(runs[0] / "metrics.jsonl", process.pid, steps=6)
    printed = capfd.readouterr().err
    assert "6/6" in printed and "d_acc 0.90" in printed


def test_bad_input_exits_with_2(tmp_path, capsys):
    assert report.main(["show", *(f"--{name}_dir={tmp_path}" for name in ("warmup", "seqkd", "gad"))]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err

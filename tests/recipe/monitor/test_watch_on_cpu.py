"""gad watch: the state of a run in the terminal."""

import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from recipe.gad.cli import main
from recipe.gad.monitor.report import _samples, _settings, _summary, find_runs
from recipe.gad.monitor.rules import all_clear
from recipe.gad.monitor.watch import RunState, duration, sparkline
from recipe.gad.run.findings import line

ROOT = Path(__file__).parents[3]


def add_step(run: Path, step: int, **data) -> None:
    data = {"critic/d_acc": 0.75, "timing_s/gen": 1.5, "timing_s/step": 2.0} | {
        k.replace("__", "/"): v for k, v in data.items()
    }
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "data": data}) + "\n")


@pytest.fixture
def run(tmp_path):
    """A run of 10 steps, three of which are done, and a line that is being written."""
    (tmp_path / "gad/hydra/.hydra").mkdir(parents=True)
    (tmp_path / "gad/hydra/.hydra/config.yaml").write_text("trainer:\n  total_training_steps: 10\n")
    for step in (1, 2, 3):
        add_step(tmp_path / "gad", step)
    return tmp_path / "gad"


def start(run: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipe.gad.cli", "watch", str(run), "--interval", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **options)


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], width=2) == "▁█"
    assert sparkline([3, 3]) == "▁▁" and sparkline([]) == ""
    assert sparkline([0, math.nan, 1]) == "▁×█" and sparkline([math.nan]) == "×"


def test_nothing_wrong_is_said_of_enough_steps_only():
    healthy = {step: {"critic/d_acc": 0.75} for step in range(20)}  # step 0 is a validation
    assert all_clear(healthy) == "Too few steps to judge: 19 of 20."
    assert all_clear({**healthy, 20: {"critic/d_acc": 0.75}}) == "Nothing wrong was found."


ESCAPES = "a\x1b[2J\x1b]0;pwn\x07\x9b2J\u202e\ud83d\r"


@pytest.mark.parametrize("once", [["--once"], []])
def test_control_characters_are_shown_and_not_obeyed(tmp_path, capfdbinary, once):
    folder = tmp_path / "run\x1b[2J"
    (folder / "hydra/.hydra").mkdir(parents=True)
    (folder / "hydra/.hydra/config.yaml").write_text("trainer:\n  total_training_steps: 3\n")
    for step in (1, 2, 3):
        add_step(folder, step, **{f"val-aux/{ESCAPES}/rouge_l/mean@1": 0.5, f"actor/{ESCAPES}": None})
    with pytest.raises(SystemExit) as exit:
        main(["watch", str(folder), *once])
    assert exit.value.code == 0
    printed = capfdbinary.readouterr().out.decode()
    assert "run\\x1b[2J" in printed and "\\x07" in printed
    assert not set(printed) & set("\x1b\x07\x9b\u202e\r")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("hydra/.hydra/config.yaml", "trainer: null\n"),
        ("hydra/.hydra/config.yaml", "trainer: [1]\n"),
        ("hydra/.hydra/config.yaml", f"trainer: {{total_training_steps: {10**30}}}\n"),
        ("hydra/.hydra/config.yaml", "[" * 5000),
        ("hydra/.hydra/config.yaml", "trainer: 2026-99-99\n"),
        ("hydra/.hydra/overrides.yaml", "[1, 2]\n"),
        ("metrics.jsonl", '{"step": %s, "data": {}}\n' % 10**30),
        ("metrics.jsonl", '{"step": true, "data": {}}\n'),
        ("metrics.jsonl", "[" * 100_000 + "\n"),
        ("metrics.jsonl", '{"step": 1, "data": {"critic/d_acc": %s}}\n' % 10**400),
        ("metrics.jsonl", '{"step": 1, "data": {"critic/d_acc": 1e308, "actor/entropy": -1e308}}\n' * 2),
        ("metrics.jsonl", '{"step": 1, "data": {"timing_s/step": -1e308, "critic/d_acc": 1e300}}\n'),
        ("val_samples/3.jsonl", '{"input": "a", "output": "b", "gts": "c", "rouge_l": [1]}\n'),
        ("val_samples/3.jsonl", '{"input": "a", "output": "b", "gts": "c", "rouge_l": "x"}\n'),
        ("val_samples/3.jsonl", '{"input": "a", "output": "b", "gts": "c", "rouge_l": %s}\n' % 10**400),
        ("val_samples/3.jsonl", "[" * 100_000 + "\n"),
    ],
)
def test_damaged_files_are_shown_or_named(run, capsys, file, text):
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    with open(run / file, "w" if file.endswith("yaml") else "a", encoding="utf-8") as stream:
        stream.write(text)
    with pytest.raises(SystemExit) as exit:
        main(["watch", str(run), "--once"])
    assert exit.value.code == 0 and "critic/d_acc" in capsys.readouterr().out
    [read] = find_runs([run])
    _summary([read]), _samples(read), _settings([read])


def test_watch_and_report_name_what_is_damaged_and_show_the_rest(run, capsys, monkeypatch):
    # not os.environ, which datasets replaces by a copy when it maps with several processes
    monkeypatch.setattr(Console, "_environ", {"COLUMNS": "1000"})
    (run / "hydra/.hydra/config.yaml").write_text("a: [1\n")
    first, *others = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([first, "oops\n", *others]))
    with pytest.raises(SystemExit) as exit:
        main(["watch", str(run), "--once"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and "step 3" in printed
    [read] = find_runs([run])
    assert list(read.metrics) == [1, 2, 3]
    for text in (printed, line(read.findings[0])):
        assert "The run's files are damaged" in text
        assert "metrics.jsonl, line 2: not JSON" in text and "config.yaml is not readable YAML" in text


def test_duration():
    assert [duration(s) for s in (4.4, 59.9, 90, 3600, 11100)] == ["4 s", "60 s", "2 min", "1 h 00 min", "3 h 05 min"]


def test_once_on_a_growing_file(run, capsys):
    def printed() -> str:
        with pytest.raises(SystemExit) as exit:
            main(["watch", str(run), "--once"])
        assert exit.value.code == 0
        return capsys.readouterr().out

    text = printed()
    assert "gad  step 3/10  2 s per step  14 s left" in text
    assert re.search(r"critic/d_acc +▁▁▁ +0.75 +0.75", text)
    assert "gen 1.5s" in text and "other 0.5s" in text
    assert "Too few steps to judge: 3 of 20." in text and "Nothing wrong" not in text
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "da')
    assert "step 3/10" in printed()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('ta": {"critic/d_acc": null}}\n')
    text = printed()
    assert "step 4/10" in text and "error   not_finite: NaN or infinite numbers" in text and "×" in text


@pytest.mark.parametrize("width", [45, 60, 80, 120])
def test_names_are_whole_on_narrow_terminals(run, width):
    names = ("critic/d_acc", "critic/d_loss", "teacher_response_length/mean")
    row = {"step": 4, "data": dict.fromkeys(names, 123456.789)}
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    state = RunState(run)
    state.update()
    console = Console(width=width, file=io.StringIO())
    console.print(state)
    lines = console.file.getvalue().splitlines()
    for name in names:
        (found,) = [line for line in lines if line.startswith(f"{name} ")]
        assert len(found.rstrip()) <= width and "1.235e+05" in found.split()
    assert any("▁" in line for line in lines) == (width > 60)


def test_total_is_unknown(run):
    (run / "hydra/.hydra/config.yaml").write_text("trainer:\n  total_training_steps: null\n")
    state = RunState(run)
    assert state.update() and not state.update()
    assert state.headline() == "gad  step 3  2 s per step" and not state.finished


@pytest.mark.parametrize(("loss_mode", "found"), [("gspo", []), ("vanilla", ["Many tokens are clipped"])])
def test_the_recorded_loss_decides_how_many_clipped_tokens_are_many(run, loss_mode, found):
    record = f"actor_rollout_ref: {{actor: {{policy_loss: {{loss_mode: {loss_mode}}}}}}}\n"
    (run / "hydra/.hydra/config.yaml").write_text(record)
    for step in range(4, 24):
        add_step(run, step, actor__pg_clipfrac=0.35)
    state = RunState(run)
    state.update()
    assert [finding.what for finding in state.findings] == found


def test_silence(run):
    old = time.time() - 600
    os.utime(run / "metrics.jsonl", (old, old))
    state = RunState(run)
    state.update()
    assert state.headline().endswith("silent for 10 min: has it stopped?")
    for step in range(4, 11):
        add_step(run, step)
    os.utime(run / "metrics.jsonl", (old, old))
    state.update()
    assert state.headline() == "gad  step 10/10  2 s per step  finished"


def test_bad_input_exits_with_2(run, capsys):
    (run / "fresh").mkdir()
    for folder, message in (
        (run / "none", "no folder"),
        (run / "fresh", "nothing is logged yet"),
        (run.parent, f"watch one of its stages: {run}"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["watch", str(folder), "--once"])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err


def test_lines_until_the_last_step(run):
    """Not a terminal: one line per growth, a finding once, and the end with the run's last step."""
    process = start(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [process.stdout.readline()]
    for step in range(4, 11):
        add_step(run, step, gad__missing_rollouts=2.0)
        lines.append(process.stdout.readline())
        if step == 4:
            lines.append(process.stdout.readline())
    rest, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and rest == ""
    assert lines[0].startswith("gad  step 3/10") and "critic/d_acc 0.75" in lines[0]
    assert [f"step {step}/10" in line for step, line in zip((4, None, 5), lines[1:4], strict=True) if step] == [
        True,
        True,
    ]
    assert [line.startswith("warning missing_rollouts: Rollouts are missing.") for line in lines].count(True) == 1
    assert "step 10/10" in lines[-1] and "finished" in lines[-1]


def test_ctrl_c_ends_it_cleanly_before_the_first_step(tmp_path):
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(3)
    add_step(tmp_path, 1)
    assert "step 1" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")


def test_terminal_is_refreshed_in_place(run):
    ours, theirs = pty.openpty()
    process = start(run, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""

    def read_until(text: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 20
        while text not in shown:
            assert select.select([ours], [], [], max(0, deadline - time.monotonic()))[0], shown[-2000:]
            shown += os.read(ours, 65536)

    read_until(b"step 3/10")
    add_step(run, 4)
    read_until(b"step 4/10")
    assert b"\x1b[1A" in shown  # the cursor goes up again
    assert "▁".encode() in shown
    process.send_signal(signal.SIGINT)
    read_until(b"\x1b[?25h")  # the cursor is visible again
    assert process.wait(timeout=20) == 0
    os.close(ours)

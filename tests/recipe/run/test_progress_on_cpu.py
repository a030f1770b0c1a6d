"""Progress in a log file."""

from recipe.gad.run import progress as module
from recipe.gad.run.progress import progress


def test_without_a_terminal_a_line_comes_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    assert list(progress(range(3), desc="rows", unit=" rows")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and lines[-1].startswith("rows: 100%") and "3/3" in lines[-1]
    assert not any("\r" in line or line == "" for line in lines)
    monkeypatch.setattr(module, "SECONDS", 30.0)
    with progress(total=5) as bar:
        bar.update(2)
    assert capsys.readouterr().err == "", "a short loop is silent"

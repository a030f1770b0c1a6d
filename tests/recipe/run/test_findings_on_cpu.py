"""recipe/gad/run/findings.py: the printed form of a finding."""

import pickle
from pathlib import Path

from recipe.gad.run.findings import InputError, error, line, note, warning


def test_the_printed_form():
    assert str(note("fine")) == "fine"
    assert str(error("n=1: expected 2", fix="n=2")) == "n=1: expected 2. Fix: n=2"
    assert str(warning("Slow", evidence="It takes 3 s.", fix="Wait.")) == "Slow. It takes 3 s. Fix: Wait."
    assert line(error("two\n  lines").about("file")) == "error   : file: two lines"


def test_an_input_error_keeps_its_finding():
    problem = pickle.loads(pickle.dumps(InputError("no such file", fix="correct the path")))
    assert (problem.finding.what, problem.finding.fix) == ("no such file", "correct the path")
    assert str(problem) == "no such file. Fix: correct the path" and isinstance(problem, ValueError)


def test_only_findings_print_the_word_fix():
    gad = Path(__file__).resolve().parents[3] / "recipe/gad"
    own = {gad / "run/findings.py", gad / "plugin.py"}  # the plugin imports nothing of the package
    spelled = [file for file in gad.rglob("*.py") if "Fix: " in file.read_text(encoding="utf-8")]
    assert set(spelled) - own == set(), "raise InputError(what, fix=...) instead"

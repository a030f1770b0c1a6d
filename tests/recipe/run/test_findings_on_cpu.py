"""recipe/gad/run/findings.py: the printed form of a finding; and what the wing ``run`` may import."""

import ast
import pickle
from pathlib import Path

from recipe.gad.run.findings import InputError, error, line, note, warning

RUN = Path(__file__).resolve().parents[3] / "recipe/gad/run"


def test_the_printed_form():
    assert str(note("fine")) == "fine"
    assert str(error("n=1: expected 2", fix="n=2")) == "n=1: expected 2. Fix: n=2"
    assert str(warning("Slow", evidence="It takes 3 s.", fix="Wait.")) == "Slow. It takes 3 s. Fix: Wait."
    assert line(error("two\n  lines").about("file")) == "error   : file: two lines"


def test_an_input_error_keeps_its_finding():
    problem = pickle.loads(pickle.dumps(InputError("no such file", fix="correct the path")))
    assert (problem.finding.what, problem.finding.fix) == ("no such file", "correct the path")
    assert str(problem) == "no such file. Fix: correct the path" and isinstance(problem, ValueError)


def test_run_imports_no_other_wing_and_nothing_of_verl():
    for file in RUN.glob("*.py"):
        modules = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        ours = {name for name in modules if name.split(".")[0] in ("verl", "recipe")}
        exceptions = {"recipe.gad.plugin"} if file.name == "checks.py" else set()
        assert [name for name in ours - exceptions if not name.startswith("recipe.gad.run.")] == [], file.name

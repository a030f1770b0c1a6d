"""The start of a run (recipe/gad/launch.py) with a doctor and a trainer that only say what they get."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = ["-m", "toy_trainer", "--config-path", "pkg://toy", "--config-name", "gad_trainer", "a=1", "b='x y'"]
DOCTOR = """import sys
print("doctor", *sys.argv[1:], flush=True)
{then}
"""
TRAINER = """import sys
print("imported", flush=True)
def main():
    print("trains", *sys.argv[1:], flush=True)
"""


@pytest.fixture
def launch(tmp_path):
    """Function that launches toy modules: Popen. The doctor's code ends with ``then``."""

    def launch(then="", trainer=TRAINER):
        (tmp_path / "recipe/gad").mkdir(parents=True)
        for package in ("recipe", "recipe/gad"):
            (tmp_path / package / "__init__.py").touch()
        (tmp_path / "recipe/gad/launch.py").write_text((ROOT / "recipe/gad/launch.py").read_text())
        (tmp_path / "recipe/gad/cli.py").write_text(DOCTOR.format(then=then))
        (tmp_path / "toy_trainer.py").write_text(trainer)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-m", "recipe.gad.launch", *WORDS]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **streams)

    return launch


def test_the_trainer_runs_after_the_doctor_with_the_same_overrides(launch):
    out, err = (process := launch("import time; time.sleep(0.5); print('passed', flush=True)")).communicate()
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert sorted(lines[:2]) == ["doctor doctor --brief --config-name gad_trainer a=1 b='x y'", "imported"]
    assert lines[2:] == ["passed", "trains " + " ".join(WORDS[2:])]


TERMINATED = "import os; os.kill(os.getpid(), 15)"


@pytest.mark.parametrize(("then", "code"), [("sys.exit(1)", 1), ("sys.exit(2)", 2), (TERMINATED, 143)])
def test_a_run_that_the_doctor_refuses_ends_with_its_exit_code(launch, then, code):
    out, err = (process := launch(then)).communicate()
    assert process.returncode == code and "trains" not in out and err == ""


def test_the_doctor_speaks_first_if_the_trainer_cannot_be_imported(launch):
    out, err = (process := launch("sys.exit(1)", "import no_such_module_of_verl")).communicate()
    assert process.returncode == 1 and err == ""


def test_a_trainer_that_cannot_be_imported_says_so_if_the_doctor_does_not(launch):
    out, err = (process := launch("", "import no_such_module_of_verl")).communicate()
    assert process.returncode == 1 and "No module named 'no_such_module_of_verl'" in err


def test_sigterm_during_the_checks_ends_the_doctor_too(launch):
    process = launch("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    out, err = process.communicate(timeout=30)  # until the doctor has closed its output
    assert process.returncode == 143 and "trains" not in out and err == ""


def test_ctrl_c_during_the_checks_ends_the_launch_without_a_traceback(launch):
    process = launch("import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(0.2); sys.exit(1)")
    out, err = process.communicate()
    assert process.returncode == 130 and "trains" not in out and "Traceback" not in err

"""The built wheel, installed into an environment without this checkout, lays the delta over verl in every process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file.relative_to(ROOT / "verl").as_posix() for file in (ROOT / "verl").rglob("*.py"))
# what extends stock modules that import vLLM can be imported only beside it
IMPORTED = [file for file in FILES if "vllm_rollout/" not in file or importlib.util.find_spec("vllm")]
MODULES = [".".join(("verl", *Path(file).with_suffix("").parts)).removesuffix(".__init__") for file in IMPORTED]


def run(*command: str | Path, **options) -> str:
    """stdout of a command that must succeed, without this process's import paths."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "VERL_USE_EXTERNAL_PLUGINS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"VERL_PLATFORM": "cpu", "RAY_USAGE_STATS_ENABLED": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(list(command), env=environment, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def isolation() -> list[str]:
    """pip's option for building with the hatchling that is here; without one, pip fetches it."""
    return ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []


class Environment:
    """A fresh virtual environment that sees the packages of the running one, but none of its .pth files.

    A path that a .pth file adds comes behind the environment's own packages, and .pth files found there are not read:
    an editable verl-gad of the running environment stays out of sight.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.packages = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def install(self, wheel: Path) -> None:
        """Install without dependencies, then open the view on the running environment's packages."""
        run(
            sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", "--no-index", wheel
        )
        paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        (self.packages / "running_environment.pth").write_text("\n".join(paths) + "\n")

    def run(self, code: str) -> str:
        """stdout of ``code``, run outside the checkout."""
        return run(self.python, "-c", textwrap.dedent(code), cwd=self.folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation(), "-w", folder, ROOT)
    (file,) = folder.glob("verl_gad-*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("env") / "venv")
    environment.install(wheel)
    return environment


def test_the_wheel_holds_the_delta_the_configuration_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(name for name in names if "/_overlay/" in name) == [f"recipe/gad/_overlay/{file}" for file in FILES]
    others = {"config/gad_trainer.yaml", "plugin.py", "monitor/report.html.j2", "cli.py", "commands/eval.py"}
    assert {f"recipe/gad/{name}" for name in others} <= set(names)
    assert [name for name in names if not name.startswith("recipe/gad/")] == []


PROBE = """
import importlib, json
def probe(names):
    import verl
    return [[name, str(importlib.import_module(name).__spec__.loader.ours)] for name in names]
"""


def assert_from_the_wheel(seen: list[list[str]], environment: Environment) -> None:
    """Every module was read from the environment's own packages."""
    overlay = environment.packages / "recipe/gad/_overlay"
    assert seen == [[name, str(overlay / file)] for name, file in zip(MODULES, IMPORTED, strict=True)]


def test_every_module_of_ours_comes_from_the_installed_wheel(environment):
    output = environment.run(f"""
        {textwrap.indent(PROBE, " " * 8).strip()}
        import recipe.gad, verl
        from importlib.metadata import distribution
        from importlib.resources import files
        print(json.dumps({{
            "modules": probe({MODULES!r}),
            "recipe": recipe.gad.__file__,
            "verl": verl.__file__,
            "metadata": str(distribution("verl-gad").locate_file("")),
            "config": files("recipe.gad.config").joinpath("gad_trainer.yaml").is_file(),
        }}))
    """)
    seen = json.loads(output.splitlines()[-1])
    assert_from_the_wheel(seen["modules"], environment)
    assert Path(seen["recipe"]) == environment.packages / "recipe/gad/__init__.py"
    assert Path(seen["metadata"]) == environment.packages
    assert ROOT / "verl" not in Path(seen["verl"]).parents and environment.packages not in Path(seen["verl"]).parents
    assert seen["config"]


def test_a_ray_worker_sees_the_overlay_of_the_wheel(environment):
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: it holds Ray's sockets
    try:
        output = environment.run(f"""
            import ray
            {textwrap.indent(PROBE, " " * 12).strip()}
            ray.init(num_cpus=2, include_dashboard=False, _temp_dir={temporary!r}, log_to_driver=False)
            print(json.dumps(ray.get(ray.remote(probe).remote({MODULES!r}), timeout=300)))
            ray.shutdown()
        """)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert_from_the_wheel(json.loads(output.splitlines()[-1]), environment)


def test_an_editable_install_uses_the_checkout_and_copies_nothing(tmp_path):
    pytest.importorskip("hatchling")
    build = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
    wheel = run(sys.executable, "-c", build, cwd=ROOT).strip()
    environment = Environment(tmp_path / "venv")
    environment.install(tmp_path / wheel)
    assert not (environment.packages / "recipe").exists() and not (ROOT / "recipe/gad/_overlay").exists()
    root = environment.run("""
        import os
        del os.environ["VERL_PLATFORM"]  # with it the plugin imports verl, which takes its time
        from recipe.gad import plugin
        print(plugin.overlay_root())
    """)
    assert Path(root.strip()) == ROOT / "verl"

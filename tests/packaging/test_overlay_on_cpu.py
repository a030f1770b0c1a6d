"""The overlay (recipe/gad/plugin.py): on a small made-up verl, where every case is cheap, then on the real modules."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Loads plugins as verl 0.9.1 does: at the end of its import, errors kept quiet.
FAKE_VERL = """
import os
from importlib.metadata import entry_points
{early}
if os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto") != "none":
    for entry_point in entry_points(group="verl.plugins"):
        try:
            entry_point.load()
        except Exception:
            pass
"""
FAKE_STOCK = {
    "algos.py": """
        __all__ = ["outer"]
        def inner():
            return "stock inner"
        def outer():
            return "outer with " + inner()
        def kept():
            return "stock kept"
    """,
    "pack/__init__.py": "from .member import MEMBER",
    "pack/member.py": "MEMBER = 'stock member'",
    "plain/leaf.py": "LEAF = 'stock leaf'",
}
FAKE_OURS = {
    "algos.py": """
        '''Extends verl.algos.'''
        from verl.algos import kept
        __all__ = ["added"]
        def inner():
            return "our inner"
        def added():
            return "added to " + kept()
        class Config:
            def __init__(self, value):
                self.value = value
    """,
    "pack/__init__.py": "from verl.pack.extra import EXTRA",
    "pack/extra.py": "import builtins; builtins.runs = getattr(builtins, 'runs', 0) + 1; EXTRA = 'our extra'",
    "plain/more.py": "MORE = 'our more'",
    "fresh/deep/module.py": "from verl.algos import added; FRESH = 'our fresh'",
    "broken.py": "raise ValueError('the overlay itself is broken')",
}


class FakeSite:
    """A folder with a made-up verl, our real plugin and a made-up delta; code runs in a fresh bare interpreter."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.write("verl/__init__.py", FAKE_VERL.format(early=""))
        for name, text in FAKE_STOCK.items():
            self.write(f"verl/{name}", text)
        for name, text in FAKE_OURS.items():
            self.write(f"recipe/gad/_overlay/{name}", text)
        self.write("recipe/gad/__init__.py", "")
        self.write("recipe/gad/plugin.py", (ROOT / "recipe/gad/plugin.py").read_text())
        self.write("verl_gad-0.dist-info/METADATA", "Name: verl-gad\nVersion: 0\n")
        self.write("verl_gad-0.dist-info/entry_points.txt", "[verl.plugins]\ngad = recipe.gad.plugin\n")
        self.verl_version("0.9.1")

    def write(self, name: str, text: str) -> None:
        """Write one file of the site."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))

    def verl_version(self, version: str) -> None:
        """State the version of the made-up verl."""
        self.write("verl-0.dist-info/METADATA", f"Name: verl\nVersion: {version}\n")

    def run(self, code: str, fails: bool = False, **environment: str) -> tuple[str, str]:
        """stdout and stderr of ``code``, which must succeed (or fail)."""
        done = subprocess.run(
            [sys.executable, "-S", "-c", textwrap.dedent(code)],
            env={"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stdout, done.stderr


@pytest.fixture
def site(tmp_path):
    return FakeSite(tmp_path)


def test_stock_is_executed_first_then_ours_in_one_namespace(site):
    _, stderr = site.run("""
        import inspect, verl
        from verl import algos
        assert algos.outer() == "outer with our inner", "stock code must see the redefined name"
        assert algos.added() == "added to stock kept"
        assert algos.__all__ == ["outer", "added"]
        assert "_overlay" not in algos.__file__ and "_overlay" not in inspect.getsourcefile(algos.kept)
        assert "_overlay" in inspect.getsourcefile(algos.inner) and "our inner" in inspect.getsource(algos.inner)
        assert algos.__doc__ == "Extends verl.algos."
    """)
    assert stderr == ""


def test_package_init_is_laid_over_and_modules_of_ours_run_once(site):
    site.run("""
        import builtins, pkgutil, verl
        import verl.pack, verl.pack.extra
        assert (verl.pack.MEMBER, verl.pack.EXTRA) == ("stock member", "our extra")
        assert builtins.runs == 1
        assert sorted(module.name for module in pkgutil.iter_modules(verl.pack.__path__)) == ["extra", "member"]
    """)


def test_modules_only_in_ours(site):
    site.run("""
        import verl
        from verl.fresh.deep.module import FRESH  # folders that the wheel does not have
        from verl.plain.leaf import LEAF  # a folder without __init__.py in the wheel and in ours
        from verl.plain.more import MORE
        assert (FRESH, LEAF, MORE) == ("our fresh", "stock leaf", "our more")
        try:
            import verl.fresh.absent
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("a module of neither tree was found")
    """)


def test_objects_are_pickled_by_reference_and_have_one_identity(site):
    pickled, _ = site.run("""
        import pickle, sys, verl
        from verl.algos import Config, added, inner
        assert pickle.loads(pickle.dumps(added)) is added is sys.modules["verl.algos"].added
        assert isinstance(pickle.loads(pickle.dumps(Config(3))), Config)
        print(pickle.dumps((added, inner, Config(3))).hex())
    """)
    site.run(f"""
        import pickle, verl
        added, inner, config = pickle.loads(bytes.fromhex("{pickled.strip()}"))
        from verl import algos
        assert added is algos.added and inner() == "our inner"
        assert type(config) is algos.Config and config.value == 3
    """)


def test_a_broken_overlay_file_is_printed_and_raised(site):
    stdout, stderr = site.run("""
        import verl
        try:
            import verl.broken
        except ValueError as error:
            print("raised:", error)
    """)
    assert stdout == "raised: the overlay itself is broken\n"
    assert "executing the overlay" in stderr and "broken.py" in stderr and "Traceback" in stderr


def test_a_file_that_does_not_fit_the_stock_one_is_refused(site):
    site.write("recipe/gad/_overlay/algos/__init__.py", "")
    (site.folder / "recipe/gad/_overlay/algos.py").unlink()
    _, stderr = site.run("import verl.algos", fails=True)
    assert "one is a package, the other a plain module" in stderr


NOT_ACTIVE = """
import sys, verl
from verl import algos
assert algos.outer() == "outer with stock inner" and not hasattr(algos, "added")
assert "OverlayFinder" not in [type(finder).__name__ for finder in sys.meta_path]
"""


def test_another_verl_version_is_refused_with_the_fix(site):
    site.verl_version("0.10.0")
    _, stderr = site.run(NOT_ACTIVE)
    assert "verl 0.10.0 is installed" in stderr and "pip install verl==0.9.1" in stderr
    assert "could not be activated" in stderr


def test_modules_imported_before_the_overlay_are_named(site):
    site.write("verl/__init__.py", FAKE_VERL.format(early="from verl import algos"))
    _, stderr = site.run(NOT_ACTIVE)
    assert "verl.algos" in stderr and "imported before the overlay" in stderr and "import verl first" in stderr


def test_an_installation_without_our_files_is_refused(site):
    for file in (site.folder / "recipe/gad/_overlay").rglob("*.py"):
        file.unlink()
    _, stderr = site.run(NOT_ACTIVE)
    assert "no module found under" in stderr


def test_plugins_can_be_switched_off(site):
    _, stderr = site.run(NOT_ACTIVE, VERL_USE_EXTERNAL_PLUGINS="none")
    assert stderr == ""


def test_install_is_idempotent_and_works_without_importing_verl_first(site):
    site.run("""
        import sys
        from recipe.gad import plugin
        plugin.install()
        import verl
        plugin.install()
        assert [type(finder).__name__ for finder in sys.meta_path].count("OverlayFinder") == 1
        from verl.algos import added
    """)


def delta_modules() -> dict[str, Path]:
    """Our file for each module of the real delta."""
    files = sorted((ROOT / "verl").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def run_real(code: str, folder: Path, **environment: str) -> str:
    """stdout of ``code`` in a fresh process of this environment, outside the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "VERL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": "-1", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_of_the_delta_holds_stock_and_ours(tmp_path):
    vllm = importlib.util.find_spec("vllm")  # stock modules that import it can be imported only beside it
    modules = {name: file for name, file in delta_modules().items() if vllm or ".vllm_rollout." not in name}
    trees = {name: ast.parse(file.read_text()).body for name, file in modules.items()}
    defined = {
        name: [node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for name, tree in trees.items()
    }
    code = f"""
        import importlib, json, pickle
        import cloudpickle, verl
        from recipe.gad.plugin import overlay_files
        seen = {{}}
        for name, names in json.loads({json.dumps(json.dumps(defined))}).items():
            module = importlib.import_module(name)
            loader = module.__spec__.loader
            stock = loader.stock.origin if loader.stock else None
            for each in names:
                thing = getattr(module, each)
                if getattr(thing, "__module__", None) == name and getattr(thing, "__qualname__", None) == each:
                    assert pickle.loads(cloudpickle.dumps(thing)) is thing, each
            seen[name] = [str(loader.ours), stock]
        from verl.trainer.ppo.core_algos import agg_loss, compute_discriminator_loss
        print(json.dumps([seen, [each.__code__.co_filename for each in (agg_loss, compute_discriminator_loss)]]))
    """
    seen, (stock_file, our_file) = json.loads(run_real(code, tmp_path).splitlines()[-1])
    assert set(seen) == set(modules)
    pins = json.loads((ROOT / "scripts/stock_hashes.json").read_text())
    for name, file in modules.items():
        ours, stock = seen[name]
        assert Path(ours).read_bytes() == file.read_bytes(), f"{name} is not the checkout's: {ours}"
        assert (stock is not None) == (file.relative_to(ROOT).as_posix() in pins), f"{name}: stock {stock}"
    assert stock_file == seen["verl.trainer.ppo.core_algos"][1] and our_file == seen["verl.trainer.ppo.core_algos"][0]


def test_switched_off_the_real_verl_is_stock(tmp_path):
    run_real(
        """
        import importlib.util, verl
        import verl.trainer.ppo.core_algos as core_algos
        assert not hasattr(core_algos, "compute_discriminator_loss")
        assert importlib.util.find_spec("verl.workers.critic") is None
        """,
        tmp_path,
        VERL_USE_EXTERNAL_PLUGINS="none",
        VERL_PLATFORM="",
    )

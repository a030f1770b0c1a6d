"""Lays our ``verl/`` tree over the installed verl wheel, module by module.

verl imports this module through the ``verl.plugins`` entry point at the end of ``import verl``, in every process. It
installs one finder on ``sys.meta_path``: for a module whose file exists in our tree, the stock file (if there is one) is
executed first and ours second, in the SAME namespace. A patch file therefore holds only what it adds or redefines, and
stock code that refers to a redefined name sees ours. DELTA.md lists every file.

verl logs a plugin that fails to load at DEBUG level only, so everything that can go wrong here is printed to stderr.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from types import CodeType, ModuleType

VERL_VERSION = "0.9.1"
"""The only verl release the delta is written against; the hash of every shadowed stock file is pinned in the tests."""


def overlay_root() -> Path:
    """Folder that holds our ``verl/`` tree: inside the package for an installed wheel, else the checkout's ``verl``."""
    packaged = Path(__file__).parent / "_overlay"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "verl"


def overlay_file(fullname: str) -> Path | None:
    """Our file for the module ``fullname`` ("verl.trainer.ppo.core_algos"), or None if the delta has none."""
    parts = fullname.split(".")
    if parts[0] != "verl" or len(parts) == 1:
        return None
    base = overlay_root().joinpath(*parts[1:])
    for candidate in (base / "__init__.py", base.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def stock_spec(fullname: str, path=None) -> importlib.machinery.ModuleSpec | None:
    """Spec of the module in the installed wheel, our finder left out."""
    return importlib.machinery.PathFinder.find_spec(fullname, path)


class OverlayLoader(importlib.abc.InspectLoader):
    """Executes the stock file (if any), then ours, in one namespace."""

    def __init__(self, ours: Path, stock: importlib.machinery.ModuleSpec | None):
        self.ours = ours
        self.stock = stock

    def _code(self, fullname: str) -> CodeType:
        return compile(self.ours.read_bytes(), str(self.ours), "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str:
        return self.ours.read_text(encoding="utf-8")

    def get_code(self, fullname: str) -> CodeType:
        return self._code(fullname)

    def is_package(self, fullname: str) -> bool:
        return self.ours.name == "__init__.py"

    def exec_module(self, module: ModuleType) -> None:
        try:
            if self.stock is not None and self.stock.loader is not None:
                self.stock.loader.exec_module(module)
            exec(self._code(module.__name__), module.__dict__)
        except Exception:
            print(f"verl-gad: executing the overlay {self.ours} failed:", file=sys.stderr)
            traceback.print_exc()
            raise


class OverlayFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of the delta; everything else is left to the finders behind it."""

    def find_spec(self, fullname, path=None, target=None):
        ours = overlay_file(fullname)
        if ours is None:
            return None
        stock = stock_spec(fullname, path)
        if stock is not None and stock.origin is None:  # a folder of ours seen as a namespace portion, not a stock module
            stock = None
        is_package = ours.name == "__init__.py"
        if stock is not None and is_package != (stock.submodule_search_locations is not None):
            raise ImportError(
                f"{ours} does not fit the stock module {stock.origin}: one is a package, the other a plain module"
            )
        spec = importlib.util.spec_from_loader(fullname, OverlayLoader(ours, stock), is_package=is_package)
        assert spec is not None
        spec.origin = stock.origin if stock is not None else str(ours)
        spec.has_location = True
        if is_package:
            stock_locations = list(stock.submodule_search_locations or []) if stock is not None else []
            spec.submodule_search_locations = [*stock_locations, str(ours.parent)]
        return spec


def installed() -> bool:
    """True if the overlay is active in this process."""
    return any(isinstance(finder, OverlayFinder) for finder in sys.meta_path)


def install() -> None:
    """Activate the overlay in this process (idempotent).

    Raises:
        ImportError: verl is of another version, or a module of the delta was imported before the overlay.
    """
    if installed():
        return
    found = version("verl")
    if found != VERL_VERSION:
        raise ImportError(
            f"verl-gad lays its changes over verl {VERL_VERSION}, but verl {found} is installed. "
            f"Fix: pip install verl=={VERL_VERSION}"
        )
    root = overlay_root()
    names = (".".join(("verl", *file.relative_to(root).with_suffix("").parts)) for file in root.rglob("*.py"))
    early = sorted({name.removesuffix(".__init__") for name in names} & set(sys.modules))
    if early:
        raise ImportError(
            f"verl-gad: {', '.join(early)} were imported before the overlay was active. "
            "Fix: import verl first, and import its modules after that."
        )
    sys.meta_path.insert(0, OverlayFinder())
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        importlib.import_module("verl.plugin.platform.platform_cpu")


try:
    install()
except Exception:
    print("verl-gad: the overlay could not be activated; GAD runs will not work in this process.", file=sys.stderr)
    traceback.print_exc()
    raise

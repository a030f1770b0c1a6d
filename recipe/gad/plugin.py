"""Lays our ``verl/`` tree over the installed verl wheel, module by module.

verl imports this module through the ``verl.plugins`` entry point at the end of ``import verl``, in every process. It
installs one finder on ``sys.meta_path``. For a module that has a file in our tree, the loader executes the stock file
(if there is one) and then ours in the SAME namespace. A file of ours therefore holds only what it adds or redefines,
and stock code that refers to a redefined name sees ours. DELTA.md lists every file.

If a plugin fails to load, verl logs it at DEBUG level only. This module therefore prints every failure to stderr.
"""

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from pathlib import Path
from types import CodeType, ModuleType

VERL_VERSION = "0.9.1"
"""The only verl release that the delta fits; scripts/show_delta.py pins the hash of every shadowed stock file."""


def overlay_root() -> Path:
    """Folder with our ``verl/`` tree: in an installed wheel inside the package, else the checkout's ``verl``."""
    packaged = Path(__file__).parent / "_overlay"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "verl"


@functools.cache
def overlay_files() -> dict[str, Path]:
    """Module name -> our file; a folder without ``__init__.py`` is listed as the folder."""
    root = overlay_root()
    files: dict[str, Path] = {}
    for file in root.rglob("*.py"):
        *folders, stem = file.relative_to(root).with_suffix("").parts
        for depth in range(1, len(folders) + 1):
            files.setdefault(".".join(("verl", *folders[:depth])), root.joinpath(*folders[:depth]))
        files[".".join(("verl", *folders) if stem == "__init__" else ("verl", *folders, stem))] = file
    return files


def stock_spec(fullname: str, path: Sequence[str] | None = None) -> ModuleSpec | None:
    """Spec of the module in the installed wheel, found without our finder and our tree."""
    if path is not None:
        path = [entry for entry in path if not Path(entry).is_relative_to(overlay_root())]
    return PathFinder.find_spec(fullname, path)


class OverlayLoader(InspectLoader):
    """Executes the stock file (if any), then ours, in one namespace."""

    def __init__(self, ours: Path, stock: ModuleSpec | None):
        self.ours = ours
        self.stock = stock

    def get_source(self, fullname: str) -> str:
        return self.ours.read_text(encoding="utf-8")

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.ours.read_bytes(), str(self.ours), "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        return self.ours.name == "__init__.py"

    def exec_module(self, module: ModuleType) -> None:
        names = vars(module)
        try:
            if self.stock is not None and self.stock.loader is not None:
                self.stock.loader.exec_module(module)
            exported = names.get("__all__", ())
            exec(self.get_code(module.__name__), names)
            if exported:  # `import *` keeps what the stock module exports
                names["__all__"] = list(dict.fromkeys([*exported, *names["__all__"]]))
        except Exception:
            print(f"verl-gad: executing the overlay {self.ours} failed:", file=sys.stderr)
            traceback.print_exc()
            raise


class OverlayFinder(MetaPathFinder):
    """Finds the modules of the delta and leaves all others to the finders after it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target=None) -> ModuleSpec | None:
        ours = overlay_files().get(fullname)
        if ours is None:
            return None
        stock = stock_spec(fullname, path)
        if ours.is_dir():  # no __init__.py of ours: use the stock package, else make a namespace package
            if stock is not None:
                return None
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(ours)]
            return spec
        is_package = ours.name == "__init__.py"
        if stock is not None and is_package != (stock.submodule_search_locations is not None):
            raise ImportError(
                f"{ours} does not fit the stock module {stock.origin}: one is a package, the other a plain module"
            )
        origin = stock.origin if stock is not None and stock.origin else str(ours)
        spec = ModuleSpec(fullname, OverlayLoader(ours, stock), origin=origin, is_package=is_package)
        spec.has_location = True
        if is_package:
            locations = stock.submodule_search_locations if stock is not None else None
            spec.submodule_search_locations = [*(locations or ()), str(ours.parent)]
        return spec


def installed() -> bool:
    """True if the overlay is active in this process."""
    return any(isinstance(finder, OverlayFinder) for finder in sys.meta_path)


def install() -> None:
    """Activate the overlay in this process; further calls do nothing.

    Raises:
        ImportError: verl has another version, or a module of the delta was imported before the overlay.
    """
    if installed():
        return
    found = version("verl")
    if found != VERL_VERSION:
        raise ImportError(
            f"verl-gad needs verl {VERL_VERSION}, but verl {found} is installed. Fix: pip install verl=={VERL_VERSION}"
        )
    if not overlay_files():
        raise ImportError(f"verl-gad: no module found under {overlay_root()}. Fix: reinstall verl-gad")
    early = sorted(name for name, file in overlay_files().items() if file.is_file() and name in sys.modules)
    if early:
        raise ImportError(
            f"verl-gad: {', '.join(early)} were imported before the overlay was active. "
            "Fix: import verl first, then its modules"
        )
    sys.meta_path.insert(0, OverlayFinder())
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        importlib.import_module("recipe.gad.cpu.platform")


try:
    install()
except Exception:
    print("verl-gad: the overlay could not be activated; GAD runs will not work in this process.", file=sys.stderr)
    traceback.print_exc()
    raise

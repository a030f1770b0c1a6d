"""Which part of recipe/gad may import which: one-way arrows, and run/ at the bottom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GAD = ROOT / "recipe/gad"
FOLDERS = {folder.name for folder in GAD.iterdir() if (folder / "__init__.py").exists()}

ALLOWED = {
    # what the trainer and the tools share knows neither
    "run": set(),
    # the plugin and the reward are loaded by verl in every process, so they stay light
    "plugin": set(),
    "reward": set(),
    "openai_client": set(),
    "config": set(),
    # wings
    "training": {"verl", "run"},
    "cpu": {"verl", "training"},
    "data": {"run", "training", "openai_client"},
    "doctor": {"verl", "run", "training", "data"},  # data: the doctor counts tokens as `gad prepare` does
    "evaluation": {"verl", "run", "training", "openai_client", "plugin", "reward"},  # reward: ROUGE-L as in validation
    "export": {"verl", "run"},
    "monitor": {"run"},
    "quickstart": {"run"},
    "referee": {"run", "monitor", "evaluation"},  # it evaluates with `gad eval` and draws like `gad report`
    # the command line: a module of arguments for each tool
    "commands": {"run", "data", "doctor", "monitor", "evaluation", "export", "openai_client", "referee"},
    "cli": {"commands"},
    # the delta: tools may import it; it needs what they share, the trainer's plain code, and the CPU rollout
    "verl": {"run", "cpu", "training"},
}
"""Part (a wing, a module of recipe/gad, or the folder verl/) -> parts that it may import."""
EXCEPTIONS = {("recipe/gad/run/checks.py", "plugin")}  # the check that the plugin is active has to ask the plugin


def imported(source: str, package: str) -> set[str]:
    """Full names of the modules and names imported anywhere in ``source``, a module of ``package``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str) -> str | None:
    """The part that a full name belongs to; None for other packages and for recipe.gad alone."""
    parts = name.split(".")
    if parts[0] == "verl":
        return "verl"
    return parts[2] if parts[:2] == ["recipe", "gad"] and len(parts) > 2 else None


def arrows() -> set[tuple[str, str, str]]:
    """(file, its part, the part it imports) of every import that leaves its part."""
    found = set()
    for file in sorted([*GAD.rglob("*.py"), *(ROOT / "verl").rglob("*.py")]):
        relative = file.relative_to(ROOT)
        own = part_of(".".join(relative.with_suffix("").parts))
        for name in imported(file.read_text(encoding="utf-8"), ".".join(relative.parent.parts)):
            target = part_of(name)
            if target not in (None, own):
                found.add((relative.as_posix(), own, target))
    return found


def test_parts_import_only_what_they_may():
    wrong = {(file, target) for file, own, target in arrows() if target not in ALLOWED.get(own, ())}
    assert sorted(wrong) == sorted(EXCEPTIONS), "see ALLOWED in this file: move the shared code to recipe/gad/run/"


def test_every_folder_is_listed_and_every_arrow_is_used():
    assert FOLDERS <= set(ALLOWED), "a new wing: say in ALLOWED what it may import"
    used = {(own, target) for _, own, target in arrows()}
    listed = {(own, target) for own, targets in ALLOWED.items() for target in targets}
    assert listed - used == set(), "nothing uses this arrow any more: remove it from ALLOWED"


def test_allowed_arrows_have_no_circle():
    # verl/ is left out: it registers the CPU rollout, a subclass of verl's own
    below = {part: targets - {part, "verl"} for part, targets in ALLOWED.items() if part != "verl"}
    while below:
        leaves = {part for part, targets in below.items() if not targets & set(below)}
        assert leaves, f"a circle among {sorted(below)}"
        below = {part: targets for part, targets in below.items() if part not in leaves}


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("import recipe.gad.data.layouts", "data"),
        ("from recipe.gad import monitor", "monitor"),
        ("def f():\n    from recipe.gad.doctor.checks import diagnose", "doctor"),
        ("from ..evaluation import sampling", "evaluation"),
        ("from .. import plugin", "plugin"),
        ("if TYPE_CHECKING:\n    import verl.utils.model", "verl"),
    ],
)
def test_every_kind_of_import_is_seen(source, part):
    assert {part_of(name) for name in imported(source, "recipe.gad.run")} == {part}

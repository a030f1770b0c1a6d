"""The delta is complete, pinned, explained in DELTA.md and our own: no file holds a run of lines of stock verl."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "verl").rglob("*.py"))
PARTS = ("Stock module", "Why", "How", "Upstream seam wanted", "Remove when")
RUN = 6
"""Consecutive lines that count as copied."""


@pytest.fixture(scope="module")
def show_delta(load_script):
    """scripts/show_delta.py as a module."""
    return load_script("show_delta")


def sections() -> dict[str, str]:
    """Text of each file's section of DELTA.md, by path."""
    text = (ROOT / "DELTA.md").read_text()
    heads = list(re.finditer(r"^### `(verl/[^`]+)`$", text, re.MULTILINE))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {head[1]: text[head.end() : end] for head, end in zip(heads, ends, strict=True)}


def test_pins_match_the_installed_wheel(show_delta):
    rows = show_delta.delta(ROOT / "verl", show_delta.stock_root(), show_delta.load_pins())
    assert [row for row in rows if row.status not in show_delta.FINE] == []
    assert [row.path for row in rows] == FILES, "verl/ holds Python files only"


def test_delta_sees_each_kind_of_difference(show_delta, tmp_path):
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    ours.mkdir(), stock.mkdir()
    for name in ("ok", "changed", "unlisted", "missing", "new"):
        (ours / f"{name}.py").write_text("ours\n")
    for name in ("ok", "changed", "unlisted"):
        (stock / f"{name}.py").write_text("stock\n")
    good = show_delta.delta(ours, stock, {})[-1].sha256
    pins = {"verl/ok.py": good, "verl/changed.py": "0", "verl/missing.py": "0", "verl/stale.py": "0"}
    statuses = {Path(row.path).stem: row.status for row in show_delta.delta(ours, stock, pins)}
    assert statuses == {name: name for name in ("changed", "missing", "new", "ok", "unlisted", "stale")}


def test_the_script_fails_on_a_changed_stock_file_and_update_accepts_it(show_delta, tmp_path, monkeypatch, capsys):
    pins = tmp_path / "pins.json"
    pins.write_text('{"verl/trainer/ppo/core_algos.py": "0"}')
    monkeypatch.setattr(show_delta, "PINS", pins)
    assert show_delta.main([]) == 1
    assert "changed" in capsys.readouterr().out
    assert show_delta.main(["--update"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["pins.json"]


def test_no_init_file_makes_our_folders_importable_packages():
    for folder in ("verl", "recipe", "tests", "scripts"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_delta_md_has_one_whole_section_for_each_file():
    assert sorted(sections()) == FILES
    for path, text in sections().items():
        for part in PARTS:
            assert re.search(rf"^- {part}: \S", text, re.MULTILINE), f"{path}: no '- {part}:' in DELTA.md"


@pytest.mark.parametrize("path", FILES)
def test_the_docstring_says_what_the_file_is(path, show_delta):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    if path in show_delta.load_pins():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert docstring.startswith("Extends") and (module in docstring or path in docstring)
    else:
        assert docstring.startswith("New")


def own_lines(text: str) -> list[str]:
    """The lines that say something: no blanks, comments, imports or lone brackets and keywords; spaces normalised."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if len(line) > 5 and not line.startswith(("#", "import ", "from "))]


def runs(lines: list[str]) -> set[tuple[str, ...]]:
    """Every run of RUN consecutive lines."""
    return {tuple(lines[start : start + RUN]) for start in range(len(lines) - RUN + 1)}


def test_no_file_of_ours_shares_a_run_of_lines_with_stock_verl(show_delta):
    ours = {path: runs(own_lines((ROOT / path).read_text())) for path in FILES}
    ours |= {str(file.relative_to(ROOT)): runs(own_lines(file.read_text())) for file in ROOT.glob("recipe/**/*.py")}
    stock = show_delta.stock_root()
    assert runs(own_lines((stock / "trainer/ppo/core_algos.py").read_text())), "the check itself sees the stock files"
    for file in stock.rglob("*.py"):
        theirs = runs(own_lines(file.read_text(encoding="utf-8")))
        for path, mine in ours.items():
            assert not mine & theirs, f"{path} shares lines with stock {file.relative_to(stock)}: {mine & theirs}"


def test_one_verl_version_everywhere():
    plugin = (ROOT / "recipe/gad/plugin.py").read_text()
    version = re.search(r'^VERL_VERSION = "(.+)"$', plugin, re.MULTILINE)[1]
    assert set(re.findall(r'"verl(?:\[\w+\])?==([^"]+)"', (ROOT / "pyproject.toml").read_text())) == {version}
    assert f"verl {version}" in (ROOT / "DELTA.md").read_text()

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
MOST_LINES = 1500
"""What verl/ may grow to: a delta is read file by file."""


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


def part(text: str, name: str) -> str:
    """One part of a section, on one line."""
    found = re.search(rf"^- {name}: (.*?)(?=^- |\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    """Functions and classes at the top level of a module."""
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def methods(node: ast.ClassDef) -> set[str]:
    return {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}


def imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name in the module -> (module it comes from, name there)."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }


class Stock:
    """Classes of the installed wheel, read and never imported."""

    def __init__(self, root: Path):
        self.root = root

    def tree(self, module: str) -> ast.Module | None:
        file = self.root.joinpath(*module.split(".")[1:]).with_suffix(".py")
        known = module.startswith("verl.") and file.is_file()
        return ast.parse(file.read_text(encoding="utf-8")) if known else None

    def methods(self, module: str, name: str) -> set[str] | None:
        """Methods of a class and of its bases in the wheel; None if the wheel has no such class."""
        tree = self.tree(module)
        node = definitions(tree).get(name) if tree else None
        if not isinstance(node, ast.ClassDef):
            return None
        found, names = methods(node), imported(tree)
        for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
            found |= self.methods(*names.get(base, (module, base))) or set()
        return found


def overrides(path: str, stock: Stock) -> dict[str, set[str]]:
    """Stock class -> its methods that classes of one of our files define anew, also through classes of that file."""
    tree = ast.parse((ROOT / path).read_text())
    own, names = definitions(tree), imported(tree)
    found: dict[str, set[str]] = {}

    def bases(node: ast.ClassDef) -> list[tuple[str, str]]:
        """Stock classes above one of ours, as (module, name)."""
        above = []
        for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
            above += bases(own[base]) if base in own else [names[base]] if base in names else []
        return above

    for node in own.values():
        if isinstance(node, ast.ClassDef):
            for module, name in bases(node):
                if again := methods(node) & (stock.methods(module, name) or set()):
                    found.setdefault(name, set()).update(again)
    return found


def tables(show_delta) -> str:
    """The two tables that lead DELTA.md, computed."""
    rows = show_delta.delta(ROOT / "verl", show_delta.stock_root(), show_delta.load_pins())
    changed, new = [], []
    for row in rows:
        own = ast.parse((ROOT / row.path).read_text())
        if row.status == "new":
            title = ast.get_docstring(own).split(". ")[0].split("\n\n")[0].removeprefix("New: ").rstrip(".")
            new.append((row, " ".join(title.replace("``", "`").split())))
            continue
        file = ast.parse((show_delta.stock_root() / row.path.removeprefix("verl/")).read_text(encoding="utf-8"))
        again = [name for name in definitions(own) if name in definitions(file)]
        changed.append((row, ", ".join(f"`{name}`" for name in again) or "nothing; adds only"))
    text = []
    for head, column, part in (("change a stock module", "replaces", changed), ("are new", "what", new)):
        text += [f"{len(part)} files, {sum(row.lines for row, _ in part)} lines, {head}:", ""]
        text += [f"| file | lines | {column} |", "|---|---|---|"]
        text += [f"| `{row.path}` | {row.lines} | {what} |" for row, what in part] + [""]
    return "\n".join(text).strip()


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


def test_the_delta_stays_small(show_delta):
    lines = sum(row.lines for row in show_delta.delta(ROOT / "verl", show_delta.stock_root(), {}))
    assert lines < MOST_LINES, f"verl/ has {lines} lines: move out what changes nothing of verl, or make it shorter"


def test_delta_md_leads_with_the_computed_tables(show_delta):
    expected = tables(show_delta)
    lead = (ROOT / "DELTA.md").read_text().split("\n## ")[0]
    assert expected in lead, f"the tables at the top of DELTA.md should read:\n\n{expected}"


@pytest.mark.parametrize("path", FILES)
def test_a_section_names_exactly_the_stock_methods_that_are_overridden(path, show_delta):
    lines = re.findall(r"^- Overrides in `(\w+)`: (.*?)(?=^- )", sections()[path], re.MULTILINE | re.DOTALL)
    named = {name: set(re.findall(r"`(\w+)`", text)) for name, text in lines}
    assert named == overrides(path, Stock(show_delta.stock_root()))


def test_overridden_methods_are_found_through_classes_of_the_wheel_and_of_ours(show_delta):
    stock = Stock(show_delta.stock_root())
    found = overrides("verl/trainer/ppo/v1/trainer_gad.py", stock)
    assert {"_compute_values", "on_step_end", "prepare_step", "__init__"} < found["PPOTrainerSync"]
    assert "_put_scores" not in found["PPOTrainerSync"], "a method of ours alone"
    assert stock.methods("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync") > {"on_step_end", "_compute_values"}
    assert stock.methods("torch.nn", "Linear") is None


@pytest.mark.parametrize("path", FILES)
def test_header_and_section_agree_on_when_a_file_can_go(path):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    goes = re.search(r"^Goes when: (.+?)\Z", docstring, re.MULTILINE | re.DOTALL)
    assert goes, f"{path}: the header must end with 'Goes when: ...'"
    assert " ".join(goes[1].replace("``", "`").split()) == part(sections()[path], "Remove when")


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

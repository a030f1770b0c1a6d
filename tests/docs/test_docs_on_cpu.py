"""The documentation against the repository: links, paths, functions, commands, flags, keys, thresholds and defaults."""

import ast
import os
import re
import shlex
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from omegaconf import OmegaConf
from typer.main import get_command

from recipe.gad.cli import app
from recipe.gad.run.config import compose_config

ROOT = Path(__file__).resolve().parents[2]
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "AGENTS.md",
    ROOT / "CHANGELOG.md",
    ROOT / "DELTA.md",
    ROOT / "SECURITY.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/**/README.md")),
]
FOLDERS = ("benchmarks", "docs", "examples", "recipe", "scripts", "tests", "verl")
"""What a path in backticks starts with, if it is one of this repository."""
LAUNCHERS = [f"run_{stage}.sh" for stage in ("seqkd", "warmup", "gad", "soda", "pipeline")]
LAUNCHER_FLAGS = ROOT / "examples/gad/common.sh"
PLACEHOLDER = "..."
"""In a command: what it needs besides."""

names = [str(doc.relative_to(ROOT)) for doc in DOCS]
every_doc = pytest.mark.parametrize("doc", DOCS, ids=names)


# ---------------------------------------------------------------------- reading Markdown


class Page(NamedTuple):
    prose: str
    """The text without fenced blocks."""
    commands: list[list[str]]
    """Words of the logical lines of the bash blocks: continued lines joined, comments left out."""


@cache
def read(doc: Path) -> Page:
    prose, block, commands, language = [], [], [], None
    for line in doc.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language == "bash":
                text = "\n".join(block).replace("\\\n", " ")
                lines = (shlex.split(part, comments=True) for part in text.splitlines())
                commands += [words for words in lines if words]
            language, block = (line[3:] or "text", []) if language is None else (None, [])
        elif language is None:
            prose.append(line)
        else:
            block.append(line)
    assert language is None, f"{doc}: a block does not end"
    return Page("\n".join(prose), commands)


def spans(doc: Path) -> list[str]:
    """Texts in backticks outside of blocks."""
    return re.findall(r"`([^`]+)`", read(doc).prose)


def anchors(doc: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", read(doc).prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def lines_starting_with(doc: Path, *programs: str) -> list[list[str]]:
    """Words of the commands of a page, in blocks and in backticks, that begin with ``programs``."""
    inline = [shlex.split(span) for span in spans(doc) if span.split()[0] in programs]
    return [words for words in [*read(doc).commands, *inline] if words[0] in programs]


# ---------------------------------------------------------------------- links, paths, functions


def broken_links(doc: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", read(doc).prose)
    broken = []
    for link in (link for link in links if not link.startswith("https://")):
        path, _, anchor = link.partition("#")
        target = (doc.parent / path).resolve() if path else doc
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def paths_in(doc: Path) -> list[tuple[str, str]]:
    """(path, name behind its colon or "") of what looks like a path of this repository."""
    found = []
    for span in spans(doc):
        for word in span.split():
            match = re.fullmatch(r"([\w./*-]+?)(?::([A-Za-z_][\w.]*))?", word)
            if match and (match[1].split("/")[0] in FOLDERS and "/" in match[1] or match[1].endswith(".sh")):
                found.append((match[1], match[2] or ""))
    return found


def missing_paths(doc: Path) -> list[str]:
    def exists(path: str) -> bool:
        places = (ROOT, doc.parent) if path.endswith(".sh") else (ROOT,)
        return any(list(place.glob(path.rstrip("/"))) for place in places)

    return [path for path, _ in paths_in(doc) if not exists(path)]


def unresolved_names(doc: Path) -> list[str]:
    return [f"{path}:{name}" for path, name in paths_in(doc) if name and not defines(ROOT / path, name)]


def defines(file: Path, dotted: str) -> bool:
    """Does a Python file define a function, a class, a method or a constant? Nothing is imported."""
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    for name in dotted.split("."):
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if getattr(node, "name", None) == name or any(getattr(t, "id", None) == name for t in targets):
                body = getattr(node, "body", [])
                break
        else:
            return False
    return True


@every_doc
def test_links_lead_somewhere(doc):
    assert broken_links(doc) == []


@every_doc
def test_paths_in_backticks_exist(doc):
    assert missing_paths(doc) == []


@every_doc
def test_functions_behind_a_path_exist(doc):
    assert unresolved_names(doc) == []


def test_the_algorithm_page_names_functions_of_each_part():
    files = {path for path, name in paths_in(ROOT / "docs/algorithm.md") if name}
    assert {f"{part}.py" for part in (
        "verl/trainer/ppo/core_algos", "verl/trainer/ppo/v1/trainer_gad", "verl/workers/critic/dp_critic",
        "verl/workers/actor/dp_actor", "recipe/gad/training/trajectory",
    )} <= files  # fmt: skip


def test_every_page_of_docs_is_linked_from_the_readme():
    text = read(ROOT / "README.md").prose
    assert [doc.name for doc in ROOT.glob("docs/*.md") if f"(docs/{doc.name})" not in text] == []


# ---------------------------------------------------------------------- commands


def parse_gad(words: list[str]) -> None:
    """Let typer parse a ``gad`` command line without running it; a mistake raises. A subcommand alone is fine."""
    command = get_command(app)
    words = [word for word in words if word != "--help"]
    while hasattr(command, "commands") and words[1:] and not words[1].startswith("-"):
        assert words[1] in command.commands, f"no subcommand {words[1]}"
        command, words = command.commands[words[1]], words[1:]
    if words[1:]:
        command.make_context(words[0], words[1:])


@every_doc
def test_gad_commands_parse(doc):
    for words in lines_starting_with(doc, "gad"):
        parse_gad(words)


def test_every_subcommand_is_run_in_the_tutorial():
    run = {words[1] for words in read(ROOT / "docs/tutorial.md").commands if words[0] == "gad"}
    assert run == set(get_command(app).commands) and "doctor" in run


FAKE_PYTHON = """#!/usr/bin/env bash
echo /warmup/global_step_1
"""
"""Stands in for ``python -m recipe.gad.run.checkpoint resolve``: the folders of the documentation do not exist."""


def dry_run(words: list[str], folder: Path) -> list[list[str]]:
    """Hydra overrides of every command that a launch script prints for a documented line."""
    python = folder / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    script, *arguments = [word for word in words if word != PLACEHOLDER]
    needed = ["--model", "MODEL", "--train_files", "train.parquet"] if PLACEHOLDER in words else []
    done = subprocess.run(
        ["bash", ROOT / script, "--dry-run", *needed, *arguments],
        env={**os.environ, "PYTHON": str(python)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    return [command[command.index("gad_trainer") + 1 :] for command in commands]


@every_doc
def test_launch_commands_have_known_flags_and_keys(doc, tmp_path):
    for _, script, *arguments in (words for words in lines_starting_with(doc, "bash") if len(words) > 1):
        assert (ROOT / script).is_file(), script
        if Path(script).name not in LAUNCHERS:
            text = (ROOT / script).read_text(encoding="utf-8")
            if f"{LAUNCHER_FLAGS.parent.name}/{LAUNCHER_FLAGS.name}" in text:  # it takes their flags
                text += LAUNCHER_FLAGS.read_text(encoding="utf-8")
            flags = [word for word in arguments if word.startswith("--")]
            assert [flag for flag in flags if f"  {flag} " not in text] == [], script
        elif arguments:  # not its name alone
            for overrides in dry_run([script, *arguments], tmp_path):
                compose_config(overrides)


@every_doc
def test_keys_of_other_commands_compose(doc):
    for words in (words[2:] for words in lines_starting_with(doc, "gad") if words[1:2] == ["doctor"]):
        compose_config([word for word in words if "=" in word and word != "key=value"])


@every_doc
def test_python_scripts_know_their_options(doc):
    for words in lines_starting_with(doc, "python"):
        if words[1] != "-m":
            text = (ROOT / words[1]).read_text(encoding="utf-8")
            assert [flag for flag in words[2:] if flag.startswith("--") and f'"{flag}"' not in text] == []


# ---------------------------------------------------------------------- keys in backticks


@cache
def configuration(*overrides: str):
    return compose_config(list(overrides))


def exists(key: str) -> bool:
    """Is there such a key, on a GPU or without one? A value of null counts."""
    for overrides in ([], ["device=cpu"]):
        node = OmegaConf.to_container(configuration(*overrides), resolve=False)
        for part in key.split("."):
            node = node.get(part, KeyError) if isinstance(node, dict) else KeyError
        if node is not KeyError:
            return True
    return False


def keys_in(doc: Path) -> list[str]:
    """Dotted configuration keys in backticks, without a value and without those that are added by "+"."""
    groups = "|".join(configuration())
    return [match[1] for span in spans(doc) if (match := re.match(rf"((?:{groups})\.[\w.]+\w)(?:=|$)", span))]


@every_doc
def test_keys_in_backticks_exist(doc):
    assert [key for key in keys_in(doc) if not exists(key)] == []


# ---------------------------------------------------------------------- metrics in backticks


METRIC = re.compile(
    r"((?:actor|critic|gad|val-aux|thinking_length|answer_length|(?:teacher_)?response_length)/[a-z_/*@1]+)"
)


@cache
def logging_code() -> str:
    """The code of verl-gad and of the installed verl."""
    verl = Path(find_spec("verl").submodule_search_locations[0])
    return "\n".join(
        file.read_text() for place in (ROOT / "verl", ROOT / "recipe", verl) for file in place.rglob("*.py")
    )


def unknown_metrics(doc: Path) -> list[str]:
    """Metrics whose last part occurs nowhere in the code, either after a slash or at the start of a string."""
    names = [match[1] for span in spans(doc) if (match := METRIC.fullmatch(span))]
    last = {name: re.escape(name.rpartition("/")[2].partition("@")[0]).replace(r"\*", "") for name in names}
    return [name for name, part in last.items() if not re.search(rf"[/\"]{part}", logging_code())]


@every_doc
def test_metrics_in_backticks_are_logged(doc):
    assert unknown_metrics(doc) == []


# ---------------------------------------------------------------------- LMOps/gad: our side of the table


def migration_rows() -> list[tuple[str, str]]:
    """(our key, our value) of the rows of keys."""
    prose = read(ROOT / "docs/lmops.md").prose
    rows = re.findall(r"^\| (.*)\|.*\| `(.+)` \| (.*) \|$", prose, re.MULTILINE)
    keys = [theirs if ours.startswith("same") else ours for theirs, _, ours in rows]
    return [(key.strip("` "), value) for key, (_, value, _) in zip(keys, rows, strict=True)]


@pytest.mark.parametrize(("key", "value"), migration_rows())
def test_values_of_the_migration_table_are_our_defaults(key, value):
    ours = OmegaConf.select(configuration(), key, throw_on_missing=True)
    assert exists(key) and ours == (float(value) if re.fullmatch(r"\d+e-\d+", value) else yaml.safe_load(value))


def test_the_migration_table_is_read():
    assert len(migration_rows()) > 35


# ---------------------------------------------------------------------- black-opd: which keys are gone


def test_the_keys_in_italics_are_gone_and_the_others_exist():
    rows = re.findall(r"^\| ([*`])(.+?)[*`] \|", read(ROOT / "docs/black_opd.md").prose, re.MULTILINE)
    assert len(rows) > 20
    assert [key for mark, key in rows if exists(key) != (mark == "`")] == []


# ---------------------------------------------------------------------- the rules of health.py


HEALTH = ast.parse((ROOT / "recipe/gad/monitor/rules.py").read_text(encoding="utf-8"))
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"


def test_thresholds_in_troubleshooting_are_those_of_health():
    values = {node.targets[0].id: node.value for node in HEALTH.body if isinstance(node, ast.Assign)}
    named = re.findall(r"`([A-Z][A-Z_]+)`\s\(([^)]+)\)", read(TROUBLESHOOTING).prose)
    assert len(named) >= 12
    for name, value in named:
        assert ast.literal_eval(values[name]) == ast.literal_eval(f"({value})"), name


def test_every_finding_is_explained_under_its_title():
    text = " ".join(read(TROUBLESHOOTING).prose.split())
    functions = [node for node in HEALTH.body if isinstance(node, ast.FunctionDef) and node.returns is not None]
    rules = [function for function in functions if ast.unparse(function.returns) == "Finding | None"]
    assert len(rules) >= 14
    for rule in rules:
        assert f"`recipe/gad/monitor/rules.py:{rule.name}`" in text
        calls = [node for node in ast.walk(rule) if isinstance(node, ast.Call)]
        for title in (call.args[0] for call in calls if getattr(call.func, "id", "") in ("error", "warning", "note")):
            words = title.values[0].value if isinstance(title, ast.JoinedStr) else title.value
            assert f"*{words}" in text


# ---------------------------------------------------------------------- the configuration page


@pytest.fixture(scope="module")
def reference(load_script):
    """scripts/config_reference.py as a module."""
    return load_script("config_reference")


def words_of(text: str) -> str:
    """The words alone: line breaks, list marks, emphasis and colons differ between page and file."""
    return " ".join(re.sub(r"[*`:\\]|^ *- ", " ", text, flags=re.MULTILINE).split())


def leaves(node: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("file", ["gad_trainer.yaml", "device/cpu.yaml", "device/gpu.yaml"])
def test_every_key_is_in_the_reference_with_its_default_and_every_comment(file):
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    base, cpu, gpu = re.split(r"^## device=\w+$", page, flags=re.MULTILINE)
    page = {"gad_trainer.yaml": base, "device/cpu.yaml": cpu, "device/gpu.yaml": gpu}[file]
    source = (ROOT / "recipe/gad/config" / file).read_text(encoding="utf-8")
    shown = dict(re.findall(r"^- \*\*`(.+?)`\*\*\s+=\s+`(.+?)`\\$", page, re.MULTILINE))
    for key, value in leaves(yaml.safe_load(source) or {}).items():
        if key.split(".")[0] not in ("hydra", "defaults"):
            assert yaml.safe_load(shown[key]) == value, key
    text = words_of(page)
    comments = [line.strip().removeprefix("#") for line in source.splitlines() if line.lstrip().startswith("#")]
    assert [line for line in comments if "@package" not in line and words_of(line) not in text] == []


def test_the_reference_is_fresh(reference, capsys):
    assert reference.main(["--check"]) == 0, capsys.readouterr().out


def test_check_fails_on_a_stale_page_and_writing_mends_it(reference, tmp_path, monkeypatch, capsys):
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(reference, "PAGE", page)
    assert reference.main(["--check"]) == 1
    page.write_text("old")
    assert reference.main(["--check"]) == 1
    assert "python scripts/config_reference.py" in capsys.readouterr().out
    assert reference.main([]) == 0 and reference.main(["--check"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["configuration.md"]


def test_a_key_without_a_comment_is_refused(reference):
    def keys(text: str) -> list[tuple]:
        return [tuple(key) for key in reference.keys_of(yaml.compose(text, Loader=yaml.SafeLoader), text)]

    assert keys("# two\n# lines\na: [1, 2]\n\n# of the block\nb:\n  c: x\n") == [
        ("a", "[1, 2]", ["two", "lines"]),
        ("b.c", "x", ["of the block"]),
    ]
    with pytest.raises(ValueError, match="line 3: b has no comment"):
        keys("# one\na: 1\nb: 2\n")


# ---------------------------------------------------------------------- the checks themselves can fail


BROKEN = """# Title
[gone](nowhere.md) [no anchor](#other) [fine](#title)
`recipe/gad/nothing.py` `recipe/gad/monitor/rules.py:no_such_rule` `recipe/gad/monitor/rules.py:Curve.last`
`trainer.nothing` `critic/no_such_metric` `critic/d_acc`

```bash
gad report runs/gad \\
    --color blue   # comment
gad nothing at all
bash examples/gad/run_gad.sh --flag x ...
bash examples/gad/run_warmup.sh ... trainer.nothing=1
gad doctor trainer.nothing=1
```
"""


def test_broken_documentation_is_found(tmp_path):
    doc = tmp_path / "broken.md"
    doc.write_text(BROKEN)
    assert broken_links(doc) == ["nowhere.md", "#other"]
    assert missing_paths(doc) == ["recipe/gad/nothing.py"]
    assert defines(ROOT / "recipe/gad/monitor/rules.py", "Curve.last")
    assert not defines(ROOT / "recipe/gad/monitor/rules.py", "no_such_rule")
    assert unknown_metrics(doc) == ["critic/no_such_metric"]
    assert keys_in(doc) == ["trainer.nothing"] and not exists("trainer.nothing")
    option, subcommand, flag, key, doctor = lines_starting_with(doc, "gad", "bash")
    with pytest.raises(Exception, match="No such option"):
        parse_gad(option)
    with pytest.raises(AssertionError, match="no subcommand nothing"):
        parse_gad(subcommand)
    with pytest.raises(AssertionError, match="unknown flag --flag"):
        dry_run(flag[1:], tmp_path)
    (overrides,) = dry_run(key[1:], tmp_path)
    for bad in (overrides, doctor[2:]):
        with pytest.raises(ValueError, match="nothing"):
            compose_config(bad)

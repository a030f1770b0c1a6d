"""Writes docs/configuration.md from the comments of recipe/gad/config/*.yaml: every key, its default, its comment.

    python scripts/config_reference.py             write the page
    python scripts/config_reference.py --check     exit 1 if the page is not what would be written

A comment is the lines right above a key; its indented lines, ``name  text``, become a list. A key without a comment
takes the comment of its block.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "recipe/gad/config"
PAGE = ROOT / "docs/configuration.md"
WIDTH = 120

INTRO = """\
# Configuration

<!-- Written by scripts/config_reference.py from the comments of recipe/gad/config/; edit those and run it again. -->

This page lists the keys that GAD sets, with their defaults. They extend verl's `ppo_trainer`: every other key of verl
works too and has verl's default. Write overrides after the flags of a launch script (`trainer.n_gpus_per_node=4`);
`+key=value` adds a key that the configuration does not have. Every script sets what its stage needs; `--dry-run` prints
it. This prints the whole configuration, with verl's keys:

```bash
gad doctor --print_config device=gpu
```
"""


class Key(NamedTuple):
    """A key that is no block: dotted name, default as written in the file, lines of its comment."""

    name: str
    default: str
    comment: list[str]


def comment_above(lines: list[str], number: int) -> list[str]:
    """Comment lines right above line ``number`` (from 0), without "# "; further indentation stays."""
    start = number
    while start and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return [line.strip()[1:].removeprefix(" ") for line in lines[start:number]]


def keys_of(node: yaml.MappingNode, text: str, prefix: str = "", inherited: list[str] | None = None) -> Iterator[Key]:
    """Keys below a block, in the order of the file.

    Raises:
        ValueError: neither a key nor its block has a comment.
    """
    lines = text.splitlines()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        comment = comment_above(lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode):
            yield from keys_of(value, text, f"{name}.", comment)
            continue
        comment = comment or inherited or []
        if not comment:
            raise ValueError(f"line {key.start_mark.line + 1}: {name} has no comment. Fix: write one above it")
        yield Key(name, text[value.start_mark.index : value.end_mark.index], comment)


def show(key: Key) -> str:
    """One entry of the page."""
    first = [line for line in key.comment if not line.startswith(" ")]
    details = [": ".join(re.split(r" {2,}", line.strip(), maxsplit=1)) for line in key.comment if line.startswith(" ")]
    entry = [wrap("- ", f"**`{key.name}`** = `{key.default}`"), wrap("  ", " ".join(first))]
    return "\n".join(["\\\n".join(entry), *(wrap("  - ", detail) for detail in details)])


def wrap(lead: str, text: str) -> str:
    """``text`` after ``lead``, in lines of WIDTH; words, and so defaults, stay whole."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), **options)


def header(text: str) -> str:
    """Comment at the top of a file, without Hydra's directive."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(line for line in lines if not line.startswith("@package"))


def sections(file: Path) -> Iterator[tuple[str, str, list[Key]]]:
    """(name, comment, keys) of every top-level block; the groups among Hydra's defaults are a block of their own."""
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if root is not None else ():
        if key.value == "hydra":
            continue
        if key.value == "defaults":
            groups = [key for item in value.value if isinstance(item, yaml.MappingNode) for key in keys_of(item, text)]
            yield "device", "Chosen as a whole, before single keys.", groups
        else:
            comment = comment_above(text.splitlines(), key.start_mark.line)
            yield key.value, " ".join(comment), list(keys_of(value, text, f"{key.value}."))


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRO, wrap("", header((CONFIG / "gad_trainer.yaml").read_text(encoding="utf-8"))) + "\n"]
    for name, comment, keys in sections(CONFIG / "gad_trainer.yaml"):
        parts.append(f"## {name}\n")
        if comment:
            parts.append(wrap("", comment) + "\n")
        parts += [show(key) + "\n" for key in keys]
    for file in sorted((CONFIG / "device").glob("*.yaml")):
        parts += [f"## device={file.stem}\n", wrap("", header(file.read_text(encoding="utf-8"))) + "\n"]
        parts += [show(key) + "\n" for _, _, keys in sections(file) for key in keys]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Write or check the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    arguments = parser.parse_args(argv)
    text = page()
    if arguments.check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.name} is {'fresh' if fresh else 'stale. Fix: python scripts/config_reference.py'}")
        return 0 if fresh else 1
    draft = PAGE.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Lists every file of our ``verl/`` tree beside the stock file of the installed verl wheel that it extends.

    python scripts/show_delta.py            print the table; exit 1 if a stock file is not the one we wrote against
    python scripts/show_delta.py --update   accept the installed wheel: rewrite scripts/stock_hashes.json

The pins live in ``scripts/stock_hashes.json``. Nothing of verl is executed.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "scripts" / "stock_hashes.json"
FINE = ("ok", "new")


@dataclass(frozen=True)
class Row:
    """One file of ours: its path ("verl/..."), its lines, the stock file's sha256 ("" if there is none), its status.

    Status: ``new`` no stock file and no pin; ``ok`` pin and stock file agree; ``changed`` they differ; ``unlisted`` a
    stock file without a pin; ``missing`` a pin, but the wheel has no such file; ``stale`` a pin, but no file of ours.
    """

    path: str
    lines: int
    sha256: str
    status: str


def stock_root() -> Path:
    """Folder of the installed verl package, found without importing it."""
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise SystemExit('verl is not installed in this environment. Fix: pip install -e ".[cpu]"')
    return Path(spec.origin).parent


def _status(pin: str | None, stock: str) -> str:
    if pin is None:
        return "unlisted" if stock else "new"
    if not stock:
        return "missing"
    return "ok" if pin == stock else "changed"


def delta(ours: Path, stock: Path, pins: dict[str, str]) -> list[Row]:
    """Rows for every file below ``ours`` (our ``verl``) against ``stock`` (the installed one), and the stale pins."""
    rows = []
    for file in sorted(ours.rglob("*")):
        if not file.is_file() or "__pycache__" in file.parts:
            continue
        relative = file.relative_to(ours)
        path = Path("verl", relative).as_posix()
        shadowed = stock / relative
        sha256 = hashlib.sha256(shadowed.read_bytes()).hexdigest() if shadowed.is_file() else ""
        lines = len(file.read_text(encoding="utf-8").splitlines())
        rows.append(Row(path, lines, sha256, _status(pins.get(path), sha256)))
    stale = sorted(set(pins) - {row.path for row in rows})
    return rows + [Row(path, 0, "", "stale") for path in stale]


def load_pins() -> dict[str, str]:
    """sha256 of each shadowed stock file, by path."""
    return json.loads(PINS.read_text(encoding="utf-8"))


def save_pins(rows: list[Row]) -> None:
    """Write the stock hashes of ``rows``, whole or not at all."""
    pins = {row.path: row.sha256 for row in rows if row.sha256}
    draft = PINS.with_suffix(".tmp")
    draft.write_text(json.dumps(pins, indent=2) + "\n", encoding="utf-8")
    draft.replace(PINS)


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="pin the stock files of the installed wheel")
    arguments = parser.parse_args(argv)
    ours, stock = ROOT / "verl", stock_root()
    if arguments.update:
        save_pins(delta(ours, stock, {}))
    rows = delta(ours, stock, load_pins())
    table = [("our file", "lines", "stock sha256", "status")]
    table += [(row.path, str(row.lines), row.sha256[:12] or "-", row.status) for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(4)]
    for path, lines, sha256, status in table:
        print(f"{path:<{widths[0]}}  {lines:>{widths[1]}}  {sha256:<{widths[2]}}  {status}")
    bad = [row for row in rows if row.status not in FINE]
    print(f"{len(rows)} files, {sum(row.lines for row in rows)} lines over {stock}; {len(bad)} to look at")
    if bad:
        print("Compare each listed file with the stock file it extends, then: python scripts/show_delta.py --update")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

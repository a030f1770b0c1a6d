"""Sizes and checksums of a checkpoint's files, to find a shard that was cut off or has flipped bits before its use.

``global_step_N/checksums.json`` holds [bytes, CRC-32] by file name. The trainer writes it after every save, and
``gad export`` into the folder of a model. A folder without it, of an earlier version or of an interrupted save, is not
verified.
"""

import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipe.gad.run.atomic_io import read_object, write_atomically

FILE = "checksums.json"
BLOCK = 1 << 24


def _crc32(file: Path) -> str:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _crc32_of(files: list[Path]) -> Iterator[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib lets other threads run
        yield from pool.map(_crc32, files)


def write_checksums(step_folder: Path) -> None:
    """Record every file below a ``global_step_N`` folder, or below an exported model's."""
    files = sorted(file for file in step_folder.rglob("*") if file.is_file() and file.name != FILE)
    names = [file.relative_to(step_folder).as_posix() for file in files]
    sizes = [file.stat().st_size for file in files]
    record = dict(zip(names, zip(sizes, _crc32_of(files), strict=True), strict=True))
    write_atomically(step_folder / FILE, json.dumps(record, indent=1))


def forget_checksums(step_folder: Path) -> None:
    """Remove the record of an earlier save, before a new one changes the files."""
    (step_folder / FILE).unlink(missing_ok=True)


def damage(step_folder: Path, folders: tuple[str, ...] | None, huggingface: bool, contents: bool) -> list[str]:
    """Files that differ from the record of their save, one sentence each.

    Args:
        step_folder: ``global_step_N``.
        folders: look into these, such as ``("actor", "critic")``; None: at all files.
        huggingface: look at their huggingface folders, which the next stage reads; else at the rest, which a resumed
            run reads.
        contents: compare checksums as well, which reads the files; else sizes alone.
    """
    if not (step_folder / FILE).is_file():
        return []
    try:
        record = read_object(step_folder / FILE)
    except ValueError as error:
        return [str(error)]
    chosen = (name for name in record if folders is None or name.split("/")[0] in folders)
    names = [name for name in chosen if ("/huggingface/" in name) is huggingface]
    problems, whole = [], []
    for name in names:
        file, size = step_folder / name, record[name][0]
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif (found := file.stat().st_size) != size:
            problems.append(f"{file} has {found} bytes, and {size} were saved")
        else:
            whole.append(name)
    if contents:
        crcs = _crc32_of([step_folder / name for name in whole])
        changed = [name for name, crc in zip(whole, crcs, strict=True) if crc != record[name][1]]
        problems += [f"{step_folder / name} has changed since it was saved (CRC-32)" for name in changed]
    return problems

"""Files that are written whole or line by line, and read back."""

import json
import os
import resource
import subprocess
import sys

import pytest

from recipe.gad.run.atomic_io import LOCK, JsonLog, alone_in, read_object, write_atomically


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_atomically(path, "é \ud83d")
    assert path.read_bytes() == b"\xc3\xa9 \\ud83d"
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(path.parent) == ["a.txt"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file: '.*/folder'"):
        write_atomically(tmp_path / "folder", "text")
    assert sorted(os.listdir(tmp_path)) == ["folder", "new"], "no temporary file is left"


@pytest.mark.parametrize("write", ['write_atomically(sys.argv[1], "x" * 9999)',
    'JsonLog(Path(sys.argv[1]), "gad test").append({"text": "x" * 9999})'])  # fmt: skip
def test_a_full_disk_names_the_file(tmp_path, write):
    code = "import sys; from pathlib import Path; from recipe.gad.run.atomic_io import JsonLog, write_atomically; "
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-c", code + write, tmp_path / "file"]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{tmp_path}/file'"
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_full_disk_names_the_lock_and_leaves_none(tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        with pytest.raises(OSError, match="too large") as found, alone_in(tmp_path / "out", "gad test"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert found.value.filename == str(tmp_path / "out" / LOCK)
    assert not any(tmp_path.iterdir())


def test_an_output_folder_belongs_to_one_process(tmp_path):
    folder = tmp_path / "out"
    with alone_in(folder, "gad test"):
        with pytest.raises(ValueError, match="another gad test uses .*out. Fix: wait"), alone_in(folder, "gad test"):
            pass
        (folder / "a").touch()
    assert os.listdir(folder) == ["a"]
    with alone_in(folder, "gad test"):
        pass
    with pytest.raises(OSError, match="x"), alone_in(tmp_path / "new", "gad test"):
        raise OSError("x")
    assert os.listdir(tmp_path) == ["out"], "a folder that stays empty is removed"


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = """
import sys, time
from pathlib import Path
from recipe.gad.run.atomic_io import alone_in
with alone_in(Path(sys.argv[1]), "gad test"):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another gad test uses"), alone_in(tmp_path, "gad test"):
        pass
    holder.kill()
    holder.wait()
    with alone_in(tmp_path, "gad test"):
        pass
    assert os.listdir(tmp_path) == []


def test_objects_of_json_files(tmp_path):
    path = tmp_path / "a.json"
    for text, message in [
        ("[1]", "holds a list, expected a JSON object. Fix: x"),
        ("{", "not valid JSON .*cut off.*x"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_object(path, "x")
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}


def records(path):
    with JsonLog(path, "gad test") as log:
        return list(log.records(id=int))


def test_a_log_that_stays_empty_leaves_no_file(tmp_path):
    assert records(tmp_path / "log.jsonl") == [] and list(tmp_path.iterdir()) == []


def test_a_log_keeps_whole_lines(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with JsonLog(path, "gad test") as log:
        log.append({"id": 1, "text": "line\u2028\ud83d"})
        assert json.loads(path.read_text()) == {"id": 1, "text": "line\u2028\ud83d"}, "written at once"
        log.append({"id": 2})
        with pytest.raises(ValueError, match="another gad test writes to .*log.jsonl"):
            JsonLog(path, "gad test")
    whole = path.read_bytes()
    for cut in (1, 4):
        path.write_bytes(whole[:-cut])
        assert [record["id"] for record in records(path)] == [1]
        assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


@pytest.mark.parametrize(
    "text",
    [
        '{"other": 1}',
        '{"id": 1}\n{"other": 1}',
        '{"id": 1}\n[]\n',
        "no JSON\n",
        "my notes, one line without a newline",
        '{"id": 1}\nmy notes',
        '{"id": "1"}\n',
        '{"id": true}\n',
        "[" * 100_000,
    ],
)
def test_a_foreign_file_is_not_cut(tmp_path, text):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log.jsonl, row \d: not written by gad test"):
        records(path)
    assert path.read_text() == text

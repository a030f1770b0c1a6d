"""Hundreds of damaged inputs for every command: no traceback, no changed input, no key in a message or a file.

The cases are random and repeat themselves: the number of a case is its seed. ``GAD_CASES=20`` runs more of them, 20
times as many.
"""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from recipe.gad.cli import main
from recipe.gad.run.config import compose_config
from tests.recipe.conftest import Reply

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.long

KEY = "sk-test/KEY+0123456789=abc"
ODD_VALUES = [
    None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf"), -float("inf"), "", " ", "x" * 5000, "\ud83d",
    "\x1b[2J", "\0", "\u202e", "🎉", [], {}, [[]], [None], {"a": {}}, {"": 0}, [5], "1", "null",
    "../..", "/dev/null", 2**63, 0.5,
]  # fmt: skip
ODD_BYTES = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"{", b"}", b"[" * 50_000, b'"', b",", b"NaN", b"Infinity",
    b"1e999", b"9" * 400, b"\x1b]0;x\x07", b"\\ud800", b"\xe2\x80\xa8", b"null", b"{}", b"[]", b"PAR1",
    b"!!python/object:os", b"&a [*a]", b"%", b"\t", b"---",
]  # fmt: skip


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes after one to three cuts, flips, repetitions or insertions."""
    for _ in range(rng.randint(1, 3)):
        at, other = sorted(rng.randint(0, len(data)) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[other:]
        elif kind == 2:
            data = data[:at] + rng.choice(ODD_BYTES) + data[at:]
        elif kind == 3:
            data = data[:at] + rng.choice(ODD_BYTES) + data[other:]
        elif data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return data


def damaged_value(rng: random.Random, value):
    """The JSON value with one node replaced by, removed, or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: damaged_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(rng, value[at]), *value[at + 1 :]]
    return rng.choice(ODD_VALUES)


def damaged_json(rng: random.Random, text: str) -> bytes:
    """A JSON document, or lines of them, of which one has an odd value, or odd bytes."""
    if rng.random() < 0.4:
        return damaged_bytes(rng, text.encode())
    try:
        return json.dumps(damaged_value(rng, json.loads(text))).encode()
    except ValueError:
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(damaged_value(rng, json.loads(lines[at])))
        return ("\n".join(lines) + "\n").encode()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def gad(*arguments: object) -> tuple[int, str]:
    """Exit code and output of a command, which must end with SystemExit, and without a traceback or an escape."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output), pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    text = output.getvalue()
    assert exit.value.code in (0, 1, 2), text
    assert "Traceback" not in text and not set(text) & set("\x1b\x07\0\u202e") and KEY not in text, text[-3000:]
    return exit.value.code, text


def cases(n: int):
    """Seeds of ``n`` cases."""
    return pytest.mark.parametrize("seed", range(n * int(os.environ.get("GAD_CASES", 1))))


# ---------------------------------------------------------------------- watch and report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A healthy GAD run: metrics, samples, and what Hydra records."""
    folder = tmp_path_factory.mktemp("runs") / "gad"
    (folder / "hydra/.hydra").mkdir(parents=True)
    (folder / "val_samples").mkdir()
    names = ["critic/d_acc", "actor/pg_loss", "response_length/mean", "teacher_response_length/mean", "timing_s/step"]
    rows = [{"step": i, "data": {**dict.fromkeys(names, 0.5 + i), "val-aux/t/rouge_l/mean@1": 0.1}} for i in range(30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (0, 10, 20):
        sample = {"input": "a question", "output": "an answer", "gts": "the teacher's", "score": 0.5, "rouge_l": 0.4}
        (folder / f"val_samples/{step}.jsonl").write_text((json.dumps(sample) + "\n") * 3)
    (folder / "hydra/.hydra/config.yaml").write_text("trainer: {total_training_steps: 30}\ngad: {stage: gad}\n")
    (folder / "hydra/.hydra/overrides.yaml").write_text("- gad.stage=gad\n- trainer.total_training_steps=30\n")
    return folder


def damaged_run(rng: random.Random, run: Path, folder: Path) -> Path:
    """A copy of the run with one damaged file."""
    shutil.copytree(run, folder)
    file = rng.choice([file for file in sorted(folder.rglob("*")) if file.is_file()])
    text = file.read_text()
    file.write_bytes(damaged_bytes(rng, text.encode()) if file.suffix == ".yaml" else damaged_json(rng, text))
    return folder


@cases(120)
def test_watch_and_report_read_what_they_can(run, tmp_path, seed):
    folder = damaged_run(random.Random(seed), run, tmp_path / "run")
    before = files_of(folder)
    gad("watch", folder, "--once")
    if seed % 10 == 0:  # drawing takes seconds
        code, _ = gad("report", folder, "--output", tmp_path / "r.html")
        assert (code == 0) == (tmp_path / "r.html").exists()
    assert files_of(folder) == before


# ---------------------------------------------------------------------- prepare

LAYOUTS = [
    {"messages": [{"role": "user", "content": "q {i}"}, {"role": "assistant", "content": "an answer {i}"}]},
    {"conversations": [{"from": "human", "value": "q {i}"}, {"from": "gpt", "value": "an answer {i}"}]},
    {"instruction": "do {i}", "input": "", "output": "an answer {i}"},
    {"question": "q {i}", "answer": "an answer {i}"},
    {"content": [{"role": "user", "content": "q {i}"}], "teacher_response": "an answer {i}"},
]


@cases(120)
def test_prepare_writes_whole_files_or_none(tmp_path, seed):
    rng = random.Random(seed)
    layout = json.dumps(rng.choice(LAYOUTS))
    rows = [json.loads(layout.replace("{i}", str(i))) for i in range(60)]
    ending = rng.choice(["jsonl", "json", "csv", "parquet"])
    file = tmp_path / "in" / f"rows.{ending}"
    file.parent.mkdir()
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    elif ending == "csv":
        file.write_bytes(
            damaged_bytes(rng, "".join(["prompt,response\n", *(f"q {i},a {i}\n" for i in range(60))]).encode())
        )
    else:
        text = "\n".join(map(json.dumps, rows)) if ending == "jsonl" else json.dumps(rows)
        file.write_bytes(damaged_json(rng, text))
    before, out = files_of(file.parent), tmp_path / "out"
    code, text = gad("prepare", file, "--output_dir", out, "--val_fraction", "0.2")
    assert files_of(file.parent) == before
    if code == 2:
        assert not out.exists(), text
        return
    assert {path.name for path in out.iterdir()} <= {"train.parquet", "val.parquet", "rejects.jsonl", "settings.json"}
    assert 0 < sum(pq.read_table(out / f"{name}.parquet").num_rows for name in ("train", "val")) <= len(rows) + 3


# ---------------------------------------------------------------------- collect


@cases(100)
def test_collect_counts_odd_answers_as_failed_and_keeps_the_good_ones(tmp_path, chat_server, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts, out = tmp_path / "p.txt", tmp_path / "a.jsonl"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(6)))
    good = chat_server.answer("an answer").body

    def reply(body, earlier):
        number = int(body["messages"][-1]["content"].split()[-1])
        if number < 3:
            return chat_server.answer(f"answer {number}")
        kind = rng.randrange(4)
        if kind == 0:
            return Reply(damaged_value(rng, good))
        if kind == 1:
            return Reply(damaged_bytes(rng, json.dumps(good).encode()))
        if kind == 2:
            echo = f"you sent {rng.choice(['', 'x' * rng.randint(0, 400)])}{body} Bearer {KEY} {KEY!r}"
            return Reply({"error": {"message": echo}}, status=rng.choice([400, 403, 404, 422]))
        return Reply(damaged_value(rng, {"error": {"message": f"no, {KEY}"}}), status=rng.choice([400, 403, 422]))

    chat_server.reply = reply
    arguments = ["collect", prompts, "--output", out, "--model", "m", "--base_url", chat_server.url]
    arguments += ["--max_retries", "0", "--concurrency", "3"]
    gad(*arguments)
    written = files_of(tmp_path)
    assert not any(KEY.encode() in data or KEY[:15].encode() in data for data in written.values())
    if len(chat_server.bodies) == 6:  # no answer stopped the others
        assert {f"answer {i}" for i in range(3)} <= {json.loads(line)["teacher_response"] for line in out.open()}
    chat_server.reply = lambda body, earlier: chat_server.answer("good")
    code, text = gad(*arguments, "--retry_failed")
    assert code == 0, text
    assert out.read_bytes().startswith(written.get("a.jsonl", b"")), "what was written stays"
    assert len(out.read_text().splitlines()) == 6


# ---------------------------------------------------------------------- eval compare


@pytest.fixture(scope="module")
def evaluated(tiny_problem, tmp_path_factory):
    """Two evaluation folders of one model."""
    folder = tmp_path_factory.mktemp("evaluated")
    limits = ["--max_prompt_length", "16", "--max_response_length", "6"]
    model, data = tiny_problem / "model", tiny_problem / "val.parquet"
    code, text = gad("eval", "--model", model, "--val_files", data, "--output_dir", folder / "a", *limits)
    assert code == 0, text
    shutil.copytree(folder / "a", folder / "b")
    return folder


@cases(100)
def test_compare_names_damaged_files(evaluated, tmp_path, seed):
    rng = random.Random(seed)
    shutil.copytree(evaluated, tmp_path / "e")
    file = rng.choice([file for file in sorted((tmp_path / "e/b").rglob("*.json*")) if file.is_file()])
    file.write_bytes(damaged_json(rng, file.read_text()))
    before = files_of(tmp_path / "e")
    gad("eval", "compare", tmp_path / "e/a", tmp_path / "e/b")
    assert files_of(tmp_path / "e") == before


# ---------------------------------------------------------------------- models: doctor and export


ODD_SETTINGS = [
    "null", "nan", "inf", "-inf", "-1", "0", "1", "0.5", "1e999", "99999999999999999999", "true", "x", "''", "' '",
    "[]", "[1]", "[null]", "{}", "{a:1}", "/", "../..", "/dev/null", "'\\x1b[2J'", "'\\u202e'", "'${oc.env:HOME}'",
]  # fmt: skip


@cases(100)
def test_the_doctor_judges_any_setting(tiny_problem, tmp_path, seed):
    """One to three keys of the configuration, of verl's as of ours, get an odd value."""
    rng = random.Random(seed)
    keys = [key for key in flat_keys(OmegaConf.to_container(compose_config([]), resolve=False)) if "@" not in key]
    ours = [key for key in keys if key.startswith("gad.")]
    chosen = [rng.choice(ours if rng.random() < 0.3 else keys) for _ in range(rng.randint(1, 3))]
    model = [f"{key}={tiny_problem}/model" for key in ("actor_rollout_ref.model.path", "critic.model.path")]
    data = [f"data.{name}_files={tiny_problem}/{name}.parquet" for name in ("train", "val")]
    odd = [f"{key}={rng.choice(ODD_SETTINGS)}" for key in chosen]
    out = f"trainer.default_local_dir={tmp_path}/out"
    gad("doctor", "--brief", "gad.stage=warmup", "device=cpu", *model, *data, out, *odd)


def flat_keys(value, before: str = "") -> list[str]:
    """Names of the leaves of nested mappings, with dots."""
    if not isinstance(value, dict) or not value:
        return [before]
    return [name for key, inner in value.items() for name in flat_keys(inner, f"{before}.{key}" if before else key)]


@cases(60)
def test_the_doctor_names_damaged_models(tiny_problem, tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    shutil.copytree(tiny_problem / "model", tmp_path / "model")
    file = rng.choice(
        [file for file in sorted((tmp_path / "model").iterdir()) if file.suffix in (".json", ".jinja", ".safetensors")]
    )
    if file.suffix == ".json":
        file.write_bytes(damaged_json(rng, file.read_text()))
    else:
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    before = files_of(tmp_path / "model")
    code, text = gad(
        "doctor", "device=cpu", "gad.stage=warmup", "gad.actor_objective=imitation", "data.train_batch_size=8",
        f"actor_rollout_ref.model.path={tmp_path}/model", f"data.train_files={tiny_problem}/train.parquet",
        f"data.val_files={tiny_problem}/val.parquet", f"trainer.default_local_dir={tmp_path}/run",
    )  # fmt: skip
    assert code in (0, 1) and (" errors, " in text or " error, " in text), "the report goes to its end"
    assert files_of(tmp_path / "model") == before and not (tmp_path / "run").exists()


@cases(60)
def test_export_writes_a_whole_model_or_none(tiny_problem, tmp_path, seed):
    rng = random.Random(seed)
    model = tmp_path / "run/global_step_2/actor/huggingface"
    shutil.copytree(tiny_problem / "model", model)
    (tmp_path / "run/global_step_2/data.pt").write_bytes(b"")
    file = rng.choice([file for file in sorted(model.iterdir()) if file.suffix in (".json", ".safetensors")])
    if file.suffix == ".json":
        file.write_bytes(damaged_json(rng, file.read_text()))
    else:
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    before = files_of(tmp_path / "run")
    code, text = gad("export", tmp_path / "run", "--output_dir", tmp_path / "out")
    assert files_of(tmp_path / "run") == before
    assert (code == 0) == (tmp_path / "out").exists(), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"][code != 0 :], (
        "no temporary folder is left"
    )


# ---------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("kilobytes", [1, 8, 30])
@pytest.mark.parametrize("command", ["prepare", "export", "report", "collect"])
def test_a_full_disk_names_the_file_and_leaves_no_temporary_one(
    tiny_problem, run, chat_server, tmp_path, command, kilobytes
):
    """No file can grow beyond a limit, as on a full disk."""
    model = tmp_path / "run/global_step_2/actor/huggingface"
    shutil.copytree(tiny_problem / "model", model)
    (tmp_path / "run/global_step_2/data.pt").write_bytes(b"")
    (tmp_path / "p.jsonl").write_text(
        "".join(f'{{"prompt": "q {i}", "response": "{os.urandom(40).hex()}"}}\n' for i in range(999))
    )
    chat_server.reply = lambda body, earlier: chat_server.answer("a" * 2000)
    out = tmp_path / "out"
    arguments = {
        "prepare": ["prepare", tmp_path / "p.jsonl", "--output_dir", out, "--val_fraction", "0.2"],
        "export": ["export", tmp_path / "run", "--output_dir", out],
        "report": ["report", run, "--output", out],
        "collect": [
            "collect",
            tmp_path / "p.jsonl",
            "--output",
            tmp_path / "a.jsonl",
            "--model",
            "m",
            "--base_url",
            chat_server.url,
        ],
    }[command]
    shell = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", sys.executable, "-m", "recipe.gad.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY}
    done = subprocess.run([*shell, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(rf"^error: {tmp_path}/\S+: .*File too large", done.stderr, re.MULTILINE), done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"run", "p.jsonl"}
    assert left <= ({"a.jsonl", "a.settings.json", "a.failed.jsonl"} if command == "collect" else set())

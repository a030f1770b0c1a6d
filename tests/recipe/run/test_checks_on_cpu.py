"""recipe/gad/run/checks.py: every bad input gets one error that names the key or row, the value and the fix."""

import copy
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from packaging.version import Version
from safetensors.numpy import load_file, save_file

from recipe.gad import plugin
from recipe.gad.run import checks as check
from recipe.gad.run import data_file
from recipe.gad.run.checkpoint import TRACKER, claim_folder
from recipe.gad.run.checks import check_config, required_ray_cpus
from recipe.gad.run.config import compose_config
from recipe.gad.run.data_file import check_data_file, data_file_problems, teacher_text
from recipe.gad.run.findings import ConfigError, error, warning
from recipe.gad.run.refusals import compared_answers

ROOT = Path(__file__).resolve().parents[3]
ROLLOUT, ACTOR, MODEL = "actor_rollout_ref.rollout", "actor_rollout_ref.actor", "actor_rollout_ref.model"
NO_VALIDATION = {"trainer.test_freq": -1, "trainer.val_before_train": False}
USER = [{"role": "user", "content": "c a f"}]


@pytest.fixture(scope="module")
def base(compose_config):
    return compose_config("gad.stage=warmup", "gad.actor_objective=imitation", f"{ACTOR}.use_kl_loss=False")


@pytest.fixture
def config(base, tmp_path, monkeypatch):
    """Function: the configuration of a warmup run that passes, with keys changed."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "VERL_USE_EXTERNAL_PLUGINS"):
        monkeypatch.delenv(name, raising=False)

    def config(changes: dict | None = None):
        changed = copy.deepcopy(base)
        for key, value in {"trainer.default_local_dir": str(tmp_path / "run"), **(changes or {})}.items():
            OmegaConf.update(changed, key, value, force_add=True)
        return changed

    return config


@pytest.fixture
def gpu(config, monkeypatch):
    """The same for a run on GPUs."""
    monkeypatch.delenv("VERL_PLATFORM")
    settings = {"trainer.device": "cuda", "ray_kwargs.ray_init.num_cpus": 1000, "trainer.n_gpus_per_node": 8}
    return lambda changes=None: config({**settings, **(changes or {})})


@pytest.fixture(scope="module")
def critic(tiny_problem, tmp_path_factory):
    """The tiny model with a score head."""
    folder = tmp_path_factory.mktemp("critic") / "huggingface"
    shutil.copytree(tiny_problem / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "score.weight": np.zeros((1, 32), np.float32)}, folder / "model.safetensors")
    return folder


def errors_of(config) -> list[str]:
    try:
        check_config(config)
    except ConfigError as refused:
        messages = [str(finding) for finding in refused.errors]
        assert all(message in str(refused) for message in messages)
        return messages
    return []


def warnings_of(config) -> list[str]:
    return [str(finding) for finding in check_config(config)]


def expect(config, *parts: str) -> None:
    """Exactly one error, with all of ``parts`` in it, and a fix."""
    (message,) = errors_of(config)
    assert "Fix: " in message
    for part in parts:
        assert part in message


# ---------------------------------------------------------------------- the whole


def test_a_good_run_passes_and_its_config_is_left_alone(config):
    good = config()
    before = OmegaConf.to_yaml(good)
    assert check_config(good) == []
    assert OmegaConf.to_yaml(good) == before


def test_a_good_gad_run_passes(config, critic):
    stage = {"gad.stage": "gad", "gad.actor_objective": "policy_gradient", "critic.model.path": str(critic)}
    assert check_config(config(stage)) == []


def test_a_good_seqkd_run_passes(config):
    assert check_config(config({"gad.stage": "seqkd", "critic.enable": False})) == []


DPO = {
    "gad.stage": "soda",
    "gad.actor_objective": "dpo",
    "critic.enable": False,
    f"{ACTOR}.use_kl_loss": True,
    f"{ACTOR}.kl_loss_coef": 0,
}


@pytest.mark.parametrize("stage", ["soda", "online_dpo"])
def test_a_good_dpo_run_passes(config, stage):
    assert check_config(config({**DPO, "gad.stage": stage})) == []
    assert check_config(config({**DPO, "gad.stage": stage, "gad.imitation_coef": 0.2})) == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gad.dpo_beta": 0}, ["gad.dpo_beta=0", "a number above 0", "gad.dpo_beta=0.1"]),
        ({"gad.dpo_beta": "big"}, ["gad.dpo_beta=big"]),
        ({"gad.imitation_coef": -1}, ["gad.imitation_coef=-1", "at least 0"]),
        ({"gad.policy_gate": 0.1}, ["gad.policy_gate=0.1", "policy gradient", "gad.policy_gate=0"]),
        ({f"{ACTOR}.use_kl_loss": False}, [f"{ACTOR}.use_kl_loss=False", "no reference"]),
        ({f"{ACTOR}.ppo_mini_batch_size": 4}, [f"{ACTOR}.ppo_mini_batch_size=4", "one optimizer step", "_size=8"]),
        ({f"{ACTOR}.ppo_epochs": 2}, [f"{ACTOR}.ppo_epochs=2", "one optimizer step", "ppo_epochs=1"]),
        ({f"{ACTOR}.kl_loss_coef": 0.001}, [f"{ACTOR}.kl_loss_coef=0.001", "would not read it"]),
        ({f"{ACTOR}.entropy_coeff": 0.1}, [f"{ACTOR}.entropy_coeff=0.1", "would not read it"]),
        ({f"{ACTOR}.policy_loss.loss_mode": "gspo"}, ["loss_mode=gspo", "would not read it"]),
        ({"algorithm.use_kl_in_reward": True}, ["algorithm.use_kl_in_reward=True", "would not read it"]),
        ({"trainer.critic_warmup": 10}, ["trainer.critic_warmup=10", "would not read it", "trainer.critic_warmup=0"]),
        ({"critic.enable": True}, ["critic.enable=True", "stage soda trains no discriminator"]),
        ({"gad.actor_objective": "imitation"}, ["gad.actor_objective=imitation", "Fix: gad.actor_objective=dpo"]),
    ],
)
def test_what_a_dpo_run_refuses(config, changes, parts):
    expect(config({**DPO, **changes}), *parts)


def test_the_other_stages_have_no_dpo(config):
    expect(config({"gad.actor_objective": "dpo"}), "stage is warmup", "Fix: gad.actor_objective=imitation")
    assert errors_of(config({"gad.dpo_beta": 0})) == []


def test_all_errors_are_listed_at_once(config):
    bad = config({"trainer.use_v1": False, f"{ROLLOUT}.temperature": 0, "data.teacher_key": None})
    with pytest.raises(
        ValueError, match="cannot start:\n- trainer.use_v1=False.*\n- .*temperature=0.*\n- data.teacher_key"
    ):
        check_config(bad)


def test_errors_travel_between_processes():
    errors, warnings = [error("one", fix="mend it"), error("two")], [warning("three")]
    refused = pickle.loads(pickle.dumps(ConfigError(errors, warnings)))
    assert (refused.errors, refused.warnings) == (errors, warnings)
    assert str(refused) == "this GAD run cannot start:\n- one. Fix: mend it\n- two"


def test_a_reference_to_a_missing_key(config):
    expect(config({"data.seed": "${no.such.key}"}), "does not resolve", "no.such.key")


def test_numbers_that_are_none(config):
    expect(config({"data.train_batch_size": "many"}), "data.train_batch_size=many", "whole number of at least 1")
    expect(config({f"{ROLLOUT}.n": 0}), f"{ROLLOUT}.n=0", "whole number of at least 1")
    expect(config({"trainer.nnodes": None}), "trainer.nnodes=None")


# ---------------------------------------------------------------------- plugin


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "gad.imitation_coeff=1",
            "no key gad.imitation_coeff. Fix: write gad.imitation_coef, or +gad.",
        ),
        ("actor_rollout_ref.lora_rank=8", "Fix: write actor_rollout_ref.model.lora_rank or "),
        ("trainer.epochs=2", "Fix: write trainer.total_epochs or "),
        ("gad.foo.bar=1", "no key gad.foo.bar. Fix: look it up in docs/configuration.md, or +gad.foo.bar for"),
        ("ray_kwargs.ray_init.num_cpu=2", "Fix: write ray_kwargs.ray_init.num_cpus, or +ray_kwargs"),
        ("critic.optim.lr", "critic.optim.lr is no override. Fix: write key=value, without spaces"),
    ],
)
def test_a_misspelt_override_names_what_it_may_mean(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compose_config([override])


@pytest.mark.parametrize(
    "override",
    [
        "ray_kwargs.ray_init._temp_dir=/x",
        "ray_kwargs.ray_init.runtime_env.env_vars.NCCL_DEBUG=INFO",
        "data.apply_chat_template_kwargs.enable_thinking=False",
        "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=1",
    ],
)
def test_a_key_that_verl_passes_on_is_added_with_a_plus(override):
    key, _, value = override.partition("=")
    with pytest.raises(ValueError) as refused:
        compose_config([override])
    assert str(refused.value) == f"there is no key {key} yet. Fix: add it: write +{key}=..."
    assert str(OmegaConf.select(compose_config([f"+{override}"]), key)) == value


def test_plugin_kept_from_loading(config, monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    expect(config(), "VERL_USE_EXTERNAL_PLUGINS=none", "unset VERL_USE_EXTERNAL_PLUGINS")
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other, gad")
    assert errors_of(config()) == []


def test_plugin_not_registered(config, monkeypatch):
    monkeypatch.setattr(check, "entry_points", lambda group: ())
    expect(config(), "verl.plugins", "recipe.gad.plugin", "pip install -e .")


def test_overlay_not_active(config, monkeypatch):
    monkeypatch.setattr(plugin, "installed", lambda: False)
    expect(config(), "verl was imported without the GAD plugin", "pip install -e .")


def test_another_verl(config, monkeypatch):
    monkeypatch.setattr(check, "version", lambda name: "0.8.0")
    expect(config(), "verl 0.8.0 is installed", f"pip install verl=={plugin.VERL_VERSION}")


def test_no_verl(config, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delitem(sys.modules, "recipe.gad.plugin")
    monkeypatch.delattr("recipe.gad.plugin")
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "OverlayFinder"])
    expect(config(), "the package verl is not installed", "pip install")


# ---------------------------------------------------------------------- data


@pytest.fixture
def data(config, tmp_path):
    """Function: the configuration of a run on these training rows (rows, bytes, or None for no file)."""

    def data(rows, name="train.parquet", changes=None):
        file = tmp_path / name
        if isinstance(rows, bytes):
            file.write_bytes(rows)
        elif isinstance(rows, pa.Table):
            pq.write_table(rows, file)
        elif rows is not None and file.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif rows is not None:
            file.write_text("\n".join(json.dumps(row) for row in rows))
        return config({"data.train_files": str(file), "data.train_batch_size": 8, **(changes or {})})

    return data


def rows_with(bad: dict, at: int = 3) -> list[dict]:
    rows = [{"content": USER, "teacher_response": "well c a f"} for _ in range(8)]
    return [{**row, **bad} if i == at else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (None, "no such file"),
        (b"", "0 bytes"),
        (b"no parquet" * 20, "not a readable parquet file"),
        (pa.table({"content": pa.array([], pa.string()), "teacher_response": pa.array([], pa.string())}), "0 rows"),
        ([{"prompt": USER, "teacher_response": "x"}], "no column 'content'; it has 'prompt', 'teacher_response'"),
        ([{"content": USER, "answer": "x"}], "no column 'teacher_response'; it has 'content', 'answer'"),
    ],
)
def test_bad_files(data, rows, expected):
    expect(data(rows), "data.train_files", "train.parquet", expected)


@pytest.mark.parametrize("name", ["a[1].parquet", "a*.parquet", "a?.parquet", "a::b.parquet"])
def test_a_path_that_verls_reader_takes_as_a_pattern(data, name):
    expect(data(rows_with({}), name), "data.train_files", name, "as a pattern", "rename")


TEACHERS = [
    (None, "is null"),
    ("", "is empty"),
    (" \n\t", "holds only whitespace"),
    ({"role": "assistant", "content": None}, "is null"),
]
PROMPTS = [
    (None, "is null"),
    ([], "is an empty list"),
    ([{"role": "user", "content": None}], "(number 0) without content"),
    ([{"role": None, "content": "x"}], "(number 0) without role"),
    ([*USER, {"role": "assistant", "content": "x"}], "ends with a message of role 'assistant'"),
    ([{"role": "system", "content": "x"}], "ends with a message of role 'system'"),
]


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
@pytest.mark.parametrize(("value", "expected"), TEACHERS[:3])
def test_bad_teacher_answers(data, name, value, expected):
    expect(data(rows_with({"teacher_response": value}), name), f"{name}, row 3: column 'teacher_response' {expected}")


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
@pytest.mark.parametrize(("value", "expected"), PROMPTS)
def test_bad_prompts(data, name, value, expected):
    expect(data(rows_with({"content": value}), name), f"{name}, row 3: column 'content'", expected, "chat messages")


def test_teacher_answers_as_chat_messages(data):
    rows = [{"content": USER, "teacher_response": {"role": "assistant", "content": "c a f"}} for _ in range(8)]
    assert errors_of(data(rows)) == []
    rows[5] = {"content": USER, "teacher_response": TEACHERS[3][0]}
    expect(data(rows), "row 5: column 'teacher_response' is null")


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_several_teacher_answers(data, name):
    def rows(*answers):
        return [{"content": USER, "teacher_response": ["a", "b"]} for _ in range(8 - len(answers))] + [
            {"content": USER, "teacher_response": answer} for answer in answers
        ]

    assert errors_of(data(rows(["a"]), name)) == []
    expect(data(rows([]), name), "row 7: column 'teacher_response' is an empty list", "or a list of such answers")
    expect(data(rows(["a", ""], ["a", ""]), name), "row 6", "has an answer (number 1) that is empty (2 such rows)")
    expect(data(rows(["a", None]), name), "row 7", "(number 1) that is null")
    if name == "train.jsonl":
        expect(data(rows("a"), name), "row 7: column 'teacher_response' is no list, unlike those before it")


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_column_for_each_teacher(data, name):
    def columns(teachers, *bad):
        rows = [{"content": USER, "gpt": "a", "claude": None if i else "b"} for i in range(8 - len(bad))]
        changed = data([*rows, *bad], name)
        OmegaConf.update(changed, "data.teacher_key", teachers)
        OmegaConf.update(changed, "data.val_files", changed.data.train_files)
        return changed

    assert errors_of(columns(["gpt", "claude"])) == errors_of(columns(["gpt"])) == []
    expect(columns(["claude"]), "data.train_files", "row 1: column 'claude' is null")
    none, blank = ({"content": USER, "gpt": gpt, "claude": None} for gpt in (None, " "))
    expect(columns(["gpt", "claude"], none), "row 7: column 'gpt' is null, as are the other teachers' columns")
    expect(columns(["gpt", "claude"], blank), "row 7: column 'gpt' holds only whitespace")
    expect(columns(["gpt", "gold"]), "has no column 'gold'; it has 'content', 'gpt', 'claude'")
    for teachers in ([], ["gpt", "gpt"], ["gpt", ""]):
        expect(columns(teachers), f"data.teacher_key={teachers}", "a list of different columns")


def test_all_teacher_answers_need_several_and_room_in_a_micro_batch(data):
    several = [{"content": USER, "teacher_response": ["a", "b", "c"][: 1 + i % 3]} for i in range(8)]

    def compare(rows, changes, name="train.parquet"):
        return data(rows, name, {"gad.teacher_answers": "all", **changes})

    def refused(changed, *parts, checks=(check.check_teacher_answers,)):
        (finding,) = check.run_checks(changed, checks)
        assert finding.level == "error" and all(part in str(finding) for part in parts), finding

    config = compare(several, {})
    n, row = config.actor_rollout_ref.rollout.n, config.data.max_prompt_length + config.data.max_response_length
    limit, size = "critic.ppo_max_token_len_per_gpu", "critic.ppo_micro_batch_size_per_gpu"
    assert errors_of(compare(several, {limit: (n + 3) * row})) == []
    short, tokens = {limit: (n + 3) * row - 1}, (check.check_tokens,)
    refused(compare(several, short), f"{limit}={short[limit]}", f"the n + 3 = {n + 3} answers", checks=tokens)
    by_rows = {"critic.use_dynamic_bsz": False, size: n + 1, "critic.forward_micro_batch_size_per_gpu": 1}
    refused(compare(several, by_rows, "train.jsonl"), f"{size}={n + 1}", f"n + 3 = {n + 3} answers", checks=tokens)
    (one,) = check.run_checks(compare(several, {**short, "gad.teacher_answers": "one"}), tokens)
    assert one.level == "ok"

    for answer in ("a", ["a"]):
        single = [{"content": USER, "teacher_response": answer}] * 8
        refused(compare(single, {}), "gad.teacher_answers=all", "no row of data.train_files has several", "=one, or")
    refused(compare(several, {"gad.teacher_answers": "both"}), "gad.teacher_answers=both", "expected one or all")
    refused(compare(several, {"gad.credit": "token"}), "gad.credit=token", "gad.teacher_answers=all has several")
    refused(compare(several, {"gad.replay": 0.5}), "gad.replay=0.5 keeps one", "or gad.replay=0")
    seqkd = {"gad.stage": "seqkd", "critic.enable": False}
    refused(compare(several, seqkd), "gad.teacher_answers=all: stage seqkd trains no discriminator")
    (unreadable,) = check.run_checks(data(None, "no.parquet", {"gad.teacher_answers": "all"}), [check.check_tokens])
    assert unreadable.level == "ok", "check_data reports the file"


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_answers_of_a_file_are_counted_once_until_it_changes(data, name, monkeypatch):
    read = []
    original = data_file._answers_by_row
    monkeypatch.setattr(data_file, "_answers_by_row", lambda file, keys: read.append(file) or original(file, keys))
    for answers in (["a", "b"], ["a", "b", "c"]):
        rows = [{"content": USER, "teacher_response": answers} for _ in range(8)]
        config = data(rows, name, {"gad.teacher_answers": "all"})
        assert check_config(config) == [] and compared_answers(config) == len(answers)
        assert len(read) == 1
        read.clear()


def test_teacher_answers_that_are_no_text(data):
    rows = [{"content": USER, "teacher_response": 5} for _ in range(8)]
    expect(data(rows), "row 0: column 'teacher_response' is of type int, not text (8 such rows)")
    expect(
        data([{"content": USER, "teacher_response": {"text": "x"}}] * 8), "a message without content (keys ['text'])"
    )


def problems_of(file: Path, lines: list[str], as_list: bool = False) -> str:
    """What the check says of a JSON file, written as lines or as one list; the reader of verl is asked too."""
    file.write_text("[" + ",".join(lines) + "]" if as_list else "\n".join(lines))
    rows, problems = data_file_problems(file, "content", "teacher_response")
    assert rows == len(lines) or problems
    try:
        loaded = datasets.load_dataset("json", data_files=str(file), cache_dir=str(file.parent / "cache"))["train"]
        kept = list(loaded) == [dict.fromkeys(loaded.column_names) | json.loads(line) for line in lines]
    except (datasets.exceptions.DatasetGenerationError, ValueError):
        kept = False
    assert kept == (not problems), "refused if and only if verl cannot read it, or changes it"
    return "\n".join(map(str, problems))


GOOD_LINE = json.dumps({"content": USER, "teacher_response": "a"})
BAD_JSON = {
    "surrogate": (r'"note": "half of \ud83d"', r"text that is not valid Unicode ('half of \ud83d'"),
    "surrogate in a key": (r'"\udc00": 1', "text that is not valid Unicode"),
    "integer": (f'"note": {{"a": {-(2**63) - 1}}}', "a number that does not fit into 64 bits"),
    "float": ('"note": 1e400', "a number that does not fit into 64 bits"),
    "depth": (f'"note": {"[" * 63 + "]" * 63}', "values that are nested more than 63 levels deep"),
    "key": ('"a": [{"b": 1, "b": 2}]', "an object with the same key twice (keys: b)"),
}


@pytest.mark.parametrize(("more", "expected"), BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_verls_reader_fails_on_or_changes(tmp_path, more, expected):
    assert f"row 1 holds {expected}" in problems_of(tmp_path / "t.jsonl", [GOOD_LINE, f"{GOOD_LINE[:-1]}, {more}}}"])


@pytest.mark.parametrize("as_list", [False, True])
def test_json_that_verls_reader_keeps(tmp_path, as_list):
    deep = "[" * 61 + "]" * 61
    more = f'"note": "\\u0000 😀", "deep": [{deep}], "number": {2**63 - 1}, "real": -1e308, "extra_info": null'
    lines = [GOOD_LINE, f"{GOOD_LINE[:-1]}, {more}}}", f'{GOOD_LINE[:-1]}, "reward_model": {{"ground_truth": "2"}}}}']
    assert problems_of(tmp_path / "t.json", lines, as_list) == ""


def test_a_json_column_of_dates_is_refused(tmp_path):
    def told(prompts, answers):
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows = [{"content": m, "teacher_response": answer} for m, answer in zip(messages, answers, strict=True)]
        return problems_of(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", [json.dumps(row) for row in rows])

    texts, days = ["a"] * 4, ["2026-01-02", "2026-01-02 10:30:00", "2026-01-02T10:30Z", "2026-01-02 10+01:00"]
    assert "column 'teacher_response' holds only dates" in told(texts, days)
    assert "column 'content' holds only dates" in told(days, texts)
    assert "column 'teacher_response' holds only dates" in told(texts, [[day, day] for day in days])
    assert told(texts, [*days[:3], "on 2026-01-02"]) == told(texts, ["2026", "20260102", "10:30", "02.01.2026"]) == ""


def test_columns_that_verl_reads_as_objects(tmp_path):
    rows, lines, table = rows_with({}), tmp_path / "t.jsonl", tmp_path / "t.parquet"
    for key in ("extra_info", "reward_model"):
        for value, fine in (("x", False), ([1], False), (None, True), ({"index": 1}, True)):
            lines.write_text("\n".join(json.dumps({**row, key: value}) for row in rows))
            pq.write_table(pa.Table.from_pylist([{**row, key: value} for row in rows]), table)
            mixed = pa.array([json.dumps(value)] * len(rows), pa.json_())  # as datasets writes a column of mixed types
            as_json = pa.Table.from_pylist(rows).append_column(key, mixed)
            pq.write_table(as_json, tmp_path / "j.parquet")
            for file in (lines, table, tmp_path / "j.parquet"):
                problems = [*map(str, data_file_problems(file, "content", "teacher_response")[1])]
                assert [f"column {key!r}" in problem for problem in problems] == [True] * (not fine), problems
                unlabelled = data_file_problems(file, "content", None)[1]  # they get a reward_model of ours
                assert len(unlabelled) == (not fine and key == "extra_info")


def test_parquet_columns_that_verls_reader_does_not_know(tmp_path):
    def told(column, name="note"):
        table = pa.Table.from_pylist(rows_with({})[:2]).append_column(name, pa.array([column] * 2, kinds.get(name)))
        pq.write_table(table, file := tmp_path / "t.parquet")
        return "".join(map(str, data_file_problems(file, "content", "teacher_response")[1]))

    kinds = {"map": pa.map_(pa.string(), pa.int64()), "view": pa.list_view(pa.int64()), "text": pa.string_view()}
    kinds["inner"] = pa.list_(pa.struct([("a", kinds["map"])]))
    for name, value in (("map", [("a", 1)]), ("view", [1]), ("inner", [{"a": [("b", 1)]}])):
        assert f"column {name!r} holds " in told(value, name)
    assert "has two columns 'content'" in told("x", "content")
    assert told("x", "text") == told([{"a": [1.5, None]}]) == told(b"x") == ""


def test_files_whose_columns_have_different_types(data, tmp_path):
    def joined(**second):
        first = data([{**row, "id": 1, "note": {"a": "x"}} for row in rows_with({})])
        pq.write_table(pa.Table.from_pylist([{**row, **second} for row in rows_with({})]), tmp_path / "b.parquet")
        OmegaConf.update(first, "data.train_files", [first.data.train_files, f"{tmp_path}/b.parquet"])
        return first

    expect(
        joined(id="1"), "data.train_files: verl cannot join ", "b.parquet: The features", "the key id has unexpected"
    )
    assert errors_of(joined(id=2, note={"a": "y", "b": 1}, more="z")) == errors_of(joined()) == []


def test_prompts_that_are_no_messages(data):
    expect(
        data([{"content": "c a f", "teacher_response": "x"}] * 8), "row 0: column 'content' is of type str, not a list"
    )
    expect(data([{"content": ["c"], "teacher_response": "x"}] * 8), "row 0", "(number 0) of type str")
    expect(data([{"content": [{"text": "c"}], "teacher_response": "x"}] * 8), "row 0", "(number 0) without role")
    for value, kind in ((5, "int"), ({"text": "c"}, "dict"), (float("inf"), "float")):
        rows = rows_with({"content": [*USER, {"role": "user", "content": value}]})
        expect(
            data(rows, "train.jsonl"), "row 3: column 'content'", f"(number 1) with content of type {kind}, not text"
        )
    rows = rows_with({"content": [{"role": 5, "content": "c"}, *USER]})
    expect(data(rows, "train.jsonl"), "row 3: column 'content'", "(number 0) with role of type int, not text")


def test_prompts_may_end_with_a_tool_message_and_hold_parts(data):
    tool = [*USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]
    assert errors_of(data(rows_with({"content": tool}))) == []
    parts = [{"role": "user", "content": [{"type": "text", "text": "c a f"}]}]
    assert errors_of(data([{"content": parts, "teacher_response": "x"}] * 8)) == []


def test_rows_are_counted_over_row_groups(data, tmp_path, monkeypatch):
    monkeypatch.setattr("recipe.gad.run.data_file.BATCH_ROWS", 3)
    expect(data(rows_with({"teacher_response": ""}, at=7)), "row 7: column 'teacher_response' is empty")


def test_a_file_that_breaks_off_in_its_data(data, tmp_path):
    rows = rows_with({})
    data(rows)
    raw = bytearray((tmp_path / "train.parquet").read_bytes())
    raw[4:60] = b"\xff" * 56  # the first pages; the footer stays readable
    expect(data(bytes(raw)), "train.parquet: is not a readable parquet file")


def test_json_lines(data):
    expect(data(b'{"content": 1,\n', "train.jsonl"), "train.jsonl: row 0 is not valid JSON")
    expect(data(b"[1, 2]", "train.json"), "train.json: row 0 is of type int, not an object")
    assert errors_of(data(json.dumps(rows_with({})).encode(), "train.json")) == []
    expect(data(b"x", "train.csv"), "unknown ending '.csv'", ".parquet, .json or .jsonl")


def test_validation_files_and_lists_of_files(data, config, tiny_problem, tmp_path):
    good = str(tiny_problem / "train.parquet")
    data(rows_with({"teacher_response": ""}), "bad.parquet")
    expect(config({"data.val_files": [good, str(tmp_path / "bad.parquet")]}), "data.val_files", "bad.parquet, row 3")
    expect(config({"data.val_files": None}), "data.val_files=None: no file")
    expect(config({"data.val_files": str(tmp_path)}), "is a folder")


def test_home_folder_is_not_expanded_by_verl(config, tiny_problem, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_problem))
    expect(config({"data.val_files": "~/val.parquet"}), "does not expand ~", f"Fix: {tiny_problem}/val.parquet")


def test_data_keys(config):
    expect(config({"data.teacher_key": None}), "data.teacher_key=null", "Fix: data.teacher_key=teacher_response")
    expect(config({"data.truncation": "middle"}), "data.truncation=middle", "error, left or right")


def test_too_few_rows_for_one_step(config, data):
    rows = [{"content": USER, "teacher_response": "x"}] * 5
    expect(data(rows), "data.train_batch_size=8", "5 rows", "Fix: data.train_batch_size=5 or less")
    expect(config({"data.train_max_samples": 4}), "data.train_batch_size=8", "4 rows")


def test_the_epochs_hold_all_steps_of_the_run(config):
    steps, epochs = "trainer.total_training_steps", "trainer.total_epochs"
    assert errors_of(config({steps: 16, epochs: 2})) == []  # 64 rows, 8 a step
    assert errors_of(config({steps: None, epochs: 2})) == []
    expect(
        config({steps: 17, epochs: 2}),
        f"{steps}=17, but {epochs}=2 of 8 steps",
        "end the run after step 16, without the checkpoint",
        f"Fix: {epochs}=3, or {steps}=16",
    )
    fewer = {steps: 16, epochs: 2, "data.train_max_samples": 56}
    expect(config(fewer), f"{epochs}=2 of 7 steps", f"Fix: {epochs}=3, or {steps}=14")


def test_large_files_are_read_in_seconds(tmp_path):
    size = 50_000
    table = pa.table({"content": [USER] * size, "teacher_response": ["well c a f " * 20] * size, "other": ["x"] * size})
    pq.write_table(table, tmp_path / "large.parquet")
    start = time.perf_counter()
    assert check_data_file(tmp_path / "large.parquet", "content", "teacher_response") == size
    assert time.perf_counter() - start < 10


def test_teacher_text():
    assert teacher_text("a") == "a" and teacher_text({"role": "assistant", "content": "b"}) == "b"
    with pytest.raises(ValueError, match="is empty"):
        teacher_text("")


def test_check_data_file_without_teacher(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"prompt": USER}]), tmp_path / "plain.parquet")
    assert check_data_file(tmp_path / "plain.parquet", "prompt", None) == 1
    with pytest.raises(ValueError, match=r"plain.parquet: has no column 'content' and 'teacher_response'"):
        check_data_file(tmp_path / "plain.parquet", "content", "teacher_response")


# ---------------------------------------------------------------------- models and tokenizers


@pytest.mark.parametrize("path", ["/no/such/folder", "./no_such", "~/no_such", "no_such", "a/b/c"])
def test_model_folders_that_do_not_exist(config, path):
    expect(config({f"{MODEL}.path": path}), f"{MODEL}.path={path}: no such folder", "organisation/name")


def test_a_model_folder_without_config(config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("")
    expect(config({"critic.model.path": str(tmp_path / "model")}), "critic.model.path", "no config.json", "notes.txt")


def test_a_model_with_broken_weights(config, critic, tmp_path):
    shutil.copytree(critic, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    expect(
        config({"critic.model.path": str(tmp_path / "model")}), "critic.model.path", "is truncated", "save the model"
    )
    weights.unlink()
    expect(config({"critic.model.path": str(tmp_path / "model")}), "holds no weights")


def test_paths_that_verl_does_not_take(config, tiny_problem, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_problem))
    exact = f"Fix: {MODEL}.path={tiny_problem}/model"
    for path in ("~/model", f"{tiny_problem}/model/"):
        expect(config({f"{MODEL}.path": path}), f"{MODEL}.path={path}", exact)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"architectures": ["LlamaModel"]}, "architectures=['LlamaModel'], and verl saves one class"),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"]}, "it is an encoder-decoder"),
        ({"model_type": "of_tomorrow"}, "transformers cannot build this model"),
        (
            {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "num_key_value_heads": None},
            "verl reads num_key_value_heads of its configuration",
        ),
    ],
)
def test_a_model_that_cannot_be_a_discriminator(config, critic, tmp_path, setting, reason):
    shutil.copytree(critic, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    expect(config({"critic.model.path": str(tmp_path / "model")}), "critic.model.path", reason, "docs/models.md")


def test_a_student_that_verl_cannot_load(config, critic, tiny_problem, tmp_path):
    shutil.copytree(tiny_problem / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    setting = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "num_key_value_heads": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    path = f"{MODEL}.path={tmp_path / 'model'}"
    settings = {f"{MODEL}.path": str(tmp_path / "model"), "critic.model.path": str(critic)}
    expect(config(settings), path, "opt cannot be a student: verl reads num_key")


def test_hub_models(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub = config({f"{MODEL}.path": "some-org/some-model"})
    assert check_config(hub) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not in the Hugging Face cache" in warnings_of(hub)[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org").mkdir()
    (message,) = [message for message in warnings_of(hub) if "folder some-org" in message]
    assert "a model of the hub, as no such folder is here" in message and "Fix: correct the path" in message


def write_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)


def test_vocabularies_must_be_the_same(config, critic, tiny_problem, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(critic, other)
    changes = {"critic.model.path": str(other)}
    assert check_config(config(changes)) == []
    settings = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(settings, indent=1))
    assert check_config(config(changes)) == []  # other bytes, same vocabulary
    write_tokenizer(other, ["<unk>", "a", "b"])
    ours = len(json.loads((tiny_problem / "model" / "tokenizer.json").read_text())["model"]["vocab"])
    expect(config(changes), "critic.model.path", "another vocabulary", f"3 and {ours} tokens", "'<end>' 2 / None")
    (other / "tokenizer.json").write_text("{")
    expect(config(changes), str(other), "cannot be loaded", "Fix: copy or save it again")
    for file in other.glob("*token*"):
        file.unlink()
    (message,) = warnings_of(config(changes))
    assert "no local tokenizer to compare" in message


def test_tokenizer_paths(config, tmp_path):
    expect(config({f"{MODEL}.tokenizer_path": "/no/such"}), f"{MODEL}.tokenizer_path=/no/such: no such folder")
    write_tokenizer(tmp_path / "words", ["<unk>", "a"])
    expect(
        config({"critic.model.tokenizer_path": str(tmp_path / "words")}), "critic.model.tokenizer_path", "another vocab"
    )


def test_lora_on_the_discriminator(config):
    rank = {"critic.model.lora_rank": 8}
    assert errors_of(config(rank)) == []
    expect(
        config({"critic.model.lora.rank": 8}),
        "critic.model.lora.rank=8 is Megatron's key, and critic.strategy=fsdp2 reads critic.model.lora_rank",
        "Fix: critic.model.lora_rank=8 critic.model.lora.rank=0",
    )
    text = "\n".join(errors_of(config({**rank, "critic.strategy": "megatron"})))
    assert (
        "critic.model: the LoRA rank is 8, and only FSDP trains adapters" in text and "critic.model.lora_rank=0" in text
    )
    expect(config({**rank, "critic.checkpoint.save_lora_only": True}), "save_lora_only=True would leave the trained")
    expect(config({**rank, "critic.model.lora_adapter_path": "/a"}), "critic.model.lora_adapter_path=/a: the adapters")
    seqkd = {"gad.stage": "seqkd", "critic.enable": False}
    assert errors_of(config({"critic.model.lora.rank": 8, **seqkd})) == []


# ---------------------------------------------------------------------- stage and sampling


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gad.stage": "sft"}, ["gad.stage=sft", "seqkd, warmup, gad"]),
        ({"gad.actor_objective": "ppo"}, ["gad.actor_objective=ppo", "policy_gradient or imitation"]),
        ({"critic.enable": False}, ["critic.enable=False", "critic.enable=True"]),
        ({"critic.enable": None}, ["critic.enable=None", "critic.enable=True"]),
        ({"gad.stage": "seqkd"}, ["critic.enable=True", "Fix: critic.enable=False"]),
        (
            {"gad.stage": "seqkd", "critic.enable": False, "gad.actor_objective": "policy_gradient"},
            ["gad.actor_objective=policy_gradient", "seqkd only imitates"],
        ),
        ({"trainer.v1.trainer_mode": "sync"}, ["trainer.v1.trainer_mode=sync", "trainer.v1.trainer_mode=gad"]),
        ({"trainer.use_v1": False}, ["trainer.use_v1=False"]),
        ({"gad.poll_interval": 0}, ["gad.poll_interval=0"]),
        ({f"{ROLLOUT}.temperature": 0}, [f"{ROLLOUT}.temperature=0", "the same text"]),
        ({f"{ROLLOUT}.temperature": -1}, [f"{ROLLOUT}.temperature=-1", "above 0"]),
        ({f"{ROLLOUT}.temperature": None}, [f"{ROLLOUT}.temperature=None", "above 0"]),
        ({"gad.step_timeout": -5}, ["gad.step_timeout=-5", "null"]),
        ({"gad.stop_after_bad_steps": -1}, ["gad.stop_after_bad_steps=-1", "at least 0"]),
        ({"algorithm.filter_groups.enable": True}, ["algorithm.filter_groups.enable=True", "expected False"]),
    ],
)
def test_stage_and_sampling(config, changes, parts):
    expect(config(changes), *parts)


def test_grpo_needs_two_samples(config, critic):
    stage = {"gad.stage": "gad", "gad.actor_objective": "policy_gradient", "critic.model.path": str(critic)}
    expect(config({**stage, f"{ROLLOUT}.n": 1}), f"{ROLLOUT}.n=1", "at least 2")
    assert errors_of(config({f"{ROLLOUT}.n": 1, f"{ROLLOUT}.temperature": 0})) == []  # imitation compares nothing


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gad.imitation_coef": -0.1}, ["gad.imitation_coef=-0.1", "at least 0"]),
        ({"gad.imitation_coef": True}, ["gad.imitation_coef=True", "a number"]),
        ({"gad.imitation_coef": "1"}, ["gad.imitation_coef=1", "a number"]),
        ({"gad.imitation_coef": float("inf")}, ["gad.imitation_coef=inf", "a number"]),
        (
            {"gad.imitation_coef": 0.1, f"{MODEL}.use_fused_kernels": True},
            ["gad.imitation_coef=0.1", f"{MODEL}.use_fused_kernels=False", f"{ROLLOUT}.temperature=1.0"],
        ),
        (
            {"gad.imitation_coef": 0.1, f"{ACTOR}.fsdp2.router_replay.mode": "R2"},
            ["gad.imitation_coef=0.1", f"{ACTOR}.fsdp2.router_replay.mode=R2"],
        ),
        ({"gad.policy_gate": -1}, ["gad.policy_gate=-1", "at least 0"]),
        ({"gad.credit": "word"}, ["gad.credit=word", "sequence or token"]),
        ({"gad.credit_gamma": 1.5}, ["gad.credit_gamma=1.5", "from 0 to 1"]),
        (
            {"gad.credit": "token"},
            ["would ignore algorithm.norm_adv_by_std_in_grpo=True", "Fix: algorithm.norm_adv_by_std_in_grpo=False"],
        ),
        (
            {"gad.credit": "token", "algorithm.norm_adv_by_std_in_grpo": False, "gad.teacher_in_group": True},
            ["would ignore gad.teacher_in_group=True"],
        ),
        (
            {"gad.credit": "token", "algorithm.norm_adv_by_std_in_grpo": False, "algorithm.adv_estimator": "rloo"},
            ["would ignore algorithm.adv_estimator=rloo"],
        ),
        ({"gad.teacher_in_group": "yes"}, ["gad.teacher_in_group=yes", "True or False"]),
        (
            {"gad.teacher_in_group": True, "algorithm.adv_estimator": "rloo"},
            ["gad.teacher_in_group=True", "algorithm.adv_estimator=rloo", "Fix: algorithm.adv_estimator=grpo"],
        ),
        (
            {"gad.teacher_in_group": True, "algorithm.use_kl_in_reward": True},
            ["gad.teacher_in_group=True", "algorithm.use_kl_in_reward=True"],
        ),
    ],
)
def test_variants_of_the_objective(gad, changes, parts):
    expect(gad(changes), *parts)


@pytest.mark.parametrize(
    ("key", "value"), [("gad.imitation_coef", 1), ("gad.teacher_in_group", True), ("gad.policy_gate", 0.1)]
)
def test_variants_of_the_objective_are_refused_where_nothing_reads_them(config, key, value):
    expect(config({key: value}), f"{key}={value}", "gad.actor_objective=imitation", f"Fix: {key}=")
    expect(config({key: value, "gad.stage": "seqkd", "critic.enable": False}), f"{key}={value}", f"Fix: {key}=")


@pytest.mark.parametrize("key", [f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward"])
def test_imitation_refuses_a_kl_term_that_it_would_not_compute(config, gad, key):
    expect(config({key: True}), f"{key}=True: imitation has no KL term", f"Fix: {key}=False")
    expect(config({key: True, "gad.stage": "seqkd", "critic.enable": False}), f"{key}=True: imitation")
    assert errors_of(gad({key: True})) == []


def test_credit_per_token_needs_a_discriminator(config):
    assert errors_of(config({"gad.credit": "token"})) == []  # the warmup's learns on prefixes
    expect(config({"gad.credit": "token", "gad.stage": "seqkd", "critic.enable": False}), "gad.credit=token", "seqkd")


def test_variants_of_the_objective_that_fit(gad):
    assert errors_of(gad({"algorithm.norm_adv_by_std_in_grpo": False})) == []
    assert errors_of(gad({"gad.credit": "token", "algorithm.norm_adv_by_std_in_grpo": False})) == []
    assert errors_of(gad({"gad.imitation_coef": 0.1, "gad.teacher_in_group": True, "gad.policy_gate": 0.1})) == []
    assert errors_of(gad({"gad.policy_gate": 0.1, f"{MODEL}.use_fused_kernels": True})) == []
    fused = {f"{MODEL}.use_fused_kernels": True, f"{ROLLOUT}.temperature": 1.0}
    assert errors_of(gad({"gad.imitation_coef": 0.1, "gad.teacher_in_group": True, **fused})) == []


def test_the_gad_stage_needs_a_trained_head(config, critic, tmp_path):
    stage = {"gad.stage": "gad", "gad.actor_objective": "policy_gradient"}
    expect(config(stage), "critic.model.path", "no score head", "critic/huggingface", "--warmup_dir")
    folder = tmp_path / "run"
    claim_folder(folder, "gad")
    for role in ("actor", "critic"):
        (folder / "global_step_5" / role).mkdir(parents=True)
    (folder / "global_step_5" / "data.pt").write_bytes(b"")
    (folder / TRACKER).write_text("5")
    expect(config(stage), "no score head")  # a resumed run too
    assert errors_of(config({**stage, "critic.model.path": str(critic)})) == []


def test_warnings(config):
    (message,) = warnings_of(config({"gad.actor_objective": "policy_gradient"}))
    assert "gad.actor_objective=policy_gradient in stage warmup: the paper uses imitation" in message
    seqkd = {"gad.stage": "seqkd", "critic.enable": False, "trainer.rollout_data_dir": "/tmp/rollouts"}
    (message,) = warnings_of(config(seqkd))
    assert "trainer.rollout_data_dir=/tmp/rollouts" in message and "no file" in message
    (message,) = warnings_of(config({"trainer.save_freq": -1}))
    assert "trainer.save_freq=-1" in message
    (message,) = warnings_of(config({"critic.checkpoint.save_contents": ["model"]}))
    assert "critic.checkpoint.save_contents lacks hf_model" in message
    rows = pq.read_metadata(config().data.train_files).num_rows
    epochs = {"data.train_batch_size": rows // 3, "trainer.total_epochs": 2}
    (message,) = warnings_of(config({**epochs, "trainer.critic_warmup": 7}))
    assert "the run has 6 steps, and trainer.critic_warmup=7: only the discriminator trains" in message
    assert warnings_of(config({**epochs, "trainer.critic_warmup": 6})) == [], "the student trains in the last step"
    train = config().data.train_files
    (message,) = warnings_of(config({"data.val_files": [train]}))
    assert f"data.val_files names a file of data.train_files ({train})" in message
    assert warnings_of(config({"data.val_files": train, **NO_VALIDATION})) == []


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {f"{ACTOR}.ppo_mini_batch_size": 3, "trainer.n_gpus_per_node": 1},
            [f"{ACTOR}.ppo_mini_batch_size=3", "data.train_batch_size=8", "Fix: data.train_batch_size=6 or 9"],
        ),
        (
            {"critic.ppo_mini_batch_size": 16},
            ["critic.ppo_mini_batch_size=16", "Fix: data.train_batch_size=16, or critic.ppo_mini_batch_size=8"],
        ),
        (
            {"critic.ppo_mini_batch_size": 4},
            ["critic.ppo_mini_batch_size=4", "8 data-parallel ranks", "Fix: critic.ppo_mini_batch_size=8"],
        ),
        (
            {f"{ACTOR}.ppo_mini_batch_size": 20, "data.train_batch_size": 40},
            [f"{ACTOR}.ppo_mini_batch_size=20", "8 data-parallel ranks", "16 or 24", "=32 or 48, or 5 GPUs"],
        ),
        ({f"{ROLLOUT}.tensor_model_parallel_size": 3}, [f"{ROLLOUT}.tensor_model_parallel_size=3", "1 or 2 or 4 or 8"]),
        (
            {f"{ACTOR}.ulysses_sequence_parallel_size": 3},
            [ACTOR, "takes 3 GPUs", "does not divide the 8", "6 or 9 GPUs"],
        ),
    ],
)
def test_batch_arithmetic(gpu, changes, parts):
    expect(gpu(changes), *parts)


def test_sequence_parallelism_lowers_the_number_of_ranks(gpu):
    small = {"data.train_batch_size": 4}
    assert len(errors_of(gpu(small))) == 2  # actor and critic
    expect(gpu({**small, f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": 2}), "critic.ppo_mini_batch_size=4")
    sequence = {
        f"{ACTOR}.ulysses_sequence_parallel_size": 2,
        "critic.fsdp.ulysses_sequence_parallel_size": 2,
    }
    assert errors_of(gpu({**small, **sequence})) == []
    (message,) = warnings_of(gpu({"critic.ulysses_sequence_parallel_size": 2}))
    assert "is not read by verl" in message


def test_megatron_ranks(gpu):
    megatron = {
        f"{role}.{key}": value
        for role in (ACTOR, "critic")
        for key, value in {
            "strategy": "megatron",
            "megatron.tensor_model_parallel_size": 2,
            "megatron.pipeline_model_parallel_size": 2,
            "megatron.context_parallel_size": 1,
        }.items()
    }
    assert errors_of(gpu({**megatron, "data.train_batch_size": 2})) == []
    messages = errors_of(gpu({**megatron, "data.train_batch_size": 3}))
    assert len(messages) == 2 and all(
        "2 data-parallel ranks" in message and "2 or 4" in message for message in messages
    )


# ---------------------------------------------------------------------- token limits


@pytest.mark.parametrize(
    ("key", "needed"),
    [
        ("critic.ppo_max_token_len_per_gpu", 5 * 28),
        ("critic.forward_max_token_len_per_gpu", 28),
        (f"{ACTOR}.ppo_max_token_len_per_gpu", 28),
        (f"{ROLLOUT}.log_prob_max_token_len_per_gpu", 28),
        ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu", 28),
        (f"{ROLLOUT}.max_model_len", 28),
    ],
)
def test_token_limits(gad, key, needed):
    followers = {  # keys that follow the one under test by default, and a reference
        "critic.forward_max_token_len_per_gpu": 1000,
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 1000,
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": 1000,
        f"{ACTOR}.use_kl_loss": True,
    }
    assert errors_of(gad({**followers, key: needed})) == []
    expect(gad({**followers, key: needed - 1}), f"{key}={needed - 1}", f"= {needed} tokens", f"Fix: {key}={needed}")


def test_the_paper_barely_fits_the_default(gpu):
    paper = {"data.max_prompt_length": 2048, "data.max_response_length": 1536, f"{ROLLOUT}.n": 8}
    assert errors_of(gpu(paper)) == []
    expect(gpu({**paper, f"{ROLLOUT}.n": 9}), "critic.ppo_max_token_len_per_gpu=32768", "(n + 1) x", "35840 or more")
    shared = {"critic.fsdp.ulysses_sequence_parallel_size": 2}
    assert errors_of(gpu({**paper, **shared, f"{ROLLOUT}.n": 9})) == []
    expect(gpu({**paper, **shared, f"{ROLLOUT}.n": 20}), "32768 x 2 GPUs", "75264", "37632 or more")


def test_the_reference_counts_only_when_it_runs(gad):
    key = "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
    assert errors_of(gad({key: 1, f"{ACTOR}.use_kl_loss": False})) == []


def test_fixed_micro_batches(gad):
    fixed = {
        f"{ACTOR}.use_kl_loss": True,
        f"{ACTOR}.use_dynamic_bsz": False,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 2,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 2,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 2,
        "critic.ppo_micro_batch_size_per_gpu": 5,
    }
    assert errors_of(gad(fixed)) == []
    small = {**fixed, "critic.ppo_micro_batch_size_per_gpu": 4}
    expect(
        gad(small),
        "critic.ppo_micro_batch_size_per_gpu=4",
        "never split",
        "Fix: critic.ppo_micro_batch_size_per_gpu=5",
    )
    for key in list(fixed)[2:5]:
        expect(gad({**fixed, key: None}), f"{key}=None")
    expect(gad({**fixed, f"{ROLLOUT}.log_prob_use_dynamic_bsz": True}), "log_prob_use_dynamic_bsz", "must equal")


# ---------------------------------------------------------------------- output folder


def test_output_folder(config, tmp_path):
    folder = tmp_path / "run"
    (folder / "global_step_5").mkdir(parents=True)
    expect(config(), str(folder), "of an unknown run", "trainer.default_local_dir")
    (folder / "gad_stage.json").write_text('{"stage": "seqkd"}')
    for mode in ("auto", "disable"):
        expect(config({"trainer.resume_mode": mode}), "of stage seqkd, and this run is of stage warmup")
    (folder / "gad_stage.json").write_text('{"stage": "warmup"}')
    (folder / TRACKER).write_text("5")
    expect(config(), "names step 5, which is not complete", "actor is missing", "Fix: delete")
    assert errors_of(config({"trainer.resume_mode": "disable"})) == []
    expect(config({"trainer.resume_mode": "always"}), "trainer.resume_mode=always", "auto, disable or resume_path")
    expect(config({"trainer.default_local_dir": "~/run"}), "does not expand ~")


def test_a_resumed_run_keeps_the_models_that_it_started_from(config, critic, tmp_path):
    first, newer = (shutil.copytree(critic, tmp_path / name) for name in ("global_step_50", "global_step_60"))
    tensors = load_file(newer / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].size)
    save_file({**tensors, name: tensors[name] * np.float32(1.0001)}, newer / "model.safetensors")  # one training step

    def run(actor, discriminator=first, **changes):
        models = {f"{MODEL}.path": str(actor), "critic.model.path": str(discriminator)}
        return config({"gad.stage": "gad", "gad.actor_objective": "policy_gradient", **models, **changes})

    assert errors_of(run(first)) == []
    check.claim_output(run(first))
    assert errors_of(run(newer)) == [], "nothing has been saved yet"
    folder = tmp_path / "run"
    for role in ("actor", "critic"):
        (folder / "global_step_5" / role).mkdir(parents=True)
    (folder / "global_step_5" / "data.pt").write_bytes(b"")
    (folder / TRACKER).write_text("5")
    assert errors_of(run(first)) == []
    expect(run(newer), f"started from the actor {first} (", f"this command names {newer} (", "--resume_step")
    expect(run(first, newer), f"started from the critic {first} (", f"this command names {newer} (")
    path = {"trainer.resume_mode": "resume_path", "trainer.resume_from_path": str(folder / "global_step_5")}
    expect(run(newer, **path, **{"trainer.default_local_dir": str(tmp_path / "other")}), f"names {newer}")
    assert errors_of(run(newer, **{"trainer.resume_mode": "disable"})) == []
    moved = first.rename(tmp_path / "moved")  # the same model under another name
    assert errors_of(run(moved, moved)) == []
    shutil.copytree(newer, first)  # another model under the same name
    expect(run(first, moved), f"started from the actor {first} (", f"this command names {first} (")


def test_resume_from_a_path(config, tmp_path):
    mode = {"trainer.resume_mode": "resume_path"}
    key = "trainer.resume_from_path"
    step = tmp_path / "earlier" / "global_step_5"
    expect(config(mode), f"{key}=None", "global_step_N")
    expect(config({**mode, key: str(step)}), "no such folder")
    for role in ("actor", "critic"):
        (step / role).mkdir(parents=True)
    expect(config({**mode, key: str(step)}), "is not complete", "data.pt is missing")
    (step / "data.pt").write_bytes(b"")
    assert errors_of(config({**mode, key: str(step)})) == []
    for role in ("actor", "critic"):
        for rank in range(2):
            (step / role / f"model_world_size_2_rank_{rank}.pt").write_bytes(b"")
    expect(config({**mode, key: str(step)}), "2 workers saved", "this run has 1")
    (step.parent / "gad_stage.json").write_text('{"stage": "gad"}')
    expect(config({**mode, key: str(step)}), "is of stage gad, and this run is of stage warmup")


# ---------------------------------------------------------------------- Ray


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, 1 + 1 + 3 + 1),
        ({"transfer_queue.backend.SimpleStorage.num_data_storage_units": 8}, 1 + 8 + 3 + 1),
        ({"trainer.n_gpus_per_node": 8, "trainer.nnodes": 2}, 1 + 1 + 48 + 1),
        ({"transfer_queue.backend.storage_backend": "MooncakeStore"}, 1 + 3 + 1),
        ({"reward.reward_manager.name": "remote", "reward.num_workers": 4}, 1 + 1 + 3 + 16 + 1),
        (
            {
                "reward.reward_model.enable_resource_pool": True,
                "reward.reward_model.nnodes": 1,
                "reward.reward_model.n_gpus_per_node": 2,
            },
            1 + 1 + 9 + 1,
        ),
    ],
)
def test_required_ray_cpus(config, changes, needed):
    assert required_ray_cpus(config(changes)) == needed


def test_too_few_ray_cpus(config, monkeypatch):
    units = {"transfer_queue.backend.SimpleStorage.num_data_storage_units": 8}
    few = config({**units, "ray_kwargs.ray_init.num_cpus": 12})
    expect(few, "12 logical CPUs", "needs 13", "ray_kwargs.ray_init.num_cpus=13", "num_data_storage_units (now 8)")
    assert errors_of(config({**units, "ray_kwargs.ray_init.num_cpus": 13})) == []
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(check, "RAY_STARTED", Path("/nowhere"))
    expect(config({"ray_kwargs.ray_init.num_cpus": None}), "4 logical CPUs", "this machine's cores", "needs 6")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert errors_of(few) == []


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({f"{ROLLOUT}.name": "vllm"}, [f"{ROLLOUT}.name=vllm", f"Fix: {ROLLOUT}.name=hf"]),
        ({"critic.strategy": "fsdp"}, ["critic.strategy=fsdp", "Fix: critic.strategy=fsdp2"]),
        ({"actor_rollout_ref.ref.strategy": "fsdp"}, ["ref.strategy=fsdp", "ref.strategy=fsdp2"]),
        (
            {"critic.model.override_config": {"attn_implementation": "flash_attention_2"}},
            ["critic.model.override_config.attn_implementation", "=sdpa"],
        ),
        (
            {"critic.model.override_config.attn_implementation": None},
            ["critic.model.override_config.attn_implementation", "=sdpa"],
        ),
        ({"ray_kwargs.ray_init.num_gpus": 0}, ["ray_kwargs.ray_init.num_gpus=0", "++ray_kwargs.ray_init.num_gpus=1"]),
        ({f"{MODEL}.lora_rank": 8}, [f"{MODEL}.lora.merge=False", f"Fix: {MODEL}.lora.merge=True"]),
    ],
)
def test_cpu_runs(config, changes, parts):
    expect(config(changes), *parts)


def test_lora_that_is_merged(config):
    assert errors_of(config({f"{MODEL}.lora_rank": 8, f"{MODEL}.lora.merge": True})) == []
    changes = {f"{MODEL}.lora.rank": 8, f"{MODEL}.lora.merge": True}
    expect(config(changes), f"{MODEL}.lora.rank=8 is Megatron's key", f"Fix: {MODEL}.lora_rank=8 {MODEL}.lora.rank=0")


@pytest.mark.parametrize("rollout", ["vllm", "sglang"])
def test_adapters_that_would_not_reach_the_rollout_engine(gpu, monkeypatch, rollout):
    changes = {f"{ROLLOUT}.name": rollout, f"{MODEL}.lora_rank": 8, f"{ACTOR}.strategy": "fsdp"}
    real = importlib.metadata.version
    monkeypatch.setattr(check, "version", lambda name: "0.21.0" if name == "peft" else real(name))
    fix = f"Fix: {MODEL}.lora.merge=True, or {ACTOR}.strategy=fsdp2"
    expect(gpu(changes), f"{MODEL}.lora.merge=False", f"{ACTOR}.strategy=fsdp", "peft 0.21.0", fix)
    assert errors_of(gpu(changes | {f"{MODEL}.lora.merge": True})) == []
    assert errors_of(gpu(changes | {f"{ACTOR}.strategy": "fsdp2"})) == []
    monkeypatch.setattr(check, "version", lambda name: "0.20.0" if name == "peft" else real(name))
    assert errors_of(gpu(changes)) == []


def test_what_this_peft_sends_under_fsdp1():
    """The first bad release is right about the installed one."""
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    from verl.utils.fsdp_utils import collect_lora_params, get_fsdp_wrap_policy

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        policy = get_fsdp_wrap_policy(adapted, is_lora=True)
        sharded = FullyShardedDataParallel(adapted, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        sent = collect_lora_params(sharded, layered_summon=False, base_sync_done=True)
    finally:
        dist.destroy_process_group()
    assert len(sent) == (0 if Version(importlib.metadata.version("peft")) >= check.PEFT_WITHOUT_FSDP1 else 2)


def test_environment(config, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    expect(config(), "CUDA_VISIBLE_DEVICES is the empty string", "unset CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    expect(config({"trainer.device": "cuda"}), "VERL_PLATFORM=cpu", "trainer.device=cuda")
    monkeypatch.delenv("VERL_PLATFORM")
    expect(config(), "VERL_PLATFORM=is not set", "export VERL_PLATFORM=cpu")


# ---------------------------------------------------------------------- imports


def test_importing_the_checks_imports_no_torch():
    script = "import sys, recipe.gad.run.checks; assert not {'torch', 'transformers', 'verl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


# ---------------------------------------------------------------------- variants of the discriminator


@pytest.fixture
def gad(config, critic):
    """Function: the configuration of a run of stage gad that passes, with keys changed."""
    stage = {"gad.stage": "gad", "gad.actor_objective": "policy_gradient", "critic.model.path": str(critic)}
    return lambda changes=None: config({**stage, **(changes or {})})


LEAD = "gad.discriminator_lead"
FRESH = "gad.fresh_discriminator"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({f"{LEAD}.max_steps": -1}, [f"{LEAD}.max_steps=-1", "whole number"]),
        ({f"{LEAD}.patience": 0}, [f"{LEAD}.patience=0"]),
        ({f"{LEAD}.min_delta": 1}, [f"{LEAD}.min_delta=1", "from 0 to below 1"]),
        ({"trainer.critic_warmup": 5}, ["trainer.critic_warmup=5", f"{LEAD}.max_steps=200", "both"]),
        # validations at 0, 50, 100 and 150 see four accuracies, enough for a patience of 3
        ({f"{LEAD}.max_steps": 150}, ["sees 3 accuracies", "one every 50 steps", f"Fix: {LEAD}.max_steps=151 or more"]),
        (
            {f"{LEAD}.max_steps": 40, "gad.val_d_acc": False},
            ["sees 3 accuracies", "one every 10 steps", f"{LEAD}.max_steps=41 or more", "trainer.critic_warmup=41"],
        ),
    ],
)
def test_a_lead_that_cannot_work_is_refused(gad, changes, parts):
    assert errors_of(gad({f"{LEAD}.max_steps": 200})) == []
    expect(gad({f"{LEAD}.max_steps": 200, **changes}), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gad.discriminator_ema": 1.0}, ["gad.discriminator_ema=1.0", "from 0 to below 1"]),
        ({"gad.actor_objective": "imitation"}, ["gad.discriminator_ema=0.9", "no actor follows"]),
    ],
)
def test_an_average_that_cannot_work_is_refused(gad, changes, parts):
    assert errors_of(gad({"gad.discriminator_ema": 0.9})) == []
    expect(gad({"gad.discriminator_ema": 0.9, **changes}), *parts)


def test_label_smoothing_is_below_one_half_and_for_a_discriminator(gad, config):
    key = "gad.label_smoothing"
    for value in (0, 0.0, 0.1, 0.49):
        assert errors_of(gad({key: value})) == []
    for value in (-0.1, 0.5, float("nan"), True, "0.1"):
        expect(gad({key: value}), f"{key}={value}", "from 0 to below 0.5", f"Fix: set {key}")
    for credit in ({"gad.credit": "token", "algorithm.norm_adv_by_std_in_grpo": False}, {"gad.replay": 0.5}):
        assert errors_of(gad({key: 0.1, **credit})) == []
    seqkd = {"gad.stage": "seqkd", "critic.enable": False, "gad.actor_objective": "imitation", key: 0.1}
    expect(config(seqkd), f"{key}=0.1", "stage seqkd trains no discriminator", f"Fix: {key}=0")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gad.val_d_acc": False}, ["needs the samples", "Fix: gad.val_d_acc=True, or"]),
        ({"trainer.test_freq": -1, "trainer.val_before_train": False}, ["trainer.test_freq=-1", "Fix: trainer.test_f"]),
        (
            {"data.val_max_samples": 1},
            ["validation has 1 different prompts", "data.val_max_samples=1", "need 2", "Fix: validate on more prompts"],
        ),
        ({f"{FRESH}.model": "/no/model"}, [f"{FRESH}: /no/model: no such folder", "Fix: pass a"]),
        ({f"{FRESH}.model": None, f"{FRESH}.lr": 0.1}, [f"{FRESH}.lr=0.1 has no effect", f"Fix: set {FRESH}.model"]),
        ({f"{FRESH}.lr": 0}, ["lr 0, 3 epochs", "above 0"]),
        ({f"{FRESH}.lr": "fast"}, [f"{FRESH}.lr=fast", "expected a number"]),
        ({f"{FRESH}.epochs": 0}, [f"{FRESH}.epochs=0", "at least 1"]),
        ({f"{FRESH}.batch_pairs": 1.5}, [f"{FRESH}.batch_pairs=1.5", "whole number"]),
        ({f"{FRESH}.seeds": [0, "x"]}, [f"{FRESH}.seeds=[0, 'x']", "whole numbers"]),
        ({f"{FRESH}.seeds": 3}, [f"{FRESH}.seeds=3", f"Fix: {FRESH}.seeds=[0,1,2]"]),
        ({f"{FRESH}.seeds": []}, ["at least one seed", "Fix: name one"]),
    ],
)
def test_fresh_discriminators_that_cannot_work_are_refused(gad, tiny_problem, changes, parts):
    on = {f"{FRESH}.model": f"{tiny_problem}/model"}
    assert errors_of(gad({**on, f"{FRESH}.seeds": [4], f"{FRESH}.lr": 1e-3})) == []
    expect(gad({**on, **changes}), *parts)


def test_fresh_discriminators_need_different_prompts_and_not_only_rows(gad, tiny_problem, tmp_path):
    rows = rows_with({})
    other = [{**rows[0], "content": [{"role": "user", "content": "f a c"}]}]
    files = [tmp_path / name for name in ("a.parquet", "b.jsonl", "c.parquet")]
    pq.write_table(pa.Table.from_pylist(rows), files[0])
    files[1].write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(other), files[2])
    names = [str(file) for file in files]

    def validating_on(chosen):
        return gad({f"{FRESH}.model": f"{tiny_problem}/model", "data.val_files": chosen})

    both = ", ".join(names[:2])
    expect(validating_on(names[:2]), "validation has 1 different prompts", both, "need 2", f"or {FRESH}.model=null")
    assert errors_of(validating_on(names)) == []
    expect(validating_on([*names[:2], "no.parquet"]), "data.val_files: no.parquet: no such file")


def test_fresh_discriminators_start_from_a_neutral_model_with_the_students_vocabulary(
    gad, config, critic, tiny_problem, tmp_path
):
    expect(gad({f"{FRESH}.model": str(critic)}), "has a score head", "not neutral", "Fix: pass a base model")
    other = shutil.copytree(tiny_problem / "model", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    expect(gad({f"{FRESH}.model": str(other)}), f"{FRESH}.model={other} has another vocabulary", first, second)
    seqkd = {"gad.stage": "seqkd", "critic.enable": False, "gad.actor_objective": "imitation"}
    what = "stage seqkd trains no discriminator"
    expect(config({**seqkd, f"{FRESH}.model": f"{tiny_problem}/model"}), what, "gad eval --two_sample_model")


def test_replay_that_cannot_work_is_refused(gad, config):
    assert errors_of(gad({"gad.replay": 0.5})) == []
    expect(gad({"gad.replay": -0.5}), "gad.replay=-0.5", "from 0 to below 10")
    expect(
        gad({"gad.replay": 0.05}),
        "8 prompts of an optimizer step",
        "are 0 earlier",
        "Fix: gad.replay=0.125",
    )
    mini = {"gad.replay": 0.5, "critic.ppo_mini_batch_size": 4, "gad.replay_capacity": 3}
    expect(gad(mini), "gad.replay_capacity=3", "the 4 prompts", "gad.replay_capacity=4 or more")
    (finding,) = check.check_replay(gad({"gad.replay": 1.25, "trainer.n_gpus_per_node": 4}))
    assert (
        "are 10 earlier prompts" in finding.what and "the 4 data-parallel" in finding.what and "1 or 1.5" in finding.fix
    )
    seqkd = {"gad.stage": "seqkd", "critic.enable": False, "gad.replay": 0.5}
    expect(config(seqkd), "gad.replay=0.5", "no discriminator")


def test_what_the_discriminator_reads_needs_one_that_judges_whole_answers(gad, config):
    token = {"gad.credit": "token", "algorithm.norm_adv_by_std_in_grpo": False}
    for key in ("gad.retokenize", "gad.shortcut_probe"):
        assert errors_of(gad({key: True})) == []
        expect(gad({key: 1.5}), f"{key}=1.5", "True or False")
        seqkd = {"gad.stage": "seqkd", "critic.enable": False, key: True}
        expect(config(seqkd), f"{key}=True", "stage seqkd trains no discriminator", f"Fix: {key}=False")
    expect(gad({**token, "gad.retokenize": True}), "gad.credit=token", "gad.retokenize=True", "gad.credit=sequence")
    assert errors_of(gad({**token, "gad.shortcut_probe": True})) == []


def test_an_answer_after_thinking_needs_an_end_of_the_thinking(gad, config, tiny_problem, tmp_path):
    span, end = "gad.score_span", "gad.think_end"
    answer = {span: "answer", end: "</think>"}
    assert errors_of(gad(answer)) == []
    expect(gad({span: "thinking"}), f"{span}=thinking", "all or answer")
    expect(gad({**answer, end: " "}), f"{end}=' '", f"{end}=null")
    expect(gad({end: "then"}), f"{end}=then", f"{span}=all would not read it")
    expect(gad({span: "answer"}), f"{tiny_problem}/model names no end", "</think> or <|channel|>", f"set {end}")
    seqkd = {"gad.stage": "seqkd", "critic.enable": False, **answer}
    expect(config(seqkd), f"{span}=answer", "stage seqkd trains no discriminator", f"Fix: {span}=all")
    token = {"gad.credit": "token", "algorithm.norm_adv_by_std_in_grpo": False}
    expect(gad({**answer, **token}), "gad.credit=token", f"{span}=answer")
    expect(gad({**answer, "gad.shortcut_probe": True}), "gad.shortcut_probe=True", f"{span}=answer")

    folder = tmp_path / "thinking"
    shutil.copytree(tiny_problem / "model", folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt and off %}<think></think>{% endif %}"
    )
    own = {span: "answer", f"{MODEL}.tokenizer_path": str(folder)}
    assert errors_of(gad(own)) == []
    expect(gad({**own, "data.apply_chat_template_kwargs": {"off": True}}), "already ends the thinking with </think>")
    custom = {span: "answer", f"{MODEL}.custom_chat_template": template + "{# <|channel|>final<|message|> #}"}
    assert errors_of(gad(custom)) == []


def test_a_student_that_begins_to_think_is_refused_unless_that_is_cut_out(config, tiny_problem):
    template = (tiny_problem / "model/chat_template.jinja").read_text()
    thinks = {f"{MODEL}.custom_chat_template": template + "{% if add_generation_prompt %}<think>{% endif %}"}
    what = "ends with '<think>', which an answer does not have: the student thinks before it answers"
    expect(config(thinks), what, f"{MODEL}.custom_chat_template", "gad.score_span=answer")
    assert errors_of(config({**thinks, "gad.score_span": "answer"})) == []
    seqkd = {"gad.stage": "seqkd", "critic.enable": False}
    expect(config({**seqkd, **thinks}), what)
    off = "{% if add_generation_prompt and enable_thinking is not false %}<think>{% endif %}"
    switched = {f"{MODEL}.custom_chat_template": template + off}
    expect(config(switched), "Fix: ++data.apply_chat_template_kwargs.enable_thinking=False; if")
    assert errors_of(config({**switched, "data.apply_chat_template_kwargs": {"enable_thinking": False}})) == []
    refusing = {f"{MODEL}.custom_chat_template": "{{ raise_exception('no') }}"}
    assert errors_of(config(refusing)) == [], "the doctor says so"


def test_teacher_answers_with_thinking_are_refused_where_only_the_students_is_cut(data, tiny_problem):
    span = "gad.score_span"
    answer = {span: "answer", "gad.think_end": "</think>"}
    bad, begun = {"teacher_response": "<think> c </think> well"}, {"teacher_response": "\n<think> c a f"}
    for name in ("train.parquet", "train.jsonl"):
        assert errors_of(data(rows_with({}), name, answer)) == []
        assert errors_of(data(rows_with(bad), name)) == []
        rows = rows_with(bad)
        rows[6] = {**rows[6], **bad}
        file = data(rows, name, answer)["data"]["train_files"]
        found = f"data.train_files: {file}, row 3: column 'teacher_response' has an answer that contains '</think>'"
        expect(data(rows, name, answer), found, "(2 such rows)", "gad prepare keeps", f"drop the row, or {span}=all")
        expect(data(rows_with(begun), name, answer), "row 3: column", "an answer that begins with '<think>'")
    mentioned = {"teacher_response": "well <think> c"}
    assert errors_of(data(rows_with(mentioned), changes=answer)) == []
    listed = [{**row, "teacher_response": ["well", row["teacher_response"]]} for row in rows_with(bad)]
    expect(data(listed, changes=answer), "row 3: column 'teacher_response' has an answer that contains")
    columns = [{"content": USER, "gpt": "well", "r1": row["teacher_response"]} for row in rows_with(bad)]
    config = data(columns, changes={**answer, "data.teacher_key": ["gpt", "r1"]})
    config.data.val_files = config.data.train_files
    expect(config, "data.train_files", "row 3: column 'r1' has an answer that contains")
    other = data(rows_with(bad), "val.parquet").data.train_files
    expect(data(rows_with({}), changes={**answer, "data.val_files": other}), f"data.val_files: {other}, row 3")

    template = (tiny_problem / "model/chat_template.jinja").read_text() + "{# [THINK] [/THINK] #}"
    named = {span: "answer", f"{MODEL}.custom_chat_template": template}
    expect(data(rows_with({"teacher_response": "c [/THINK] well"}), changes=named), "contains '[/THINK]'")
    expect(data(rows_with({"teacher_response": None}), changes=answer), "row 3: column 'teacher_response' is null")
    expect(data(None, "no.parquet", answer), "no.parquet: no such file")


def test_unlabelled_files_that_cannot_work_are_refused(gad, tmp_path):
    file, bad = tmp_path / "prompts.parquet", tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist([{"content": USER}] * 4), file)
    pq.write_table(pa.Table.from_pylist([{"content": None}, {"content": USER}]), bad)
    ratio, files = "gad.unlabelled_ratio", "gad.unlabelled_files"
    good = {ratio: 0.25, files: [str(file)]}
    assert errors_of(gad(good)) == []
    expect(gad({ratio: 0.25}), f"{files}=[]", f"{ratio}=0.25", "without the other")
    expect(gad({files: [str(file)]}), f"{ratio}=0.0", "without the other")
    expect(gad({**good, ratio: 1}), f"{ratio}=1", "from 0 to below 1")
    expect(gad({**good, ratio: 0.99}), "leaves 0 of data.train_batch_size=8", f"Fix: {ratio}=0.875")
    expect(gad({**good, "critic.ppo_mini_batch_size": 2}), "leaves 6", "a multiple of 4", f"{ratio}=0.5")
    expect(gad({**good, files: [str(bad)]}), f"{files}: {bad}", "row 0", "is null")
    expect(gad({**good, files: "missing.parquet"}), f"{files}: missing.parquet", "no such file")
    expect(gad({**good, "data.gen_batch_size": 4}), "data.gen_batch_size=4", "null")
    expect(gad({**good, "gad.actor_objective": "imitation"}), "gad.actor_objective=imitation")
    expect(gad({**good, "gad.imitation_coef": 0.2}), "gad.imitation_coef=0.2", "teacher answer", f"{files}=[]")


def test_an_average_needs_fsdp2(gad):
    (finding,) = check.check_average(gad({"gad.discriminator_ema": 0.9, "critic.strategy": "fsdp"}))
    assert "critic.strategy=fsdp:" in finding.what and finding.fix == "critic.strategy=fsdp2"


def test_a_lead_before_imitation_is_refused(config):
    expect(config({f"{LEAD}.max_steps": 200}), "gad.actor_objective=imitation", "trainer.critic_warmup=201")

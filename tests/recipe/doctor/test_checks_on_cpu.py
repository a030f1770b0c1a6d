"""recipe/gad/doctor/checks.py and recipe/gad/doctor/memory.py on real tiny models, tokenizers and data."""

import copy
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from recipe.gad.cli import main as cli
from recipe.gad.doctor import checks as doctor
from recipe.gad.doctor.checks import (
    check_agent_loop,
    check_chat_ids,
    check_discriminator_size,
    check_disk,
    check_end_token,
    check_generation_prompt,
    check_lengths,
    check_numbers,
    check_prompt_date,
    check_rollout_heads,
    check_versions,
    examine,
    memory_findings,
    report,
)
from recipe.gad.doctor.memory import (
    GIB,
    Experts,
    ModelShape,
    Training,
    checkpoint_bytes,
    checkpoints_on_disk,
    fresh_memory,
    kv_tokens,
    model_shape,
    role_memory,
    roles,
    training,
)
from recipe.gad.run.checks import check_ray, run_checks
from recipe.gad.run.config import compose_config
from recipe.gad.run.data_file import sample_rows
from recipe.gad.run.findings import Finding
from recipe.gad.run.thinking import check_thinking
from recipe.gad.run.two_sample import FRESH
from recipe.gad.training.reading import Reading
from recipe.gad.training.trajectory import tokenize_teacher

ROOT = Path(__file__).resolve().parents[3]
MODEL, ACTOR, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
WARMUP = ("gad.stage=warmup", "gad.actor_objective=imitation", f"{ACTOR}.use_kl_loss=False")


@pytest.fixture
def overrides(tiny_problem, tmp_path, monkeypatch):
    """Overrides of a warmup run without a GPU that passes."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "VERL_USE_EXTERNAL_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    return [
        "device=cpu", *WARMUP, f"{MODEL}.path={tiny_problem}/model", f"data.train_files={tiny_problem}/train.parquet",
        f"data.val_files={tiny_problem}/val.parquet", "data.train_batch_size=8", "data.max_prompt_length=16",
        "data.max_response_length=12", f"trainer.default_local_dir={tmp_path}/run",
    ]  # fmt: skip


def messages(check, config, level):
    return [str(finding) for finding in run_checks(config, [check]) if finding.level == level]


def run_cli(*arguments):
    with pytest.raises(SystemExit) as exit:
        cli(["doctor", *arguments])
    return exit.value.code


# ---------------------------------------------------------------------- the command


def test_a_good_run(overrides, capsys):
    assert run_cli(*overrides) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 errors, 0 warnings"
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert {line.split()[1] for line in lines[:-1]} >= {"batches:", "data:", "end_token:", "lengths:", "disk:"}


def test_for_another_machine_this_ones_cpus_packages_and_disk_do_not_count(overrides, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 1)
    monkeypatch.setattr(doctor, "CHECKS", (check_ray,))
    monkeypatch.setattr(doctor, "doctor_checks", lambda _: [doctor.Prerequisites(check_disk, frozenset())])
    overrides = [*overrides, "ray_kwargs.ray_init.num_cpus=null"]
    assert run_cli("--brief", "--for_another_machine", "--cpus", "3", *overrides) == 1
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+) +(\w+):", text, re.MULTILINE) == [("error", "ray")] and "Ray has 3 logical CPUs" in text
    assert run_cli("--for_another_machine", *overrides) == 0
    text = capsys.readouterr().out
    assert "not checked: logical CPUs of the other machine" in text and "not checked: free disk space" in text
    assert run_cli("--cpus", "3", *overrides) == 2
    assert "--cpus is for another machine" in capsys.readouterr().err


def test_errors_of_both_kinds_of_checks_as_json(overrides, capsys):
    assert run_cli("--json", *overrides, "data.max_prompt_length=3", "gad.poll_interval=0") == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert all(finding.keys() == {"level", "where", "what", "evidence", "fix"} for finding in findings)
    errors = {finding["where"]: finding for finding in findings if finding["level"] == "error"}
    assert errors.keys() == {"polling", "lengths"} and all(finding["fix"] for finding in errors.values())
    assert "data.max_prompt_length=3" in errors["lengths"]["what"]
    assert "gad.poll_interval=0" in errors["polling"]["what"] and errors["polling"]["fix"] == "gad.poll_interval=0.1"
    assert not any("Fix: " in text for finding in findings for text in finding.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "5",
        "\xff",
        "[" * 10**5,
        '{"model_type": "no-such-model"}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "vocab_size": 0}',
        '{"model_type": "llama", "num_attention_heads": 0}',
    ],
)
def test_a_broken_configuration_of_a_model_is_a_finding_and_the_report_goes_to_its_end(
    overrides, tiny_problem, tmp_path, capsys, text
):
    shutil.copytree(tiny_problem / "model", tmp_path / "model")
    (tmp_path / "model/config.json").write_bytes(text.encode("latin-1"))
    code = run_cli(*overrides, f"{MODEL}.path={tmp_path}/model")
    out = capsys.readouterr().out
    assert code == 1 and out.splitlines()[-1].endswith("this run cannot start")
    assert "ok      data: " in out, "the other checks are there"
    assert "Traceback" not in out


@pytest.mark.parametrize(
    "header", [b"", b"\x08" + b"\0" * 7, (10**6).to_bytes(8, "little") + b"[" * 10**6, b"\xff" * 8]
)
def test_broken_weights_are_a_finding(overrides, tiny_problem, tmp_path, capsys, header):
    shutil.copytree(tiny_problem / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(header)
    assert run_cli(*overrides, f"{MODEL}.path={tmp_path}/model") == 1
    out = capsys.readouterr().out
    assert "error   models: " in out and "ok      data: " in out


def test_numbers_that_no_run_can_use(overrides):
    good = compose_config(overrides, "gad_trainer")
    assert messages(check_numbers, good, "error") == []
    number, whole = "expected a number of 0 or more", "expected a whole number of at least 1"
    for key, value, message in [
        (f"{ACTOR}.optim.lr", float("nan"), f"{number}. Fix: {ACTOR}.optim.lr=1e-6"),
        (f"{ACTOR}.optim.lr", -1, number),
        ("critic.optim.lr", float("inf"), number),
        (f"{ROLLOUT}.temperature", float("nan"), number),
        (f"{ROLLOUT}.val_kwargs.temperature", -1, number),
        ("trainer.total_training_steps", -1, whole),
        ("trainer.total_epochs", 0, whole),
    ]:
        config = copy.deepcopy(good)
        OmegaConf.update(config, key, value)
        [error] = messages(check_numbers, config, "error")
        assert error.startswith(f"{key}={value}: {message}")


def with_model_config(tiny_problem, folder, **changes):
    shutil.copytree(tiny_problem / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_too_few_positions(overrides, tiny_problem, tmp_path, capsys):
    model = with_model_config(tiny_problem, tmp_path / "model", max_position_embeddings=27)
    code = run_cli(*overrides, f"{MODEL}.path={model}")  # 16 + 12 = 28 tokens
    out = capsys.readouterr().out
    message = f"positions: {MODEL}.path: max_position_embeddings is 27, and prompt + response = 28 tokens. Fix: lower"
    assert code == 0 and f"warning {message}" in out, "the Hugging Face rollout computes rotary positions"
    assert run_cli(*overrides, f"{MODEL}.path={model}", f"{ROLLOUT}.name=vllm") == 1
    assert f"error   {message}" in capsys.readouterr().out


def test_a_vocabulary_that_is_larger_than_the_embeddings(overrides, tiny_problem, tmp_path, capsys):
    model = with_model_config(tiny_problem, tmp_path / "model", vocab_size=5)
    assert run_cli(*overrides, f"{MODEL}.path={model}") == 1
    assert "error   vocabulary: " in (out := capsys.readouterr().out) and "the model has 5 embeddings" in out


def test_a_model_that_is_not_here_is_not_called_ok(overrides, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert run_cli(*overrides, f"{MODEL}.path=some-org/some-model") in (0, 1)
    out = capsys.readouterr().out
    assert f"{MODEL}.path=some-org/some-model: a model of the hub; its files were not checked" in out
    assert "Model folders exist and are whole" not in out and "same vocabulary" not in out
    assert "same token ids" not in out and "split evenly over the GPUs of a rollout engine" not in out


def test_a_check_whose_ground_is_missing_is_not_run(overrides, capsys):
    assert run_cli(*overrides, f"{MODEL}.path=/no/such", "data.seed=1") == 1
    out = capsys.readouterr().out
    assert "warning skipped: positions, vocabulary, end_token, " in out
    assert ", because of the errors of models. Fix: resolve those errors first" in out
    assert out.splitlines()[-1].endswith("this run cannot start")


def test_checks_that_found_the_same_share_a_line():
    found = [
        Finding("error", "batches", "no number"),
        Finding("ok", "ray", "fine"),
        Finding("error", "data", "no number"),
    ]
    report(found, (lines := []).append)
    assert lines == [
        "ok      ray: fine",
        "error   batches, data: no number",
        "1 error, 0 warnings: this run cannot start",
    ]


@pytest.mark.parametrize(
    "argument",
    ["gad.stagee=gad", "gad.stage=[", "device=tpu", "data.seed=${no.such.key}", "--config-name=none", "--no-flag"],
)
def test_bad_usage(overrides, argument, capsys):
    assert run_cli(*overrides, argument) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err


def test_warnings_do_not_stop_a_run_and_nothing_is_written(overrides, tmp_path, capsys):
    assert run_cli(*overrides, "gad.actor_objective=policy_gradient", "++trainer.nothing=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("warning ")] == [
        "warning stage: gad.actor_objective=policy_gradient in stage warmup: the paper uses imitation"
    ]
    assert lines[-1] == "0 errors, 1 warning" and not (tmp_path / "run").exists()


def test_the_resolved_configuration_is_printed(capsys):
    assert run_cli("--print_config", "device=cpu", "gad.stage=warmup") == 0
    config = OmegaConf.create(capsys.readouterr().out)
    assert config.trainer.v1.trainer_mode == "gad" and config.gad.stage == "warmup"
    assert run_cli("--print-config", "data.seed=${no.such.key}") == 2
    assert "error: the configuration does not resolve" in capsys.readouterr().err


def test_composing_imports_neither_verl_nor_torch():
    script = (
        "import sys; from recipe.gad.run.config import compose_config; config = compose_config(['gad.stage=warmup'])\n"
        "assert config.gad.stage == 'warmup' and config.trainer.use_v1\n"
        "assert not {'torch', 'transformers', 'verl'} & set(sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "VERL_PLATFORM"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, env=environment)


# ---------------------------------------------------------------------- tokenizer


@pytest.fixture
def model(tiny_problem, tmp_path):
    """Function: a copy of the tiny model with keys of its JSON files changed."""

    def model(name: str, **files: dict) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_problem / "model", folder)
        for stem, changes in files.items():
            file = folder / f"{stem}.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    return model


def test_an_end_token_that_ends_no_turn(compose_config, model):
    """As in folders converted from GGUF: eos is the token that opens a turn, here <user> for ChatML's <|im_start|>."""
    opens = 4
    folder = model("both", tokenizer_config={"eos_token": "<user>"}, generation_config={"eos_token_id": opens})
    (error,) = messages(check_end_token, compose_config(*WARMUP, f"{MODEL}.path={folder}"), "error")
    for part in (str(folder), "ends an assistant turn with ['<end>']", "a rollout stops at ['<user>']",
                 "ends no turn", "Fix: set eos_token '<end>'", "eos_token_id 2"):  # fmt: skip
        assert part in error


def test_a_tokenizer_that_the_agent_loop_refuses(compose_config, byte_tokenizer, model, capsys):
    """The tiny model's tokenizer has no token for a line break, which verl wants of the family Qwen3."""
    folder = model("words", config={"model_type": "qwen3"})
    config = compose_config(*WARMUP, f"{MODEL}.path={folder}")
    (error,) = messages(check_agent_loop, config, "error")
    for part in (str(folder), "of the family qwen3, at the first rollout", "newline to tokenize to one token, got []",
                 "Fix: use the tokenizer of a qwen3 model"):  # fmt: skip
        assert part in error
    seqkd = ["gad.stage=seqkd", "critic.enable=False", "trainer.val_before_train=False"]
    without = compose_config(*WARMUP, *seqkd, "trainer.test_freq=-1", f"{MODEL}.path={folder}")
    assert messages(check_agent_loop, without, "ok") == ["stage seqkd without validation has no agent loop"]
    byte_tokenizer().save_pretrained(folder)
    doctor._tokenizer.cache_clear()
    assert messages(check_agent_loop, config, "error") == []
    config = compose_config(*WARMUP, f"{MODEL}.path={model('llama')}")
    assert messages(check_agent_loop, config, "error") == [] and capsys.readouterr().err == ""


def test_the_end_token_of_a_base_model(compose_config, model):
    """As <|endoftext|> beside ChatML's <|im_end|>: the trainer ends teacher answers where rollouts stop."""
    pad = 0
    folder = model("base", tokenizer_config={"eos_token": "<pad>"}, generation_config={"eos_token_id": pad})
    config = compose_config(*WARMUP, f"{MODEL}.path={folder}")
    assert messages(check_end_token, config, "error") == []
    (warning,) = messages(check_end_token, config, "warning")
    for part in ("ends an assistant turn with ['<end>']", "given the end ['<pad>']", "Fix: set eos_token '<end>'",
                 "tokenizer_config.json", "eos_token_id 2", "generation_config.json"):  # fmt: skip
        assert part in warning
    template = folder / "chat_template.jinja"
    template.write_text("<pad> " + template.read_text())  # eos opens the whole, as a bos token
    config = compose_config(*WARMUP, f"{MODEL}.path={folder}")
    doctor._tokenizer.cache_clear()
    assert [finding.level for finding in run_checks(config, [check_end_token])] == ["warning"]


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"tokenizer_config": {"eos_token": "<user>"}}, "tokenizer.eos_token is '<user>', but a turn ends"),
        ({"generation_config": {"eos_token_id": [4]}}, "generation_config.eos_token_id is [4] (['<user>'])"),
    ],
)
def test_an_end_token_that_one_of_both_names(compose_config, model, files, part):
    config = compose_config(*WARMUP, f"{MODEL}.path={model('one', **files)}")
    (warning,) = messages(check_end_token, config, "warning")
    assert part in warning and "Fix: " in warning
    assert messages(check_end_token, config, "error") == []


def test_turns_without_an_end(compose_config, model):
    folder = model("plain")
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} um {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (warning,) = messages(check_end_token, compose_config(*WARMUP, f"{MODEL}.path={folder}"), "warning")
    assert "ends an assistant turn with ['um']" in warning and "a template that ends its turns" in warning
    refusing = model("refusing")
    (refusing / "chat_template.jinja").write_text("{{ raise_exception('no turns here') }}")
    (error,) = messages(check_end_token, compose_config(*WARMUP, f"{MODEL}.path={refusing}"), "error")
    assert "no turns here" in error and "Fix: " in error
    (warning,) = messages(check_lengths, compose_config(*WARMUP, f"{MODEL}.path={refusing}"), "warning")
    assert "no turns here" in warning
    none = model("none")
    (none / "chat_template.jinja").unlink()
    (error,) = messages(check_end_token, compose_config(*WARMUP, f"{MODEL}.path={none}"), "error")
    assert "no chat template" in error
    (warning,) = messages(check_lengths, compose_config(*WARMUP, f"{MODEL}.path={none}"), "warning")
    assert "no chat template" in warning
    custom = f"{MODEL}.custom_chat_template='{{% for m in messages %}}{{{{ m.content }}}} <end> {{% endfor %}}'"
    config = compose_config(*WARMUP, f"{MODEL}.path={none}")
    OmegaConf.update(config, f"{MODEL}.custom_chat_template", custom.partition("=")[2].strip("'"))
    assert messages(check_end_token, config, "error") == []


QUESTION = "<bos>{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} <end>"
TEMPLATES = {
    # thinks unless it is told not to: an answer, or a generation prompt without thinking, has it empty
    "hybrid": QUESTION + "{% else %}<assistant> <think></think> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking is false %}<think></think> {% endif %}{% endif %}",
    # the empty thinking is in the generation prompt alone
    "empty": QUESTION + "{% else %}<assistant> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> <think></think> {% endif %}",
    # the generation prompt begins to think, and there is no way around
    "always": QUESTION + "{% else %}<assistant> {{ m.content.split('</think>')[-1] }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> <think> {% endif %}",
    # gpt-oss: a channel for each part
    "channels": QUESTION + "{% else %}<assistant><|channel|>final<|message|>{{ m.content }} <end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    # nothing about thinking, but rollouts have to write a name
    "name": QUESTION + "{% else %}<assistant> um: {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    # thinks unless it is told not to, and shows nothing of it (SmolLM3, Hunyuan)
    "silent": QUESTION + "{% else %}<assistant> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if enable_thinking is false %}<think></think> {% endif %}{% endif %}",
    # the same with a number and other tags (Seed-OSS)
    "budget": QUESTION + "{% else %}<assistant> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% if thinking_budget == 0 %}<seed:think></seed:think> {% endif %}"
    "{% endif %}",
    # begins to think, and names no end of it (OLMo 3)
    "begins": QUESTION + "{% else %}<assistant> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> <think>{% endif %}",
    # an answer has the end alone (GLM 4.7, DeepSeek V3.1)
    "end": QUESTION + "{% else %}<assistant></think>{{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '</think>' if enable_thinking is false else '<think>' }}{% endif %}",
    # takes thinking out of answers, as an early template of DeepSeek R1
    "knows": QUESTION + "{% else %}<assistant> {{ m.content.split('</think>')[-1] }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}",
    # a name in the generation prompt alone
    "prefix": QUESTION + "{% else %}<assistant> {{ m.content }} <end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> um: {% endif %}",
}


RIGHT = "Rollouts begin where the chat template begins an answer, as teacher answers do."


def test_a_generation_prompt_that_is_not_the_beginning_of_an_answer(compose_config, model):
    switch = "++data.apply_chat_template_kwargs.enable_thinking=False"
    answer, policy = "gad.score_span=answer", "gad.actor_objective=policy_gradient"

    def found(name, *overrides, level="error"):
        folder = model(f"{name}-{len(seen)}")
        seen.append(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
        config = compose_config(*WARMUP, f"{MODEL}.path={folder}", *overrides)
        findings = run_checks(config, [check_thinking if level == "error" else check_generation_prompt])
        return [str(finding) for finding in findings if finding.level == level]

    seen = []
    (error,) = found("hybrid")
    assert "begins an answer with '<think></think> ' after '<bos><user> question <end><assistant> '" in error
    assert f"Fix: {switch}; if the student is to think, {answer}" in error
    assert found("hybrid", switch) == found("empty") == []
    (error,) = found("hybrid", "gad.stage=seqkd", "critic.enable=False")
    assert error.endswith(f"Fix: {switch}")
    for name, part in (
        ("always", "ends with '<think> '"),
        ("begins", "ends with '<think>'"),
        ("channels", "with '<|channel|>final<|message|>'"),
    ):
        (error,) = found(name)
        assert part in error and "custom_chat_template" in error and answer in error
        assert found(name, answer) == found(name, answer, policy, level="warning") == []
        (warning,) = found(name, answer, level="warning")
        assert "imitation of the teacher teaches it not to" in warning and "Fix: in stage warmup" in warning
    assert found("name") == []
    (warning,) = found("name", level="warning")
    assert "begins an answer with ' um: '" in warning and "custom_chat_template" in warning
    (warning,) = found("prefix", level="warning")
    assert "ends with 'um: ', which an answer does not have" in warning and "custom_chat_template" in warning
    assert found("prefix") == []
    budget = "++data.apply_chat_template_kwargs.thinking_budget=0"
    for name, off in (("silent", switch), ("budget", budget)):
        (error,) = found(name)
        assert f"another prompt with {off.rpartition('.')[2]}, which switches thinking off" in error
        assert f"Fix: {off}; if the student is to think, {answer}" in error
        assert found(name, off) == found(name, off, level="warning") == found(name, answer) == []
    (note,) = found("knows", level="ok")
    assert "names </think>, and no prompt begins to think" in note and answer in note
    assert found("empty", level="ok") == found("knows", answer, policy, level="ok") == [RIGHT]
    (error,) = found("end")
    assert "begins an answer with '</think>' after '<bos><user> question <end><assistant><think>'" in error
    assert f"Fix: {switch};" in error and found("end", switch) == []


def test_a_student_that_thinks_is_reported_once(overrides, tiny_problem, tmp_path):
    folder = shutil.copytree(tiny_problem / "model", tmp_path / "thinks")
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{% if add_generation_prompt %}<think>{% endif %}")
    findings = examine([*overrides, f"{MODEL}.tokenizer_path={folder}"])
    about = [finding for finding in findings if "thinks before it answers" in finding.what]
    assert [(finding.level, finding.where) for finding in about] == [("error", "thinking")]
    (skipped,) = [finding for finding in findings if finding.where == "skipped"]
    assert skipped.what == "generation_prompt, because of the errors of thinking"
    (ok,) = run_checks(compose_config([*overrides, f"{MODEL}.path=no/model"]), [check_thinking])
    assert ok.level == "ok" and "not checked" in ok.what


def test_white_space_that_begins_the_answers_of_the_template(compose_config, byte_tokenizer, model):
    """As after GLM 4.5's empty thinking: the template writes a line break, and teacher answers have none."""
    folder = model("spaced")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}U: {{ m.content }}\n{% else %}A:{{ space }}{{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    byte_tokenizer(template).save_pretrained(folder)
    config = compose_config(*WARMUP, f"{MODEL}.path={folder}", "++data.apply_chat_template_kwargs.space=' '")
    (warning,) = messages(check_generation_prompt, config, "warning")
    for part in ("begins the answer 'answer' with the tokens ['Ġ', 'a', 'n']", "begin with ['a', 'n', 's']",
                 "Fix: ", "custom_chat_template"):  # fmt: skip
        assert part in warning
    config = compose_config(*WARMUP, f"{MODEL}.path={folder}", "++data.apply_chat_template_kwargs.space=''")
    assert messages(check_generation_prompt, config, "warning") == []


def test_a_tokenizer_that_puts_a_space_before_teacher_answers(compose_config, spaced_tokenizer, model):
    """As TinyLlama's chat model: after "<|assistant|>:", a rollout's first token has no space."""
    folder = model("sentencepiece")
    tokenizer = spaced_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>:{{ space }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>:{% endif %}"
    )
    tokenizer.save_pretrained(folder)

    def found(*overrides):
        config = compose_config(*WARMUP, f"{MODEL}.path={folder}", *overrides)
        return messages(check_generation_prompt, config, "warning")

    (warning,) = found()
    assert "the tokens ['a', 'n', 's'], and teacher answers begin with ['▁', 'a', 'n']" in warning
    assert warning.endswith("Fix: gad.retokenize=True")
    assert found("gad.retokenize=True") == found("gad.stage=seqkd", "critic.enable=False") == []
    assert found("++data.apply_chat_template_kwargs.space=' '") == []
    rollout = tokenizer.convert_tokens_to_ids([*"answer", "</s>"])
    (read,) = Reading(tokenizer, None, [], retokenize=True).read([rollout])[0]
    assert read == tokenize_teacher(tokenizer, ["answer"], [tokenizer.eos_token_id])[0]


def test_a_template_that_writes_the_date(compose_config, model):
    """Llama 3.2 takes it from date_string, if that is given."""
    now = "strftime_now('%d %b %Y')"
    for name, date in (("llama", f"date_string if date_string is defined else {now}"), ("fixed", now)):
        folder = model(name)
        (folder / "chat_template.jinja").write_text(f"{{{{ {date} }}}} {QUESTION}{{% endif %}}{{% endfor %}}")
        (warning,) = messages(check_prompt_date, compose_config(*WARMUP, f"{MODEL}.path={folder}"), "warning")
        assert "writes the current date into prompts" in warning
        fix = warning.partition("Fix: ")[2]
        if name == "fixed":
            assert fix == f"set {MODEL}.custom_chat_template to one with a fixed date"
        else:
            config = compose_config(*WARMUP, f"{MODEL}.path={folder}", fix.strip("'"))
            assert messages(check_prompt_date, config, "warning") == []
    assert messages(check_prompt_date, compose_config(*WARMUP, f"{MODEL}.path={model('none')}"), "warning") == []


def test_a_template_that_leaves_out_the_answer(compose_config, model):
    """As a template that takes a list of parts for the content, or writes no answer that ends a conversation."""
    folder = model("parts")
    template = "{% for m in messages %}<user>{% for part in m.content %}{{ part.text }}{% endfor %}<end>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (error,) = messages(check_end_token, compose_config(*WARMUP, f"{MODEL}.path={folder}"), "error")
    assert "the chat template leaves out the text of an answer" in error
    assert "actor_rollout_ref.model.custom_chat_template" in error


def test_a_broken_tokenizer(compose_config, model):
    folder = model("broken")
    (folder / "tokenizer.json").write_text("{")
    for check in (check_end_token, check_lengths):
        (error,) = messages(check, compose_config(*WARMUP, f"{MODEL}.path={folder}"), "error")
        assert f"the tokenizer in {folder} cannot be loaded" in error and "Fix: " in error


def test_prompts_that_the_template_refuses(compose_config, model, tmp_path):
    folder = model("strict")
    file = folder / "chat_template.jinja"
    file.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + file.read_text()
    )
    user = {"role": "user", "content": "a"}
    rows = [
        {"content": [{"role": "system", "content": "b"}, user] if i < 2 else [user], "teacher_response": "a"}
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = compose_config(*WARMUP, f"{MODEL}.path={folder}", f"data.train_files={tmp_path}/rows.parquet")
    (warning,) = messages(check_lengths, config, "warning")
    assert (
        "2 rows cannot be used" in warning
        and "refuses the prompt: no system turn" in warning
        and "all 8 rows" in warning
    )


def test_a_critic_with_another_template(compose_config, model):
    critic = model("critic")
    assert messages(check_chat_ids, compose_config(*WARMUP, f"critic.model.tokenizer_path={critic}"), "warning") == []
    other = model("other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("<user>", "<assistant>"))
    (warning,) = messages(check_chat_ids, compose_config(*WARMUP, f"critic.model.tokenizer_path={other}"), "warning")
    assert str(other) in warning and "Fix: " in warning


# ---------------------------------------------------------------------- lengths


@pytest.fixture
def data(compose_config, tmp_path):
    """Function: configuration of a run whose answers have these numbers of words (one token each, plus <end>)."""

    def data(words: list[int], *overrides: str, prompt_words: int = 2):
        user = [{"role": "user", "content": " ".join("a" * prompt_words)}]
        rows = [{"content": user, "teacher_response": " ".join("b" * count)} for count in words]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        files = [f"data.{kind}_files={tmp_path}/rows.parquet" for kind in ("train", "val")]
        return compose_config(*WARMUP, *files, *overrides)

    return data


def test_answers_over_the_limit(data):
    config = data([5] * 9 + [19], "data.max_response_length=12")  # 9 x 6 + 20 tokens; 8 of 74 beyond the limit
    (warning,) = messages(check_lengths, config, "warning")
    for part in ("data.train_files (all 10 rows)", "7 tokens on average, longest 20", "10.0% longer than",
                 "data.max_response_length=12", "cut by data.truncation=right; 10.8%",
                 "Fix: data.max_response_length=20"):  # fmt: skip
        assert part in warning
    assert messages(check_lengths, data([5] * 24 + [19], "data.max_response_length=12"), "warning") == []  # 4 %
    (error,) = messages(check_lengths, data([5] * 24 + [19], "data.truncation=error"), "error")
    assert "data.truncation=error stops there" in error
    assert messages(check_lengths, data([11, 11], "data.truncation=error"), "error") == []


def test_prompts_over_the_limit(data):
    length = 1 + 1 + 6 + 1 + 1  # <bos> <user> words <end> <assistant>
    config = data([5] * 8, f"data.max_prompt_length={length - 1}", prompt_words=6)
    (error,) = messages(check_lengths, config, "error")
    assert "100.0% longer than data.max_prompt_length" in error and f"longest {length}" in error
    fits = data([5] * 8, f"data.max_prompt_length={length}", prompt_words=6)
    assert messages(check_lengths, fits, "error") == []


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_the_sample_is_evenly_spaced(tmp_path, monkeypatch, name):
    monkeypatch.setattr("recipe.gad.run.data_file.BATCH_ROWS", 7)
    rows = [{"content": [{"role": "user", "content": str(i)}], "teacher_response": f"t{i}"} for i in range(40)]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    total, prompts, answers = sample_rows(tmp_path / name, "content", "teacher_response", 4)
    assert (total, answers) == (40, ["t0", "t10", "t20", "t30"])
    assert [prompt[0]["content"] for prompt in prompts] == ["0", "10", "20", "30"]
    assert len(sample_rows(tmp_path / name, "content", "teacher_response", 100)[1]) == 40


def test_a_large_file_is_sampled(data, monkeypatch):
    monkeypatch.setattr(doctor, "SAMPLE_ROWS", 10)
    notes = messages(check_lengths, data([5] * 100), "ok")
    assert "10 of 100 rows, evenly spaced" in notes[0]


# ---------------------------------------------------------------------- memory


SHAPE = ModelShape(
    parameters=1000, layers=2, hidden=8, intermediate=16, heads=4, kv_heads=2, head_dim=2, vocabulary=20, tied=False
)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tmp_path, tied):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    config = AutoConfig.for_model(
        "qwen3", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, num_labels=1,
    )  # fmt: skip
    for kind, value_model in ((AutoModelForCausalLM, False), (AutoModelForTokenClassification, True)):
        model = kind.from_config(config)
        own, other = tmp_path / f"{value_model}", tmp_path / "lm"
        model.save_pretrained(own)
        AutoModelForCausalLM.from_config(config).save_pretrained(other)
        for folder in (own, other):
            shape = model_shape(folder, value_model)
            assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert shape.layer_parameters * 3 + shape.root_parameters <= shape.parameters
        assert abs(shape.layer_parameters - sum(p.numel() for p in model.model.layers[0].parameters())) < 16
        (other / "model.safetensors").unlink()  # counted on the meta device
        if not value_model:
            assert model_shape(other, value_model).parameters == shape.parameters
    assert (shape.kv_heads, shape.head_dim, shape.heads, shape.intermediate) == (2, 8, 4, 24)


MOE = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 999, "moe_intermediate_size": 6, "num_experts": 5,
    "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
"""Qwen3-MoE. Its intermediate_size is for dense layers, of which it has none."""


def test_all_experts_take_memory_and_a_token_passes_some(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**MOE)
    expert = 3 * 16 * 6  # gate, up and down
    attention = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 2 * 8  # queries, keys and values, output, norms of both heads
    layer = attention + 5 * expert + 5 * 16 + 2 * 16  # router, two norms
    by_hand = 2 * 50 * 16 + 3 * layer + 16  # embedding and head, last norm
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert by_hand == sum(parameter.numel() for parameter in model.parameters())
    config.save_pretrained(tmp_path / "meta")
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "disk")  # one tensor for each expert; the model fuses them
    for folder in (tmp_path / "meta", tmp_path / "disk"):
        shape = model_shape(folder, value_model=False)
        assert shape.parameters == by_hand and shape.layer_parameters == (3 * layer + 16) // 3
        assert shape.experts == Experts(3 * 5 * expert, count=5, active=2, intermediate=6, shared_intermediate=0)
        assert shape.active_layer_parameters == by_hand - 2 * 50 * 16 - 3 * 3 * expert
        assert shape.intermediate == 0
        norms, attended = 2 * 16 * (4 + 2 * 2), 2 * (4 + 2) * 8 * 2
        assert shape.layer_activation_bytes(2) == norms + attended + 2 * 2 * (4 * 6 + 2 * 16) + 4 * 5


@pytest.mark.parametrize(
    ("family", "sizes", "dense", "experts"),
    [
        # a dense layer, then layers with a shared expert
        ("deepseek_v3", {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 2}, 999, (4, 2, 6, 12)),
        ("qwen2_moe", {"shared_expert_intermediate_size": 7}, 0, (5, 2, 6, 7)),
        ("mixtral", {"moe_intermediate_size": None, "intermediate_size": 24}, 0, (5, 2, 24, 0)),
    ],
)
def test_shared_experts_and_dense_layers_are_found(tmp_path, family, sizes, dense, experts):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **{**MOE, **sizes})
    config.save_pretrained(tmp_path)
    shape = model_shape(tmp_path, value_model=False)
    found = shape.experts
    assert (found.count, found.active, found.intermediate, found.shared_intermediate) == experts
    assert shape.intermediate == dense


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
def test_lora_parameters_are_those_of_peft(tiny_problem, tmp_path, family):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_problem / "model" if family == "llama" else tmp_path
    if family != "llama":
        config = AutoConfig.for_model(family, **{**MOE, "intermediate_size": 6})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
    assert model_shape(folder, False).lora_parameters(3) == trained


def test_the_formulas_by_hand():
    memory = role_memory(SHAPE, Training(shards=4, tokens=10))
    assert (memory.weights, memory.gradients, memory.optimizer) == (1000.0, 1000.0, 2000.0)
    # per token and layer: two norms 2 x 8 x (4 + 2 x 2), attention 2 x (2 x (4 + 2) x 2), MLP 2 x 4 x 16
    layer = 128 + 48 + 128
    assert memory.activations == 10 * (2 * 8 * 2 + layer)
    assert memory.logits == 2 * 10 * 20 * 2
    root, one = 2 * 20 * 8, (1000 - 320) // 2
    assert memory.gathered == 2 * (root + 2 * one) + 2 * root + (2 + 4) * one
    assert memory.peak == 4000 + memory.gathered + memory.activations + memory.logits
    assert memory.resident == 3000
    open_ = role_memory(SHAPE, Training(shards=4, tokens=10, gradient_checkpointing=False, logits=False))
    assert (open_.activations, open_.logits) == (10 * 2 * layer, 0)


def test_offload_lora_and_the_reference_by_hand():
    run = Training(shards=2, tokens=1, param_offload=True, optimizer_offload=True)
    assert role_memory(SHAPE, run).resident == 0 and role_memory(SHAPE, run).states == 8000
    cpu = role_memory(SHAPE, Training(shards=2, tokens=1, cpu_states=True))
    assert (cpu.states, cpu.step, cpu.resident) == (0, 0, 0)
    lora = role_memory(SHAPE, Training(shards=1, tokens=1, trainable=100))
    assert (lora.weights, lora.gradients, lora.optimizer) == (4400, 400, 800)
    discriminator = role_memory(SHAPE, Training(shards=1, tokens=1, trainable=100, head=9))  # the head is in the 1000
    assert (discriminator.weights, discriminator.gradients, discriminator.optimizer) == (4400, 436, 872)
    contents = ["model", "optimizer", "hf_model"]
    run = Training(shards=2, tokens=1, trainable=100, head=9)  # hf_model holds merged weights
    assert checkpoint_bytes(SHAPE, run, contents) == 4 * (1100 + 2 * 109 + 1000)
    reference = role_memory(SHAPE, Training(shards=1, tokens=10, trainable=0, cpu_states=True))
    assert reference.states == 0 and reference.logits == 2 * 10 * 20 * 2 and reference.activations == 10 * 304


def test_the_average_of_the_discriminator_by_hand():
    run = Training(shards=2, tokens=1, weight_bytes=2, average=True)
    memory = role_memory(SHAPE, run)  # weights 1000 x 2 / 2, their average in float32 1000 x 4 / 2
    assert (memory.weights, memory.gradients, memory.optimizer) == (1000 + 2000, 1000, 2000)
    assert (memory.states, memory.resident) == (6000, 5000)
    for elsewhere in ({"param_offload": True}, {"cpu_states": True}):
        assert role_memory(SHAPE, replace(run, **elsewhere)) == role_memory(
            SHAPE, replace(run, **elsewhere, average=False)
        )
    lora = role_memory(SHAPE, Training(shards=1, tokens=1, trainable=100, head=9, average=True))
    assert lora.weights == 4 * 1100 + 4 * 109
    assert checkpoint_bytes(SHAPE, run, ["model"]) == 2 * 1000 + 4 * 1000


@pytest.mark.parametrize("bytes_", [2, 4])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_what_a_step_with_lora_leaves_in_memory(tiny_problem, role, bytes_):
    """Weights, gradients and Adam's moments of a real step: frozen weights once, what is trained four times."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    from recipe.gad.training.lora import add_adapters
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    settings = dict.fromkeys(("lora_adapter_path", "target_parameters", "exclude_modules"))
    settings = SimpleNamespace(**settings, lora_rank=3, lora_alpha=16, target_modules="all-linear")
    kind = AutoModelForCausalLM if role == "actor" else AutoModelForTokenClassification
    dtype = {2: torch.bfloat16, 4: torch.float32}[bytes_]
    model = kind.from_pretrained(tiny_problem / "model", dtype=dtype, **({"num_labels": 1} if role == "critic" else {}))
    if role == "actor":
        model = FSDPEngine._build_lora_module(SimpleNamespace(model_config=settings), model)
    else:
        model = add_adapters(model, settings, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    optimizer.step()

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    shape = model_shape(tiny_problem / "model", value_model=role == "critic")
    head = {"actor": 0, "critic": 32 + 1}[role]
    run = Training(1, 1, weight_bytes=bytes_, trainable=shape.lora_parameters(3), head=head)
    memory = role_memory(shape, run)
    assert memory.weights == size(model.parameters())
    assert memory.gradients == size(p.grad for p in model.parameters() if p.grad is not None)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == size(moments)


def test_the_table_of_a_model_with_lora_in_the_documentation(tmp_path):
    """docs/memory.md has what the doctor prints."""
    from transformers import Qwen2Config

    Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    page = (ROOT / "docs/memory.md").read_text()
    page = page[page.index("Qwen2.5-1.5B") :]
    lora = [f"{MODEL}.lora_rank=32", "critic.model.lora_rank=32"]
    for suffix, ranks in (("", []), (" with LoRA", lora)):
        config = compose_config(["trainer.n_gpus_per_node=1", f"{MODEL}.path={tmp_path}", *ranks])
        for role, _ in roles(config):
            shape = model_shape(tmp_path, value_model=role == "critic")
            run = training(config, role, shape)
            memory = role_memory(shape, run)
            parts = (memory.weights, memory.gradients, memory.optimizer, memory.gathered, memory.activations)
            parts += (memory.logits, memory.peak, memory.resident)
            cells = ["0" if part == 0 else f"{part / GIB:.2f}" for part in parts]
            name = {ACTOR: "actor", "critic": "critic"}.get(role, "reference") + (suffix or f", T = {run.tokens}")
            assert f"| {name} | {' | '.join(cells)} |" in page
    assert run.trainable == 36_929_536 and f"= {run.trainable:,}." in page


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("llama", None),
        ("llama with LoRA", None),
        ("mixtral", Experts(0, count=8, active=3, intermediate=160, shared_intermediate=0)),
    ],
)
def test_the_activations_that_autograd_keeps(family, experts):
    """Bytes that the backward pass of a real layer saves, beside its parameters, against the formula; float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    sparse = {"num_local_experts": experts.count, "num_experts_per_tok": experts.active} if experts else {}
    family, _, adapters = family.partition(" with ")
    config = AutoConfig.for_model(
        family, vocab_size=8, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, **sparse,
    )  # fmt: skip
    tokens = 512

    def saved(layers):
        config.num_hidden_layers = layers
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        if adapters:
            model.enable_input_require_grads()
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules="all-linear"))
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        return sum(size for size, _ in sizes.values())

    measured = (saved(3) - saved(1)) / 2 / tokens
    shape = ModelShape(0, 1, 64, 0 if experts else 160, 4, 2, 16, 8, True, experts)
    # frozen norms do not keep the normalized value; each of seven adapters keeps the output of its first map
    difference = -2 * 64 * 4 + 7 * 1 * 4 if adapters else 0
    assert measured == pytest.approx(shape.layer_activation_bytes(4) + difference, rel=0.02)


def test_settings_come_from_the_configuration(compose_config):
    config = compose_config(
        "trainer.n_gpus_per_node=4", f"{ACTOR}.fsdp_config.fsdp_size=2", "critic.fsdp.param_offload=True",
        "critic.fsdp.ulysses_sequence_parallel_size=2", f"{ACTOR}.ppo_max_token_len_per_gpu=100",
        "critic.ppo_max_token_len_per_gpu=200", f"{ROLLOUT}.tensor_model_parallel_size=2",
    )  # fmt: skip
    assert [role for role, _ in roles(config)] == [ACTOR, "critic", "actor_rollout_ref.ref"]
    actor, critic, reference = (training(config, role, SHAPE) for role, _ in roles(config))
    assert (actor.shards, actor.tokens, actor.logits, actor.param_offload) == (2, 100, True, False)
    assert (critic.shards, critic.tokens, critic.logits, critic.param_offload) == (4, 200, False, True)
    assert (reference.trainable, reference.cpu_states) == (0, True)
    fixed = compose_config(
        "critic.use_dynamic_bsz=False", "critic.ppo_micro_batch_size_per_gpu=5",
        "critic.fsdp.ulysses_sequence_parallel_size=2", f"{MODEL}.lora_rank=4",
    )  # fmt: skip
    assert training(fixed, "critic", SHAPE).tokens == 5 * 28 // 2
    assert training(fixed, ACTOR, SHAPE).trainable == SHAPE.lora_parameters(4)
    assert (training(fixed, "critic", SHAPE).trainable, training(fixed, "critic", SHAPE).head) == (None, 0)
    assert [role for role, _ in roles(fixed)] == [ACTOR, "critic"]  # the reference is the actor without its adapter
    both = compose_config("critic.model.lora_rank=3", "gad.discriminator_ema=0.99")
    critic = training(both, "critic", SHAPE)
    assert (critic.trainable, critic.head) == (SHAPE.lora_parameters(3), SHAPE.hidden + 1)
    assert critic.average and not training(both, ACTOR, SHAPE).average
    # 2 kv heads on 2 GPUs: 2 x 2 layers x 1 head x 2 x 8 bytes (float64) per token; half of the weights on each GPU
    assert kv_tokens(config, SHAPE, 4000 + 640) == 640 // 64


def test_a_run_against_a_gpu(compose_config):
    config = compose_config("trainer.device=cuda", "data.max_prompt_length=16")

    def levels(gib, *changes):
        for key, value in changes:
            OmegaConf.update(config, key, value)
        found = list(memory_findings(config, gib * GIB))
        return [finding.level for finding in found], "\n".join(map(str, found))

    kinds, text = levels(80.0)
    assert set(kinds) == {"ok"} and "22,624 parameters over 1 GPUs" in text, text
    kinds, text = levels(0.0001)  # 107 KB: less than the states of one role
    assert "error" in kinds and "weights, gradients and Adam alone take" in text and "Fix: " in text
    kinds, text = levels(0.05)  # the states fit, the activations of 32768 tokens do not
    assert kinds.count("warning") >= 1 and "a smaller critic.ppo_max_token_len_per_gpu" in text
    kinds, text = levels(80.0, (f"{ROLLOUT}.gpu_memory_utilization", 1e-9))
    assert kinds.count("error") == 1 and "room for 0 tokens, and prompt + response = 28" in text
    kinds, text = levels(80.0, (f"{ROLLOUT}.gpu_memory_utilization", 1.0))
    assert (
        kinds.count("error") == 1 + 3 and "Fix: actor_rollout_ref.rollout.gpu_memory_utilization=0.99 or less" in text
    )
    _, text = levels(80.0, ("gad.stage", "seqkd"))
    assert "of the engine" in text, "validation samples"
    _, text = levels(80.0, ("trainer.test_freq", -1), ("trainer.val_before_train", False))
    assert "engine" not in text and "at work" in text


def test_a_fresh_discriminator_against_a_gpu(compose_config, tiny_problem):
    config = compose_config("trainer.device=cuda", "data.max_prompt_length=16", f"{FRESH}.model={tiny_problem}/model")
    found = {finding.what.partition(":")[0]: finding for finding in memory_findings(config, 80 * GIB)}
    size = model_shape(tiny_problem / "model", value_model=True).parameters
    states = 16 * size / GIB  # float32: weights, gradients and two moments of Adam
    assert f"{FRESH}: {size:,} parameters" in found[FRESH].what and f"Adam {states:.2f}, activations of 448 tokens" in (
        found[FRESH].what
    )  # batches of 8 pairs, 28 tokens a row
    assert fresh_memory(SHAPE, 448).states == 16 * SHAPE.parameters and fresh_memory(SHAPE, 448).resident == 0
    assert found[f"{FRESH} at work"].level == "ok"
    levels = {finding.what.partition(":")[0]: finding for finding in memory_findings(config, 0.0001 * GIB)}
    assert levels[f"{FRESH} at work"].level == "error" and f"or {FRESH}.model=null" in levels[f"{FRESH} at work"].fix


def test_without_a_gpu_the_estimate_is_not_compared(compose_config, monkeypatch):
    monkeypatch.setattr(doctor, "this_gpu_bytes", lambda: None)
    found = list(memory_findings(compose_config("trainer.device=cuda"), None))
    assert found[-1].fix.startswith("--gpu_memory_gb N")
    assert [finding.level for finding in found] == ["ok"] * 3 + ["warning"]


def test_heads_that_do_not_split(compose_config):
    (error,) = messages(check_rollout_heads, compose_config(f"{ROLLOUT}.tensor_model_parallel_size=4"), "error")
    assert "does not divide the model's 2 attention heads" in error and "=1 or 2" in error


def test_a_discriminator_that_is_no_stronger_than_the_student(compose_config, tiny_problem, tmp_path):
    from transformers import AutoConfig, LlamaForCausalLM

    def found(layers, level):
        config = AutoConfig.from_pretrained(tiny_problem / "model", num_hidden_layers=layers)
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(layers))
        return messages(check_discriminator_size, compose_config(f"critic.model.path={tmp_path}/{layers}"), level)

    # without 2 x 31 x 32 parameters of embedding and head; 33 are the score head's
    (same,) = messages(check_discriminator_size, compose_config(), "ok")
    assert "have 20,673 parameters, the student's 20,640: it is no stronger" in same and "--reward_model" in same
    assert found(2, "ok") == [same]
    layer = (20_640 - 32) // 2  # 32: the last norm
    (weaker,) = found(1, "warning")
    assert f"have {20_673 - layer:,} parameters" in weaker and "cannot lead it" in weaker
    assert found(4, "warning") == []
    (larger,) = found(4, "ok")
    assert f"have {20_673 + 2 * layer:,} parameters" in larger and "--reward_model" not in larger
    assert "if there is one" in messages(check_discriminator_size, compose_config("gad.stage=seqkd"), "ok")[0]


def test_a_student_with_experts_is_as_strong_as_what_a_token_passes(compose_config, tmp_path):
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(**MOE).save_pretrained(tmp_path)
    (found,) = messages(check_discriminator_size, compose_config(f"{MODEL}.path={tmp_path}", "gad.stage=gad"), "ok")
    assert found.startswith("critic.model.path: the discriminator's layers have ") and " active parameters" in found


# ---------------------------------------------------------------------- disk


def test_a_small_disk(compose_config, tmp_path, monkeypatch):
    parameters = 22_624, 22_624 - 31 * 32 + 33  # the critic has a score head in the language model's place
    needed = sum(3 * 16 * count for count in parameters)  # 3 kept; float32 weights twice and two moments
    folder = f"trainer.default_local_dir={tmp_path}/a/b"
    monkeypatch.setattr(doctor, "free_bytes", lambda path: needed - 1)
    (error,) = messages(check_disk, compose_config(*WARMUP, folder), "error")
    assert "0.0" not in error and " KiB = " in error
    assert f"{tmp_path}/a/b" in error and "Fix: a smaller trainer.max_actor_ckpt_to_keep" in error
    monkeypatch.setattr(doctor, "free_bytes", lambda path: needed)
    assert messages(check_disk, compose_config(*WARMUP, folder), "error") == []
    all_kept = compose_config(*WARMUP, folder, "trainer.max_actor_ckpt_to_keep=null")
    (warning,) = messages(check_disk, all_kept, "warning")
    assert "trainer.max_actor_ckpt_to_keep=None: every checkpoint is kept" in warning
    assert "no checkpoint" in messages(check_disk, compose_config("trainer.save_freq=-1"), "ok")[0]


def test_free_space_of_a_folder_that_is_not_made_yet(tmp_path):
    assert doctor.free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_checkpoints_at_once_are_those_of_verls_manager(tmp_path, keep):
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    manager = object.__new__(BaseCheckpointManager)
    manager.previous_saved_paths, most = [], 0
    for step in range(6):
        manager.ensure_checkpoint_capacity(keep)
        (tmp_path / str(step)).mkdir()
        most = max(most, len(list(tmp_path.iterdir())))
        manager.register_checkpoint(str(tmp_path / str(step)), keep)
    assert checkpoints_on_disk(None, keep) == checkpoints_on_disk(6, keep) == most
    assert checkpoints_on_disk(1, keep) == 1 and checkpoints_on_disk(6, None) == 6


# ---------------------------------------------------------------------- packages


@pytest.fixture
def installed(monkeypatch):
    """Function: pretend that packages have these versions (None: not installed)."""

    def installed(**versions):
        def version(name):
            if name in versions and versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions.get(name) or importlib.metadata.version(name)

        monkeypatch.setattr(doctor, "version", version)

    return installed


def test_versions(compose_config, installed):
    engine = compose_config(f"{ROLLOUT}.name=vllm")
    installed(vllm="0.24.0", torch="2.11.0+cu130", transformers="5.9.0")
    assert [finding.level for finding in run_checks(engine, [check_versions])] == ["ok"]
    installed(vllm="0.24.0", torch="2.12.0", transformers="5.9.0")
    (warning,) = messages(check_versions, engine, "warning")
    assert "torch 2.12.0 is installed" in warning and "==2.11.0" in warning and "'.[vllm]'" in warning
    installed(vllm=None, torch="2.11.0", transformers="5.11.0")
    missing, too_new = sorted(messages(check_versions, engine, "error"), reverse=True)
    assert "vllm is not installed" in missing and "transformers 5.11.0" in too_new
    assert messages(check_versions, compose_config(), "warning") == [], "the hf rollout pins nothing"


def test_a_package_without_metadata(compose_config, installed, tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    installed(vllm=None, torch="2.11.0", transformers="5.9.0")
    engine = compose_config(f"{ROLLOUT}.name=vllm")
    assert messages(check_versions, engine, "error") == []
    (warning,) = messages(check_versions, engine, "warning")
    assert "vllm can be imported" in warning and "asks for ==" in warning


def test_what_the_doctor_needs_are_checks(overrides):
    base = {finding.where for finding in examine(overrides)}
    assert all(prerequisites.needs <= base for prerequisites in doctor.doctor_checks(None))

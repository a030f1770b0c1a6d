"""``gad eval`` end to end on a CPU: a real tiny model, real files, the command as a user calls it."""

import json
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.gad.cli import main
from recipe.gad.evaluation.sampling import (
    Settings,
    answers_hash,
    default_backend,
    load_rows,
    make_answers,
    read_answers,
    read_settings,
    recorded_settings,
)
from recipe.gad.evaluation.scores import compare, format_table, read_scores
from recipe.gad.run.atomic_io import alone_in
from recipe.gad.run.checkpoint import actor_folder

MAX_PROMPT, MAX_RESPONSE = 16, 6


@pytest.fixture(scope="module")
def settings(tiny_problem):
    def settings(**changes):
        values = {
            "model": str(tiny_problem / "model"),
            "val_files": (str(tiny_problem / "val.parquet"),),
            "backend": "hf",
            "max_prompt_length": MAX_PROMPT,
            "max_response_length": MAX_RESPONSE,
        }
        return Settings(**{**values, **changes})

    return settings


@pytest.fixture(scope="module")
def command(tiny_problem):
    """Function running ``gad eval`` in this process; returns the exit code."""

    def command(output_dir, *arguments):
        try:
            main(
                ["eval", "--model", f"{tiny_problem}/model", "--val_files", f"{tiny_problem}/val.parquet"]
                + ["--output_dir", str(output_dir), "--max_prompt_length", "16", "--max_response_length", "6"]
                + [str(argument) for argument in arguments]
            )
        except SystemExit as end:
            return end.code or 0

    return command


def gad(*arguments):
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code or 0


# ---------------------------------------------------------------------- answers


def test_answers_hold_what_was_sampled_and_the_teacher_as_in_training(settings, tiny_problem, tmp_path):
    answers = make_answers(settings(n=3), tmp_path)
    assert answers == read_answers(tmp_path)
    data = pq.read_table(tiny_problem / "val.parquet").to_pylist()
    assert [(line["index"], line["sample"]) for line in answers] == [(i, s) for i in range(len(data)) for s in range(3)]
    cut = 0
    for line in answers:
        row = data[line["index"]]
        words = row["teacher_response"].split()
        assert line["messages"] == row["content"] and line["data_source"] == "tiny"
        assert line["teacher"].split() == words[:MAX_RESPONSE]
        assert line["teacher_tokens"] == min(len(words) + 1, MAX_RESPONSE)  # one token per word, and <end>
        assert line["teacher_cut"] == (len(words) + 1 > MAX_RESPONSE)
        assert 1 <= line["student_tokens"] <= MAX_RESPONSE
        assert line["student_tokens"] == MAX_RESPONSE or not line["student_cut"]
        assert "<end>" not in line["student"] + line["teacher"]
        cut += line["teacher_cut"]
    assert 0 < cut < len(answers)
    assert len({line["student"] for line in answers if line["index"] == 0}) > 1
    assert read_settings(tmp_path)["n"] == 3


def test_prompts_are_those_of_the_chat_template(settings, tiny_problem):
    tokenizer = AutoTokenizer.from_pretrained(tiny_problem / "model")
    rows = load_rows(settings())
    data = pq.read_table(tiny_problem / "val.parquet").to_pylist()
    for row, source in zip(rows.rows, data, strict=True):
        expected = f"<bos> <user> {source['content'][0]['content']} <end> <assistant>".split()
        assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == expected
    assert rows.stop_ids == [tokenizer.eos_token_id]


def test_ids_behind_the_first_end_token_are_dropped(settings):
    rows = load_rows(settings())
    end, [a, b] = rows.stop_ids[0], rows.tokenizer.convert_tokens_to_ids(["well", "um"])
    line = rows.answer(0, 0, [a, b, end, a, end])
    assert (line["student"], line["student_tokens"], line["student_cut"]) == ("well um", 3, False)
    line = rows.answer(0, 0, [a, b, a])
    assert (line["student"], line["student_tokens"], line["student_cut"]) == ("well um well", 3, True)
    line = rows.answer(0, 0, [end])
    assert (line["student"], line["student_tokens"], line["student_cut"]) == ("", 1, False)


def test_greedy_answers_equal_an_argmax_loop_without_padding(settings, tiny_problem, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_problem / "model").eval()
    rows = load_rows(settings())
    for line in make_answers(settings(temperature=0.0), tmp_path):
        ids, answer = list(rows.rows[line["index"]]["prompt_ids"]), []
        while len(answer) < MAX_RESPONSE and not set(answer) & set(rows.stop_ids):
            with torch.no_grad():
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        assert line["student"] == rows.text(answer)
        assert line["student_tokens"] == len(answer)


def test_a_low_temperature_samples_what_greedy_search_finds(settings, tmp_path):
    greedy = [line["student"] for line in make_answers(settings(temperature=0.0), tmp_path / "greedy")]
    cold = [line["student"] for line in make_answers(settings(temperature=1e-4, n=2), tmp_path / "cold")]
    assert cold == [text for text in greedy for _ in range(2)]


def test_the_seed_decides_the_answers(settings, tmp_path):
    def texts(folder, **changes):
        return [line["student"] for line in make_answers(settings(**changes), tmp_path / folder)]

    assert texts("a", seed=1) == texts("b", seed=1)
    assert texts("a", seed=1) != texts("c", seed=2)


def test_answers_of_the_same_settings_are_reused_and_others_refused(settings, tmp_path):
    first = make_answers(settings(), tmp_path)
    stamp = (tmp_path / "answers.jsonl").stat().st_mtime_ns
    assert make_answers(settings(), tmp_path) == first
    assert (tmp_path / "answers.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"temperature: 0\.8 and 0\.5.*--overwrite"):
        make_answers(settings(temperature=0.5), tmp_path)
    assert read_answers(tmp_path) == first
    assert make_answers(settings(temperature=0.5), tmp_path, overwrite=True) != first
    assert read_settings(tmp_path)["temperature"] == 0.5


def test_a_retrained_model_or_changed_data_is_noticed(settings, tiny_problem, tmp_path):
    shutil.copytree(tiny_problem / "model", tmp_path / "model")
    shutil.copy(tiny_problem / "val.parquet", tmp_path / "val.parquet")
    changed = {"model": str(tmp_path / "model"), "val_files": (str(tmp_path / "val.parquet"),)}
    make_answers(settings(**changed), tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tiny_problem / "model").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model_written"):
        make_answers(settings(**changed), tmp_path / "out")
    make_answers(settings(**changed), tmp_path / "out", overwrite=True)
    shutil.copy(tiny_problem / "train.parquet", tmp_path / "val.parquet")
    with pytest.raises(ValueError, match="val_sha256"):
        make_answers(settings(**changed), tmp_path / "out")


def test_answers_that_were_cut_at_the_end_of_a_line_are_not_reused(settings, tmp_path):
    first = make_answers(settings(), tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(ValueError, match="answers.jsonl has changed since gad eval wrote it. Fix: run gad eval --over"):
        make_answers(settings(), tmp_path)
    assert make_answers(settings(), tmp_path, overwrite=True) == first


def test_two_evaluations_in_one_folder_are_refused(command, tmp_path, capsys):
    with alone_in(tmp_path, "gad eval"):
        assert command(tmp_path) == 2
    assert f"another gad eval uses {tmp_path}. Fix: wait for it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_no_answers(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "recipe.gad.evaluation.sampling._sample_hf", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        make_answers(settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    monkeypatch.undo()
    assert make_answers(settings(temperature=0.5), tmp_path)  # nothing to overwrite


def test_long_prompts_are_dropped_as_in_training(settings, tiny_problem, tmp_path):
    data = pq.read_table(tiny_problem / "val.parquet").to_pylist()
    lengths = [len(row["content"][0]["content"].split()) + 4 for row in data]  # <bos> <user> ... <end> <assistant>
    limit = sorted(lengths)[len(lengths) // 2]
    answers = make_answers(settings(max_prompt_length=limit), tmp_path)
    kept = [row["content"] for row, length in zip(data, lengths, strict=True) if length <= limit]
    assert [line["messages"] for line in answers] == kept
    assert len(kept) < len(data)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "sglang"}, "backend 'sglang': expected one of vllm, hf"),
        ({"backend": "vllm"}, "backend vllm: not installed"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": 0.0, "n": 2}, "greedy"),
        ({"n": 0}, "n 0"),
        ({"n": 100_000_000}, "n 100000000: expected a whole number from 1 to 10000"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"seed": -1}, "seed -1: expected a whole number from 0"),
        ({"max_response_length": 0}, "max_response_length 0"),
        ({"model": "./nowhere"}, "no such folder"),
    ],
)
def test_settings_out_of_range_are_refused(settings, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


def test_without_a_gpu_the_backend_is_hf():
    assert default_backend() == "hf"


# ---------------------------------------------------------------------- which model


def test_a_run_its_checkpoint_and_its_actor_name_the_actors_folder(tiny_problem, tmp_path, capsys):
    for step in (2, 10):
        shutil.copytree(tiny_problem / "model", tmp_path / f"run/global_step_{step}/actor/huggingface")
    newest = str(tmp_path / "run/global_step_10/actor/huggingface")
    for name in ("run", "run/global_step_10", "run/global_step_10/actor", "run/global_step_10/actor/huggingface"):
        assert actor_folder(str(tmp_path / name)) == newest
    (tmp_path / "run/global_step_10/actor/huggingface/model.safetensors").write_bytes(b"cut off")
    assert actor_folder(str(tmp_path / "run")) == str(tmp_path / "run/global_step_2/actor/huggingface")
    assert "skipped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="truncated"):
        actor_folder(str(tmp_path / "run/global_step_10"))


def test_hub_ids_stay_and_missing_folders_are_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/warmup").mkdir(parents=True)
    (tmp_path / "runs/warmup/gad_stage.json").touch()
    (tmp_path / "Qwen/Qwen3-8B").mkdir(parents=True)
    assert actor_folder("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for missing in (str(tmp_path / "nowhere"), "modell", "runs/gad/global_step_3", "~/nowhere", "runs/gad"):
        with pytest.raises(ValueError, match="no such folder"):
            actor_folder(missing)
    with pytest.raises(ValueError, match="holds no model"):
        actor_folder(str(tmp_path))


# ---------------------------------------------------------------------- what a run records

RUN_CONFIG = """
data:
  max_prompt_length: 14
  max_response_length: 5
  prompt_key: content
  teacher_key: null
  apply_chat_template_kwargs: {enable_thinking: false}
actor_rollout_ref:
  rollout:
    temperature: 1.0
    val_kwargs: {temperature: "${oc.select:data.unknown,0.7}"}
"""


@pytest.fixture
def run_folder(tiny_problem, tmp_path):
    """A run with one checkpoint and Hydra's record."""
    shutil.copytree(tiny_problem / "model", tmp_path / "run/global_step_2/actor/huggingface")
    (tmp_path / "run/hydra/.hydra").mkdir(parents=True)
    (tmp_path / "run/hydra/.hydra/config.yaml").write_text(RUN_CONFIG)
    return tmp_path / "run"


@pytest.mark.parametrize("inside", ["", "global_step_2", "global_step_2/actor", "global_step_2/actor/huggingface"])
def test_a_run_and_its_checkpoints_give_the_settings_of_its_validation(run_folder, inside):
    recorded = {
        "temperature": 0.7,
        "max_prompt_length": 14,
        "max_response_length": 5,
        "prompt_key": "content",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert recorded_settings(str(run_folder / inside)) == (run_folder, recorded)


def test_other_models_record_nothing(tiny_problem):
    assert recorded_settings(str(tiny_problem / "model")) == (None, {})
    assert recorded_settings("owner/name") == (None, {})


def test_the_command_takes_what_the_run_records_and_flags_win(run_folder, tiny_problem, tmp_path, capsys):
    data = ["--val_files", tiny_problem / "val.parquet", "--output_dir", tmp_path / "eval"]
    assert gad("eval", "--model", run_folder, *data, "--max_response_length", "6") == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("from the configuration")]
    assert line.startswith(f"from the configuration of {run_folder}: temperature 0.7, max_prompt_length 14, prompt_key")
    assert "max_response_length" not in line
    made = read_settings(tmp_path / "eval")
    assert (made["temperature"], made["max_prompt_length"], made["max_response_length"]) == (0.7, 14, 6)
    assert made["chat_template_kwargs"] == {"enable_thinking": False}
    assert made["teacher_key"] == Settings.teacher_key


def test_an_unreadable_record_is_an_error(run_folder, tiny_problem, tmp_path, capsys):
    (run_folder / "hydra/.hydra/config.yaml").write_text("data: [")
    data = ["--val_files", tiny_problem / "val.parquet", "--output_dir", tmp_path / "eval"]
    assert gad("eval", "--model", run_folder, *data) == 2
    assert "config.yaml is not readable YAML" in capsys.readouterr().err


# ---------------------------------------------------------------------- the command


def test_the_command_writes_scores_and_keeps_sections(command, tiny_problem, tmp_path, capsys, chat_server):
    assert command(tmp_path) == 0
    table = capsys.readouterr().out
    assert "ROUGE-L" in table and "two-sample" not in table
    answers, scores = read_answers(tmp_path), read_scores(tmp_path)
    lengths = [line["student_tokens"] for line in answers]
    assert scores["text"]["length"]["student"]["value"] == pytest.approx(sum(lengths) / len(lengths))

    assert command(tmp_path, "--two_sample_model", tiny_problem / "model", "--two_sample_seeds", "0,1") == 0
    assert "two-sample acc" in capsys.readouterr().out
    test = read_scores(tmp_path)["two_sample"]
    assert [row["seed"] for row in test["by_seed"]] == [0, 1]
    assert test["settings"]["model"] == str(tiny_problem / "model")

    chat_server.reply = lambda body, earlier: chat_server.answer(
        "Verdict: A" if "answer_A" in body["messages"][-1]["content"] else "Score: 4"
    )
    assert command(tmp_path, "--judge_model", "a judge", "--judge_base_url", chat_server.url) == 0
    table = capsys.readouterr().out
    assert "0 replies unparsable, 0 requests failed; the two orders disagree in 100.0%" in table
    assert "judge 1-10" in table and "4.00 [4.00, 4.00]" in table and "two-sample acc" in table
    scores = read_scores(tmp_path)
    assert scores["judge"]["pairwise"]["tie"]["value"] == 1
    assert scores["two_sample"] == test

    # other answers: what was said about the old ones is gone
    assert command(tmp_path, "--seed", "5", "--overwrite") == 0
    assert set(read_scores(tmp_path)) == {"answers_sha256", "text"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "missing --model, --val_files, --output_dir"),
        (["eval", "--model", "m"], "missing --val_files, --output_dir"),
        (["eval", "compare", "/nowhere/a", "/nowhere/b"], "no evaluation folder"),
        (["eval", "compare", "/nowhere/a"], "at least two"),
    ],
)
def test_unusable_arguments_end_with_a_message(arguments, message, capsys):
    assert gad(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--two_sample_seeds", "0,x", "--two_sample_model", "m/m"], "--two_sample_seeds '0,x'"),
        (["--chat_template_kwargs", "[1]"], "--chat_template_kwargs '[1]': expected a JSON object"),
        (["--judge_model", "j", "--judge_mode", "best"], "judge mode 'best'"),
        (["--teacher_key", "answer"], "has no column 'answer'"),
    ],
)
def test_unusable_options_end_with_a_message_before_anything_is_sampled(command, tmp_path, arguments, message, capsys):
    assert command(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from recipe.gad.cli import app; "
        "heavy = {'torch', 'transformers', 'verl', 'numpy', 'openai'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def evaluated(tiny_problem, settings, tmp_path_factory):
    """Folders a and b: two models, same data and settings."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = AutoModelForCausalLM.from_pretrained(tiny_problem / "model")
    shutil.copytree(tiny_problem / "model", folder / "other")
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    model.save_pretrained(folder / "other")
    for name, path in (("a", tiny_problem / "model"), ("b", folder / "other")):
        arguments = ["--max_prompt_length", "16", "--max_response_length", "6", "--output_dir", folder / name]
        assert gad("eval", "--model", path, "--val_files", tiny_problem / "val.parquet", *arguments) == 0
    return folder


def one_table(text):
    """Lines of a table whose blocks of columns are put side by side again."""
    assert max(map(len, text.splitlines())) <= 120
    first, *others = ([line.ljust(120) for line in block.splitlines()] for block in text.split("\n\n"))
    for other in others:
        assert [line.split()[:1] for line in other[1:4]] == [line.split()[:1] for line in first[1:4]]
        first = [line + more for line, more in zip(first, other, strict=False)] + other[len(first) :]
    return first


def test_compare_prints_a_row_per_model_and_writes_json(evaluated, tmp_path, capsys):
    assert gad("eval", "compare", evaluated / "a", evaluated / "b", "--output", tmp_path / "compare.json") == 0
    lines = one_table(capsys.readouterr().out)
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "teacher"]
    written = json.loads((tmp_path / "compare.json").read_text())
    assert gad("eval", "compare", evaluated / "a", evaluated / "b", "--json") == 0
    assert json.loads(capsys.readouterr().out) == written
    assert list(written) == ["a", "b"]
    assert written["b"]["model"] == str(evaluated / "other")
    value = read_scores(evaluated / "b")["text"]["rouge_l"]["student"]["value"]
    assert written["b"]["scores"]["text"]["rouge_l"]["student"]["value"] == value
    assert f"{value:.3f}" in lines[2]
    assert gad("eval", "compare", evaluated / "a", evaluated / "b", "--output", tmp_path / "compare.json") == 0
    scores = (evaluated / "a/scores.json").read_bytes()
    assert gad("eval", "compare", evaluated / "a", evaluated / "b", "--output", evaluated / "a/scores.json") == 2
    assert "scores.json exists, and another program wrote it. Fix: " in capsys.readouterr().err
    assert (evaluated / "a/scores.json").read_bytes() == scores


def test_compare_tests_the_differences_to_the_first(evaluated, tiny_problem, tmp_path, capsys):
    for name, model in (("a", tiny_problem / "model"), ("b", evaluated / "other")):
        shutil.copytree(evaluated / name, tmp_path / name)
        arguments = ["--max_prompt_length", "16", "--max_response_length", "6", "--output_dir", tmp_path / name]
        test = ["--two_sample_model", tiny_problem / "model", "--two_sample_seeds", "0,1"]
        assert gad("eval", "--model", model, "--val_files", tiny_problem / "val.parquet", *arguments, *test) == 0
    folders = tmp_path / "a", tmp_path / "b", evaluated / "b"
    assert gad("eval", "compare", *folders, "--output", tmp_path / "compare.json") == 0
    first, second, untested = json.loads((tmp_path / "compare.json").read_text()).values()
    assert "difference_to_first" not in first and set(untested["difference_to_first"]) == {"rouge_l"}
    found = second["difference_to_first"]

    def values(entry):
        return (
            entry["scores"]["text"]["rouge_l"]["student"]["value"],
            entry["scores"]["two_sample"]["accuracy"]["value"],
        )

    (rouge, accuracy), (rouge_b, accuracy_b) = values(first), values(second)
    assert found["rouge_l"]["value"] == pytest.approx(rouge_b - rouge)
    assert found["two_sample"]["value"] == pytest.approx(accuracy_b - accuracy)
    for difference in found.values():
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert 0 <= difference["p_value"] <= 1
    assert f"{found['rouge_l']['value']:+.3f} [" in capsys.readouterr().out


def test_compare_lets_a_judge_decide_between_two_models(evaluated, capsys, chat_server):
    def longer_wins(body, earlier):
        texts = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_", body["messages"][-1]["content"])
        a, b = map(len, texts)
        return chat_server.answer("Verdict: tie" if a == b else f"Verdict: {'A' if a > b else 'B'}")

    of_a, of_b = ([len(line["student"]) for line in read_answers(evaluated / name)] for name in ("a", "b"))
    wins = sum(b > a for a, b in zip(of_a, of_b, strict=True)) / len(of_a)
    assert 0 < wins < 1
    chat_server.reply = longer_wins
    judge = ("--judge_model", "a judge", "--judge_base_url", chat_server.url)
    assert gad("eval", "compare", evaluated / "a", evaluated / "b", *judge) == 0
    titles, a, b, teacher, note = one_table(capsys.readouterr().out)
    assert note.startswith(f"b: judge a judge: pairwise: {len(of_a)} pairs counted, 0 replies unparsable")
    start = titles.index("win vs a")
    assert (a[start:].split()[0], b[start:].split()[0], teacher[start:].split()[0]) == ("-", f"{wins:.3f}", "-")


def test_compare_names_what_differs(evaluated, settings, tmp_path):
    shutil.copytree(evaluated / "b", tmp_path / "b")
    record = read_settings(tmp_path / "b")
    (tmp_path / "b/settings.json").write_text(json.dumps({**record, "temperature": 0.7, "n": 2}))
    with pytest.raises(ValueError, match=r"temperature: 0\.8 and 0\.7; n: 1 and 2\. Fix"):
        compare([evaluated / "a", tmp_path / "b"])
    (tmp_path / "b/settings.json").write_text(json.dumps({**record, "val_sha256": ["0"]}))
    with pytest.raises(ValueError, match="val_sha256"):
        compare([evaluated / "a", tmp_path / "b"])


def test_compare_refuses_folders_without_scores_of_their_answers(evaluated, tmp_path):
    shutil.copytree(evaluated / "b", tmp_path / "b")
    answers = read_answers(tmp_path / "b")
    (tmp_path / "b/answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers[:-1]))
    with pytest.raises(ValueError, match="answers.jsonl has changed since gad eval wrote it. Fix: "):
        compare([evaluated / "a", tmp_path / "b"])
    record = {**read_settings(tmp_path / "b"), "answers_sha256": answers_hash(tmp_path / "b")}
    (tmp_path / "b/settings.json").write_text(json.dumps(record))  # as if gad eval had written these answers
    with pytest.raises(ValueError, match=r"has no scores\.json for its answers"):
        compare([evaluated / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="at least two different"):
        compare([evaluated / "a", evaluated / "a"])


@pytest.mark.parametrize(
    "damage",
    [
        {"text": 3},
        {"text": {}},
        {"text": None},
        {"text": {"rouge_l": {"student": {"value": "x"}}}},
        {"two_sample": None},
        {"two_sample": {"wins_by_seed": []}},
        {"two_sample": {"wins_by_seed": [], "accuracy": 5, "accuracy_std": "x"}},
        {"judge": []},
        {"judge": {"settings": 5}},
        {"judge": {"score": {}}},
        {"judge": {"pairwise": {"win": 3}}},
    ],
)
def test_compare_names_damaged_scores(evaluated, tmp_path, capsys, damage):
    shutil.copytree(evaluated / "b", tmp_path / "b")
    scores = {**read_scores(evaluated / "b"), **damage}
    (tmp_path / "b/scores.json").write_text(json.dumps(scores))
    assert gad("eval", "compare", evaluated / "a", tmp_path / "b") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/b/scores.json does not hold what gad eval writes. Fix: delete it")


@pytest.mark.parametrize("line", ["5", "[]", '{"index": 0}', "[" * 100_000, "{"])
def test_answers_that_gad_eval_did_not_write_are_named(evaluated, tmp_path, capsys, line):
    shutil.copytree(evaluated / "b", tmp_path / "b")
    (tmp_path / "b/answers.jsonl").write_text(f"{line}\n")
    assert gad("eval", "compare", evaluated / "a", tmp_path / "b") == 2
    assert f"error: {tmp_path}/b/answers.jsonl" in capsys.readouterr().err


def test_compare_refuses_two_sample_tests_of_different_bases(evaluated, tmp_path):
    for name, base in (("a", "one"), ("b", "two")):
        shutil.copytree(evaluated / name, tmp_path / name)
        scores = {**read_scores(tmp_path / name), "two_sample": {"settings": {"model": base}}}
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(ValueError, match="two_sample model: 'one' and 'two'"):
        compare([tmp_path / "a", tmp_path / "b"])


def test_tables_are_aligned():
    table = format_table({"x": {"one": "1", "two": "22"}, "longer": {"two": "2"}})
    assert table.splitlines() == ["        one  two", "x       1    22", "longer  -    2"]
    table = format_table({"x": {"one": "1", "two": "22"}, "longer": {"two": "2"}}, width=12)
    assert table.splitlines() == ["        one", "x       1", "longer  -", "", "        two", "x       22", "longer  2"]

"""gad report: one self-contained page from the logs of runs."""

import io
import json
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from recipe.gad.cli import main
from recipe.gad.monitor.report import (
    AGAINST_IMITATION,
    COLOURS,
    SECTIONS,
    THEMES,
    _band,
    _draw,
    find_runs,
    write_report,
)

EVIL = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=a()> & \"q\" \ud800"


def write_run(folder: Path, stage: str = "gad", steps: int = 30, seed: int = 0, text: str = "well {} right") -> Path:
    """A run folder as verl writes it; ``stage`` "warmup" has imitation losses, "gad" those of the policy."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    rows = [{"step": 0, "data": {"val-aux/toy/rouge_l/mean@1": 0.3}}]
    for step in range(1, steps + 1):
        data = {name: rng.random() for name in ("critic/d_loss", "critic/score_gap", "critic/grad_norm")}
        data |= {"critic/d_acc": 0.9 - 0.2 * step / steps, "actor/entropy": 0.9, "actor/grad_norm": 1.0}
        data |= {"critic/student_value_mean": -1.0, "critic/teacher_value_mean": 1.0, "critic/score_length_corr": 0.1}
        for side in ("", "teacher_"):
            data |= {f"{side}response_length/mean": 10 + rng.random(), f"{side}response_length/cut_ratio": 0.0}
        if stage == "gad":
            data |= {"actor/pg_loss": 0.0, "actor/pg_clipfrac": 0.15, "actor/ppo_kl": 0.001, "actor/kl_loss": 0.1}
            data |= {"gad/policy_gate": 0.5, "gad/leading": 0.0}
            data |= {"critic/replay_d_acc": 0.8, "critic/d_prefix_acc": 0.7}
        else:
            data |= {"actor/sft_loss": 2.0 / step}
        data |= {"timing_s/gen": 1.0, "timing_s/update_actor": 0.5, "timing_s/step": 1.6, "perf/throughput": 500.0}
        data |= {"actor/perf/max_memory_allocated_gb": 30.0, "gad/missing_rollouts": 0.0}
        if step % 10 == 0:
            data["val-aux/toy/rouge_l/mean@1"] = 0.3 + step / 100
            data |= {"val-aux/d_acc": 0.8, "val-aux/two_sample": 0.7}
        rows.append({"step": step, "data": data})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "da')
    (folder / "val_samples").mkdir()
    for step in range(0, steps + 1, 10):
        dump = [{"input": x, "output": text.format(x), "gts": f"well {x} right", "rouge_l": 0.5} for x in "abc"]
        (folder / f"val_samples/{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dump))
    settings = folder / "hydra/.hydra"
    settings.mkdir(parents=True)
    (settings / "overrides.yaml").write_text(f"- data.seed={seed}\n- gad.stage={stage}\n- +ray_kwargs.a.KEY=secret\n")
    return folder


class Page(HTMLParser):
    """Tags, ids, links, texts and headings of a page; complains about tags that do not nest."""

    VOID = {"meta", "img", "source", "br", "link", "input"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.assets: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        assert not any(name.startswith("on") for name in values), values
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.assets += [values[name] for name in ("src", "srcset") if name in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The page of one GAD run whose answers are hostile."""
    folder = tmp_path_factory.mktemp("one")
    run = write_run(folder / "a$b<i>", text="{}" + EVIL)
    write_report([run], folder / "report.html")
    return folder


def test_page_is_whole_and_self_contained(one):
    page = Page(one / "report.html")
    expected = {panel.name for panels in SECTIONS.values() for panel in panels} - {"sft_loss", "dpo"} | {"step_time"}
    assert expected <= set(page.ids)
    assert {"health", "summary", "samples", "settings"} <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert len(page.assets) == 2 * len(expected)
    assert all(asset.startswith("data:image/png;base64,") for asset in page.assets)
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links) and page.links
    assert not re.search(r"@import|url\(", page.source) and "link" not in page.tags
    assert any("left out" in text and "Imitation loss" in text for text in page.texts)
    pngs = {path.stem: path.read_bytes() for path in (one / "report_png").iterdir()}
    assert set(pngs) == expected and all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in pngs.values())
    assert sorted(path.name for path in one.iterdir()) == ["a$b<i>", "report.html", "report_png"]  # nothing temporary


def test_samples_are_text(one):
    page = Page(one / "report.html")
    assert "script" not in page.tags and page.tags.count("img") == page.tags.count("picture")
    shown = EVIL.replace("\ud800", "\\ud800")
    assert page.texts.count("a" + shown) == 4  # steps 0, 10, 20, 30
    assert "i" not in page.tags and "a$b<i>" in page.texts


def test_settings_without_the_environment(one):
    page = Page(one / "report.html")
    assert "data.seed" in page.texts and "secret" not in page.source


def test_two_runs_are_overlaid(tmp_path):
    runs = [write_run(tmp_path / name / "gad", seed=seed) for seed, name in enumerate("xy")]
    found = find_runs(runs)
    assert [(run.label, run.offset, run.last_step) for run in found] == [("x/gad", 0, 30), ("y/gad", 0, 30)]
    write_report(runs, tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    assert page.tags.count("picture") == len(list((tmp_path / "both_png").iterdir()))
    table = page.source[page.source.index('id="settings"') :]
    assert re.search(r'class="differs"><td>data.seed</td><td class="value">0</td><td class="value">1</td>', table)
    assert re.search(r"<tr><td>gad.stage</td>", table)


def test_every_run_is_in_the_picture(tmp_path):
    """Pixels in the colour of the second run are there exactly if it is; odd folder names are only names."""
    runs = find_runs([write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("_a$b", "_c"))])
    panel = next(panel for panel in SECTIONS["Discriminator"] if panel.name == "score_gap")
    second = tuple(int(COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))
    for theme, chosen, expected in (("light", runs[:1], False), ("light", runs, True), ("dark", runs, True)):
        picture = Image.open(io.BytesIO(_draw(panel, chosen, theme))).convert("RGB")
        assert (second in {colour for _, colour in picture.getcolors(1 << 24)}) is expected
        background = tuple(int(THEMES[theme][0][i : i + 2], 16) for i in (1, 3, 5))
        assert picture.getpixel((0, 0)) == background


def test_pipeline_folder_counts_on_from_the_warmup(tmp_path):
    base = tmp_path / "pipeline"
    for stage in ("gad", "warmup", "seqkd"):
        write_run(base / stage, stage, steps=20)
    (base / "gad-2").mkdir()
    (base / "gad-2/metrics.jsonl").write_text("")  # has just started
    found = find_runs([base])
    assert [(run.label, run.offset) for run in found] == [("seqkd", 0), ("warmup", 0), ("gad", 20)]
    assert [AGAINST_IMITATION in run.notes for run in found] == [False, False, True]
    write_report([base], tmp_path / "report.html")
    assert {"sft_loss", "pg_loss"} <= set(Page(tmp_path / "report.html").ids)


def test_a_gad_run_counts_on_from_the_step_of_the_run_that_it_started_from(tmp_path):
    warmup, gad = write_run(tmp_path / "w", "warmup", steps=20), write_run(tmp_path / "g", "gad", steps=10)
    record = gad / "hydra/.hydra/config.yaml"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"actor_rollout_ref: {{model: {{path: {warmup}/global_step_15/actor/huggingface}}}}\n")
    assert [run.offset for run in find_runs([gad, warmup])] == [15, 0]
    assert [run.offset for run in find_runs([gad])] == [0]
    record.write_text(f"actor_rollout_ref: {{model: {{path: {tmp_path}/other/global_step_15/actor/huggingface}}}}\n")
    assert [run.offset for run in find_runs([gad, warmup])] == [0, 0]
    record.write_text("actor_rollout_ref: 5\n")
    assert [run.offset for run in find_runs([gad, warmup])] == [0, 0]


def test_the_band_of_clipped_tokens_is_that_of_the_recorded_loss(tmp_path):
    ppo, gspo = write_run(tmp_path / "ppo"), write_run(tmp_path / "gspo")
    record = gspo / "hydra/.hydra/config.yaml"
    record.write_text("actor_rollout_ref: {actor: {policy_loss: {loss_mode: gspo}}}\n")
    for run in (ppo, gspo):
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text.replace('"actor/pg_clipfrac": 0.15', '"actor/pg_clipfrac": 0.35'))
    runs = find_runs([ppo, gspo])
    assert [[finding.what for finding in run.findings] for run in runs] == [["Many tokens are clipped"], []]
    (panel,) = (panel for panel in SECTIONS["Policy"] if panel.name == "pg_clipfrac")
    bands = [_band(panel, shown) for shown in (runs[:1], runs[1:], runs)]
    assert bands == [(0.0, 0.3), (0.02, 0.4), None]  # runs of different losses have no band in common


def test_findings_are_on_the_page(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "r+", encoding="utf-8") as file:
        rows = [json.loads(text) for text in file.read().splitlines()[:-1]]
        rows[5]["data"]["actor/pg_loss"] = None  # NaN, as the logger writes it
        file.seek(0)
        file.truncate()
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (written,) = write_report([run], tmp_path / "report.html")
    assert [finding.what for finding in written.findings] == ["NaN or infinite numbers"]
    texts = Page(tmp_path / "report.html").texts
    assert "Error: NaN or infinite numbers" in texts
    assert "actor/pg_loss in 1 steps, first 5, last 5." in texts


def test_few_metrics_and_a_broken_dump(tmp_path):
    (tmp_path / "run/val_samples").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "data": {"actor/sft_loss": 2.0}}\n')
    (tmp_path / "run/val_samples/1.jsonl").write_text("not JSON\n")
    (tmp_path / "report_png").mkdir()
    (tmp_path / "report_png/d_acc.png").write_bytes(b"of an earlier report")
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.tags.count("picture") == 1 and "samples" not in page.ids and "settings" not in page.ids
    assert any("samples of step 1 are left out" in text for text in page.texts)
    assert [path.name for path in (tmp_path / "report_png").iterdir()] == ["sft_loss.png"]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=5)
    with pytest.raises(SystemExit) as exit:
        main(["report", "run"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "run: 5 steps. Too few steps to judge: 5 of 20." in printed and "report: report.html" in printed
    assert (tmp_path / "report.html").is_file()
    with pytest.raises(SystemExit) as exit:
        main(["report", "run"])
    assert exit.value.code == 0, "its own report is replaced"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "empty holds no run"),
        (["run", "run"], "given twice"),
        (["torn"], "no complete line"),
        (["run", "--output", "empty"], "empty is a folder. Fix: name a file with --output"),
        (["run", "--output", "run/metrics.jsonl"], "run/metrics.jsonl exists, and another program wrote it. Fix: name"),
        (["run", "--output", "link"], "link is a link, expected a file. Fix: name a new file"),
        (["run", "--output", "pipe"], "pipe is a device or a pipe, expected a file. Fix: name a new file"),
        (["run", "--output", "/dev/full"], "/dev/full is a device or a pipe"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", steps=2)
    for name, text in (("empty/other.txt", "x"), ("torn/metrics.jsonl", '{"step"')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "run/metrics.jsonl")
    os.mkfifo(tmp_path / "pipe")
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as exit:
        main(["report", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "pipe", "run", "torn"]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics and (tmp_path / "link").is_symlink()

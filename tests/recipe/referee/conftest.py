"""A small plan, and results of evaluations as gad eval leaves them, without a model."""

import json
import random

import pytest

from recipe.gad.evaluation.scores import text_section, update_scores
from recipe.gad.referee.plan import parse_plan


def plan_value(**changes):
    """What the YAML file of a plan holds; a changed value of None takes a key out."""
    imitation = {"seqkd": {"steps": 20}}
    value = {
        "model": "student",
        "train_files": "train.parquet",
        "val_files": "val.parquet",
        "device": "cpu",
        "seeds": [0, 1],
        "train_batch_size": 8,
        "control": "seqkd",
        "arms": {
            "base": [],
            "seqkd": [imitation, {"seqkd": {"steps": 30, "save_every": 10}}],
            "gad": [imitation, {"discriminator": {"steps": 10}}, {"gad": {"steps": 20, "save_every": 10}}],
        },
        **changes,
    }
    return {key: entry for key, entry in value.items() if entry is not None}


@pytest.fixture
def plan():
    return parse_plan(plan_value())


@pytest.fixture
def write_evaluation():
    """Function that writes the folder of an evaluation; ``quality`` in [0, 1] is the share of right words."""

    def write(evaluation, quality, prompts=24, wins=None, seed=0):
        rng = random.Random(f"{evaluation.name} {seed}")
        answers = []
        for index in range(prompts):
            teacher = [f"word{index + i}" for i in range(8)]
            student = [word if rng.random() < quality else "wrong" for word in teacher]
            texts = {"teacher": " ".join(teacher), "student": " ".join(student)}
            sizes = {"teacher_tokens": 9, "student_tokens": 9, "teacher_cut": False, "student_cut": False}
            messages = [{"role": "user", "content": f"prompt {index}"}]
            answers.append({"index": index, "sample": 0, "data_source": "toy", "messages": messages, **texts, **sizes})
        evaluation.folder.mkdir(parents=True)
        lines = "".join(json.dumps(answer) + "\n" for answer in answers)
        (evaluation.folder / "answers.jsonl").write_text(lines)
        settings = {"model": evaluation.model, "model_written": None, "temperature": 0.8, "val_sha256": ["x"]}
        (evaluation.folder / "settings.json").write_text(json.dumps(settings))
        sections = {"text": text_section(answers, 0)}
        if wins is not None:
            values = [float(rng.random() < wins) for _ in answers]
            sections["two_sample"] = {"wins_by_seed": [values, values[::-1]], "settings": {}}
        update_scores(evaluation.folder, **sections)

    return write

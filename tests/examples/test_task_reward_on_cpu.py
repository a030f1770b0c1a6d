"""examples/gad/task_reward: the reward function and the data by hand; weights of data sources on a command line."""

import random
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

FOLDER = Path(__file__).resolve().parents[2] / "examples/gad/task_reward"


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import problem

    yield problem
    for name in ("problem", "json_form"):
        sys.modules.pop(name)


def test_the_reward_asks_for_json_with_exactly_these_keys(problem):
    def score(text):
        return problem.compute_score(solution_str=text, data_source="json", ground_truth="", extra_info={})

    assert score('{ "name" : "a" , "city" : "b" }') == score('{"city": 1, "name": null}') == 1.0
    for wrong in ('{"name": "a"}', '{"name": "a", "city": "b", "age": 3}', '{"name": "a", "city": "b"', "[]", "7", ""):
        assert score(wrong) == 0.0, wrong


def test_the_teacher_names_the_letters_in_every_form_and_keeps_the_form_in_two_of_three(problem):
    rng = random.Random(0)
    answers = [problem.teacher_answer("c", "f", rng) for _ in range(2000)]
    assert all(problem.letters_right("c f", answer) for answer in answers)
    assert not problem.letters_right("f c", answers[0]) and not problem.letters_right("c f", '{ "name" : "c" }')
    right = sum(problem.compute_score(answer) for answer in answers) / len(answers)
    assert right == pytest.approx(0.65, abs=0.04)


def test_weights_of_data_sources_can_be_given_on_the_command_line(compose_config):
    config = compose_config("gad.task_reward.weight={math: 0.7, chat: 0}")
    assert OmegaConf.to_container(config.gad.task_reward.weight) == {"math": 0.7, "chat": 0}

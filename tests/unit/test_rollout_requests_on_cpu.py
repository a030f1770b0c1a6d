"""What the single-turn agent loop asks of each rollout engine."""

import asyncio
from types import SimpleNamespace

import pytest

from verl.experimental.agent_loop import single_turn_agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


def asked(monkeypatch, rollout: str, trainer_mode: str, **changed) -> dict:
    """The sampling parameters that reach the stock loop, for a row with fields changed."""
    seen = {}

    async def stock_run(self, sampling_params, **kwargs):
        seen.update(sampling_params)
        return SimpleNamespace(reward_score=None)

    monkeypatch.setattr(single_turn_agent_loop._StockSingleTurnAgentLoop, "run", stock_run)
    loop = object.__new__(SingleTurnAgentLoop)
    loop.config = SimpleNamespace(trainer=SimpleNamespace(v1=SimpleNamespace(trainer_mode=trainer_mode)))
    loop.rollout_config = SimpleNamespace(name=rollout, seed=0)
    row = {"global_steps": 1, "session_id": 0, "index": 0, "raw_prompt": [{"role": "user", "content": "a"}], **changed}
    given = {"temperature": 0.8, "logprobs": True}
    asyncio.run(loop.run(given, **row))
    assert given == {"temperature": 0.8, "logprobs": True}, "the caller's parameters serve other samples too"
    return {name: value for name, value in seen.items() if name not in given}


@pytest.mark.parametrize("trainer_mode", ["gad", "sync"])
def test_trainers_that_wait_for_every_answer_ask_vllm_for_whole_ones(monkeypatch, trainer_mode):
    assert asked(monkeypatch, "vllm", trainer_mode) == {"whole_answers": True}


@pytest.mark.parametrize("trainer_mode", ["colocate_async", "separate_async"])
def test_trainers_that_interrupt_answers_do_not(monkeypatch, trainer_mode):
    assert asked(monkeypatch, "vllm", trainer_mode) == {}


def test_other_engines_are_not_asked_for_what_they_do_not_know(monkeypatch):
    assert asked(monkeypatch, "sglang", "gad") == {}
    assert list(asked(monkeypatch, "hf", "gad")) == ["seed"]


def test_every_sample_of_every_row_has_a_seed_that_repeats(monkeypatch):
    def seed(**changed):
        return asked(monkeypatch, "hf", "gad", **changed)["seed"]

    others = [{"index": 1}, {"session_id": 1}, {"global_steps": 2}, {"raw_prompt": [{"role": "user", "content": "b"}]}]
    assert len({seed(), *(seed(**changed) for changed in others)}) == 5
    assert seed() == seed()

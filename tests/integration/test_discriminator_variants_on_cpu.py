"""Switches of the discriminator on real engine workers, each against an independent computation."""

import pytest
import torch
import transfer_queue as tq

from recipe.gad.run.log import VAL_D_ACC
from recipe.gad.training.lead import DiscriminatorLead
from tests.integration.test_gad_step_on_cpu import hf_model, score


class Spy:
    """A replay buffer that notes (prompt, student, teacher) of every validation sample."""

    def __init__(self, replay_buffer):
        self.replay_buffer, self.rows = replay_buffer, []

    def sample(self, **arguments):
        batch, metrics = self.replay_buffer.sample(**arguments)
        data = tq.kv_batch_get(keys=batch.keys, partition_id="val")
        rows = zip(data["prompts"].unbind(), data["responses"].unbind(), list(data["teacher_response"]), strict=True)
        self.rows += rows
        return batch, metrics


# ---------------------------------------------------------------------- accuracy on validation prompts


def test_validation_accuracy_equals_huggingface_and_changes_nothing_else(live, monkeypatch):
    spy, tokenizer = Spy(live.trainer.replay_buffer), live.trainer.tokenizer
    for _ in range(3):  # else D prefers neither side
        live.step()
    live.set(gad__val_d_acc=False)
    without, weights = live.trainer._validate(), live.weights("critic")
    live.set(gad__val_d_acc=True)
    monkeypatch.setattr(live.trainer, "replay_buffer", spy)
    metrics = live.trainer._validate()
    accuracy = metrics.pop(VAL_D_ACC)
    assert metrics == without and metrics
    critic, wins = hf_model(live, "critic"), []
    for prompt, student, text in spy.rows:
        teacher = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        gap = score(critic, prompt, teacher) - score(critic, prompt, student)
        wins.append(0.5 if abs(gap) < 1e-6 else float(gap > 0))
    assert len(wins) == 8 and accuracy == pytest.approx(sum(wins) / 8)
    assert 0.0 < accuracy
    assert all(torch.equal(value, weights[name]) for name, value in live.weights("critic").items())
    assert not any((tq.kv_list() or {}).values()), "rows of the validation stay in the queue"


# ---------------------------------------------------------------------- the discriminator's lead


def test_the_lead_delays_exactly_the_actor_and_survives_a_checkpoint(live, tmp_path, monkeypatch):
    trainer = live.trainer
    metrics, _ = live.step()
    assert "gad/leading" not in metrics and "actor/pg_loss" in metrics
    first = trainer.global_steps
    monkeypatch.setattr(trainer, "_lead", DiscriminatorLead(first + 50, 1, 0.01, test_freq=first))
    actor, critic = live.weights("actor"), live.weights("critic")
    metrics, _ = live.step()
    assert metrics["gad/leading"] == 1.0 and "actor/pg_loss" not in metrics
    assert all(torch.equal(actor[name], value) for name, value in live.weights("actor").items())
    assert any(not torch.equal(critic[name], value) for name, value in live.weights("critic").items())

    trainer._lead.values[0] = 0.9  # the validation before training
    live.set(trainer__default_local_dir=str(tmp_path))
    trainer.global_steps = first
    trainer._save_checkpoint()
    noted = trainer._validate()[VAL_D_ACC]  # at a step of test_freq, after the checkpoint
    trainer._lead.values = {}
    live.set(trainer__resume_mode="resume_path", trainer__resume_from_path=f"{tmp_path}/global_step_{first}")
    trainer._load_checkpoint()
    assert trainer.global_steps == first and trainer._lead.values == {0: 0.9, first: noted}
    live.set(trainer__resume_mode="disable")

    trainer._lead.values[first] = 0.8  # not above 0.9: the lead is over
    trainer.global_steps = first + 1
    metrics, _ = live.step()
    assert metrics["gad/leading"] == 0.0 and "actor/pg_loss" in metrics
    assert any(not torch.equal(actor[name], value) for name, value in live.weights("actor").items())

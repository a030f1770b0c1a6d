"""How long the discriminator leads (recipe/gad/training/lead.py): the last step of it, by hand."""

import os

import pytest
import torch

from recipe.gad.run.findings import InputError
from recipe.gad.training.lead import DiscriminatorLead
from recipe.gad.training.state import load_state, save_state


def last_leading_step(lead, validation=None, training=None, steps=100):
    """Step by step as the trainer does: training, decision, validation."""
    led = []
    for step in range(steps):
        if step:
            lead.note_training(step, training(step) if training else 0.5)
            led += [step] if lead.leads(step) else []
        if validation and step % 10 == 0:
            lead.note_validation(step, validation[step // 10] if step // 10 < len(validation) else 0.0)
    assert led == list(range(1, len(led) + 1)), "it never begins again"
    return len(led)


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ([0.6, 0.7, 0.8, 0.805, 0.805, 0.9], 40),  # 0.805 is less than 0.01 above 0.8, twice: steps 30 and 40
        ([0.6, 0.7, 0.8, 0.805, 0.815, 0.9, 0.9, 0.9], 70),  # 0.815 is a rise from 0.8
        ([0.9, 0.8, 0.7], 20),
        ([0.1 * i for i in range(10)], 80),  # it rises to max_steps
    ],
)
def test_it_ends_when_validation_accuracy_stops_rising_or_at_max_steps(values, last):
    assert last_leading_step(DiscriminatorLead(80, 2, 0.01, test_freq=10), values) == last


def test_without_validation_ten_steps_count_as_one_value():
    # means of ten steps: .7, .8, .8, .8; the second without a rise is complete in step 40, whose decision sees it
    lead = DiscriminatorLead(80, 2, 0.01)
    assert last_leading_step(lead, training=lambda step: (0.7 if step <= 10 else 0.8) + 0.2 * (-1) ** step) == 39


def test_off_it_never_leads():
    assert last_leading_step(DiscriminatorLead(0, 2, 0.01), training=lambda step: 1.0) == 0


def test_a_resumed_run_decides_the_same_and_the_first_value_of_a_step_counts(tmp_path):
    lead, resumed = (DiscriminatorLead(80, 2, 0.01, test_freq=10) for _ in range(2))
    for step, value in ((0, 0.6), (10, 0.7), (20, 0.7)):
        lead.note_validation(step, value)
    save_state(tmp_path / "global_step_20", {"discriminator_lead": lead.state_dict()})
    resumed.load_state_dict(load_state(tmp_path / "global_step_20", {"discriminator_lead"})["discriminator_lead"])
    resumed.note_validation(20, 0.9)  # validation before training, with other samples
    resumed.note_validation(25, 0.9)  # resumed from a step at which the first run did not validate
    for run in (lead, resumed):
        assert run.leads(30)
        run.note_validation(30, 0.7)
        assert not run.leads(31)
    assert lead == resumed


def test_state_of_a_part_that_was_off_is_left_out_with_a_warning(tmp_path, caplog):
    save_state(tmp_path, {})
    assert not list(tmp_path.iterdir()), "nothing is switched on, so there is no file"
    assert load_state(tmp_path, {"replay"}) == {} and "no state of replay" in caplog.text


class Shell:
    """Runs a command if it is unpickled."""

    def __reduce__(self):
        return os.system, ("exit 7",)


def test_a_state_file_that_is_damaged_or_holds_code_is_refused(tmp_path):
    save_state(tmp_path, {"lead": {"best": torch.tensor(0.5)}})
    file = tmp_path / "gad_state.pt"
    whole = file.read_bytes()
    for damage in (whole[:-200], whole[:3], b""):
        file.write_bytes(damage)
        with pytest.raises(InputError, match=r"gad_state\.pt is damaged.*Fix: resume from another checkpoint"):
            load_state(tmp_path, {"lead"})
    save_state(tmp_path, {"lead": Shell()})
    with pytest.raises(InputError, match="gad_state"):
        load_state(tmp_path, {"lead"})

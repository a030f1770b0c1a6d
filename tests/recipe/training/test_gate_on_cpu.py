"""The confidence gate (recipe/gad/training/gate.py): expected values by hand."""

import pytest

from recipe.gad.training.gate import PolicyGate


def test_the_gate_follows_the_running_mean_of_the_accuracy():
    gate, factors = PolicyGate(0.2), []
    for accuracy in (0.8, 0.6, 0.0, 1.0):
        gate.note(accuracy)
        factors.append(gate.factor)
    # means: 0.8, 0.72 + 0.06 = 0.78, 0.702, 0.6318 + 0.1
    assert gate.accuracy == pytest.approx(0.7318)
    assert factors == [1.0, 1.0, 1.0, 1.0]
    for accuracy, factor in ((0.6, 0.5), (0.65, 0.75), (0.5, 0.0), (0.3, 0.0), (0.7, 1.0)):
        gate = PolicyGate(0.2)
        gate.note(accuracy)
        assert gate.factor == pytest.approx(factor)


def test_a_gate_that_is_off_or_knows_nothing_yet_is_open():
    gate = PolicyGate(0.0)
    gate.note(0.4)
    assert gate.factor == 1.0 == PolicyGate(0.1).factor


def test_a_resumed_gate_goes_on_with_the_same_numbers():
    whole, first = PolicyGate(0.3), PolicyGate(0.3)
    for accuracy in (0.71, 0.64):
        whole.note(accuracy)
        first.note(accuracy)
    resumed = PolicyGate(0.3, first.accuracy)
    for accuracy in (0.55, 0.52):
        whole.note(accuracy)
        resumed.note(accuracy)
    assert resumed == whole

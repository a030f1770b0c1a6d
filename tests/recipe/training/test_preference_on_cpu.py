"""DPO: loss and gradient against hand-written formulas in float64, and the stored answers of the start policy."""

import math

import pytest
import torch
from tensordict import TensorDict

from recipe.gad.training import preference
from recipe.gad.training.trajectory import TEACHER_IDS
from verl.utils import tensordict_utils as tu

POLICY, REFERENCE = [-10.0, -12.0, -9.0, -20.0, -5.0, -6.5], [-11.0, -11.5, -9.5, -19.0, -5.0, -4.0]
BETA = 0.3


def values(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def by_hand(policy, reference, weights, n):
    """Equation 7 of arXiv 2305.18290 pair by pair, with its derivatives by hand: loss, gradient, accuracy, margin."""
    loss, accuracy, margin, gradient = 0.0, 0.0, 0.0, [0.0] * len(policy)
    for teacher in range(0, len(policy), n + 1):
        for student in range(teacher + 1, teacher + n + 1):
            chosen, rejected = (policy[i] - reference[i] for i in (teacher, student))
            gap = BETA * (chosen - rejected)
            loss += weights[student] * math.log1p(math.exp(-gap))
            slope = weights[student] * BETA / (1 + math.exp(gap))
            gradient[teacher] -= slope
            gradient[student] += slope
            accuracy += weights[student] * (1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
            margin += weights[student] * gap
    return loss, gradient, accuracy, margin


@pytest.mark.parametrize(
    "weights",
    [[0, 1 / 4, 1 / 4, 0, 1 / 4, 1 / 4], [0, 1 / 3, 1 / 3, 0, 1 / 3, 0]],
    ids=["all answers", "one is missing"],
)
def test_loss_and_gradient_are_those_of_the_paper(weights):
    policy = values(POLICY).requires_grad_()
    loss, found = preference.compute_dpo_loss(policy, values(REFERENCE), values(weights), n=2, beta=BETA)
    [gradient] = torch.autograd.grad(loss, policy)
    expected = by_hand(POLICY, REFERENCE, weights, 2)
    assert loss.item() == pytest.approx(expected[0], rel=1e-6)
    assert gradient.tolist() == pytest.approx(expected[1], rel=1e-5)
    got = [found[name].aggregate() for name in ("dpo_loss", "dpo_acc", "dpo_margin")]
    assert [float(value) for value in got] == pytest.approx([expected[0], *expected[2:]], rel=1e-5)


def test_without_a_change_of_the_policy_the_loss_is_log_2_and_accuracy_a_half():
    weights = values([0, 0.25, 0.25, 0, 0.25, 0.25])
    loss, found = preference.compute_dpo_loss(values(POLICY), values(POLICY), weights, n=2, beta=BETA)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert float(found["dpo_acc"].aggregate()) == 0.5 and float(found["dpo_margin"].aggregate()) == 0.0


def test_answers_of_thousands_of_tokens_keep_the_digits_of_a_small_difference():
    policy, reference = values([-9000.001, -8000.0]), values([-9000.0, -8000.0])
    _, found = preference.compute_dpo_loss(policy, reference, values([0, 1]), n=1, beta=1.0)
    assert float(found["dpo_margin"].aggregate()) == pytest.approx(-0.001, rel=1e-4)


def jagged(rows, dtype=torch.float64):
    return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


def test_log_probability_of_an_answer_is_the_sum_over_the_tokens_of_the_policy():
    log_probs, mask = jagged([[-1.0, -2.0, -4.0], [-8.0]]), jagged([[1, 0, 1], [1]], torch.int64)
    assert preference.sequence_log_probs(log_probs, mask).tolist() == [-5.0, -8.0]


def test_imitation_is_the_mean_over_the_tokens_of_the_teachers():
    policy, tokens = values([-3.0, -50.0, -60.0, -5.0, -70.0, -80.0]).requires_grad_(), values([2, 9, 9, 6, 9, 9])
    loss = preference.imitation_loss(policy, tokens, n=2)
    [gradient] = torch.autograd.grad(loss, policy)
    assert loss.item() == 1.0  # (3 + 5) / (2 + 6)
    assert gradient.tolist() == [-0.125, 0, 0, -0.125, 0, 0]


class Toy(torch.nn.Module):
    """Log-probabilities of given sequences from a table of logits: one optimizer step can be checked by hand."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6).sin())

    def log_probs(self, sequences):
        """Of the next token at every place, as an engine gives them: flat, the last place of a sequence unused."""
        rows = [self.logits[ids].log_softmax(-1) for ids in sequences]
        return [
            torch.cat([row[:-1].gather(-1, ids[1:, None]).squeeze(-1), row.new_zeros(1)])
            for row, ids in zip(rows, sequences, strict=True)
        ]


def test_two_passes_in_any_micro_batches_have_the_gradient_of_dpo_written_out():
    n, prompts = 2, [[1, 2], [3]]
    answers = [[[4, 5], [0], [2, 2, 1]], [[1], [5, 4], [3, 0]]]
    sequences = [torch.tensor(p + a) for p, group in zip(prompts, answers, strict=True) for a in group]
    lengths = [len(answer) for group in answers for answer in group]
    weights = values([0, 1 / 4, 1 / 4, 0, 1 / 4, 1 / 4])
    model, start = Toy(), Toy()
    with torch.no_grad():
        start.logits += 0.1 * torch.arange(36, dtype=torch.float64).view(6, 6).cos()

    def answer_log_probs(network):
        rows = zip(network.log_probs(sequences), lengths, strict=True)
        return torch.stack([row[-length - 1 : -1].sum() for row, length in rows])

    # written out: all sequences at once, -log sigmoid pair by pair
    policy, reference = answer_log_probs(model), answer_log_probs(start).detach()
    expected = 0.0
    for teacher in (0, 3):
        for student in (teacher + 1, teacher + 2):
            ratio = (policy[teacher] - reference[teacher]) - (policy[student] - reference[student])
            expected = expected - torch.nn.functional.logsigmoid(BETA * ratio) / 4
    expected.backward()
    wanted, model.logits.grad = model.logits.grad, None

    loss, _ = preference.compute_dpo_loss(values(policy.tolist()).requires_grad_(), reference, weights, n, BETA)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    leaf = policy.detach().requires_grad_()
    [coefficients] = torch.autograd.grad(preference.compute_dpo_loss(leaf, reference, weights, n, BETA)[0], leaf)
    n_ranks = 2
    for rank in ([[0, 4], [5]], [[3], [1, 2]]):  # rows of a pair are apart
        for micro_batch in rank:
            rows = [model.log_probs([sequences[i]])[0] for i in micro_batch]
            prompt_of = [prompts[i // 3] for i in micro_batch]
            data = TensorDict(
                {
                    "prompts": jagged(prompt_of, torch.int64),
                    "responses": jagged([[0] * lengths[i] for i in micro_batch], torch.int64),
                    "response_mask": jagged([[1] * lengths[i] for i in micro_batch], torch.int64),
                    preference.COEFFICIENT: coefficients[micro_batch],
                },
                batch_size=len(micro_batch),
            )
            tu.assign_non_tensor(data, dp_size=n_ranks)
            offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
            output = {"log_probs": torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets)}
            part, metrics = preference.coefficient_loss(None, output, data)
            assert metrics == {}
            (part / n_ranks).backward()  # engines average gradients over ranks
    torch.testing.assert_close(model.logits.grad, wanted, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------- answers of the start policy


def test_the_key_of_stored_answers_depends_on_prompt_and_settings():
    messages = [{"role": "user", "content": "hi"}]
    keys = {
        preference.start_key(["model", 4], messages),
        preference.start_key(["model", 8], messages),
        preference.start_key(["model", 4], [{"role": "user", "content": "ho"}]),
    }
    assert len(keys) == 3
    assert preference.start_key(["model", 4], [dict(message) for message in messages]) in keys


def test_records_hold_the_answers_in_the_order_of_their_samples_and_give_back_rows():
    prompt = torch.tensor([7, 8])
    rows = {"a_10_0": (prompt, torch.tensor([3])), "a_9_0": (prompt, torch.tensor([1, 2]))}
    rows["a_2_0"] = (prompt, torch.tensor([], dtype=torch.int64))  # an empty answer is as good as a missing one
    records = preference.start_records({"a": "key a", "b": "key b"}, rows)
    assert records == [
        {"key": "key a", "prompt": [7, 8], "answers": [[1, 2], [3]]},
        {"key": "key b", "prompt": [], "answers": []},
    ]
    back = preference.start_rows("u", records[0], [5])
    assert list(back) == ["u_0_0", "u_1_0"]
    assert back["u_0_0"]["input_ids"].tolist() == [7, 8, 1, 2] and back["u_0_0"][TEACHER_IDS] == [5]
    assert preference.start_rows("u", records[1], [5]) == {}

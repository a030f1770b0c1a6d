"""Switches of the discriminator on real engine workers, each against an independent computation."""

import pyarrow.parquet as pq
import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf

from recipe.gad.run.log import VAL_D_ACC, VAL_TWO_SAMPLE
from recipe.gad.run.two_sample import TwoSampleSettings
from recipe.gad.training import shortcuts
from recipe.gad.training.fresh import Pair, held_out, load_base
from recipe.gad.training.lead import DiscriminatorLead
from recipe.gad.training.replay import Replay
from recipe.gad.training.smoothing import loss_of
from recipe.gad.training.teachers import Teachers
from tests.integration.test_gad_step_on_cpu import (
    drop,
    hf_model,
    live_groups,
    pairwise_reference,
    rows,
    run_from,
    score,
)
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.critic.dp_critic import DataParallelPPOCritic


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


def random_states(live):
    """Of all generators of the worker's process."""

    def collect(worker):
        import random

        import numpy
        import torch

        return torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]

    torch_state, python_state, numpy_state = live.on_workers(collect)
    return torch_state.tolist(), python_state, numpy_state.tolist()


def test_a_fresh_discriminator_judges_validation_answers_and_changes_nothing_else(live, tiny_problem, monkeypatch):
    spy, tokenizer, key = Spy(live.trainer.replay_buffer), live.trainer.tokenizer, "gad__fresh_discriminator"
    live.step()
    monkeypatch.setattr(live.trainer, "replay_buffer", spy)
    without = live.trainer._validate()
    assert VAL_TWO_SAMPLE not in without and VAL_D_ACC in without
    spy.rows.clear()
    weights, states = {role: live.weights(role) for role in ("actor", "critic")}, random_states(live)
    settings = TwoSampleSettings(f"{tiny_problem}/model", (0, 3), lr=3e-3, epochs=2)
    values = {"model": settings.model, "seeds": list(settings.seeds), "lr": settings.lr, "epochs": settings.epochs}
    live.set(**{f"{key}__{name}": value for name, value in values.items()})
    metrics = live.trainer._validate()
    live.set(**{f"{key}__{name}": None for name in values})
    accuracy = metrics.pop(VAL_TWO_SAMPLE)
    assert metrics == without
    assert random_states(live) == states
    for role, before in weights.items():
        assert all(torch.equal(value, before[name]) for name, value in live.weights(role).items())
    assert not any((tq.kv_list() or {}).values()), "rows of the validation stay in the queue"

    pairs = []
    for prompt, student, text in sorted(
        (prompt.tolist(), student.tolist(), text) for prompt, student, text in spy.rows
    ):
        teacher = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        read = shortcuts.canonical_ids(tokenizer, student)
        pairs.append(Pair(str(prompt), prompt + read, prompt + teacher))
    base = load_base(settings.model)
    wins = [held_out(base, pairs, settings, seed)[0] for seed in settings.seeds]
    assert len(pairs) == 8 and accuracy == pytest.approx(sum(map(sum, wins)) / 16)


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
    live.load()
    assert trainer.global_steps == first and trainer._lead.values == {0: 0.9, first: noted}
    live.set(trainer__resume_mode="disable")

    trainer._lead.values[first] = 0.8  # not above 0.9: the lead is over
    trainer.global_steps = first + 1
    metrics, _ = live.step()
    assert metrics["gad/leading"] == 0.0 and "actor/pg_loss" in metrics
    assert any(not torch.equal(actor[name], value) for name, value in live.weights("actor").items())


# ---------------------------------------------------------------------- the average of its weights


def distance(got, expected):
    """Largest difference; one update of the average moves it by up to 2.5e-4."""
    return max((got[name] - value).abs().max().item() for name, value in expected.items())


def equal(got, expected):
    return all(torch.equal(got[name], value) for name, value in expected.items())


def averaged(live):
    """The weights that score, by name; D's own are put back."""
    live.trainer.critic_wg.use_average(True)
    weights = live.weights("critic")
    live.trainer.critic_wg.use_average(False)
    return weights


def test_with_or_without_an_average_d_takes_the_same_steps(live, tmp_path):
    """Runs before any other test has started an average in these workers."""
    trainer = live.trainer
    live.set(trainer__default_local_dir=str(tmp_path))
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    trainer._save_checkpoint()
    folder = tmp_path / f"global_step_{trainer.global_steps}" / "critic"
    assert list(folder.glob("model_*")) and not list(folder.glob("average_*"))
    off, on = {}, {}
    trainer._update_critic(batch, metrics=off)
    without = live.weights("critic")
    trainer.critic_wg.load_checkpoint(local_path=str(folder), del_local_after_load=False)
    assert not equal(live.weights("critic"), without)
    trainer.critic_wg.start_average(0.75)
    trainer._update_critic(batch, metrics=on)
    assert equal(live.weights("critic"), without)
    for name in ("critic/d_loss", "critic/d_acc", "critic/grad_norm"):
        assert on[name] == off[name]
    live.finish(batch)


def test_scores_are_those_of_the_averaged_weights_and_a_resumed_run_has_the_same(live, tmp_path, monkeypatch):
    trainer = live.trainer
    own = live.weights("critic")
    expected = {name: value.double() for name, value in own.items()}
    trainer.critic_wg.start_average(0.75)
    monkeypatch.setattr(trainer.discriminator, "averages", True)
    live.set(gad__discriminator_ema=0.75, gad__score_in_update=True)
    assert not trainer._scores_in_update()
    taken = []
    for _ in range(2):
        batch, metrics = live.sample()
        batch = trainer._balance_batch(batch, metrics=metrics)
        before = live.weights("critic")
        trainer._compute_values(batch, metrics=metrics)
        assert equal(live.weights("critic"), before), "scoring has put D's own weights back"
        taken.append((batch, live.fields(batch.keys), hf_model(live, "critic")))
        taken[-1][2].load_state_dict(expected, strict=False)
        trainer._update_critic(batch, metrics=metrics)
        after = live.weights("critic")
        assert not equal(after, before)
        expected = {name: 0.75 * value + 0.25 * after[name].double() for name, value in expected.items()}
        assert distance(averaged(live), expected) < 1e-6
        live.finish(batch)
    for _, fields, model in taken:
        rows = zip(fields["prompts"].unbind(), fields["responses"].unbind(), fields["rm_scores"].unbind(), strict=True)
        for prompt, response, scores in rows:
            assert scores[-1].item() == pytest.approx(score(model, prompt, response).item(), abs=2e-5)

    live.set(trainer__default_local_dir=str(tmp_path))
    trainer._save_checkpoint()
    folder = tmp_path / f"global_step_{trainer.global_steps}"
    saved, average = live.weights("critic"), averaged(live)
    assert not equal(saved, average)
    live.step()
    assert not equal(averaged(live), average)
    live.set(trainer__resume_mode="resume_path", trainer__resume_from_path=str(folder))
    live.load()
    assert equal(live.weights("critic"), saved) and equal(averaged(live), average)
    (folder / "critic" / "average_world_size_1_rank_0.pt").unlink()  # of a run without the average
    live.load()
    assert equal(averaged(live), saved)
    live.set(trainer__resume_mode="disable", gad__discriminator_ema=0.0, gad__score_in_update=False)
    trainer.global_steps += 1


# ---------------------------------------------------------------------- smoothed labels


@pytest.mark.parametrize("in_update", [True, False])
def test_an_update_with_smoothed_labels_equals_the_pairwise_one(live, monkeypatch, in_update):
    trainer = live.trainer
    switches = OmegaConf.merge(live.config.gad, {"label_smoothing": 0.2})
    monkeypatch.setattr(trainer.discriminator, "group_loss", loss_of(switches, trainer._teachers))
    live.set(gad__score_in_update=in_update)
    batch, metrics = live.sample()
    batch = trainer._balance_batch(drop(batch, batch.keys[:1]), metrics=metrics)
    critic, gaps = hf_model(live, "critic"), []

    def value(row):
        return critic(torch.cat(row).unsqueeze(0)).logits[0, -1, 0]

    for teacher, students in live_groups(live):
        gaps += [value(teacher) - value(student) for student in students]
    gaps = torch.stack(gaps)
    assert len(gaps) == 8 * 4 - 1
    loss = (0.8 * torch.log1p((-gaps).exp()) + 0.2 * torch.log1p(gaps.exp())).mean()
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in critic.parameters() if p.grad is not None))
    trainer._compute_values(batch, metrics=metrics)
    trainer._update_critic(batch, metrics=metrics)
    live.set(gad__score_in_update=False)
    assert metrics["critic/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["critic/d_loss"] == pytest.approx(torch.log1p((-gaps).exp()).mean().item(), rel=1e-5)
    assert metrics["critic/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    live.finish(batch)
    trainer.discriminator._loss = None  # the workers have this loss


# ---------------------------------------------------------------------- replay


@pytest.mark.parametrize("in_update", [True, False])
def test_an_update_with_replay_equals_the_pairwise_one_over_fresh_and_old_pairs(live, monkeypatch, tmp_path, in_update):
    trainer = live.trainer
    replay = Replay(4, 100, 1)
    monkeypatch.setattr(trainer, "_replay", replay)
    live.set(gad__score_in_update=in_update)
    metrics, _ = live.step()  # nothing to replay yet
    assert "critic/replay_d_acc" not in metrics and len(replay.groups) == 8
    old = [
        ((past.prompt.long(), past.teacher.long()), [(past.prompt.long(), ids.long()) for ids in past.students])
        for past in replay.draw(trainer.global_steps)
    ]
    assert len(old) == 4 and all(len(students) == 4 for _, students in old)

    batch, metrics = live.sample()
    batch = trainer._balance_batch(drop(batch, batch.keys[:1]), metrics=metrics)
    critic, fresh = hf_model(live, "critic"), live_groups(live)
    loss, accuracy, _ = pairwise_reference(critic, fresh)
    old_accuracy = pairwise_reference(critic, old)[1]
    loss_of_both, _, norm = pairwise_reference(critic, fresh + old)
    trainer._compute_values(batch, metrics=metrics)
    fields = live.fields(batch.keys)
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    for is_real, (prompt, response), scores in zip(real, rows(fields), fields["rm_scores"].unbind(), strict=True):
        expected = score(critic, prompt, response).item() if is_real else 0.0
        assert scores[-1].item() == pytest.approx(expected, abs=2e-5)
    trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["critic/loss"] == pytest.approx(loss_of_both, rel=1e-5)
    assert metrics["critic/d_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["critic/replay_d_acc"] == pytest.approx(old_accuracy, abs=1e-6)
    live.finish(batch)
    assert len(replay.groups) == 16
    assert not (tq.kv_list("train") or {}).get("train"), "rows of a finished step stay in the queue"

    kept = replay.state_dict()
    live.set(gad__score_in_update=False, trainer__default_local_dir=str(tmp_path), trainer__resume_mode="resume_path")
    live.set(trainer__resume_from_path=f"{tmp_path}/global_step_{trainer.global_steps}")
    trainer._save_checkpoint()
    live.step()
    live.load()
    live.set(trainer__resume_mode="disable")
    trainer.global_steps += 1
    assert replay.seen == kept["seen"] == 16
    for got, (prompt, teacher, students) in zip(replay.groups, kept["groups"], strict=True):
        tensors = zip((got.prompt, got.teacher, *got.students), (prompt, teacher, *students), strict=True)
        assert all(torch.equal(a, b) for a, b in tensors)


# ---------------------------------------------------------------------- what D reads


@pytest.mark.parametrize("in_update", [True, False])
def test_d_reads_answers_as_the_tokens_of_their_text_and_the_actor_as_sampled(live, monkeypatch, in_update):
    def other(tokenizer, ids):  # the words of this tokenizer have one spelling each
        return list(ids) if len(ids) % 2 else [*ids[::-1], ids[0]]

    monkeypatch.setattr(shortcuts, "canonical_ids", other)
    trainer = live.trainer
    live.set(gad__retokenize=True, gad__score_in_update=in_update, gad__shortcut_probe=True)
    batch, metrics = live.sample()
    sampled = {key: ids.tolist() for key, ids in zip(batch.keys, live.fields(batch.keys)["responses"], strict=True)}
    batch = trainer._balance_batch(drop(batch, batch.keys[:1]), metrics=metrics)
    critic, groups = hf_model(live, "critic"), live_groups(live)
    read = [
        (teacher, [(prompt, torch.tensor(other(None, answer.tolist()))) for prompt, answer in students])
        for teacher, students in groups
    ]
    changed = [len(answer) % 2 == 0 for _, students in groups for _, answer in students]
    assert any(changed) and not all(changed)
    loss, accuracy, norm = pairwise_reference(critic, read)
    trainer._compute_values(batch, metrics=metrics)
    fields = live.fields(batch.keys)
    columns = zip(batch.keys, batch.tags, rows(fields), fields["rm_scores"].unbind(), strict=True)
    for key, tag, (prompt, response), scores in columns:
        if tag.get("is_padding", False):
            continue
        assert response.tolist() == sampled[key]
        expected = score(critic, prompt, torch.tensor(other(None, sampled[key]))).item()
        assert scores[-1].item() == pytest.approx(expected, abs=2e-5)
    trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/d_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["critic/student_noncanonical"] == pytest.approx(sum(changed) / len(changed))
    live.finish(batch)
    metrics, _ = live.step()
    assert 0.0 <= metrics["critic/shortcut_tokens_acc"] <= 1.0
    trainer._validate()
    assert not any((tq.kv_list() or {}).values()), "rows stay in the queue"
    live.set(gad__retokenize=False, gad__score_in_update=False, gad__shortcut_probe=False)
    monkeypatch.setattr(trainer, "_read_as", {})


@pytest.mark.parametrize("in_update", [True, False])
def test_d_reads_the_answer_after_the_thinking_and_the_actor_follows_on_all_tokens(live, monkeypatch, in_update):
    trainer = live.trainer
    then, eos = trainer.tokenizer.convert_tokens_to_ids("then"), trainer.tokenizer.eos_token_id

    def answer(ids):
        """What follows the first "then"; an empty turn if nothing does."""
        ids = ids.tolist()
        return torch.tensor((ids[ids.index(then) + 1 :] if then in ids else []) or [eos])

    live.set(gad__score_span="answer", gad__think_end="then", gad__score_in_update=in_update)
    batch, metrics = live.sample()
    sampled = dict(zip(batch.keys, live.fields(batch.keys)["responses"].unbind(), strict=True))
    batch = trainer._balance_batch(batch, metrics=metrics)
    critic, groups = hf_model(live, "critic"), live_groups(live)
    spoken = [ids.tolist() for ids in sampled.values()]
    thinking = [ids.index(then) + 1 if then in ids else len(ids) for ids in spoken]
    assert any(then in ids for ids in spoken) and not all(then in ids for ids in spoken)
    assert metrics["thinking_length/mean"] == pytest.approx(sum(thinking) / len(thinking))
    lengths = [len(ids) - n for ids, n in zip(spoken, thinking, strict=True)]
    assert metrics["answer_length/mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["answer_length/empty_ratio"] == pytest.approx(lengths.count(0) / len(lengths))
    read = [(teacher, [(prompt, answer(ids)) for prompt, ids in students]) for teacher, students in groups]
    loss, accuracy, norm = pairwise_reference(critic, read)
    trainer._compute_old_log_prob(batch, metrics=metrics)
    trainer._compute_ref_log_prob(batch, metrics=metrics)
    trainer._compute_values(batch, metrics=metrics)
    trainer._compute_advantage(batch, metrics=metrics)
    fields = live.fields(batch.keys)
    columns = zip(batch.keys, rows(fields), fields["rm_scores"].unbind(), fields["advantages"].unbind(), strict=True)
    for key, (prompt, response), scores, advantages in columns:
        assert torch.equal(response, sampled[key]), "the policy trains on what was sampled"
        assert scores[-1].item() == pytest.approx(score(critic, prompt, answer(response)).item(), abs=2e-5)
        assert len(advantages) == len(response) and (advantages == advantages[0]).all(), "thinking tokens included"
    trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/d_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)
    live.finish(batch)
    if in_update:
        spy, wins = Spy(trainer.replay_buffer), []
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "replay_buffer", spy)
            got, critic = trainer._validate()[VAL_D_ACC], hf_model(live, "critic")
        for prompt, student, text in spy.rows:
            teacher = torch.tensor([*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], eos])
            gap = score(critic, prompt, teacher) - score(critic, prompt, answer(student))
            wins.append(0.5 if abs(gap) < 1e-6 else float(gap > 0))
        assert got == pytest.approx(sum(wins) / len(wins))
        metrics, _ = live.step()
        assert "actor/pg_loss" in metrics
    assert not any((tq.kv_list() or {}).values()), "rows stay in the queue"
    live.set(gad__score_span="all", gad__think_end=None, gad__score_in_update=False)
    monkeypatch.setattr(trainer, "_read_as", {})


# ---------------------------------------------------------------------- several teachers


@pytest.fixture
def two_teachers(live, tiny_problem, tmp_path):
    """The training data with one more column: what a second teacher, "other", says to every second prompt."""
    table = pq.read_table(tiny_problem / "train.parquet")
    other = [None if row % 2 else ["um um", "so see"] for row in range(len(table))]
    pq.write_table(table.append_column("other", [other]), tmp_path / "two.parquet")
    files = live.config.data.train_files
    live.set(data__train_files=[f"{tmp_path}/two.parquet"], data__teacher_key=["teacher_response", "other"])
    live.set(data__val_files=[f"{tmp_path}/two.parquet"])
    live.trainer._init_dataloader()
    yield
    live.set(data__train_files=files, data__val_files=f"{tiny_problem}/val.parquet")
    live.set(data__teacher_key="teacher_response")
    live.trainer._init_dataloader()


def test_a_step_compares_with_the_answer_that_was_drawn_and_logs_the_accuracy_of_each_teacher(live, two_teachers):
    trainer, tokenizer = live.trainer, live.trainer.tokenizer
    batch, metrics = live.sample()
    batch = trainer._balance_batch(batch, metrics=metrics)
    critic, groups = hf_model(live, "critic"), live_groups(live)
    said = [tokenizer.decode(teacher[1], skip_special_tokens=True) for teacher, _ in groups]
    loss, accuracy, _ = pairwise_reference(critic, groups)
    trainer._compute_values(batch, metrics=metrics)
    trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/d_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(accuracy, abs=1e-6)
    for teacher, is_other in (("teacher_response", False), ("other", True)):
        of_it = [group for group, text in zip(groups, said, strict=True) if (text in ("um um", "so see")) == is_other]
        expected = pairwise_reference(critic, of_it)[1]
        assert metrics[f"critic/d_acc/{teacher}"] == pytest.approx(expected, abs=1e-6)
    live.finish(batch)
    fields = live.step()[1]
    truths = [reward["ground_truth"] for reward in fields["reward_model"]]
    assert truths == list(fields["teacher_response"]), "a task reward compares with the answer that was drawn"


@pytest.fixture
def all_answers(live, two_teachers, monkeypatch):
    """The trainer as it is with gad.teacher_answers=all: prompts have one answer or three."""
    trainer, own = live.trainer, live.trainer.discriminator
    live.set(gad__teacher_answers="all")
    teachers = Teachers.of(live.config, trainer.train_dataset)
    monkeypatch.setattr(trainer, "_teachers", teachers)
    discriminator = DataParallelPPOCritic(
        own.critic_wg, own.config, own.rollout_n, teachers.loss, teachers=teachers.most
    )
    monkeypatch.setattr(trainer, "discriminator", discriminator)
    limit = live.config.critic.ppo_max_token_len_per_gpu
    yield
    own._loss = None  # the workers have another
    live.set(gad__teacher_answers="one", gad__score_in_update=False, critic__ppo_max_token_len_per_gpu=limit)


def test_all_answers_are_compared_and_a_prompt_weighs_the_same_however_many_it_has(live, all_answers):
    compare_all_answers(live, in_update=True, tokens=32768)
    live.set(gad__imitation_coef=0.1, gad__teacher_in_group=True)
    metrics, _ = live.step()
    live.set(gad__imitation_coef=0.0, gad__teacher_in_group=False)
    assert metrics["actor/imitation_loss"] > 0 and "actor/teacher_pg_loss" in metrics, "these read the drawn answer"
    compare_all_answers(live, in_update=False, tokens=200)
    assert not any((tq.kv_list() or {}).values()), "rows stay in the queue"


def compare_all_answers(live, in_update, tokens):
    """A step up to D's update, against a loop over the pairs; one sample is missing."""
    trainer = live.trainer
    live.set(gad__score_in_update=in_update, critic__ppo_max_token_len_per_gpu=tokens)
    batch, metrics = live.sample()
    batch = trainer._balance_batch(drop(batch, batch.keys[:1]), metrics=metrics)
    critic, losses, wins, won = hf_model(live, "critic"), [], {"teacher_response": [], "other": []}, 0.0
    critic.zero_grad()

    def value(row):
        return critic(torch.cat(row).unsqueeze(0)).logits[0, -1, 0]

    counts, total = set(), sum(len(group.students) for group in trainer._groups)
    for group in trainer._groups:
        keys = [key for key in trainer._extra_keys if key.startswith(f"{group.uid}_teacher_")]
        real = [row for row in rows(live.fields(keys)) if len(row[1]) > 1]  # a filler's answer is one token
        counts.add((len(keys), len(real)))
        students = [value(row) for row in rows(live.fields([row.key for row in group.students]))]
        for row in real:
            text, teacher = trainer.tokenizer.decode(row[1], skip_special_tokens=True), value(row)
            for student in students:
                gap = teacher - student
                losses.append(-torch.nn.functional.logsigmoid(gap) / (total * len(real)))
                win = float(gap > 0) + 0.5 * float(gap == 0)
                won += win / (total * len(real))
                wins["other" if text in ("um um", "so see") else "teacher_response"].append(win)
    assert counts == {(3, 1), (3, 3)}
    loss = torch.stack(losses).sum()
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in critic.parameters() if p.grad is not None))
    trainer._compute_values(batch, metrics=metrics)
    fields = live.fields(batch.keys)
    columns = zip(batch.tags, rows(fields), fields["rm_scores"].unbind(), strict=True)
    for row, scores in ((row, scores) for tag, row, scores in columns if not tag.get("is_padding", False)):
        assert scores[-1].item() == pytest.approx(score(critic, *row).item(), abs=2e-5)
    trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/d_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(won, abs=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    for teacher, of_it in wins.items():
        assert metrics[f"critic/d_acc/{teacher}"] == pytest.approx(sum(of_it) / len(of_it), abs=1e-6)
    live.finish(batch)


# ---------------------------------------------------------------------- prompts without teacher answers


@pytest.fixture
def unlabelled(live, tiny_problem, tmp_path):
    """Two of eight prompts of a step come from a file without teacher answers."""
    prompts = pq.read_table(tiny_problem / "val.parquet").select(["content"])
    pq.write_table(prompts, tmp_path / "unlabelled.parquet")
    live.set(gad__unlabelled_files=[f"{tmp_path}/unlabelled.parquet"], gad__unlabelled_ratio=0.25)
    live.trainer._init_dataloader()
    yield [messages[0]["content"] for messages in prompts["content"].to_pylist()]
    live.set(gad__unlabelled_files=[], gad__unlabelled_ratio=0.0, data__gen_batch_size=None)
    live.trainer._init_dataloader()
    live.trainer._unlabelled = set()


def test_without_such_prompts_a_step_takes_the_prompts_of_stock_verl(live):
    trainer = live.trainer

    def prompts(next_batch):
        trainer._init_dataloader()
        return [[message["content"] for message in messages] for messages in next_batch(trainer)["raw_prompt"]]

    stock = prompts(PPOTrainerSync._next_train_batch)
    assert len(stock) == 8 and prompts(type(trainer)._next_train_batch) == stock
    assert trainer._prompts is None and not trainer._unlabelled


def test_d_scores_prompts_without_teacher_answers_and_trains_on_the_others(live, unlabelled):
    trainer = live.trainer
    live.set(gad__score_in_update=True)  # scores come from a separate pass all the same
    batch, metrics = live.sample()
    without = {key for key in batch.keys if key.rsplit("_", 2)[0] in trainer._unlabelled}
    assert len(without) == 2 * 4 and len(batch) == 8 * 4
    *lost, lone = sorted(without)[:4]  # one prompt keeps one answer, which has nothing to compare with
    batch = run_from(live, drop(batch, lost), metrics)
    assert metrics["gad/missing_rollouts"] == 3 and len(trainer._groups) == 6
    critic, fields = hf_model(live, "critic"), live.fields(batch.keys)
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    tokens = fields["rm_scores"].unbind(), fields["advantages"].unbind()
    columns = zip(batch.keys, real, rows(fields), *tokens, strict=True)
    moved = False
    for key, is_real, (prompt, response), scores, advantages in columns:
        expected = score(critic, prompt, response).item() if is_real and key != lone else 0.0
        assert scores[-1].item() == pytest.approx(expected, abs=2e-5)
        if key == lone:
            assert not advantages.any()
        if key in without:
            text = trainer.tokenizer.decode(prompt, skip_special_tokens=True)
            assert not is_real or any(content in text for content in unlabelled)
            moved |= bool(advantages.any())
    assert moved, "the policy follows the scores on prompts without teacher answers"
    loss, accuracy, norm = pairwise_reference(critic, live_groups(live))
    trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/d_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)
    live.finish(batch)
    metrics, _ = live.step()
    assert "actor/pg_loss" in metrics and metrics["gad/missing_rollouts"] == 0
    live.set(gad__score_in_update=False)


def test_a_resumed_run_goes_on_with_the_next_prompts(live, unlabelled, tmp_path):
    trainer = live.trainer

    def prompts_of_next_step():
        return [messages[0]["content"] for messages in trainer._next_train_batch()["raw_prompt"]]

    first = prompts_of_next_step()
    assert set(first[6:]) <= set(unlabelled) and not set(first[:6]) & set(unlabelled)
    live.set(trainer__default_local_dir=str(tmp_path), trainer__resume_mode="resume_path")
    live.set(trainer__resume_from_path=f"{tmp_path}/global_step_{trainer.global_steps}")
    trainer._save_checkpoint()
    following = [prompts_of_next_step() for _ in range(6)]  # past the end of the unlabelled file
    seen = [content for prompts in [first, *following] for content in prompts[6:]]
    assert sorted(seen[:8]) == sorted(unlabelled), "an epoch has every prompt once"
    trainer._init_dataloader()
    live.load()
    assert [prompts_of_next_step() for _ in range(6)] == following
    live.set(trainer__resume_mode="disable")
    trainer.global_steps += 1

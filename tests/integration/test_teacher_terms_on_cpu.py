"""Terms on the teacher's answers in the actor's update, on real engine workers, against independent float64 code."""

from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

from recipe.gad.training.credit import prefix_discriminator_loss
from recipe.gad.training.gate import PolicyGate
from recipe.gad.training.rows import sample_order
from recipe.gad.training.teachers import Teachers
from tests.integration.test_gad_step_on_cpu import drop, hf_model, rows, run_from, score
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

ACTOR = "actor_rollout_ref__actor"


@pytest.fixture
def settings(live):
    """Sets keys of the live trainer, for one test."""
    before: dict = {}

    def settings(**values):
        for key in values:
            before.setdefault(key, OmegaConf.select(live.config, key.replace("__", ".")))
        live.set(**values)

    yield settings
    live.set(**before)


def log_probs(model, prompt, response, temperature):
    """Log-probabilities of the response tokens with their graph, (response_length,), float64."""
    logits = model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)


def grad_norm(model):
    return torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None)).item()


def teacher_rows_of(live):
    """uid -> (prompt, response) of the teacher, without fillers."""
    groups = live.trainer._groups
    fields = live.fields([group.teacher.key for group in groups])
    real = [bool(mask.any()) for mask in fields["response_mask"].unbind()]
    columns = zip(groups, rows(fields), real, strict=True)
    return {group.uid: row for group, row, is_real in columns if is_real}


MICRO_BATCHES = {
    "one micro-batch": {},
    "small token limit": {f"{ACTOR}__ppo_max_token_len_per_gpu": 60},
    "fixed rows": {f"{ACTOR}__use_dynamic_bsz": False, f"{ACTOR}__ppo_micro_batch_size_per_gpu": 8},
}


@pytest.mark.parametrize("skip_old_log_prob", [False, True])
@pytest.mark.parametrize("micro_batches", MICRO_BATCHES)
@pytest.mark.parametrize("missing", [0, 5])
def test_one_step_sees_the_policy_gradient_and_the_imitation(live, settings, micro_batches, skip_old_log_prob, missing):
    coef, kl_coef = 0.3, 0.7
    settings(
        gad__imitation_coef=coef,
        gad__skip_old_log_prob=skip_old_log_prob,
        actor_rollout_ref__actor__kl_loss_type="low_var_kl",
        actor_rollout_ref__actor__kl_loss_coef=kl_coef,
        **MICRO_BATCHES[micro_batches],
    )
    live.step()  # the actor has moved away from the reference
    batch, metrics = live.sample()
    keys = sorted(batch.keys, key=lambda key: sample_order(key, live.trainer._submitted))
    if missing:  # a whole prompt, and one more answer
        batch = drop(batch, [*keys[:4], keys[6]])
    batch = run_from(live, batch, metrics)
    fields, policy = live.fields(batch.keys), hf_model(live, "actor")
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    assert sum(real) == 8 * 4 - missing
    n_tokens = sum(len(row[1]) for row, is_real in zip(rows(fields), real, strict=True) if is_real)
    temperature = live.config.actor_rollout_ref.rollout.temperature
    assert temperature == 0.8
    total = 0.0
    columns = (rows(fields), fields["advantages"].unbind(), fields["ref_log_prob"].unbind(), real)
    for (prompt, response), advantages, ref, is_real in zip(*columns, strict=True):
        if is_real:
            values = log_probs(policy, prompt, response, temperature)
            gap = ref.double() - values
            surrogate = -(advantages.double() * (values - values.detach()).exp()).sum()
            total = total + (surrogate + kl_coef * (gap.exp() - gap - 1).sum()) / n_tokens
    teachers = teacher_rows_of(live)
    assert len(teachers) >= (7 if missing else 8)
    nll = -torch.cat([log_probs(policy, *row, temperature=1.0) for row in teachers.values()]).mean()
    (total + coef * nll).backward()
    before = live.weights("actor")
    live.trainer._update_actor(batch, metrics=metrics)
    assert metrics["actor/imitation_loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert metrics["actor/loss"] == pytest.approx((total + coef * nll).item(), rel=1e-4)
    assert metrics["actor/pg_loss"] + kl_coef * metrics["actor/kl_loss"] == pytest.approx(total.item(), abs=1e-5)
    assert metrics["actor/grad_norm"] == pytest.approx(grad_norm(policy), rel=1e-3)
    assert any(not torch.equal(before[name], value) for name, value in live.weights("actor").items())
    assert "actor/teacher_pg_loss" not in metrics
    live.finish(batch)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize(
    ("micro_batches", "missing", "score_in_update", "coef"),
    [("one micro-batch", 0, True, 0.0), ("small token limit", 5, True, 0.3), ("small token limit", 5, False, 0.0)],
)
def test_the_teachers_answer_is_a_sample_of_its_group(
    live, settings, micro_batches, missing, score_in_update, coef, by_std
):
    kl_coef = 0.7
    settings(
        gad__teacher_in_group=True,
        gad__imitation_coef=coef,
        gad__score_in_update=score_in_update,
        gad__skip_old_log_prob=True,
        algorithm__norm_adv_by_std_in_grpo=by_std,
        actor_rollout_ref__actor__kl_loss_type="low_var_kl",
        actor_rollout_ref__actor__kl_loss_coef=kl_coef,
        **MICRO_BATCHES[micro_batches],
    )
    live.step()  # the actor has moved away from the reference
    batch, metrics = live.sample()
    keys = sorted(batch.keys, key=lambda key: sample_order(key, live.trainer._submitted))
    if missing:  # all but one answer to the first prompt, and one to the second
        batch = drop(batch, [*keys[:3], keys[4], keys[6]])
    critic, policy = hf_model(live, "critic"), hf_model(live, "actor")
    batch = run_from(live, batch, metrics)
    fields = live.fields(batch.keys)
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    of_key = {key: row for key, row, is_real in zip(batch.keys, rows(fields), real, strict=True) if is_real}
    refs = dict(zip(batch.keys, fields["ref_log_prob"].unbind(), strict=True))
    stored = {name: dict(zip(batch.keys, fields[name].unbind(), strict=True)) for name in ("advantages", "returns")}
    teachers, temperature = teacher_rows_of(live), live.config.actor_rollout_ref.rollout.temperature
    surrogate, n_policy, kl, n_students = 0.0, 0, 0.0, 0
    for group in live.trainer._groups:
        answers = [teachers[group.uid], *(of_key[row.key] for row in group.students)]
        scores = torch.stack([score(critic, *answer) for answer in answers])
        advantages = scores - scores.sum() / len(scores)
        if by_std:
            advantages = advantages / ((advantages**2).sum() / (len(scores) - 1)).sqrt()
        for i, (answer, advantage) in enumerate(zip(answers, advantages, strict=True)):
            values = log_probs(policy, *answer, temperature if i else 1.0)
            surrogate = surrogate - (advantage * (values - values.detach()).exp()).sum()
            n_policy += len(values)
            if i:
                key = group.students[i - 1].key
                gap = refs[key].double() - values
                kl, n_students = kl + (gap.exp() - gap - 1).sum(), n_students + len(values)
                for column in stored.values():
                    wanted = torch.full((len(values),), advantage.item())
                    torch.testing.assert_close(column[key].float(), wanted, atol=2e-3, rtol=2e-3)
    nll = -torch.cat([log_probs(policy, *row, temperature=1.0) for row in teachers.values()]).mean()
    total = surrogate / n_policy + kl_coef * kl / n_students + coef * nll
    total.backward()
    live.trainer._update_actor(batch, metrics=metrics)
    assert metrics["actor/grad_norm"] == pytest.approx(grad_norm(policy), rel=3e-3)
    assert metrics["actor/loss"] == pytest.approx(total.item(), abs=2e-4)
    policy_loss = metrics["actor/pg_loss"] + metrics["actor/teacher_pg_loss"]
    assert policy_loss == pytest.approx((surrogate / n_policy).item(), abs=2e-4)
    assert metrics["actor/kl_loss"] == pytest.approx((kl / n_students).item(), rel=1e-3)
    assert ("actor/imitation_loss" in metrics) == bool(coef)
    live.trainer._update_critic(batch, metrics=metrics)
    live.finish(batch)


def test_every_optimizer_step_of_a_batch_has_its_own_teachers(live, settings):
    settings(gad__imitation_coef=1.0, **{f"{ACTOR}__ppo_mini_batch_size": 2, f"{ACTOR}__shuffle": True})

    def steps_taken():
        def count(worker):
            engine = next(w for name, w in worker.worker_dict.items() if name.startswith("actor")).actor.engine
            return max((int(entry["step"]) for entry in engine.optimizer.state.values()), default=0)

        return live.on_workers(count)

    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    before = steps_taken()
    live.trainer._update_actor(batch, metrics=metrics)
    assert steps_taken() - before == 4
    assert 0.0 < metrics["actor/imitation_loss"] < 10.0
    live.finish(batch)


def test_off_is_bit_equal_to_the_stock_update(live, settings, tmp_path):
    settings(trainer__default_local_dir=str(tmp_path))
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    live.trainer._save_checkpoint()
    config = omega_conf_to_dataclass(live.config.actor_rollout_ref.actor)
    live.trainer.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=config))
    stock_metrics: dict = {}
    PPOTrainerSync._update_actor(live.trainer, batch, stock_metrics)
    stock = live.weights("actor")
    folder = tmp_path / f"global_step_{live.trainer.global_steps}" / "actor"
    live.trainer.actor_rollout_wg.load_checkpoint(local_path=str(folder), del_local_after_load=False)
    assert any(not torch.equal(stock[name], value) for name, value in live.weights("actor").items())
    live.trainer._update_actor(batch, metrics)
    assert all(torch.equal(stock[name], value) for name, value in live.weights("actor").items())
    absent = {"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"}  # a batch is one optimizer step
    assert all(stock_metrics[name] == 0.0 for name in absent) and not absent & metrics.keys()
    names = [name for name in stock_metrics if not name.startswith(("perf/", "actor/perf")) and name not in absent]
    assert {name: metrics[name] for name in names} == {name: stock_metrics[name] for name in names}
    live.finish(batch)


@pytest.mark.parametrize("score_in_update", [False, True])
@pytest.mark.parametrize("in_group", [False, True])
def test_the_gate_scales_the_policy_term_alone(live, settings, monkeypatch, in_group, score_in_update):
    settings(
        gad__teacher_in_group=in_group,
        gad__imitation_coef=0.3 if in_group else 0.0,
        gad__score_in_update=score_in_update,
        gad__skip_old_log_prob=True,
        actor_rollout_ref__actor__kl_loss_type="low_var_kl",
        actor_rollout_ref__actor__kl_loss_coef=0.7,
    )
    trainer = live.trainer
    monkeypatch.setattr(trainer, "_gate", PolicyGate(0.5, accuracy=0.6))
    live.step()  # the actor has moved away from the reference
    before = trainer._gate.accuracy
    batch, metrics = live.sample()
    policy = hf_model(live, "actor")
    batch = run_from(live, batch, metrics)
    fields = live.fields(batch.keys)
    trainer._update_critic(batch, metrics=metrics)
    gate = (0.9 * before + 0.1 * metrics["critic/d_acc"] - 0.5) / 0.5
    assert 0.0 < gate < 1.0 and metrics["gad/policy_gate"] == pytest.approx(gate, rel=1e-9)
    advantages = fields["advantages"].unbind()
    policy_term, kl, n_students, n_policy = 0.0, 0.0, 0, 0
    for (prompt, response), values, ref in zip(rows(fields), advantages, fields["ref_log_prob"].unbind(), strict=True):
        current = log_probs(policy, prompt, response, live.config.actor_rollout_ref.rollout.temperature)
        gap = ref.double() - current
        policy_term = policy_term - (values.double() * (current - current.detach()).exp()).sum()
        kl, n_students = kl + (gap.exp() - gap - 1).sum(), n_students + len(current)
    n_policy, imitation = n_students, 0.0
    if in_group:
        teachers = {uid: log_probs(policy, *row, temperature=1.0) for uid, row in teacher_rows_of(live).items()}
        for uid, current in teachers.items():  # a group's advantages add up to 0
            of_students = [row for key, row in zip(batch.keys, advantages, strict=True) if key.startswith(f"{uid}_")]
            advantage = -sum(row[0].double() for row in of_students)
            policy_term = policy_term - (advantage * (current - current.detach()).exp()).sum()
            n_policy += len(current)
        imitation = -0.3 * torch.cat(list(teachers.values())).mean()
    (gate * policy_term / n_policy + 0.7 * kl / n_students + imitation).backward()
    trainer._update_actor(batch, metrics=metrics)
    assert metrics["actor/grad_norm"] == pytest.approx(grad_norm(policy), rel=3e-3)
    for got, plain in zip(live.fields(batch.keys)["advantages"].unbind(), advantages, strict=True):
        torch.testing.assert_close(got, plain * gate, rtol=1e-5, atol=1e-7)
    live.finish(batch)


def test_a_checkpoint_holds_the_gate(live, settings, tmp_path, monkeypatch):
    settings(trainer__default_local_dir=str(tmp_path))
    trainer = live.trainer
    monkeypatch.setattr(trainer, "_gate", PolicyGate(0.1, accuracy=0.6123))
    trainer._save_checkpoint()
    trainer._gate.accuracy = None
    folder = tmp_path / f"global_step_{trainer.global_steps}"
    settings(trainer__resume_mode="resume_path", trainer__resume_from_path=str(folder))
    live.load()
    assert trainer._gate.accuracy == 0.6123


def test_advantages_without_the_division_are_centred_scores(live, settings):
    settings(
        algorithm__norm_adv_by_std_in_grpo=False,
        gad__score_in_update=True,
        gad__skip_old_log_prob=True,
        actor_rollout_ref__actor__kl_loss_coef=0.0,
    )
    batch, metrics = live.sample()
    critic, policy = hf_model(live, "critic"), hf_model(live, "actor")
    batch = run_from(live, batch, metrics)
    fields = live.fields(batch.keys)
    of_key = dict(zip(batch.keys, zip(rows(fields), fields["advantages"].unbind(), strict=True), strict=True))
    loss, tokens = 0.0, int(fields["response_mask"].values().sum())
    for group in live.trainer._groups:
        answers = [of_key[row.key][0] for row in group.students]
        scores = torch.stack([score(critic, *answer) for answer in answers])
        for row, answer, advantage in zip(group.students, answers, scores - scores.mean(), strict=True):
            got = of_key[row.key][1]
            torch.testing.assert_close(got, torch.full_like(got, advantage.item()), atol=3e-5, rtol=0)
            current = log_probs(policy, *answer, live.config.actor_rollout_ref.rollout.temperature)
            loss = loss - (advantage * (current - current.detach()).exp()).sum() / tokens
    loss.backward()
    live.trainer._update_actor(batch, metrics=metrics)
    assert metrics["actor/pg_loss"] == pytest.approx(loss.item(), abs=3e-5)
    assert metrics["actor/grad_norm"] == pytest.approx(grad_norm(policy), rel=3e-3)
    live.finish(batch)


# ---------------------------------------------------------------------- credit per token


@pytest.mark.parametrize("limit", [150, 32768])
@pytest.mark.parametrize("missing", [0, 5])
def test_credit_per_token_in_ds_update_and_in_the_advantages(live, settings, monkeypatch, limit, missing):
    gamma = 0.7
    settings(
        gad__credit="token",
        gad__credit_gamma=gamma,
        gad__score_in_update=True,  # gets its own pass all the same
        gad__skip_old_log_prob=True,
        algorithm__norm_adv_by_std_in_grpo=False,
        critic__ppo_max_token_len_per_gpu=limit,
    )
    monkeypatch.setattr(live.trainer.discriminator, "group_loss", prefix_discriminator_loss)
    batch, metrics = live.sample()
    keys = sorted(batch.keys, key=lambda key: sample_order(key, live.trainer._submitted))
    if missing:
        batch = drop(batch, [*keys[:4], keys[6]])
    critic = hf_model(live, "critic")
    batch = run_from(live, batch, metrics)
    assert "critic/d_loss" not in metrics
    fields = live.fields(batch.keys)
    of_key = dict(zip(batch.keys, rows(fields), strict=True))
    stored = dict(zip(batch.keys, fields["advantages"].unbind(), strict=True))

    def values(prompt, response):
        """After the prompt and after each token of the answer."""
        return critic(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 :, 0]

    losses, ends, prefixes = [], [], []
    teachers = teacher_rows_of(live)
    for group in live.trainer._groups:
        if not group.students:
            continue
        of_teacher = values(*teachers[group.uid])[1:]
        of_students = [values(*of_key[row.key]) for row in group.students]
        for student in of_students:
            shorter = min(len(of_teacher), len(student) - 1)
            prefixes.append(torch.log1p((student[1 : shorter + 1] - of_teacher[:shorter]).exp()).mean())
            ends.append(torch.log1p((student[-1] - of_teacher[-1]).exp()))
            losses.append((prefixes[-1] + ends[-1]) / 2)
        deltas = [student.detach().diff() for student in of_students]
        for row, delta in zip(group.students, deltas, strict=True):
            centred = [delta[k] - torch.stack([d[k] for d in deltas if len(d) > k]).mean() for k in range(len(delta))]
            expected = [
                sum(gamma ** (k - t) * centred[k] for k in range(t, len(delta))).item() for t in range(len(delta))
            ]
            assert stored[row.key].tolist() == pytest.approx(expected, abs=5e-5)
    torch.stack(losses).mean().backward()
    live.trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert metrics["critic/d_loss"] == pytest.approx(torch.stack(ends).mean().item(), rel=1e-4)
    assert metrics["critic/d_prefix_loss"] == pytest.approx(torch.stack(prefixes).mean().item(), rel=1e-4)
    assert metrics["critic/grad_norm"] == pytest.approx(grad_norm(critic), rel=1e-3)
    live.trainer._update_actor(batch, metrics=metrics)
    assert metrics["actor/grad_norm"] > 0.0
    live.finish(batch)


def test_credit_decides_the_loss_of_the_discriminator(compose_config):
    from types import SimpleNamespace

    from verl.trainer.ppo.v1.trainer_gad import PPOTrainerGAD
    from verl.workers.critic.dp_critic import discriminator_loss

    for credit, loss in (("sequence", discriminator_loss), ("token", prefix_discriminator_loss)):
        config = compose_config(f"gad.credit={credit}")
        trainer = PPOTrainerGAD.__new__(PPOTrainerGAD, config)
        trainer.config, trainer.use_critic, trainer.critic_wg, trainer.rollout_n = config, True, SimpleNamespace(), 4
        trainer._teachers = Teachers(dataset=None, seed=0, named=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PPOTrainerSync, "_setup", lambda self: None)
            trainer._setup()
        assert trainer.discriminator.group_loss is loss and trainer.discriminator.group_size == 4 + 1
        assert trainer._scores_in_update() == (credit == "sequence")

"""The steps of GAD on real engine workers, each against an independent computation."""

import json
import math

import orjson
import pytest
import torch
import torch.nn.functional as F
import transfer_queue as tq
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from recipe.gad.run.checkpoint import verify_contents
from recipe.gad.training.preference_trainer import PPOTrainerOnlineDPO, PPOTrainerSODA
from recipe.gad.training.rows import filler, sample_order
from recipe.gad.training.trajectory import build_prompt_ids
from verl.trainer.ppo.v1.trainer_gad import PPOTrainerWarmup

KL_FORMULAS = {  # float64 estimates of KL(policy || reference) per token
    "kl": lambda gap: gap,
    "mse": lambda gap: 0.5 * gap**2,
    "low_var_kl": lambda gap: (-gap).exp() + gap - 1,
}
RATIO_METRICS = {"actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"}


def hf_model(live, role: str):
    """Independent float64 Hugging Face model with the live weights of a role."""
    path = live.config.actor_rollout_ref.model.path
    if role == "critic":
        config = AutoConfig.from_pretrained(path, num_labels=1)
        model = AutoModelForTokenClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    missing = model.load_state_dict(live.weights(role), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    return model.double().eval()


def token_log_probs(model, prompt, response, temperature):
    """Log-probabilities of the response tokens at a temperature, (response_length,), float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0]
    picked = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return picked.gather(-1, response.unsqueeze(-1)).squeeze(-1)


def score(model, prompt, response):
    """Score of D: the last token's value."""
    with torch.no_grad():
        return model(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, -1, 0]


def rows(fields):
    """(prompt, response) of every row."""
    return list(zip(fields["prompts"].unbind(), fields["responses"].unbind(), strict=True))


def drop(batch, keys):
    """The batch as if the rollouts of ``keys`` had failed."""
    tq.kv_clear(keys=list(keys), partition_id="train")
    return batch.select_keys([key for key in batch.keys if key not in set(keys)])


def drop_missing(live, batch, missing):
    """The batch without "one sample", or without "a whole prompt" and a sample of another; "none": as it is."""
    keys = sorted(batch.keys, key=lambda key: sample_order(key, live.trainer._submitted))
    lost = {"none": [], "one sample": keys[1:2], "a whole prompt": [*keys[:4], keys[6]]}[missing]
    return drop(batch, lost) if lost else batch


def run_from(live, batch, metrics):
    """The rest of a step after sampling, actor left alone; returns the batch."""
    trainer = live.trainer
    batch = trainer._balance_batch(batch, metrics=metrics)
    for name in ("_compute_old_log_prob", "_compute_ref_log_prob", "_compute_values", "_compute_advantage"):
        batch = getattr(trainer, name)(batch, metrics=metrics)
    return batch


def test_teacher_data_passes_through_the_rollout(live):
    batch, metrics = live.sample()
    batch = live.trainer._balance_batch(batch, metrics=metrics)
    fields = live.fields(batch.keys)
    tokenizer = live.trainer.tokenizer
    teachers = {group.uid: group.teacher.key for group in live.trainer._groups}
    assert len(teachers) == live.config.data.train_batch_size
    assert not set(teachers.values()) & set(batch.keys)
    for key, prompt, text in zip(batch.keys, fields["prompts"].unbind(), list(fields["teacher_response"]), strict=True):
        row = live.fields([teachers[key.rsplit("_", 2)[0]]])
        answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert row["prompts"][0].tolist() == prompt.tolist()
        assert row["responses"][0].tolist() == answer
        assert row["input_ids"][0].tolist() == prompt.tolist() + answer
        assert row["position_ids"][0].tolist() == list(range(len(prompt) + len(answer)))
    live.finish(batch)
    left = tq.kv_list("train") or {}
    assert not left.get("train"), "rows of a finished step stay in the queue"


def test_student_scores_equal_huggingface_and_the_same_text_gets_the_same_score(live):
    batch, metrics = live.sample()
    batch = live.trainer._balance_batch(batch, metrics=metrics)
    live.trainer._compute_values(batch, metrics=metrics)
    fields, critic = live.fields(batch.keys), hf_model(live, "critic")
    got = fields["rm_scores"].unbind()
    for (prompt, response), token_scores in zip(rows(fields), got, strict=True):
        assert token_scores[:-1].abs().sum() == 0
        assert token_scores[-1].item() == pytest.approx(score(critic, prompt, response).item(), abs=2e-5)
    teacher_keys = [group.teacher.key for group in live.trainer._groups]
    view = live.trainer._view(batch.keys, teacher_keys=teacher_keys)
    teacher_scores = live.trainer.discriminator._forward_micro_batch(view, compute_teacher=True)
    teacher_rows = rows(live.fields(teacher_keys))
    expected = torch.stack([score(critic, prompt, response) for prompt, response in teacher_rows])
    torch.testing.assert_close(teacher_scores.double(), expected, atol=2e-5, rtol=0)

    # a student row with the teacher's text: same score, whatever the neighbours and the micro-batches
    prompt, response = teacher_rows[0]
    fake = {
        **filler(live.trainer.tokenizer.eos_token_id),
        "prompts": prompt,
        "responses": response,
        "input_ids": torch.cat([prompt, response]),
    }
    fake["position_ids"] = torch.arange(len(fake["input_ids"]))
    fake["response_mask"] = fake["loss_mask"] = torch.ones(len(response), dtype=torch.int64)
    live.trainer._put_rows("train", {"same_0_0": fake})
    live.trainer._extra_keys.append("same_0_0")
    for limit in (40, 60, 32768):
        live.set(critic__forward_max_token_len_per_gpu=limit)
        scores = live.trainer.discriminator.compute_values(live.trainer._view([*batch.keys, "same_0_0"]))
        assert scores[-1].item() == pytest.approx(teacher_scores[0].item(), abs=1e-5)
    live.finish(batch)


def test_teacher_forcing_scores_increase_within_a_group(live):
    batch, metrics = live.sample()
    batch = live.trainer._balance_batch(batch, metrics=metrics)
    teacher_keys = [group.teacher.key for group in live.trainer._groups]
    view, discriminator = live.trainer._view(batch.keys, teacher_keys=teacher_keys), live.trainer.discriminator
    base = discriminator._forward_micro_batch(view, compute_teacher=True)
    forced = discriminator._forward_batch_teacher_forcing_grpo(view, teacher_repeat=3)
    assert torch.equal(forced.view(-1, 3), base.unsqueeze(-1) + torch.tensor([0.0, 1.0, 2.0]))
    live.finish(batch)


def pairwise_reference(critic, groups):
    """Loss, accuracy and gradient norm of the naive update: the teacher is run once per student (float64)."""
    critic.zero_grad()
    losses, wins = [], []
    for (teacher_prompt, teacher_response), students in groups:
        for prompt, response in students:
            teacher = critic(input_ids=torch.cat([teacher_prompt, teacher_response]).unsqueeze(0)).logits[0, -1, 0]
            student = critic(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, -1, 0]
            losses.append(-F.logsigmoid(teacher - student))
            wins.append(float(teacher > student) + 0.5 * float(teacher == student))
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in critic.parameters() if p.grad is not None))
    return loss.item(), sum(wins) / len(wins), norm.item()


def live_groups(live):
    groups = []
    for group in live.trainer._groups:
        if group.students:
            teacher = rows(live.fields([group.teacher.key]))[0]
            groups.append((teacher, rows(live.fields([key for key, _ in group.students]))))
    return groups


@pytest.mark.parametrize(
    "micro_batches",
    [
        {"critic__use_dynamic_bsz": True, "critic__ppo_max_token_len_per_gpu": 150},
        {"critic__use_dynamic_bsz": True, "critic__ppo_max_token_len_per_gpu": 32768},
        {
            "critic__use_dynamic_bsz": False,
            "critic__ppo_micro_batch_size_per_gpu": 10,
            "critic__forward_micro_batch_size_per_gpu": 3,
        },
    ],
    ids=["small token limit", "one micro-batch", "fixed rows"],
)
@pytest.mark.parametrize("missing", ["none", "one sample", "a whole prompt"])
def test_grouped_update_equals_the_pairwise_one_over_real_pairs(live, micro_batches, missing):
    live.set(**micro_batches)
    batch, metrics = live.sample()
    batch = drop_missing(live, batch, missing)
    batch = run_from(live, batch, metrics)
    loss, accuracy, norm = pairwise_reference(hf_model(live, "critic"), live_groups(live))
    live.trainer._update_critic(batch, metrics=metrics)
    assert metrics["critic/d_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["gad/missing_rollouts"] == {"none": 0, "one sample": 1, "a whole prompt": 5}[missing]
    gap = metrics["critic/teacher_value_mean"] - metrics["critic/student_value_mean"]
    assert metrics["critic/score_gap"] == pytest.approx(gap, abs=1e-5)
    live.set(critic__use_dynamic_bsz=True, critic__ppo_max_token_len_per_gpu=32768)
    live.finish(batch)


@pytest.mark.parametrize("missing", [0, 1])
def test_scores_in_update_are_those_before_the_step_and_d_is_updated_once(live, missing):
    live.set(gad__score_in_update=True)
    batch, metrics = live.sample()
    if missing:
        batch = drop(batch, batch.keys[:missing])
    batch = live.trainer._balance_batch(batch, metrics=metrics)
    critic = hf_model(live, "critic")
    loss, accuracy, norm = pairwise_reference(critic, live_groups(live))
    live.trainer._compute_values(batch, metrics=metrics)
    assert metrics["critic/d_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["critic/d_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-3)
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    assert sum(real) == 8 * 4 - missing
    fields = live.fields(batch.keys)
    for is_real, (prompt, response), token_scores in zip(real, rows(fields), fields["rm_scores"].unbind(), strict=True):
        assert token_scores[:-1].abs().sum() == 0
        expected = score(critic, prompt, response).item() if is_real else 0.0
        assert token_scores[-1].item() == pytest.approx(expected, abs=2e-5)
    once = live.weights("critic")
    assert any(not torch.equal(once[name].double(), value) for name, value in critic.state_dict().items())
    live.trainer._update_critic(batch, metrics=metrics)
    assert all(torch.equal(once[name], value) for name, value in live.weights("critic").items())
    live.set(gad__score_in_update=False)
    live.finish(batch)


@pytest.mark.parametrize("score_in_update", [False, True])
def test_the_only_answer_left_of_a_prompt_gets_no_advantage_whatever_the_offset_of_d(live, score_in_update):
    live.set(gad__score_in_update=score_in_update)
    bias = 50.0  # added to every score: the loss of D does not see it

    def shift(worker, by=bias):
        import torch

        critic = worker.worker_dict["critic"].engine.module
        head = critic.score
        handle = head.register_forward_hook(lambda module, args, output: output + torch.tensor(by, dtype=output.dtype))
        critic._test_shift = handle

    def unshift(worker):
        worker.worker_dict["critic"].engine.module._test_shift.remove()

    live.on_workers(shift)
    batch, metrics = live.sample()
    keys = sorted(batch.keys, key=lambda key: sample_order(key, live.trainer._submitted))
    batch = run_from(live, drop(batch, keys[1:4]), metrics)
    live.on_workers(unshift)
    fields = live.fields(batch.keys)
    advantages = dict(zip(batch.keys, (row.double() for row in fields["advantages"].unbind()), strict=True))
    scores = dict(zip(batch.keys, (row[-1].item() for row in fields["rm_scores"].unbind()), strict=True))
    assert advantages[keys[0]].abs().max() == 0.0
    assert min(scores[key] for key in keys[4:]) > 0.5 * bias, "the others keep D's score"
    for start in range(4, len(keys), 4):
        group = torch.tensor([scores[key] for key in keys[start : start + 4]], dtype=torch.float64)
        for key, expected in zip(keys[start : start + 4], (group - group.mean()) / (group.std() + 1e-6), strict=True):
            assert advantages[key].tolist() == pytest.approx([expected.item()] * len(advantages[key]), abs=1e-3)
    live.set(gad__score_in_update=False)
    live.finish(batch)


@pytest.mark.parametrize("score_in_update", [False, True])
def test_a_task_reward_is_added_to_the_score_and_the_actor_follows_both(live, score_in_update):
    trainer = live.trainer
    live.set(gad__score_in_update=score_in_update, gad__task_reward__weight={"tiny": 0.7})
    batch, metrics = live.sample()
    keys = sorted(batch.keys, key=lambda key: sample_order(key, trainer._submitted))
    critic = hf_model(live, "critic")
    batch = run_from(live, drop(batch, keys[1:4]), metrics)  # one prompt keeps one answer
    fields = live.fields(batch.keys)
    columns = zip(batch.keys, rows(fields), fields["advantages"].unbind(), strict=True)
    of_key = {key: (*row, advantage[0].item()) for key, row, advantage in columns}
    assert of_key[keys[0]][2] == 0.0
    parts = []
    for start in range(4, len(keys), 4):
        group = [of_key[key] for key in keys[start : start + 4]]
        scores = torch.stack([score(critic, prompt, answer) for prompt, answer, _ in group])
        words = [len(trainer.tokenizer.decode(answer, skip_special_tokens=True).split()) for _, answer, _ in group]
        rewards = torch.tensor(words, dtype=torch.float64) / 10
        parts.append((scores, rewards))
        normalized = [(part - part.mean()) / (part.std() + 1e-6) for part in (scores, rewards)]
        both = normalized[0] + 0.7 * normalized[1]
        expected = both / (both.std() + 1e-6)  # GRPO divides what it gets
        assert [advantage for *_, advantage in group] == pytest.approx(expected.tolist(), abs=2e-3)
    assert any(rewards.std() > 0 for _, rewards in parts)
    deviations = [torch.cat([part - part.mean() for part in column]) for column in zip(*parts, strict=True)]
    correlation = torch.cosine_similarity(*deviations, dim=0).item()
    assert metrics["critic/score_task_corr"] == pytest.approx(correlation, abs=1e-3)
    lone = len(trainer.tokenizer.decode(of_key[keys[0]][1], skip_special_tokens=True).split()) / 10
    mean = (torch.cat([rewards for _, rewards in parts]).sum().item() + lone) / (len(keys) - 3)
    assert metrics["critic/task_reward_mean"] == pytest.approx(mean, abs=1e-5)
    live.set(gad__score_in_update=False, gad__task_reward__weight=0)
    live.finish(batch)


def test_scores_get_a_pass_of_their_own_when_a_batch_is_several_optimizer_steps(live):
    live.set(gad__score_in_update=True, critic__ppo_mini_batch_size=4)
    batch, metrics = live.sample()
    batch = live.trainer._balance_batch(batch, metrics=metrics)
    before = live.weights("critic")
    live.trainer._compute_values(batch, metrics=metrics)
    assert all(torch.equal(before[name], value) for name, value in live.weights("critic").items())
    assert "critic/d_loss" not in metrics and "rm_scores" in live.fields(batch.keys)
    live.set(gad__score_in_update=False, critic__ppo_mini_batch_size=8)
    live.finish(batch)


def test_without_the_old_log_prob_pass_the_actor_gets_the_same_gradient(live):
    live.set(
        gad__skip_old_log_prob=True,
        actor_rollout_ref__actor__kl_loss_type="low_var_kl",
        actor_rollout_ref__actor__kl_loss_coef=0.7,
    )
    live.step()  # the actor has moved away from the reference
    temperature = live.config.actor_rollout_ref.rollout.temperature
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    fields, policy = live.fields(batch.keys), hf_model(live, "actor")
    assert "old_log_probs" not in fields
    total, tokens, entropy, kl = 0.0, int(fields["response_mask"].values().sum()), 0.0, 0.0
    for (prompt, response), advantages, ref in zip(
        rows(fields), fields["advantages"].unbind(), fields["ref_log_prob"].unbind(), strict=True
    ):
        logits = policy(input_ids=torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        log_prob = (logits / temperature).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
        sample_kl = KL_FORMULAS["low_var_kl"](log_prob - ref.double()).sum()
        surrogate = -(advantages.double() * (log_prob - log_prob.detach()).exp()).sum()
        total = total + (surrogate + 0.7 * sample_kl) / tokens
        entropy, kl = entropy - log_prob.detach().sum().item() / tokens, kl + sample_kl.item() / tokens
    total.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters() if p.grad is not None)).item()
    live.trainer._update_actor(batch, metrics=metrics)
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert metrics["actor/loss"] == pytest.approx(total.item(), abs=1e-5)
    assert metrics["actor/kl_loss"] == pytest.approx(kl, rel=1e-3)
    assert metrics["actor/entropy"] == pytest.approx(entropy, abs=1e-4)
    assert not RATIO_METRICS & set(metrics)  # 0 by construction
    assert 0.0 < metrics["training/rollout_probs_diff_max"] < 1e-4
    assert 0.0 < metrics["training/rollout_probs_diff_mean"] <= metrics["training/rollout_probs_diff_max"]
    live.set(gad__skip_old_log_prob=False)
    live.finish(batch)


@pytest.mark.parametrize(
    "needs_it",
    [
        {"algorithm__use_kl_in_reward": True},
        {"algorithm__rollout_correction__rollout_is": "token"},
        {"actor_rollout_ref__actor__ppo_epochs": 2},
        {"actor_rollout_ref__actor__ppo_mini_batch_size": 4},
        {"algorithm__adv_estimator": "optimal_token_baseline"},
    ],
    ids=lambda keys: next(iter(keys)).rsplit("__", 1)[-1],
)
def test_old_log_probs_are_computed_when_something_needs_them(live, needs_it):
    before = {key: OmegaConf.select(live.config, key.replace("__", ".")) for key in needs_it}
    live.set(gad__skip_old_log_prob=True)
    assert live.trainer._skips_old_log_prob()
    live.set(**needs_it)
    batch, metrics = live.sample()
    batch = live.trainer._balance_batch(batch, metrics=metrics)
    live.trainer._compute_old_log_prob(batch, metrics=metrics)
    assert "old_log_probs" in live.fields(batch.keys)
    live.set(gad__skip_old_log_prob=False, **before)
    live.finish(batch)


def test_critic_epochs_and_mini_batches_take_that_many_optimizer_steps(live):
    def steps_taken():
        def count(worker):
            state = worker.worker_dict["critic"].engine.optimizer.state
            return max(int(entry["step"]) for entry in state.values())

        return live.on_workers(count)

    before = steps_taken()
    live.set(critic__ppo_epochs=3, critic__ppo_mini_batch_size=4, critic__shuffle=True)
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    live.trainer._update_critic(batch, metrics=metrics)
    assert steps_taken() - before == 3 * 8 // 4
    assert 0.0 <= metrics["critic/d_acc"] <= 1.0
    live.set(critic__ppo_epochs=1, critic__ppo_mini_batch_size=8, critic__shuffle=False)
    live.finish(batch)


def test_without_teacher_data_the_critic_keeps_the_stock_value_loss(live):
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    got, scores = live.trainer.discriminator.update_critic(live.trainer._view(batch.keys))
    assert scores.numel() == 0
    assert "critic/vf_loss" in got and "critic/d_loss" not in got
    fields = live.fields(batch.keys)
    assert math.isfinite(got["critic/vf_loss"]) and fields["returns"].values().abs().sum() > 0
    live.finish(batch)


def test_a_broken_discriminator_stops_the_run_and_one_bad_step_does_not(live, tmp_path):
    def poison(worker):
        head = worker.worker_dict["critic"].engine.module.score.weight
        head._test_kept = head.detach().clone()
        head.data.fill_(float("nan"))

    def cure(worker):
        head = worker.worker_dict["critic"].engine.module.score.weight
        head.data.copy_(head._test_kept)

    trainer, step = live.trainer, live.trainer.global_steps
    live.set(trainer__default_local_dir=str(tmp_path))
    actor = live.weights("actor")
    assert live.step()[0]["gad/bad_steps"] == 0
    moved = live.weights("actor")
    assert any(not torch.equal(actor[name], value) for name, value in moved.items())
    live.on_workers(poison)
    metrics, _ = live.step()
    assert metrics["gad/bad_steps"] == 1 and math.isnan(metrics["critic/grad_norm"])
    live.on_workers(cure)
    assert live.step()[0]["gad/bad_steps"] == 0
    live.on_workers(poison)
    for bad in (1, 2):
        assert live.step()[0]["gad/bad_steps"] == bad
    expected = rf"steps {step + 3} to {step + 5} have NaN .*critic/grad_norm.*no checkpoint"
    with pytest.raises(RuntimeError, match=expected):
        live.step()
    live.on_workers(cure)
    saved = [json.loads(line) for line in (tmp_path / f"bad_step_{step + 5}/rows.jsonl").read_text().splitlines()]
    assert len(saved) == 8 * 4 + 8 and all(row["prompt"] and row["answer"] for row in saved)
    numbers = json.loads((tmp_path / f"bad_step_{step + 5}/metrics.json").read_text())
    assert numbers["critic/d_loss"] == "nan" and numbers["gad/bad_steps"] == 3
    trainer.on_step_end()
    tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
    trainer._bad_steps.in_a_row = 0
    trainer.global_steps += 1


def test_critic_warmup_delays_exactly_the_actor(live):
    start = live.trainer.global_steps
    live.set(trainer__critic_warmup=start + 1)
    actor, critic = live.weights("actor"), live.weights("critic")
    metrics, _ = live.step()
    assert "actor/pg_loss" not in metrics and "critic/d_loss" in metrics
    assert all(torch.equal(actor[name], value) for name, value in live.weights("actor").items())
    assert any(not torch.equal(critic[name], value) for name, value in live.weights("critic").items())
    metrics, _ = live.step()  # global step start + 1: critic_warmup <= global_step
    assert "actor/pg_loss" in metrics
    assert any(not torch.equal(actor[name], value) for name, value in live.weights("actor").items())
    live.set(trainer__critic_warmup=0)


def test_actor_and_critic_both_move_in_gad_and_metrics_are_in_the_log(live):
    actor, critic = live.weights("actor"), live.weights("critic")
    metrics, _ = live.step()
    assert any(not torch.equal(actor[name], value) for name, value in live.weights("actor").items())
    assert any(not torch.equal(critic[name], value) for name, value in live.weights("critic").items())
    expected = """critic/d_loss critic/d_acc critic/student_value_mean critic/teacher_value_mean critic/score_gap
        critic/score_length_corr critic/grad_norm critic/lr actor/pg_loss actor/kl_loss actor/entropy
        response_length/mean response_length/cut_ratio teacher_response_length/mean
        teacher_response_length/cut_ratio""".split()
    assert not set(expected) - set(metrics)
    assert not RATIO_METRICS & set(metrics)  # one optimizer step: 0 by construction, with a separate pass too
    assert not [name for name in metrics if name.startswith(("critic/values/", "critic/vf_"))]


@pytest.mark.parametrize(
    "setting",
    [{"actor_rollout_ref__actor__ppo_mini_batch_size": 4}, {"algorithm__rollout_correction__bypass_mode": True}],
    ids=["two optimizer steps", "ratios to the rollout engine"],
)
def test_metrics_of_the_ratio_are_in_the_log_where_it_can_differ_from_1(live, setting):
    before = {key: OmegaConf.select(live.config, key.replace("__", ".")) for key in setting}
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    live.set(**setting)
    live.trainer._update_actor(batch, metrics=metrics)
    live.set(**before)
    live.finish(batch)
    assert set(metrics) >= RATIO_METRICS


def test_compute_ref_log_prob_works_and_the_reference_is_loaded(live):
    live.step()  # the actor has moved away from the reference
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    fields = live.fields(batch.keys)
    reference = AutoModelForCausalLM.from_pretrained(live.config.actor_rollout_ref.model.path, dtype=torch.float64)
    policy = hf_model(live, "actor")
    for (prompt, response), ref, old in zip(
        rows(fields), fields["ref_log_prob"].unbind(), fields["old_log_probs"].unbind(), strict=True
    ):
        for got, model in ((ref, reference), (old, policy)):
            expected = token_log_probs(model, prompt, response, live.config.actor_rollout_ref.rollout.temperature)
            torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0)
    assert (fields["ref_log_prob"].values() - fields["old_log_probs"].values()).abs().max() > 1e-4
    live.finish(batch)


@pytest.mark.parametrize("kl_type", KL_FORMULAS)
def test_use_kl_in_reward_takes_effect_and_apply_kl_penalty_changes_token_level_rewards(live, kl_type):
    from verl.trainer.ppo import core_algos

    live.set(algorithm__kl_penalty=kl_type)
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    plain = live.fields(batch.keys)["advantages"]
    live.set(algorithm__use_kl_in_reward=True, algorithm__kl_ctrl__kl_coef=0.5)
    live.trainer.kl_ctrl_in_reward = core_algos.get_kl_controller(live.config.algorithm.kl_ctrl)
    batch = live.trainer._compute_advantage(batch, metrics=metrics)
    fields = live.fields(batch.keys)
    gap = (fields["old_log_probs"].values() - fields["ref_log_prob"].values()).double()
    expected = fields["rm_scores"].values().double() - 0.5 * KL_FORMULAS[kl_type](gap)
    torch.testing.assert_close(fields["token_level_rewards"].values().double(), expected, atol=1e-5, rtol=1e-4)
    assert gap.abs().max() > 1e-4
    assert not torch.allclose(fields["advantages"].values(), plain.values())
    assert "actor/reward_kl_penalty" in metrics
    live.set(algorithm__use_kl_in_reward=False)
    live.finish(batch)


@pytest.mark.parametrize("kl_type", KL_FORMULAS)
@pytest.mark.parametrize("coef", [0.0, 0.7])
@pytest.mark.parametrize("entropy_coeff", [0.0, 0.3])
def test_use_kl_loss_its_coef_and_its_type_take_effect_in_the_actor_loss(live, kl_type, coef, entropy_coeff):
    from functools import partial

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    live.set(
        actor_rollout_ref__actor__kl_loss_type=kl_type,
        actor_rollout_ref__actor__kl_loss_coef=coef,
        actor_rollout_ref__actor__entropy_coeff=entropy_coeff,
    )
    actor_config = omega_conf_to_dataclass(live.config.actor_rollout_ref.actor)
    live.trainer.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=actor_config))
    batch, metrics = live.sample()
    batch = run_from(live, batch, metrics)
    fields = live.fields(batch.keys)
    live.trainer._update_actor(batch, metrics=metrics)
    gap = (fields["old_log_probs"].values() - fields["ref_log_prob"].values()).double()
    kl = KL_FORMULAS[kl_type](gap).mean().item()
    assert metrics["actor/kl_loss"] == pytest.approx(kl, abs=1e-5, rel=1e-3)
    expected = metrics["actor/pg_loss"] + coef * kl
    if entropy_coeff:
        expected -= entropy_coeff * fields["entropy"].values().double().mean().item()
    assert metrics["actor/loss"] == pytest.approx(expected, abs=1e-5)
    live.set(actor_rollout_ref__actor__entropy_coeff=0.0)
    live.finish(batch)


def test_gspo_loss_runs_as_the_actor_objective(live):
    from functools import partial

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    live.set(
        actor_rollout_ref__actor__policy_loss__loss_mode="gspo",
        actor_rollout_ref__actor__loss_agg_mode="seq-mean-token-mean",
    )
    actor_config = omega_conf_to_dataclass(live.config.actor_rollout_ref.actor)
    live.trainer.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=actor_config))
    metrics, fields = live.step()
    # first step on fresh samples: ratio 1, so the loss is minus the mean advantage over sequences
    expected = -torch.stack([row.double().mean() for row in fields["advantages"].unbind()]).mean().item()
    assert metrics["actor/pg_loss"] == pytest.approx(expected, abs=1e-5)
    live.set(
        actor_rollout_ref__actor__policy_loss__loss_mode="vanilla", actor_rollout_ref__actor__loss_agg_mode="token-mean"
    )


def test_gspo_clips_some_answers_in_the_second_optimizer_step_of_a_batch(live):
    """The first optimizer step has the ratio 1 and clips nothing. In the second, a narrow clip range leaves only the
    answers whose likelihood has moved against their advantage."""
    from functools import partial

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    actor = "actor_rollout_ref__actor__"
    setting = {
        f"{actor}policy_loss__loss_mode": "gspo",
        f"{actor}loss_agg_mode": "seq-mean-token-mean",
        f"{actor}clip_ratio_low": 1e-5,
        f"{actor}clip_ratio_high": 1e-5,
        f"{actor}ppo_mini_batch_size": 4,
    }
    before = {key: OmegaConf.select(live.config, key.replace("__", ".")) for key in setting}

    def set_loss():
        actor_config = omega_conf_to_dataclass(live.config.actor_rollout_ref.actor)
        live.trainer.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=actor_config))

    live.set(**setting)
    set_loss()
    fractions = [live.step()[0]["actor/pg_clipfrac"] for _ in range(2)]
    live.set(**before)
    set_loss()
    assert all(0.0 < fraction < 0.5 for fraction in fractions), fractions


def test_a_save_holds_what_the_line_of_its_step_will_hold(live, tmp_path):
    live.set(trainer__default_local_dir=str(tmp_path))
    trainer, metrics = live.trainer, {}
    trainer.timing_raw = {}
    trainer.on_step_begin()
    batch = trainer.step(metrics, trainer.timing_raw)
    measured = dict(metrics)
    trainer._save_checkpoint()
    assert metrics == measured
    epoch = (trainer.global_steps - 1) // trainer.steps_per_epoch
    trainer._compute_metrics(batch, metrics, {**trainer.timing_raw, "step": 1.0}, trainer.global_steps, epoch)
    logged = json.loads(orjson.dumps(metrics, option=orjson.OPT_SERIALIZE_NUMPY))  # as stock's file logger writes it
    saved = json.loads((tmp_path / f"global_step_{trainer.global_steps}/metrics.json").read_text())
    clocks = ("timing_s/", "timing_per_token_ms/", "perf/time_per_step", "perf/throughput")
    assert saved == {name: value for name, value in logged.items() if not name.startswith(clocks)}
    assert {"critic/d_loss", "actor/kl_loss", "response_length/mean"} < set(saved)
    live.finish(batch)


def test_checkpoints_of_both_load_back(live, tmp_path):
    live.set(trainer__default_local_dir=str(tmp_path))
    live.trainer._save_checkpoint()
    saved = {role: live.weights(role) for role in ("actor", "critic")}
    step = live.trainer.global_steps
    folder = tmp_path / f"global_step_{step}"
    verify_contents(folder, "gad")
    record = json.loads((folder / "checksums.json").read_text())
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert set(record) == names - {"checksums.json"} and "actor/model_world_size_1_rank_0.pt" in record
    actor = AutoModelForCausalLM.from_pretrained(folder / "actor" / "huggingface", dtype=torch.float32)
    critic = AutoModelForTokenClassification.from_pretrained(
        folder / "critic" / "huggingface", num_labels=1, dtype=torch.float32
    )
    for model, role in ((actor, "actor"), (critic, "critic")):
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in saved[role].items())
    live.step()
    live.set(trainer__resume_mode="resume_path", trainer__resume_from_path=str(folder))
    live.load()
    assert live.trainer.global_steps == step
    for role in ("actor", "critic"):
        assert all(torch.equal(saved[role][name], value) for name, value in live.weights(role).items())
    live.trainer.global_steps += 1


def test_an_overlong_prompt_is_part_of_no_step(live):
    """The trainer counts steps over the rows that stay."""
    trainer, config = live.trainer, live.config
    whole, epochs, limit = len(trainer.train_dataset), config.trainer.total_epochs, config.data.max_prompt_length
    prompts = [trainer.train_dataset[i]["raw_prompt"] for i in range(whole)]
    lengths = sorted(len(build_prompt_ids(trainer.tokenizer, prompt, {})) for prompt in prompts)
    left = sum(length < lengths[-1] for length in lengths)
    steps = whole // 8 * 2
    live.set(trainer__total_training_steps=steps, trainer__total_epochs=2, data__max_prompt_length=lengths[-1] - 1)
    with pytest.raises(ValueError, match=rf"{left} rows .* end the run after step {left // 8 * 2}, .* Fix: "):
        trainer._init_dataloader()
    live.set(trainer__total_training_steps=100, trainer__total_epochs=epochs, data__max_prompt_length=limit)
    trainer._init_dataloader()
    assert len(trainer.train_dataset) == whole and left < whole


def test_imitation_is_the_next_token_loss_on_the_teacher(live):
    from functools import partial

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.actor.dp_actor import imitation_loss

    actor_config = omega_conf_to_dataclass(live.config.actor_rollout_ref.actor)
    live.trainer.actor_rollout_wg.set_loss_fn(partial(imitation_loss, config=actor_config))
    live.trainer.__class__ = PPOTrainerWarmup
    batch, metrics = live.sample()
    keys = sorted(batch.keys, key=lambda key: sample_order(key, live.trainer._submitted))
    first = live.fields(keys[:1])
    batch = run_from(live, drop(batch, keys[:4]), metrics)  # the first prompt has no rollout, but a teacher's answer
    teacher_rows = [teacher for teacher, _ in live_groups(live)]
    assert len(teacher_rows) == 7
    teacher_rows.append((first["prompts"][0], torch.tensor(list(first["teacher_response_ids"])[0])))
    policy = hf_model(live, "actor")
    expected = -torch.cat([token_log_probs(policy, *row, temperature=1.0) for row in teacher_rows]).mean()
    live.trainer._update_actor(batch, metrics=metrics)
    assert metrics["actor/sft_loss"] == pytest.approx(expected.item(), rel=1e-4)
    live.finish(batch)


@pytest.mark.parametrize(
    "micro_batches",
    [
        {"actor_rollout_ref__actor__ppo_max_token_len_per_gpu": 60},
        {
            "actor_rollout_ref__actor__use_dynamic_bsz": False,
            "actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": 3,
            "actor_rollout_ref__ref__log_prob_use_dynamic_bsz": False,
            "actor_rollout_ref__ref__log_prob_micro_batch_size_per_gpu": 7,
            "actor_rollout_ref__rollout__log_prob_use_dynamic_bsz": False,
            "actor_rollout_ref__rollout__log_prob_micro_batch_size_per_gpu": 4,
        },
    ],
    ids=["by tokens", "fixed rows"],
)
@pytest.mark.parametrize("missing", ["none", "one sample", "a whole prompt"])
@pytest.mark.parametrize("coef", [0.0, 0.4])
def test_dpo_has_the_loss_and_the_gradient_of_the_pairs_written_out(live, micro_batches, missing, coef):
    before = {key: OmegaConf.select(live.config, key.replace("__", ".")) for key in micro_batches}
    live.trainer.__class__ = PPOTrainerOnlineDPO
    live.set(gad__dpo_beta=0.3, gad__imitation_coef=coef, **micro_batches)
    batch, metrics = live.sample()
    batch = drop_missing(live, batch, missing)
    batch = live.trainer._balance_batch(batch, metrics=metrics)
    policy, path = hf_model(live, "actor"), live.config.actor_rollout_ref.model.path
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).requires_grad_(False)

    def log_prob(model, prompt, response):
        ids = torch.cat([prompt, response]).unsqueeze(0)
        log_probs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return log_probs.gather(-1, response.unsqueeze(-1)).sum()

    def log_ratio(prompt, response):
        return log_prob(policy, prompt, response) - log_prob(reference, prompt, response)

    gaps = []
    for teacher, students in live_groups(live):
        chosen = log_ratio(*teacher)
        gaps += [0.3 * (chosen - log_ratio(*student)) for student in students]
    gaps = torch.stack(gaps)
    assert len(gaps) == 8 * 4 - {"none": 0, "one sample": 1, "a whole prompt": 5}[missing]
    loss = -F.logsigmoid(gaps).mean()
    teachers = rows(live.fields([group.teacher.key for group in live.trainer._groups]))
    nll = -sum(log_prob(policy, *teacher) for teacher in teachers) / sum(len(answer) for _, answer in teachers)
    (loss + coef * nll).backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in policy.parameters() if p.grad is not None)).item()
    live.trainer._update_actor(batch, metrics=metrics)
    if coef:
        assert metrics.pop("actor/imitation_loss") == pytest.approx(nll.item(), rel=1e-4)
    assert "actor/imitation_loss" not in metrics
    assert metrics["actor/dpo_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["actor/dpo_margin"] == pytest.approx(gaps.mean().item(), abs=1e-4)
    assert metrics["actor/dpo_acc"] == pytest.approx(((gaps.sign() + 1) / 2).mean().item(), abs=1e-6)
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert "actor/loss" not in metrics
    live.set(gad__imitation_coef=0.0, **before)
    live.finish(batch)


def test_a_soda_prompt_without_a_stored_answer_is_no_pair(live, monkeypatch):
    numbers = iter(range(8))
    monkeypatch.setattr(PPOTrainerSODA, "_start_key", lambda self, messages: next(numbers))
    live.trainer.__class__ = PPOTrainerSODA
    stored = {"prompt": [4, 5], "answers": [[6, 7]] * 4}
    live.trainer._start_records = {0: {"prompt": [], "answers": []}} | dict.fromkeys(range(1, 8), stored)
    live.trainer.prepare_step()
    metrics = {}
    batch = live.trainer._step_once(metrics, {}, 8)
    lost = live.trainer._groups[-1]
    assert lost.students == [] and lost.teacher_tokens > 0
    assert metrics["gad/missing_rollouts"] == 4 and metrics["actor/dpo_loss"] > 0
    live.finish(batch)

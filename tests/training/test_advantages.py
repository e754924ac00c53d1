"""Estimators against hand-computed tables, brute force in float64, and TRL's own trainers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import RLOOConfig, RLOOTrainer

from bupo import BuPOTrainer
from bupo.training.objective.advantages import compute_leave_one_out, gae, masked_whiten, put_on_last_token
from bupo.training.objective.critic import compute_value_loss
from bupo.training.objective.rollout_batch import RolloutBatch
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, token_reward, trainer_of

rewards_lists = st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=24)


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    by_hand = [1 - 1 / 3, 0 - 2 / 3, 0 - 2 / 3, 1 - 1 / 3, 0, 0, 0, 0]
    torch.testing.assert_close(compute_leave_one_out(rewards, 4), torch.tensor(by_hand))


def test_leave_one_out_skips_ungraded_completions():
    found = compute_leave_one_out(torch.tensor([1.0, math.nan, 0.0, 2.0, math.nan, math.nan]), 3)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 0.0]))


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 10_000))
def test_leave_one_out_is_the_mean_of_the_others(prompts, group, seed):
    rewards = np.random.default_rng(seed).normal(size=prompts * group)
    found = compute_leave_one_out(torch.tensor(rewards), group).numpy()
    for i, reward in enumerate(rewards):
        first = i // group * group
        others = [rewards[j] for j in range(first, first + group) if j != i]
        assert found[i] == pytest.approx(reward - np.mean(others), abs=1e-12)


def test_last_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]])  # the last row has a tool's token inside
    found = put_on_last_token(torch.tensor([1.0, 2.0, 3.0, math.nan]), mask)
    assert found.tolist() == [[0, 1, 0], [0, 0, 2], [0, 0, 0], [0, 0, 0]]


def test_gae_by_hand():
    """gamma 0.9, lambda 0.8, values 0.5, 0.6, 0.7, reward 1 at the end."""
    deltas = [0.9 * 0.6 - 0.5, 0.9 * 0.7 - 0.6, 1 - 0.7]
    third = deltas[2]
    second = deltas[1] + 0.72 * third
    first = deltas[0] + 0.72 * second
    rewards, values = torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.6, 0.7, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1, 1, 1, 0]]), 0.9, 0.8)
    torch.testing.assert_close(advantages, torch.tensor([[first, second, third, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[first + 0.5, second + 0.6, third + 0.7, 0.0]]))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_sum(tokens, seed, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_(t+k) over unmasked tokens (eq. 16 of the paper), in float64."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=tokens), rng.normal(size=tokens)
    mask = rng.random(tokens) < 0.7
    rewards_BC, values_BC, mask_BC = (torch.tensor(x)[None] for x in (rewards, values, mask.astype(int)))
    found, _ = gae(rewards_BC, values_BC, mask_BC, gamma, lam)
    real = np.flatnonzero(mask)
    deltas = [
        rewards[t] + gamma * (values[real[i + 1]] if i + 1 < len(real) else 0) - values[t] for i, t in enumerate(real)
    ]
    expected = np.zeros(tokens)
    for i, t in enumerate(real):
        expected[t] = sum((gamma * lam) ** k * deltas[i + k] for k in range(len(real) - i))
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-9)


def test_gae_without_discount_is_reward_minus_value():
    rewards, values, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.rand(1, 3), torch.ones(1, 3)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(advantages, 1 - values)
    torch.testing.assert_close(returns, torch.ones(1, 3))


def test_reinforce_plus_plus_by_hand():
    """With completions of 1 and 3 tokens and rewards 1 and 0, the mean over tokens is 1/4 and the unbiased variance 1/4."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    found = masked_whiten(torch.tensor([[1.0], [0.0]]) * mask, mask)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0, 0], [-0.5, -0.5, -0.5]]), atol=1e-6, rtol=0)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 7), st.integers(0, 10_000))
def test_whitening_over_processes_is_whitening_of_all(rows, columns, seed):
    """The sums of two processes, against numpy on all rows."""
    rng = np.random.default_rng(seed)
    values, mask = rng.normal(size=(2 * rows, columns)), rng.random((2 * rows, columns)) < 0.7
    mask[:, 0] = True
    parts = [(torch.tensor(values[half]), torch.tensor(mask[half])) for half in (slice(rows), slice(rows, None))]
    count, total = mask.sum(), values[mask].sum()
    squares = ((values[mask] - total / count) ** 2).sum()
    answers = iter([torch.tensor([count, total]), torch.tensor([squares])] * 2)
    found = np.concatenate([masked_whiten(v, m, lambda sums: next(answers)).numpy() for v, m in parts])
    expected = np.where(mask, (values - values[mask].mean()) / np.sqrt(values[mask].var(ddof=1) + 1e-8), 0)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 0.9, 0.2]), torch.tensor([0.0, 0.8, 0.3]), torch.tensor([1.0, 1.0, 1.0])
    loss, clipped = compute_value_loss(values, old, returns, 0.5)
    # the first value moved by 1.0 and is clipped to 0.5, farther from its return
    torch.testing.assert_close(loss, 0.5 * torch.tensor([0.25, 0.01, 0.64]))
    assert clipped.tolist() == [True, False, False]


def rollout_of(trainer):
    """Return the tensors of the first rollout batch."""
    seen = {}
    name = (
        "generate_rollouts" if isinstance(trainer, BuPOTrainer) else "_generate_and_score_completions"
    )  # private in TRL
    real = getattr(trainer, name)

    def spy(inputs):
        output = real(inputs)
        seen.setdefault("output", {k: v.clone() for k, v in output.items() if isinstance(v, torch.Tensor)})
        return output

    setattr(trainer, name, spy)
    trainer.train()
    return seen["output"]


def test_rloo_agrees_with_trls_trainer(tmp_path):
    common = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 1}
    theirs = RLOOTrainer(
        model_of(),
        token_reward,
        RLOOConfig(
            str(tmp_path / "a"), steps_per_generation=4, report_to="none", use_cpu=True, bf16=False, beta=0.0, **common
        ),
        train_dataset=PROBLEMS,
        processing_class=TOKENIZER,
    )
    mine = trainer_of(model_of(), config(tmp_path / "b", advantage_estimator="rloo", **common))
    for output in (
        rollout_of(theirs),
        rollout_of(mine),
    ):  # the trainers sample differently, so each is compared with the other's formula
        rewards = torch.tensor(batch_rewards(output), dtype=torch.float32)
        assert output["advantages"].abs().max() > 0.1
        torch.testing.assert_close(output["advantages"], compute_leave_one_out(rewards, 4), atol=1e-6, rtol=1e-5)


def batch_rewards(output):
    lengths = output["completion_mask"].sum(1)
    ids = [row[:n].tolist() for row, n in zip(output["completion_ids"], lengths, strict=True)]
    return np.array(token_reward(ids))


def test_grpo_in_a_run_is_the_published_formula(tmp_path):
    output = rollout_of(trainer_of(model_of(), config(tmp_path, max_steps=1)))
    groups = batch_rewards(output).reshape(-1, 4)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(output["advantages"].numpy(), expected.ravel(), atol=1e-4)


def test_reinforce_plus_plus_in_a_run_is_the_published_formula(tmp_path):
    output = rollout_of(trainer_of(model_of(), config(tmp_path, max_steps=1, advantage_estimator="reinforce++")))
    mask = output["completion_mask"].bool().numpy()
    tokens = np.broadcast_to(batch_rewards(output)[:, None], mask.shape)[mask]
    found = output["advantages"].numpy()
    np.testing.assert_allclose(found[mask], (tokens - tokens.mean()) / tokens.std(ddof=1), atol=1e-4)
    assert not found[~mask].any()


def test_ppo_in_a_run_starts_from_zero_values(tmp_path):
    """With a value head of zero, returns are the rewards and advantages the whitened rewards."""
    output = rollout_of(trainer_of(model_of(), config(tmp_path, max_steps=1, advantage_estimator="ppo")))
    mask = output["completion_mask"].bool()
    assert not output["values"].any()
    rewards = torch.tensor(batch_rewards(output), dtype=torch.float32)[:, None].expand(mask.shape)
    torch.testing.assert_close(output["returns"][mask], rewards[mask])
    tokens = rewards[mask].double()
    torch.testing.assert_close(
        output["advantages"][mask].double(), (tokens - tokens.mean()) / tokens.std(), atol=1e-4, rtol=1e-4
    )


def test_dual_clip_is_the_published_formula():
    """TRL's two-sided clipping, min(min(r, c) A, clip(r) A), is dual clip (arXiv 1912.09729): max(min(r A, clip(r) A), c A)
    for A < 0."""
    ratio = torch.linspace(0.01, 30, 2000, dtype=torch.float64)
    for advantage in (-2.0, -0.1, 0.3, 1.5):
        low, high, c = 0.8, 1.2, 10.0
        theirs = torch.minimum(ratio.clamp(max=c) * advantage, ratio.clamp(low, high) * advantage)
        plain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        published = torch.maximum(plain, torch.tensor(c * advantage)) if advantage < 0 else plain
        torch.testing.assert_close(theirs, published)


@pytest.mark.parametrize("estimator", ["grpo", "reinforce++"])
def test_the_loss_is_a_token_mean_with_dual_clip(tmp_path, estimator):
    """The trainer's loss on one micro-batch with ratios far from 1, against the formula in float64."""
    args = config(
        tmp_path,
        internal_steps=0,
        internal_layer=None,
        max_steps=1,
        delta=3.0,
        loss_type="dapo",
        advantage_estimator=estimator,
    )
    trainer = trainer_of(model_of(), args)
    seen = []

    def loss_of(model, inputs, inner=trainer.compute_micro_batch_loss):
        noise = torch.randn(inputs["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(0))
        inputs = {**inputs, "old_per_token_logps": inputs["old_per_token_logps"] + 2 * noise}
        loss = inner(model, inputs)
        with torch.no_grad():
            logps = trainer.policy_alignment.score_batch(RolloutBatch(inputs)).log_probs
        seen.append((inputs, logps.double(), loss.item()))
        return loss

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    inputs, logps, loss = seen[0]
    ratio, mask = (logps - inputs["old_per_token_logps"].double()).exp(), inputs["completion_mask"].double()
    advantage = inputs["advantages"].double()
    advantage = (advantage[:, None] if advantage.dim() == 1 else advantage).expand(ratio.shape)
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    clipped = torch.where(advantage < 0, torch.maximum(clipped, 3.0 * advantage), clipped)
    assert (ratio > 3).any()
    window = inputs["num_items_in_batch"].double() / args.steps_per_generation  # tokens of an update, on average
    assert loss == pytest.approx((-(clipped * mask).sum() / window).item(), rel=1e-4)

"""Ungraded answers (None, NaN, infinite rewards) count as absent in advantages, the loss, the critic and the logs.

The reference is computed in float64 on the graded answers only (tests/helpers/ungraded_reference.py).
"""

import json
import math
import os
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bupo import BuPOTrainer, UserError
from bupo.models.loading import load_model
from bupo.training.objective.advantages import ESTIMATORS, set_advantages
from bupo.training.objective.rollout_batch import RolloutBatch, mask_ungraded_rewards, sum_weighted_rewards
from tests.helpers import ungraded_reference as reference
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, snapshot

ODD = (None, nan, inf, -inf)


def tensor_of(rows):
    return torch.tensor([[nan if value is None else value for value in row] for row in rows], dtype=torch.float32)


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "weights", "expected"),
    [
        ((1.0, 2.0), (1.0, 1.0), 3.0),
        ((1.0, None), (2.0, 1.0), 2.0),  # one function returns None
        ((None, nan), (1.0, 1.0), nan),
        ((1.0, inf), (1.0, 1.0), nan),  # an infinite reward makes the sum meaningless
        ((1.0, -inf), (1.0, 0.5), nan),
        ((inf, -inf), (1.0, 1.0), nan),
        ((None, inf), (1.0, 1.0), nan),
        ((1.0, inf), (1.0, 0.0), 1.0),  # a function of weight 0 is only logged
        ((None, 3.0), (1.0, 0.0), nan),
        ((0.5, 3.0), (0.0, 0.0), 0.0),
        ((3e38, 3e38), (1.0, 1.0), nan),
        ((1e30, 0.0), (1.0, 1.0), nan),  # its square is infinite in fp32
        ((1e17, 0.0), (1.0, 1.0), 1e17),
    ],
)
def test_the_rule(row, weights, expected):
    rewards = tensor_of([row])
    (found,) = sum_weighted_rewards(rewards, torch.tensor(weights)).tolist()
    assert found == pytest.approx(expected, nan_ok=True, rel=1e-6)
    kept = mask_ungraded_rewards(rewards, torch.tensor(weights))
    assert not kept.isinf().any() and bool(kept.isnan().all()) == math.isnan(expected)


@given(
    st.lists(st.sampled_from([0.0, 1.0, -2.5, *ODD]), min_size=4, max_size=20), st.integers(2, 5), st.integers(0, 99)
)
def test_every_estimator_is_as_on_the_answers_that_are_left(values, group, seed):
    values = values[: len(values) // group * group]
    if not values:
        return
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, len(values)).tolist()
    mask = torch.tensor([[int(t < n) for t in range(4)] for n in lengths])
    guesses = torch.tensor(rng.normal(size=(len(values), 4)))
    rewards = [reference.reward_of([value], [1.0]) for value in values]
    for name in [name for name, estimator in ESTIMATORS.items() if estimator]:
        batch = RolloutBatch({"completion_ids": mask, "completion_mask": mask}, tensor_of([[v] for v in values])[:, 0])
        batch._rewards = batch._rewards.double()
        set_advantages(name, batch, group, lambda sums: sums, guesses, 0.9, 0.8)
        found = batch.tensors["advantages"]
        assert found.isfinite().all()
        check_advantages(name, found, rewards, lengths, group, guesses.tolist(), (0.9, 0.8))


def check_advantages(name, found, rewards, lengths, group, values=None, gae=(1.0, 1.0), **options):
    """Check advantages `(B,)` or `(B, C)` against the reference; those of ungraded answers are 0."""
    if name in ("grpo", "rloo"):
        how = options.get("rows")
        if how is not None:
            expected = reference.normalized_then_summed(how, options["weights"], rewards, group)
        elif name == "grpo":
            expected = reference.grpo(rewards, group, options.get("scale", "group"))
        else:
            expected = reference.rloo(rewards, group)
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
        return
    expected = (
        reference.reinforce(rewards, lengths)
        if name == "reinforce++"
        else reference.ppo(rewards, lengths, values, *gae)[0]
    )
    for row, tokens in zip(found.tolist(), expected, strict=True):
        np.testing.assert_allclose(row, [*(tokens or []), *[0.0] * (len(row) - len(tokens or []))], atol=3e-4)


# -- in a trainer ------------------------------------------------------------------------------------------------------


class Rewards:
    """Two reward functions with given rewards for each rollout batch."""

    def __init__(self, rows):
        self.rows = rows

    def functions(self):
        def first(completions, **kwargs):
            return [row[0] for row in self.rows]

        def second(completions, **kwargs):
            return [row[1] for row in self.rows]

        return [first, second]


def saved_model(folder):
    """Save a tiny model in a folder, from which TRL loads the reference of a KL penalty."""
    model_of(num_hidden_layers=3).save_pretrained(folder / "model")
    return load_model(str(folder / "model"))


def trainer_with(folder, rewards, **changes):
    args = config(folder, **{"max_completion_length": 5, "reward_weights": [1.0, 0.5], "probe_every": 0, **changes})
    model, functions = saved_model(folder), rewards.functions()
    return BuPOTrainer(model, functions, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)


def patterns(count, group):
    """Return rewards of two functions: some ungraded, a prompt with one graded answer, and a prompt with none."""
    rng = np.random.default_rng(count)
    rows: list[list[float | None]] = [[float(rng.integers(0, 3)), float(rng.integers(0, 2))] for _ in range(count)]
    for place, odd in zip(range(1, count, 3), [*ODD, None, inf] * count, strict=False):
        rows[place] = [odd, None] if place % 2 else [1.0, odd]
    nothing: list[list[float | None]] = [[nan, -inf] for _ in range(group - 2)]
    rows[: group - 1] = [[None, None] for _ in rows[: group - 1]]
    rows[group - 1] = [2.0, 1.0]
    rows[group : 2 * group] = [[None, nan], [inf, 1.0], *nothing]
    return rows


METHODS = [
    ("grpo", {"scale_rewards": "group"}),
    ("grpo", {"scale_rewards": "batch"}),
    ("grpo", {"scale_rewards": "none"}),
    ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}),
    ("rloo", {}),
    ("reinforce++", {}),
    ("ppo", {}),
    ("ppo", {"critic_backbone": "shared"}),
]


@pytest.mark.parametrize(
    ("estimator", "changes"), METHODS, ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value
)
@pytest.mark.parametrize("steps", [0, 2], ids=["phase2", "phase1"])
@pytest.mark.parametrize("group", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5))])
def test_a_rollout_is_as_without_them(tmp_path, estimator, changes, steps, group):
    count = 4 * group
    rows = patterns(count, group)
    trainer = trainer_with(
        tmp_path, Rewards(rows), advantage_estimator=estimator, num_generations=group, per_device_train_batch_size=count,
        steps_per_generation=1, num_iterations=2, internal_steps=steps, gamma=0.9, lam=0.8, **changes,
    )  # fmt: skip
    trainer.model.train()
    output = trainer.generate_rollouts([PROBLEMS[n // group] for n in range(count)])
    rewards = [reference.reward_of(row, [1.0, 0.5]) for row in rows]
    graded = torch.tensor([reward is not None for reward in rewards])
    assert 3 <= graded.sum() < count
    lengths = output["completion_mask"].sum(1).tolist()
    options = {"scale": changes.get("scale_rewards", "group")}
    if "multi_objective_aggregation" in changes:
        rows_of_graded = [
            row if reward is not None else [None, None] for row, reward in zip(rows, rewards, strict=True)
        ]
        options = {"rows": rows_of_graded, "weights": [1.0, 0.5]}
    values = None
    if estimator == "ppo":
        values = [[0.0] * n for n in lengths]  # the value head starts at zero
        assert not output["values"].any() and not output["returns"][~graded].any()
        assert output["returns"][graded].abs().sum() > 0
    check_advantages(estimator, output["advantages"], rewards, lengths, group, values, (0.9, 0.8), **options)
    mask = RolloutBatch(output).loss_mask
    assert not mask[~graded].any() and mask[graded].any(1).all()
    assert output["num_items_in_batch"] == sum(n for n, is_graded in zip(lengths, graded, strict=True) if is_graded)
    metrics = {name: values[-1] for name, values in trainer.train_metrics.items()}
    known = [reward for reward in rewards if reward is not None]
    assert metrics["reward"] == pytest.approx(np.mean(known), abs=1e-5)
    assert metrics["reward_std"] == pytest.approx(np.std(known, ddof=1), abs=1e-5)
    assert metrics["completions/ungraded_ratio"] == pytest.approx(1 - len(known) / count)
    first = [row[0] for row, r in zip(rows, rewards, strict=True) if r is not None and row[0] is not None]
    assert metrics["rewards/first/mean"] == pytest.approx(np.mean(first), abs=1e-5)
    if estimator != "grpo" or options == {"scale": "group"}:
        by_prompt = [[rewards[i] for i in places] for places in reference.groups_of(rewards, group) if places]
        assert metrics["frac_reward_zero_std"] == pytest.approx(np.mean([len(set(of)) == 1 for of in by_prompt]))
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("loss", ["dapo", "bnpo", "cispo", "grpo", pytest.param("vespo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("steps", [0, 2], ids=["phase2", "phase1"])
def test_the_loss_and_its_gradient_are_as_without_them(tmp_path, loss, steps):
    """A micro-batch equals the same one without its ungraded rows, with a KL penalty, entropy bonus and old log-probs."""
    rows = [[1.0, 0.0], [None, None], [0.0, 0.0], [3.0, inf], [nan, nan], [2.0, 1.0], [0.0, None], [1.0, 1.0]]
    trainer = trainer_with(
        tmp_path, Rewards(rows), per_device_train_batch_size=8, steps_per_generation=1, num_iterations=2, beta=0.1,
        internal_steps=steps, loss_type=loss, entropy_coef=0.0 if loss == "grpo" else 0.05,
    )  # fmt: skip
    trainer.model.train()
    inputs = trainer.generate_rollouts([PROBLEMS[n // 4] for n in range(8)])
    with torch.no_grad():  # as after an update, so that ratios are not 1
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainer.current_gradient_accumulation_steps = 1
    kept = torch.tensor([reference.reward_of(row, [1.0, 0.5]) is not None for row in rows])
    short = {name: value[kept] if value.dim() else value for name, value in inputs.items()}
    del short["tool_mask"]
    found, metrics = [], []
    for batch in (inputs, short):
        trainer.model.zero_grad()
        trainer.train_metrics.clear()
        value = trainer.compute_micro_batch_loss(trainer.model, batch)
        value.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        found.append((value.detach(), gradients))
        metrics.append({name: values[-1] for name, values in trainer.train_metrics.items()})
    # TRL's mean over answers counts masked answers, as it does truncated ones
    share = kept.float().mean() if loss == "grpo" else 1.0
    torch.testing.assert_close(found[0][0], found[1][0] * share, atol=1e-5, rtol=1e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other * share, atol=1e-5, rtol=1e-3)
    for name in ("entropy", "kl", "approx_kl", "clip_ratio/region_mean", "internal/entropy"):
        if name in metrics[1]:
            assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("steps", [0, 4], ids=["phase2", "phase1"])
@pytest.mark.parametrize(
    "odd", [None, pytest.param(inf, marks=pytest.mark.slow), pytest.param(nan, marks=pytest.mark.slow)]
)
def test_batches_without_a_graded_answer_move_nothing_and_log_no_zeros(tmp_path, estimator, steps, odd, caplog):
    """The second and third of four rollout batches are ungraded; without weight decay no weight moves in them."""
    batches = iter([False, True, True, False])

    def reward(completion_ids, **kwargs):
        ungraded = next(batches)
        return [odd if ungraded else float(sum(ids) % 3) for ids in completion_ids]

    args = config(
        tmp_path, advantage_estimator=estimator, internal_steps=steps, max_steps=4, per_device_train_batch_size=8,
        steps_per_generation=1, weight_decay=0.0, max_completion_length=4, optim="sgd", learning_rate=0.1, beta=0.05,
    )  # fmt: skip
    model = saved_model(tmp_path)
    trainer = BuPOTrainer(model, reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    weights = []
    real = trainer.generate_rollouts

    def rollout(inputs):
        weights.append(snapshot(model))
        return real(inputs)

    trainer.generate_rollouts = rollout
    trainer.train()
    assert all(torch.equal(weights[1][name], weights[3][name]) for name in weights[1])
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[3][name], value) for name, value in snapshot(model).items())
    rows = [row for row in trainer.state.log_history if "phase" in row]
    assert len(rows) == 4
    for row, ungraded in zip(rows, [False, True, True, False], strict=True):
        assert all(math.isfinite(value) for value in row.values())
        assert row["completions/ungraded_ratio"] == float(ungraded)
        for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/reward/mean", "entropy", "kl"):
            assert (name in row) != ungraded, name
        assert ("warning/nothing_graded" in row) == ungraded and "warning/entropy_collapse" not in row
    assert "the entropy has" not in caplog.text


def test_the_adaptive_entropy_coefficient_waits_for_graded_answers(tmp_path):
    """TRL counts an entropy of 0 without a token, and would raise the coefficient."""
    batches = iter([False, True, True, False])

    def reward(completion_ids, **kwargs):
        ungraded = next(batches)
        return [None if ungraded else float(sum(ids) % 3) for ids in completion_ids]

    args = config(
        tmp_path, internal_steps=0, internal_layer=None, max_steps=4, per_device_train_batch_size=4, steps_per_generation=2,
        gradient_accumulation_steps=2, max_completion_length=4, use_adaptive_entropy=True, entropy_coef=0.1,
        entropy_coef_delta=0.01, entropy_target=0.001, entropy_coef_max=1.0, probe_every=0,
    )  # fmt: skip
    trainer = BuPOTrainer(saved_model(tmp_path), reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    trainer.train()
    found = [row["entropy_coef"] for row in trainer.state.log_history if "entropy_coef" in row and "phase" in row]
    assert found == pytest.approx([0.09, 0.09, 0.09, 0.08])  # above the target: one step down in each graded batch


def test_an_evaluation_has_finite_numbers_too(tmp_path):
    """TRL's evaluation: one pass with some ungraded answers, one with ungraded answers only."""
    trainer = trainer_with(tmp_path, Rewards([[1.0, 1.0]] * 4), per_device_eval_batch_size=4, num_generations_eval=4)
    trainer.eval_dataset = PROBLEMS.select(range(1))
    trainer.reward_funcs = Rewards([[1.0, inf], [2.0, 2.0], [None, None], [0.0, None]]).functions()
    found = trainer.evaluate()
    assert found["eval_reward"] == pytest.approx(1.5) and found["eval_completions/ungraded_ratio"] == 0.5
    assert found["eval_rewards/second/mean"] == pytest.approx(2.0)
    assert all(math.isfinite(value) for value in found.values())
    trainer.reward_funcs = Rewards([[nan, inf]] * 4).functions()
    found = trainer.evaluate()
    assert found["eval_completions/ungraded_ratio"] == 1 and math.isfinite(found["eval_loss"])
    assert not {"eval_reward", "eval_entropy", "eval_rewards/first/mean"} & found.keys()
    assert all(math.isfinite(value) for value in found.values())


def test_a_run_that_is_never_graded_is_still_refused(tmp_path):
    trainer = trainer_with(tmp_path, Rewards([[None, inf]] * 16), max_steps=4)
    with pytest.raises(UserError, match="no answer of 1 rollout batches was graded"):
        trainer.train()


def test_two_processes_leave_out_the_same(tmp_path):
    """Means of a prompt and whitening are over both processes, also if one has no graded answer of a prompt."""
    values = [1.0, "inf", 0.0, None, "nan", None, 3.0, "-inf", 2.0, 0.0, None, 1.5]
    methods = [("grpo", {"scale_rewards": scale}) for scale in ("group", "batch", "none")]
    methods += [("rloo", {}), ("reinforce++", {}), ("ppo", {}), ("ppo", {"critic_backbone": "shared"})]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.helpers.ungraded_run", str(tmp_path), json.dumps(values), json.dumps(methods)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    rewards = [None if value is None or isinstance(value, str) else value for value in values]
    for place, (estimator, changes) in enumerate(methods):
        first, second = ranks[0][place], ranks[1][place]
        lengths = first["lengths"] + second["lengths"]
        by_token = estimator in ("reinforce++", "ppo")
        for start, rank in ((0, first), (6, second)):
            found, here = torch.tensor(rank["advantages"]), slice(start, start + 6)
            guesses = [[0.0] * n for n in lengths]
            if not by_token:
                expected = reference.rloo(rewards, 4)
                if estimator == "grpo":
                    expected = reference.grpo(rewards, 4, changes["scale_rewards"])
                np.testing.assert_allclose(found.numpy(), expected[here], atol=2e-4)
            else:
                expected = reference.reinforce(rewards, lengths)
                if estimator == "ppo":
                    expected = reference.ppo(rewards, lengths, guesses, 1.0, 1.0)[0]
                for row, tokens in zip(found.tolist(), expected[here], strict=True):
                    padded = [*(tokens or []), *[0.0] * (len(row) - len(tokens or []))]
                    np.testing.assert_allclose(row, padded, atol=3e-4)
            assert rank["mask"] == [reward is not None for reward in rewards[here]]
            assert rank["tokens"] == sum(n for n, r in zip(lengths, rewards, strict=True) if r is not None)
            assert rank["reward"] == pytest.approx(7.5 / 6) and rank["ungraded"] == pytest.approx(0.5)
            assert rank["finite"]

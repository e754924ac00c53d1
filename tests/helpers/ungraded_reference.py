"""Advantages of a rollout batch without its ungraded answers, in float64 and answer by answer: the reference of
tests/training/test_ungraded.py.
"""

import math

import numpy as np


def reward_of(row, weights):
    """Return the reward of an answer, or None if it is ungraded."""
    counted = [(value, weight) for value, weight in zip(row, weights, strict=True) if weight != 0]
    if any(value is not None and math.isinf(value) for value, _ in counted):
        return None
    known = [value * weight for value, weight in counted if value is not None and not math.isnan(value)]
    return sum(known) if known and math.isfinite(sum(known)) else None


def standard(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.inf  # a single value has no deviation


def groups_of(rewards, group):
    """Return the indices of the graded answers, by prompt."""
    for first in range(0, len(rewards), group):
        yield [i for i in range(first, first + group) if rewards[i] is not None]


def grpo(rewards, group, scale):
    found = [0.0] * len(rewards)
    every = [reward for reward in rewards if reward is not None]
    for places in groups_of(rewards, group):
        values = [rewards[i] for i in places]
        for i in places:
            divisor = {"group": standard(values) + 1e-4, "batch": standard(every) + 1e-4, "none": 1.0}[scale]
            found[i] = (rewards[i] - np.mean(values)) / divisor
    return found


def normalized_then_summed(rows, weights, rewards, group):
    sums = {i: 0.0 for i, reward in enumerate(rewards) if reward is not None}
    for places in groups_of(rewards, group):
        for k, weight in enumerate(weights):
            here = [i for i in places if rows[i][k] is not None and math.isfinite(rows[i][k])]
            values = [rows[i][k] for i in here]
            for i in here:
                sums[i] += weight * (rows[i][k] - np.mean(values)) / (standard(values) + 1e-4)
    every = list(sums.values())
    return [(sums[i] - np.mean(every)) / (standard(every) + 1e-4) if i in sums else 0.0 for i in range(len(rewards))]


def rloo(rewards, group):
    found = [0.0] * len(rewards)
    for places in groups_of(rewards, group):
        for i in places:
            others = [rewards[j] for j in places if j != i]
            found[i] = rewards[i] - np.mean(others) if others else 0.0
    return found


def whitened(by_token):
    """Whiten lists of one value a token; None for an ungraded answer."""
    every = [value for values in by_token if values is not None for value in values]
    if len(every) < 2:
        return [None if values is None else [0.0] * len(values) for values in by_token]
    mean, deviation = np.mean(every), math.sqrt(np.var(every, ddof=1) + 1e-8)
    return [None if values is None else [(value - mean) / deviation for value in values] for values in by_token]


def reinforce(rewards, lengths):
    return whitened([None if r is None else [r] * n for r, n in zip(rewards, lengths, strict=True)])


def ppo(rewards, lengths, values, gamma, lam):
    """Compute advantages and returns; `values` are of all tokens of the answers."""
    estimates, returns = [], []
    for reward, length, guesses in zip(rewards, lengths, values, strict=True):
        if reward is None:
            estimates.append(None)
            returns.append(None)
            continue
        paid = [0.0] * (length - 1) + [reward]
        later = [*guesses[1:length], 0.0]
        deltas = [paid[t] + gamma * later[t] - guesses[t] for t in range(length)]
        gae = [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]
        estimates.append(gae)
        returns.append([a + v for a, v in zip(gae, guesses, strict=False)])
    return whitened(estimates), returns

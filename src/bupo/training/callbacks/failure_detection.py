"""Detection of silent failures: runs that continue although they learn nothing or destroy the model.

[`FailureDetector`] gets the metrics of each rollout batch and returns the failures that are new. It depends only on its
arguments and its state, so a resumed run decides like an uninterrupted one and reports nothing twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

MIN_GRADED_RATIO = 0.5  # share of completions with a finite reward: below it, most of the sampling is wasted
# nats per completion: at this value 99 of 100 completions of a prompt are the same, and so are their rewards
MIN_COMPLETION_ENTROPY = 0.05
# nats per token above the first batch's: 7 times as many words to choose from; exploration adds tenths
MAX_ENTROPY_INCREASE = 2.0
MAX_REFERENCE_KL = 10.0  # nats per token, of the KL penalty: runs that learn stay below 1
# nats per token between the sampling policy and the updated one, a log ratio of 3 on all tokens: PPO stops at 0.02 to
# 0.05, and a layer policy, whose raw logits are steep, starts with up to 0.4
MAX_APPROX_KL = 5.0


class Failure(NamedTuple):
    """Failure that the metrics of a rollout batch show.

    Attributes:
        is_present (`Callable`): takes the metrics of a rollout batch.
        patience (`int`): rollout batches in a row until it is reported. Chance may cause one; three are no chance.
        message (`str`): format string over the metrics and options, with the remedy.
    """

    is_present: Callable[[Mapping[str, float]], bool]
    patience: int
    message: str


def _has_zero_reward(metrics: Mapping[str, float]) -> bool:
    return metrics["reward"] == 0 and metrics["reward_std"] == 0  # both are NaN if nothing is graded


# failures that the sampled completions show; `FailureDetector.record_rollouts` documents the metrics
ROLLOUT_FAILURES = {
    "nothing_graded": Failure(
        lambda metrics: metrics["graded"] == 0,
        1,
        "no answer was graded, every reward was None, NaN or infinite: nothing is learned; check what the reward function "
        "returns",
    ),
    "few_graded": Failure(
        lambda metrics: 0 < metrics["graded"] < MIN_GRADED_RATIO,
        3,
        "most answers got no finite reward ({graded:.0%} did) in {batches} rollout batches in a row: check what the reward "
        "function returns for the others",
    ),
    "zero_reward": Failure(
        _has_zero_reward,
        3,
        "all rewards were 0 in {batches} rollout batches in a row: nothing is learned; {zero_remedy}, and look at the answers "
        "(log_completions)",
    ),
    "equal_rewards": Failure(
        lambda metrics: (
            metrics["graded"] > 0 and metrics["frac_reward_zero_std"] == 1 and not _has_zero_reward(metrics)
        ),
        3,
        "all answers to each prompt got one reward (mean {reward:.3g}) in {batches} rollout batches in a row: nothing is "
        "learned; use a reward that depends on the answer, and replace problems that are solved by harder ones",
    ),
    "all_cut": Failure(
        lambda metrics: metrics["completions/clipped_ratio"] == 1,
        3,
        "every answer was cut at max_completion_length={max_completion_length} in {batches} rollout batches in a row"
        "{masked}: raise it, or check that the model ends its answers with its eos token",
    ),
    "beyond_context": Failure(
        lambda metrics: metrics["tokens"] > metrics["positions"],
        1,
        "prompts and max_completion_length={max_completion_length} add up to {tokens:.0f} tokens, and the model has "
        "{positions:.0f} positions: shorten either",
    ),
}
# failures that the updates show; `FailureDetector.record_updates` documents the metrics
UPDATE_FAILURES = {
    "entropy_collapse": Failure(
        lambda metrics: metrics["entropy"] * metrics["completions/mean_length"] < MIN_COMPLETION_ENTROPY,
        3,
        "the entropy has fallen to {entropy:.2g} nats per token: the answers are all alike; lower learning_rate, or raise "
        "temperature, epsilon_high or entropy_coef",
    ),
    "entropy_jump": Failure(
        lambda metrics: not metrics["entropy"] <= metrics["first_entropy"] + MAX_ENTROPY_INCREASE,  # true for NaN
        2,  # one batch may hold a few unusual prompts
        "the entropy has risen to {entropy:.3g} nats per token: the weights are being destroyed; lower learning_rate, and "
        "resume from an earlier checkpoint",
    ),
    "kl_explosion": Failure(
        lambda metrics: metrics.get("kl", 0.0) > MAX_REFERENCE_KL,
        2,  # single tokens dominate its estimate, exp(x) - x - 1
        "the KL to the reference is {kl:.3g} nats per token: lower learning_rate, or raise beta",
    ),
    "policy_jump": Failure(
        lambda metrics: metrics.get("approx_kl", 0.0) > MAX_APPROX_KL,
        1,
        "updates move the policy {approx_kl:.3g} nats per token from the one that sampled: lower learning_rate, "
        "steps_per_generation or num_iterations",
    ),
}
FAILURES = ROLLOUT_FAILURES | UPDATE_FAILURES


@dataclass
class FailureDetector:
    """Counts of a run's failures, by rollout batch.

    Attributes:
        consecutive_batches (`dict[str, int]`): rollout batches in a row that show a failure, up to the last one.
        reported (`list[str]`): failures that were reported.
        num_batches (`int`): rollout batches recorded.
        any_graded, any_rewarded (`bool`): whether any completion was ever graded, or had a reward other than 0.
        first_entropy (`float`, *optional*): of the language model policy in the first batch, nats per token.
        mean_length (`float`): mean tokens of the last batch's completions.
    """

    consecutive_batches: dict[str, int] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)
    num_batches: int = 0
    any_graded: bool = False
    any_rewarded: bool = False
    first_entropy: float | None = None
    mean_length: float = 0.0

    def record_rollouts(self, metrics: Mapping[str, float]) -> list[str]:
        """Record a rollout batch that was just sampled and return the new failures.

        Args:
            metrics (`dict`): `graded` (share of completions with a finite reward), `reward` and `reward_std` of these,
                `frac_reward_zero_std` (share of prompts whose completions have one reward), `completions/clipped_ratio`
                (share of completions that were cut), `completions/mean_length` (tokens), `tokens` (of the longest prompt
                and the longest completion allowed), and `positions` (of the model; infinite if it has no limit).
        """
        self.num_batches += 1
        self.mean_length = metrics["completions/mean_length"]
        self.any_graded |= metrics["graded"] > 0
        self.any_rewarded |= metrics["graded"] > 0 and metrics["reward"] != 0
        return self._update_counts(ROLLOUT_FAILURES, metrics)

    def record_updates(self, metrics: Mapping[str, float]) -> list[str]:
        """Record the updates of a rollout batch and return the new failures.

        Args:
            metrics (`dict`): `entropy` of the language model policy and, if measured, `kl` (of the penalty) and `approx_kl`
                (between the sampling policy and the updated one); nats per token, means over the updates.
        """
        if self.first_entropy is None:
            self.first_entropy = metrics["entropy"]
        context = {"first_entropy": self.first_entropy, "completions/mean_length": self.mean_length}
        return self._update_counts(UPDATE_FAILURES, {**metrics, **context})

    def _update_counts(self, failures: Mapping[str, Failure], metrics: Mapping[str, float]) -> list[str]:
        """Count the failures that a batch shows and return those that have lasted and were not reported before."""
        for name, failure in failures.items():
            count = self.consecutive_batches.get(name, 0)
            self.consecutive_batches[name] = count + 1 if failure.is_present(metrics) else 0
        new = [name for name in self.active_failures if name not in self.reported]
        self.reported += new
        return new

    @property
    def active_failures(self) -> list[str]:
        """Failures that have lasted up to the last rollout batch."""
        return [name for name, batches in self.consecutive_batches.items() if batches >= FAILURES[name].patience]

    @property
    def has_never_graded(self) -> bool:
        """Return whether there were rollout batches and none of their completions was graded."""
        return self.num_batches > 0 and not self.any_graded

    def state(self) -> dict[str, Any]:
        """Return the counts as plain values, for a checkpoint."""
        return asdict(self)

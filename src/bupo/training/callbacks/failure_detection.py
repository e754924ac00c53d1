"""Failures that make no noise: a curve that is flat or falls, and nothing says why.

`Symptoms` sees what each rollout batch measured and tells which symptoms are new. It decides from its arguments and its own
state alone, so that a resumed run decides as one that was not stopped, and says nothing twice.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# rollout batches in a row until a symptom counts: what chance may do to one batch takes three
PATIENCE = {
    "nothing_graded": 1,
    "few_graded": 3,
    "zero_reward": 3,
    "equal_rewards": 3,
    "all_cut": 3,
    "beyond_context": 1,
    "entropy_collapse": 3,
    "entropy_jump": 2,  # a batch may hold a few prompts of another kind
    "kl_explosion": 2,  # its estimate, exp(x) - x - 1, is ruled by single tokens
    "policy_jump": 1,
}
MIN_GRADED_RATIO = 0.5  # share of answers with a finite reward: below it, most of the sampling is wasted
MIN_COMPLETION_ENTROPY = (
    0.05  # nats an answer: 99 of 100 answers to a prompt are one and the same, so their rewards are too
)
MAX_ENTROPY_INCREASE = (
    2.0  # nats a token above the first batch's: 7 times as many words to choose from; exploration adds tenths
)
MAX_REFERENCE_KL = 10.0  # nats a token, of the penalty: runs that learn stay below 1
# nats a token between the policy that sampled and the one that is updated, a log ratio of 3 on all: PPO stops at 0.02 to
# 0.05, and a layer policy, whose raw logits are steep, starts with up to 0.4
MAX_APPROX_KL = 5.0


@dataclass
class FailureDetector:
    """The record of a run.

    Attributes:
        in_a_row (`dict[str, int]`): rollout batches in a row that show a symptom, up to the last.
        said (`list[str]`): those that are no news any more.
        batches (`int`): rollout batches seen.
        graded, rewarded (`bool`): whether any answer has ever been graded, or had a reward other than 0.
        first_entropy (`float`, *optional*): of the language model policy in the first batch, nats a token.
        length (`float`): mean tokens of the last batch's answers.
    """

    consecutive_batches: dict[str, int] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)
    num_batches: int = 0
    any_graded: bool = False
    any_rewarded: bool = False
    first_entropy: float | None = None
    mean_length: float = 0.0

    def record_rollouts(self, metrics: Mapping[str, float]) -> list[str]:
        """Note a rollout batch as it was sampled. Returns the symptoms that are new.

        Args:
            metrics (`dict`): `graded` (share of answers with a finite reward), `reward` and `reward_std` of these,
                `frac_reward_zero_std` (share of prompts whose answers have one reward), `completions/clipped_ratio` (share of
                answers that were cut), `completions/mean_length` (tokens), `tokens` (of the longest prompt and the longest
                answer allowed), and `positions` (of the model; infinite where it names none).
        """
        self.num_batches += 1
        self.mean_length = metrics["completions/mean_length"]
        self.any_graded |= metrics["graded"] > 0
        self.any_rewarded |= metrics["graded"] > 0 and metrics["reward"] != 0
        zero = metrics["reward"] == 0 and metrics["reward_std"] == 0  # neither is so where nothing is graded
        return self._update_counts(
            {
                "nothing_graded": metrics["graded"] == 0,
                "few_graded": 0 < metrics["graded"] < MIN_GRADED_RATIO,
                "zero_reward": zero,
                "equal_rewards": not zero and metrics["graded"] > 0 and metrics["frac_reward_zero_std"] == 1,
                "all_cut": metrics["completions/clipped_ratio"] == 1,
                "beyond_context": metrics["tokens"] > metrics["positions"],
            }
        )

    def record_updates(self, metrics: Mapping[str, float]) -> list[str]:
        """Note the updates of a rollout batch. Returns the symptoms that are new.

        Args:
            metrics (`dict`): `entropy` of the language model policy, and where there are, `kl` (of the penalty) and `approx_kl`
                (between the policy that sampled and the one that is updated); nats a token, means over the updates.
        """
        entropy = metrics["entropy"]
        if self.first_entropy is None:
            self.first_entropy = entropy
        return self._update_counts(
            {
                "entropy_collapse": entropy * self.mean_length < MIN_COMPLETION_ENTROPY,
                "entropy_jump": not entropy <= self.first_entropy + MAX_ENTROPY_INCREASE,  # NaN too
                "kl_explosion": metrics.get("kl", 0.0) > MAX_REFERENCE_KL,
                "policy_jump": metrics.get("approx_kl", 0.0) > MAX_APPROX_KL,
            }
        )

    def _update_counts(self, found: Mapping[str, bool]) -> list[str]:
        """Count what a batch shows, and tell what has come to count."""
        self.consecutive_batches |= {
            name: self.consecutive_batches.get(name, 0) + 1 if here else 0 for name, here in found.items()
        }
        news = [name for name in self.active_failures if name not in self.reported]
        self.reported += news
        return news

    @property
    def active_failures(self) -> list[str]:
        """The symptoms that hold now."""
        return [name for name, batches in self.consecutive_batches.items() if batches >= PATIENCE[name]]

    @property
    def has_never_graded(self) -> bool:
        """Whether there were rollout batches, and not one answer that was graded."""
        return self.num_batches > 0 and not self.any_graded

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

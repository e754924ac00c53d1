"""Scoring for internal policy alignment (IPA, eq. 9): the log-probs of the target policy in the ratio.

In the first phase, the old and reference log-probs of a rollout batch and the new ones of each update are the internal
policy's. Sampling, and the logged `entropy`, stay the language model policy's.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from bupo.models.packing import PackedDecoder, build_packed_decoder, build_packed_decoder_like
from bupo.models.residual_stream import Activation, ResidualStream
from bupo.training.config import BuPOConfig
from bupo.training.objective.micro_batches import arrange_micro_batches, can_reorder_rows
from bupo.training.objective.phases import Objective
from bupo.training.objective.policy_head import PolicyHead, PolicyScores, StatesCallback
from bupo.training.objective.rollout_batch import (
    ENTROPIES_KEY,
    INTERNAL_PREFIX,
    OLD_LOG_PROBS,
    REFERENCE_LOG_PROBS,
    SAMPLER_LOG_PROBS,
    CompletionScores,
    RolloutBatch,
)
from bupo.training.trl_internals import GRPOTrainerHooks

MAX_LOG_RATIO = 20.0  # beyond it a ratio leaves fp32, and its gradient is 0 times infinity


def clamp_log_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    """Clamp log-probs so that their ratio to the old ones stays within fp32.

    Clamped log-probs get no gradient; the others are returned unchanged.
    """
    log_ratio = log_probs - old_log_probs
    clamped = old_log_probs + log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(log_ratio.abs() > MAX_LOG_RATIO, clamped, log_probs)


def get_shuffled_vocab_order(stream: ResidualStream, seed: int) -> torch.Tensor:
    """Return a random order `(V,)` of the unembedding's rows that depends on the seed only."""
    rows = stream.get_unembedding().weight.size(0)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


@dataclass
class PolicyScorer:
    """Callable that TRL scores in place of a model.

    Attributes:
        model (`nn.Module` or `Callable`): with a [`~bupo.training.objective.policy_head.PolicyHead`] or TRL's fused
            head, and its wrappers.
        activation ([`~bupo.models.residual_stream.Activation`], *optional*): states of the policy to score; by default
            the language model policy.
        old_log_probs (`torch.Tensor` of shape `(B, C)`, *optional*): old log-probs, which limit the new ones.
        states_callback (`Callable`, *optional*): receives the states that meet the unembedding.
        extra_activation ([`~bupo.models.residual_stream.Activation`], *optional*): states of an internal policy that is
            scored in the same forward pass as the language model policy.
        log_ratio (`torch.Tensor` of shape `(B, C)`, *optional*): log ratio of the last call to the old log-probs.
        extra_scores (`list[PolicyScores]`): scores of the extra policy, one entry a call.
    """

    model: Callable[..., PolicyScores]
    activation: Activation | None = None
    old_log_probs: torch.Tensor | None = None
    states_callback: StatesCallback | None = None
    extra_activation: Activation | None = None
    log_ratio: torch.Tensor | None = None
    extra_scores: list[PolicyScores] = field(default_factory=list)

    def __call__(self, **inputs) -> PolicyScores:
        options = {
            "policy": self.activation,
            "extra_policy": self.extra_activation,
            "states_callback": self.states_callback,
        }
        # TRL's head, of a model without a policy head, accepts none of the options
        scores = self.model(**inputs, **{name: value for name, value in options.items() if value is not None})
        if self.extra_activation:
            self.extra_scores.append(PolicyScores(scores.internal_log_probs, scores.internal_entropy, scores.aux_loss))
        if self.old_log_probs is not None:
            log_probs = cast(torch.Tensor, scores.log_probs)
            scores.log_probs = clamp_log_ratio(log_probs[:, -self.old_log_probs.size(1) :], self.old_log_probs)
            self.log_ratio = scores.log_probs.detach() - self.old_log_probs
        return scores


@contextmanager
def metric_prefix(prefix: str, metrics: dict[str, list[float]]) -> Iterator[None]:
    """Put a prefix before the names of the metrics that are added in this context."""
    before = {name: len(values) for name, values in metrics.items()}
    yield
    added = {name: values[before.get(name, 0) :] for name, values in metrics.items()}
    for name, values in added.items():
        if values:
            del metrics[name][-len(values) :]
            metrics[prefix + name].extend(values)
        if not metrics[name]:
            del metrics[name]


class RolloutScorers:
    """Makes the [`PolicyScorer`] for each scoring pass of TRL over a rollout batch: one forward pass scores two
    policies.

    Args:
        model (`nn.Module`): the policy; any other model is the reference model.
        objective ([`~bupo.training.objective.phases.Objective`]): of the rollout batch, as known before sampling.

    Attributes:
        activation ([`~bupo.models.residual_stream.Activation`], *optional*): states of the internal policy; None while
            `auto` has not chosen its layer.
        scorers (`list[PolicyScorer]`): of the passes so far.
    """

    def __init__(self, model: nn.Module, objective: Objective):
        self.model, self.activation = model, objective.internal_activation
        self.has_auxiliary = objective.auxiliary is not None
        self.scorers: list[PolicyScorer] = []

    def __call__(self, model: nn.Module) -> PolicyScorer:
        # a separate reference model needs only the internal policy in phase 1; with PEFT the reference is the same model
        if model is self.model or self.has_auxiliary:
            scorer = PolicyScorer(model, extra_activation=self.activation)
        else:
            scorer = PolicyScorer(model, self.activation)
        self.scorers.append(scorer)
        return scorer


class InternalPolicyAlignment:
    """Scores rollout batches and micro-batches with the policies of their objective.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): its model and reference model get a policy head.
        stream, reference ([`~bupo.models.residual_stream.ResidualStream`], *optional*): of the model and of the
            reference model. A model without a stream, in a run without a first phase, is scored by TRL's fused head.
        args ([`~bupo.BuPOConfig`]): lens, module and temperature.
    """

    def __init__(
        self,
        trainer: GRPOTrainerHooks,
        stream: ResidualStream | None,
        reference: ResidualStream | None,
        args: BuPOConfig,
    ):
        self.trainer, self.args = trainer, args
        # packed rows differ in length, for which a compiled model would recompile; NEFTune's noise depends on the length
        needs_padded_rows = args.torch_compile or args.neftune_noise_alpha
        self.packing = None if needs_padded_rows or stream is None else build_packed_decoder(stream.model)
        self._attach_head(stream, self.packing)
        if reference is not None:
            self._attach_head(reference, self.packing and build_packed_decoder_like(self.packing, reference.model))

    def _attach_head(self, stream: ResidualStream | None, packing: PackedDecoder | None) -> None:
        if stream is not None:
            args = self.args
            order = get_shuffled_vocab_order(stream, args.seed) if args.internal_objective == "shuffled_vocab" else None
            PolicyHead(stream, args.temperature, args.internal_lens, args.cast_lm_head_to_fp32, packing, order)

    def packed_rows_for_backward(self) -> AbstractContextManager[None]:
        """Keep packed rows for a backward pass, which may recompute blocks."""
        return self.packing.keep_for_backward() if self.packing else nullcontext()

    def arrange_micro_batches(self, micro_batches: list[dict]) -> list[dict]:
        """Exchange rows between the micro-batches of an update, where packing benefits and the loss allows it."""
        if self.packing is None or not can_reorder_rows(self.args, self.trainer.aux_loss_enabled):
            return micro_batches
        return arrange_micro_batches(micro_batches, self.args.gradient_accumulation_steps)

    def make_rollout_scorers(self, objective: Objective) -> RolloutScorers | None:
        """Return the scorers for a rollout batch, or None where only the language model policy is optimised."""
        if objective.phase == 2 and objective.auxiliary is None:
            return None
        return RolloutScorers(self.trainer.model, objective)

    def score_batch(
        self,
        batch: RolloutBatch,
        activation: Activation | None = None,
        states_callback: StatesCallback | None = None,
    ) -> CompletionScores:
        """Score a batch's completions with one of the model's policies, without gradient checkpointing.

        Returns:
            [`~bupo.training.objective.rollout_batch.CompletionScores`]: `(B, C)` each.
        """
        return self._score_batch(batch, PolicyScorer(self.trainer.model, activation, states_callback=states_callback))

    def _score_batch(self, batch: RolloutBatch, scorer: PolicyScorer) -> CompletionScores:
        batch_size = self.args.per_device_train_batch_size
        with self.trainer.without_gradient_checkpointing():
            return self.trainer.score_completions(
                scorer, batch.input_ids, batch.attention_mask, batch.completion_length, batch_size
            )

    @torch.no_grad()
    def set_internal_log_probs(
        self,
        batch: RolloutBatch,
        activation: Activation,
        sampled_scores: CompletionScores | None,
        scorers: RolloutScorers,
    ) -> None:
        """Store the internal policy's log-probs for the loss.

        In phase 1 they replace the old and reference log-probs of the language model policy, whose entropies are kept
        for the logs. With an auxiliary objective they are stored under separate names.

        Log-probs of a sampler that differs from the language model policy (vLLM, a `rollout_func`) are shifted by the
        same difference as the old ones. Then `off_policy_mask_threshold` measures the sampler's difference from the
        language model policy, and the updates since. The importance weights of vLLM's samples already compare the
        language model policy with the sampler, and stay.

        Args:
            batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): sampled.
            activation ([`~bupo.models.residual_stream.Activation`]): states of the internal policy.
            sampled_scores ([`~bupo.training.objective.rollout_batch.CompletionScores`], *optional*): the language model
                policy's, where TRL computed them.
            scorers ([`RolloutScorers`]): used by TRL for this batch.
        """
        tensors, internal = batch.tensors, {}
        needs_log_probs = OLD_LOG_PROBS in tensors or SAMPLER_LOG_PROBS in tensors
        scores = sampled_scores
        scorer = scorers.scorers[0] if scores else PolicyScorer(self.trainer.model, extra_activation=activation)
        if scores is None and (needs_log_probs or not scorers.has_auxiliary):
            scores = self._score_batch(batch, scorer)
        if scores is not None and needs_log_probs:
            log_probs = (
                concat_log_probs(scorer.extra_scores, batch.completion_length)
                if scorer.extra_scores
                else self.score_batch(batch, activation).log_probs
            )
            if OLD_LOG_PROBS in tensors:
                internal[OLD_LOG_PROBS] = log_probs
            if SAMPLER_LOG_PROBS in tensors:
                internal[SAMPLER_LOG_PROBS] = tensors[SAMPLER_LOG_PROBS] + log_probs - scores.log_probs
        if REFERENCE_LOG_PROBS in tensors:
            internal[REFERENCE_LOG_PROBS] = self._score_reference(batch, activation, scorers)
        if scorers.has_auxiliary:
            internal = {INTERNAL_PREFIX + name: value for name, value in internal.items()}
        elif scores is not None:
            tensors[ENTROPIES_KEY] = scores.entropies
        tensors.update(internal)

    def _score_reference(self, batch: RolloutBatch, activation: Activation, scorers: RolloutScorers) -> torch.Tensor:
        """Return the log-probs `(B, C)` of the reference model's internal policy."""
        reference = self.trainer.ref_model
        if scorers.activation is None:  # `auto` chose the layer after TRL had scored the batch
            with self.trainer.reference_adapter() if reference is None else nullcontext():
                return self._score_batch(batch, PolicyScorer(reference or self.trainer.model, activation)).log_probs
        if reference is None or scorers.has_auxiliary:
            return concat_log_probs(scorers.scorers[-1].extra_scores, batch.completion_length)
        return batch.tensors[REFERENCE_LOG_PROBS]

    def add_auxiliary_loss(
        self,
        loss: torch.Tensor,
        objective: Objective,
        batch: RolloutBatch,
        scorer: PolicyScorer,
        metrics: dict[str, list[float]],
    ) -> torch.Tensor:
        """Return the weighted sum of the language model policy's loss and the auxiliary policy's.

        Both come from one forward pass; each policy has separate old and reference log-probs. Metrics of the auxiliary
        policy's loss are logged under `internal/`.

        Args:
            loss (`torch.Tensor`): of the language model policy.
            objective ([`~bupo.training.objective.phases.Objective`]): the weight of the auxiliary policy.
            batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): the micro-batch.
            scorer ([`PolicyScorer`]): has scored the micro-batch with both policies.
            metrics (`dict`): of the next log.
        """
        tensors = batch.tensors
        internal = {
            name: tensors[INTERNAL_PREFIX + name]
            for name in (OLD_LOG_PROBS, REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS)
            if INTERNAL_PREFIX + name in tensors
        }
        # the forward pass is done: this scorer returns its second result
        auxiliary = PolicyScorer(lambda **_: scorer.extra_scores[-1], old_log_probs=internal.get(OLD_LOG_PROBS))
        metrics["internal/weight"].append(objective.weight)
        with metric_prefix("internal/", metrics):
            auxiliary_loss = self.trainer.compute_policy_loss(auxiliary, {**tensors, **internal})
            self._log_approx_kl(batch, auxiliary, metrics)
        return objective.weight * auxiliary_loss + (1 - objective.weight) * loss

    def log(
        self, batch: RolloutBatch, scorer: PolicyScorer, objective: Objective, metrics: dict[str, list[float]]
    ) -> None:
        """Log the layer, the entropies of both policies, and the target policy's KL to the sampling policy."""
        if objective.layer:
            metrics["internal/layer"].append(objective.layer)
        if scorer.activation:  # TRL has logged the target policy's entropy
            metrics["internal/entropy"].append(metrics["entropy"].pop())
            entropies = batch.tensors[ENTROPIES_KEY]
            metrics["entropy"].append(batch.mean_over_tokens(entropies, self.trainer.sum_over_processes))
        self._log_approx_kl(batch, scorer, metrics)

    def _log_approx_kl(self, batch: RolloutBatch, scorer: PolicyScorer, metrics: dict[str, list[float]]) -> None:
        if scorer.log_ratio is not None:
            approx_kl = scorer.log_ratio.square() / 2
            metrics["approx_kl"].append(batch.mean_over_tokens(approx_kl, self.trainer.sum_over_processes))


def concat_log_probs(scores: list[PolicyScores], length: int) -> torch.Tensor:
    """Return the log-probs `(B, C)` of the last `length` tokens, over the batches of rows that were scored."""
    return torch.cat([cast(torch.Tensor, part.log_probs)[:, -length:] for part in scores])

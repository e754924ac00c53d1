"""Internal policy alignment (IPA, eq. 9): whose log-probs meet in the ratio.

In the first phase the old and the reference log-probs of a rollout batch are the internal policy's, and so are those of each
update; the entropy that is logged, and whatever samples, stay the language model policy's.
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
from bupo.training.objective.layer_parameters import get_parameters_above
from bupo.training.objective.micro_batches import arrange_micro_batches, can_reorder_rows
from bupo.training.objective.phases import AuxiliaryObjective, Stage
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


def clamp_log_ratio(log_probs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Log-probs whose ratio to the old ones stays within fp32. Those beyond get no gradient; all others are as they were."""
    change = log_probs - old
    within = old + change.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(change.abs() > MAX_LOG_RATIO, within, log_probs)


def get_shuffled_vocab_order(stream: ResidualStream, seed: int) -> torch.Tensor:
    """`(V,)`: the rows of the unembedding in an order that only the seed decides, the same in every process and start."""
    rows = stream.get_unembedding().weight.size(0)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


@dataclass
class PolicyScorer:
    """Answers a scoring call in a model's place.

    Attributes:
        model (`nn.Module` or `Callable`): with a [`~bupo.training.objective.policy_head.PolicyHead`] or TRL's own, and its wrappers.
        site ([`~bupo.models.residual_stream.Activation`], *optional*): the internal policy; by default the language model policy.
        old (`torch.Tensor` of shape `(B, C)`, *optional*): old log-probs, which limit the new ones.
        read (`Callable`, *optional*): sees the states.
        also ([`~bupo.models.residual_stream.Activation`], *optional*): an internal policy that is asked besides, in the same pass.
        change (`torch.Tensor` of shape `(B, C)`, *optional*): the last answer's log ratio to the old ones.
        besides (`list[PolicyScores]`): what the policy that was asked besides says, of each call.
    """

    model: Callable[..., PolicyScores]
    activation: Activation | None = None
    old_log_probs: torch.Tensor | None = None
    states_callback: StatesCallback | None = None
    extra_activation: Activation | None = None
    log_ratio: torch.Tensor | None = None
    extra_scores: list[PolicyScores] = field(default_factory=list)

    def __call__(self, **inputs) -> PolicyScores:
        asked = {
            "policy": self.activation,
            "also": self.extra_activation,
            "read": self.states_callback,
        }  # without a policy head, neither is
        scores = self.model(**inputs, **{name: value for name, value in asked.items() if value is not None})
        if self.extra_activation:
            self.extra_scores.append(PolicyScores(scores.internal_log_probs, scores.internal_entropy, scores.aux_loss))
        if self.old_log_probs is not None:
            log_probs = cast(torch.Tensor, scores.log_probs)
            scores.log_probs = clamp_log_ratio(log_probs[:, -self.old_log_probs.size(1) :], self.old_log_probs)
            self.log_ratio = scores.log_probs.detach() - self.old_log_probs
        return scores


@contextmanager
def metric_prefix(prefix: str, metrics: dict[str, list[float]]) -> Iterator[None]:
    """Inside, what is added to the metrics goes under names that begin so."""
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
    """Speakers in the models' places while TRL scores a rollout batch: one pass gives what two policies say.

    Args:
        model (`nn.Module`): the policy; any other is the reference model.
        site ([`~bupo.models.residual_stream.Activation`], *optional*): the internal policy, if it is known yet.
        both (`bool`): whether the language model policy is optimised besides, and its reference is wanted too.
    """

    def __init__(self, model: nn.Module, site: Activation | None, both: bool = False):
        self.model, self.activation, self.scores_language_model = model, site, both
        self.scorers: list[PolicyScorer] = []

    def __call__(self, model: nn.Module) -> PolicyScorer:
        # of a reference model only the internal policy is wanted; an adapter's reference is the policy's model
        mine = model is self.model or self.scores_language_model
        self.scorers.append(
            PolicyScorer(model, extra_activation=self.activation) if mine else PolicyScorer(model, self.activation)
        )
        return self.scorers[-1]


class InternalPolicyAlignment:
    """The scoring of a run.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): its model and reference model get a policy head on each stream.
        stream, reference ([`~bupo.models.residual_stream.ResidualStream`], *optional*): of the model and of the reference model. One
            whose layers nothing asks for may have none; then TRL's own head scores.
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
        # a compiled model's rows are not packed, of which no two are of one length, nor where noise depends on that
        rows = args.torch_compile or args.neftune_noise_alpha
        self.stream = stream
        self.packing = None if rows or stream is None else build_packed_decoder(stream.model)
        self._attach_head(stream, self.packing)
        if reference is not None:
            self._attach_head(reference, self.packing and build_packed_decoder_like(self.packing, reference.model))

    def _attach_head(self, stream: ResidualStream | None, packing: PackedDecoder | None) -> None:
        if stream is not None:
            args = self.args
            order = get_shuffled_vocab_order(stream, args.seed) if args.internal_objective == "shuffled_vocab" else None
            PolicyHead(stream, args.temperature, args.internal_lens, args.cast_lm_head_to_fp32, packing, order)

    def packed_rows_for_backward(self) -> AbstractContextManager[None]:
        """Around a forward pass and its backward pass, which may compute blocks of packed rows again."""
        return self.packing.keep_for_backward() if self.packing else nullcontext()

    def arrange_micro_batches(self, pieces: list[dict]) -> list[dict]:
        """A rollout batch's micro-batches, their rows exchanged where packing gains by it and the loss allows it."""
        if self.packing is None or not can_reorder_rows(self.args, self.trainer.aux_loss_enabled):
            return pieces
        return arrange_micro_batches(pieces, self.args.gradient_accumulation_steps)

    def get_activation(self, layer: int | None) -> Activation | None:
        """Where the internal policy has its states that a stage on a layer optimises; None for the language model policy."""
        if layer is None or self.args.internal_objective == "frozen_upper":
            return None
        return Activation(self.args.internal_module, layer)

    def drop_gradients_above(self, stage: Stage | None) -> None:
        """After a backward pass of a stage that optimises the language model policy: drop the gradients above its layer.

        Clipping then counts what moves, and an optimizer skips the rest, its weight decay too.
        """
        if stage is None or self.args.internal_objective != "frozen_upper":
            return
        assert self.stream is not None and stage.layer is not None, "a layer that is trained is known"
        for parameter in get_parameters_above(self.stream, stage.layer):
            parameter.grad = None

    def make_rollout_scorers(self, stage: Stage | None, mixed: AuxiliaryObjective | None) -> RolloutScorers | None:
        """What speaks in the models' places while a rollout batch is scored, if an internal policy is optimised."""
        if stage is None and mixed is None:
            return None
        layer = mixed.layer if mixed else stage.layer if stage else None
        return RolloutScorers(self.trainer.model, self.get_activation(layer), both=mixed is not None)

    def score_batch(
        self, batch: RolloutBatch, site: Activation | None = None, read: StatesCallback | None = None
    ) -> CompletionScores:
        """`(B, C)`: of one of the model's policies on a batch's answers. Activations are kept, so this is for rollouts."""
        return self._score_batch(batch, PolicyScorer(self.trainer.model, site, states_callback=read))

    def log(
        self, batch: RolloutBatch, speaker: PolicyScorer, stage: Stage | None, metrics: dict[str, list[float]]
    ) -> None:
        """Say the stage's layer, whose entropy it is that TRL has logged of a micro-batch, and how far its policy is from the
        one that sampled."""
        if stage and stage.layer:
            metrics["internal/layer"].append(stage.layer)
        if speaker.activation:
            metrics["internal/entropy"].append(metrics["entropy"].pop())
            metrics["entropy"].append(batch.mean_over_tokens(batch.tensors[ENTROPIES_KEY], self.trainer.total))
        if speaker.log_ratio is not None:
            metrics["approx_kl"].append(batch.mean_over_tokens(speaker.log_ratio.square() / 2, self.trainer.total))

    def _score_batch(self, batch: RolloutBatch, speaker: PolicyScorer) -> CompletionScores:
        size = self.args.per_device_train_batch_size
        with self.trainer.without_gradient_checkpointing():
            return self.trainer.score_completions(
                speaker, batch.input_ids, batch.attention_mask, batch.completion_length, size
            )

    @torch.no_grad()
    def set_internal_log_probs(
        self, batch: RolloutBatch, site: Activation, sampled: CompletionScores | None, voices: RolloutScorers
    ) -> None:
        """Put the internal policy's log-probs where the loss looks for old and reference ones, and keep pi_theta's entropy; or
        beside pi_theta's, where both are optimised.

        The log-probs of a sampler that differs from pi_theta (vLLM, a `rollout_func`) are moved by as much as the old ones:
        what `off_policy_mask_threshold` then measures is the sampler's difference from pi_theta, and the updates since. The
        weights that correct vLLM's sampling compare pi_theta with the sampler already, and stay.

        Args:
            batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): sampled.
            site ([`~bupo.models.residual_stream.Activation`]): the internal policy.
            sampled ([`~bupo.training.objective.rollout_batch.CompletionScores`], *optional*): pi_theta's, where sampling came by them.
            voices ([`RolloutScorers`]): what has scored the batch.
        """
        tensors, found = batch.tensors, {}
        moving = OLD_LOG_PROBS in tensors or SAMPLER_LOG_PROBS in tensors
        theta, own = sampled, voices.scorers[0] if sampled else PolicyScorer(self.trainer.model, extra_activation=site)
        if theta is None and (moving or not voices.scores_language_model):
            theta = self._score_batch(batch, own)
        if theta is not None and moving:
            layer = (
                concat_log_probs(own.extra_scores, batch.completion_length)
                if own.extra_scores
                else self.score_batch(batch, site).log_probs
            )
            if OLD_LOG_PROBS in tensors:
                found[OLD_LOG_PROBS] = layer
            if SAMPLER_LOG_PROBS in tensors:
                found[SAMPLER_LOG_PROBS] = tensors[SAMPLER_LOG_PROBS] + layer - theta.log_probs
        if REFERENCE_LOG_PROBS in tensors:
            found[REFERENCE_LOG_PROBS] = self._score_reference(batch, site, voices)
        if voices.scores_language_model:
            found = {INTERNAL_PREFIX + name: value for name, value in found.items()}
        elif theta is not None:
            tensors[ENTROPIES_KEY] = theta.entropies
        tensors.update(found)

    def _score_reference(self, batch: RolloutBatch, site: Activation, voices: RolloutScorers) -> torch.Tensor:
        """`(B, C)`: log-probs of the reference model's internal policy."""
        reference = self.trainer.ref_model
        if voices.activation is None:  # the layer was not known yet
            with self.trainer.reference_adapter() if reference is None else nullcontext():
                return self._score_batch(batch, PolicyScorer(reference or self.trainer.model, site)).log_probs
        if reference is None or voices.scores_language_model:
            return concat_log_probs(voices.scorers[-1].extra_scores, batch.completion_length)
        return batch.tensors[REFERENCE_LOG_PROBS]

    def add_auxiliary_loss(
        self,
        theta: torch.Tensor,
        mixed: AuxiliaryObjective | None,
        batch: RolloutBatch,
        speaker: PolicyScorer,
        metrics: dict[str, list[float]],
    ) -> torch.Tensor:
        """The loss where a layer's policy is optimised besides, from the same forward pass; each policy has its own old and
        reference log-probs. What TRL logs of the layer's goes under `internal/`.

        Args:
            theta (`torch.Tensor`): the loss of the language model policy, which stays where nothing is mixed in.
            mixed ([`~bupo.training.objective.phases.AuxiliaryObjective`], *optional*): the layer, and its weight.
            batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): the micro-batch.
            speaker ([`PolicyScorer`]): what has answered for both.
        """
        if mixed is None:
            return theta
        inputs = batch.tensors
        own = {
            name: inputs[INTERNAL_PREFIX + name]
            for name in (OLD_LOG_PROBS, REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS)
            if INTERNAL_PREFIX + name in inputs
        }
        echo = PolicyScorer(lambda **_: speaker.extra_scores[-1], old_log_probs=own.get(OLD_LOG_PROBS))
        metrics["internal/weight"].append(mixed.weight)
        with metric_prefix("internal/", metrics):
            layer = self.trainer.compute_policy_loss(echo, {**inputs, **own})
            self.log(batch, echo, None, metrics)
        return mixed.weight * layer + (1 - mixed.weight) * theta


def concat_log_probs(answers: list[PolicyScores], tokens: int) -> torch.Tensor:
    """`(B, C)`: log-probs of the last tokens, of one answer after another."""
    return torch.cat([cast(torch.Tensor, scores.log_probs)[:, -tokens:] for scores in answers])

"""Internal policy alignment (IPA, eq. 9): whose log-probs meet in the ratio.

In the first phase the old and the reference log-probs of a rollout batch are the internal policy's, and so are those of each
update; the entropy that is logged, and whatever samples, stay the language model policy's.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from bupo.model.residual import ResidualStream, Site
from bupo.training.config import BuPOConfig
from bupo.training.head import PolicyHead, PolicyScores, Read
from bupo.training.rollouts import ENTROPIES, OLD, REFERENCE, SAMPLER, RolloutBatch
from bupo.training.seam import Scores, TRLTrainer

LARGEST_LOG_RATIO = 20.0  # beyond it a ratio leaves fp32, and its gradient is 0 times infinity


def limited(log_probs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Log-probs whose ratio to the old ones stays within fp32. Those beyond get no gradient; all others are as they were."""
    change = log_probs - old
    within = old + change.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return torch.where(change.abs() > LARGEST_LOG_RATIO, within, log_probs)


@dataclass
class Speaker:
    """Answers a scoring call in a model's place.

    Attributes:
        model (`nn.Module`): with a [`~bupo.training.head.PolicyHead`] or TRL's own, and its wrappers.
        site ([`~bupo.model.residual.Site`], *optional*): the internal policy; by default the language model policy.
        old (`torch.Tensor` of shape `(B, C)`, *optional*): old log-probs, which limit the new ones.
        read (`Callable`, *optional*): sees the states.
        change (`torch.Tensor` of shape `(B, C)`, *optional*): the last answer's log ratio to the old ones.
    """

    model: nn.Module
    site: Site | None = None
    old: torch.Tensor | None = None
    read: Read | None = None
    change: torch.Tensor | None = None

    def __call__(self, **inputs) -> PolicyScores:
        asked = {"policy": self.site, "read": self.read}  # without a policy head, neither is
        scores = self.model(**inputs, **{name: value for name, value in asked.items() if value is not None})
        if self.old is not None:
            scores.log_probs = limited(scores.log_probs[:, -self.old.size(1) :], self.old)
            self.change = scores.log_probs.detach() - self.old
        return scores


class Alignment:
    """The scoring of a run.

    Args:
        trainer ([`~bupo.training.seam.TRLTrainer`]): its model and reference model get a policy head on each stream.
        stream, reference ([`~bupo.model.residual.ResidualStream`], *optional*): of the model and of the reference model. One
            whose layers nothing asks for may have none; then TRL's own head scores.
        args ([`~bupo.BuPOConfig`]): lens, module and temperature.
    """

    def __init__(
        self, trainer: TRLTrainer, stream: ResidualStream | None, reference: ResidualStream | None, args: BuPOConfig
    ):
        self.trainer, self.args = trainer, args
        for model in (stream, reference):
            if model is not None:
                PolicyHead(model, args.temperature, args.internal_lens, args.cast_lm_head_to_fp32)

    def site(self, layer: int | None) -> Site | None:
        """Where the internal policy of a layer has its states; None for the language model policy."""
        return None if layer is None else Site(self.args.internal_module, layer)

    def scores(self, batch: RolloutBatch, site: Site | None = None, read: Read | None = None) -> Scores:
        """`(B, C)`: of one of the model's policies on a batch's answers. Activations are kept, so this is for rollouts."""
        return self._scores(batch, Speaker(self.trainer.model, site, read=read))

    def log(self, batch: RolloutBatch, speaker: Speaker, metrics: dict[str, list[float]]) -> None:
        """Say whose entropy it is that TRL has logged of a micro-batch, and how far its policy is from the one that sampled."""
        if speaker.site:
            metrics["internal/layer"].append(speaker.site.layer)
            metrics["internal/entropy"].append(metrics["entropy"].pop())
            metrics["entropy"].append(batch.mean(batch.tensors[ENTROPIES], self.trainer.total))
        if speaker.change is not None:
            metrics["kl_old"].append(batch.mean(speaker.change.square() / 2, self.trainer.total))

    def _scores(self, batch: RolloutBatch, speaker: Speaker) -> Scores:
        size = self.args.per_device_train_batch_size
        with self.trainer.without_checkpointing():
            return self.trainer.score(speaker, batch.input_ids, batch.attention_mask, batch.tokens, size)

    @torch.no_grad()
    def align(self, batch: RolloutBatch, site: Site, sampled: Scores | None) -> None:
        """Put the internal policy's log-probs where the loss looks for old and reference ones, and keep pi_theta's entropy.

        The log-probs of a sampler that differs from pi_theta (vLLM, a `rollout_func`) are moved by as much as the old ones:
        what `off_policy_mask_threshold` then measures is the sampler's difference from pi_theta, and the updates since. The
        weights that correct vLLM's sampling compare pi_theta with the sampler already, and stay.

        Args:
            batch ([`~bupo.training.rollouts.RolloutBatch`]): sampled.
            site ([`~bupo.model.residual.Site`]): the internal policy.
            sampled ([`~bupo.training.seam.Scores`], *optional*): pi_theta's, where sampling came by them.
        """
        tensors = batch.tensors
        theta = self.scores(batch) if sampled is None else sampled
        tensors[ENTROPIES] = theta.entropies
        if OLD in tensors or SAMPLER in tensors:
            layer = self.scores(batch, site).log_probs
            if OLD in tensors:
                tensors[OLD] = layer
            if SAMPLER in tensors:
                tensors[SAMPLER] = tensors[SAMPLER] + layer - theta.log_probs
        if REFERENCE in tensors:
            reference = self.trainer.ref_model
            with self.trainer.as_reference() if reference is None else nullcontext():
                speaker = Speaker(self.trainer.model if reference is None else reference, site)
                tensors[REFERENCE] = self._scores(batch, speaker).log_probs

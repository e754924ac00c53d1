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
from bupo.training.rollouts import ENTROPIES, OLD, REFERENCE, RolloutBatch
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
        model (`nn.Module`): with a [`~bupo.training.head.PolicyHead`], and its wrappers.
        site ([`~bupo.model.residual.Site`], *optional*): the internal policy; by default the language model policy.
        old (`torch.Tensor` of shape `(B, C)`, *optional*): old log-probs, which limit the new ones.
        read (`Callable`, *optional*): sees the states.
    """

    model: nn.Module
    site: Site | None = None
    old: torch.Tensor | None = None
    read: Read | None = None

    def __call__(self, **inputs) -> PolicyScores:
        scores = self.model(**inputs, policy=self.site, read=self.read)
        if self.old is not None:
            scores.log_probs = limited(scores.log_probs[:, -self.old.size(1) :], self.old)
        return scores


class Alignment:
    """The scoring of a run.

    Args:
        trainer ([`~bupo.training.seam.TRLTrainer`]): its model and reference model get a policy head each.
        stream, reference ([`~bupo.model.residual.ResidualStream`]): of the model, and of the reference model if there is one.
        args ([`~bupo.BuPOConfig`]): lens, module and temperature.
    """

    def __init__(self, trainer: TRLTrainer, stream: ResidualStream, reference: ResidualStream | None, args: BuPOConfig):
        self.trainer, self.stream, self.args = trainer, stream, args
        for model in (stream, reference):
            if model is not None:
                PolicyHead(model, args.temperature, args.internal_lens, args.cast_lm_head_to_fp32)

    def site(self, layer: int | None) -> Site | None:
        """Where the internal policy of a layer has its states; None for the language model policy."""
        return None if layer is None else Site(self.args.internal_module, layer)

    def scores(self, batch: RolloutBatch, site: Site | None = None, read: Read | None = None) -> Scores:
        """`(B, C)`: of one of the model's policies on a batch's answers. Activations are kept, so this is for rollouts."""
        return self._scores(batch, Speaker(self.trainer.model, site, read=read))

    def _scores(self, batch: RolloutBatch, speaker: Speaker) -> Scores:
        size = self.args.per_device_train_batch_size
        with self.trainer.without_checkpointing():
            return self.trainer.score(speaker, batch.input_ids, batch.attention_mask, batch.tokens, size)

    @torch.no_grad()
    def align(self, batch: RolloutBatch, site: Site, entropies: torch.Tensor | None) -> None:
        """Put the internal policy's log-probs where the loss looks for old and reference ones, and keep pi_theta's entropy.

        Args:
            batch ([`~bupo.training.rollouts.RolloutBatch`]): sampled.
            site ([`~bupo.model.residual.Site`]): the internal policy.
            entropies (`torch.Tensor` of shape `(B, C)`, *optional*): pi_theta's, where sampling came by them.
        """
        tensors = batch.tensors
        tensors[ENTROPIES] = self.scores(batch).entropies if entropies is None else entropies
        if OLD in tensors:
            tensors[OLD] = self.scores(batch, site).log_probs
        if REFERENCE in tensors:
            reference = self.trainer.ref_model
            with self.trainer.as_reference() if reference is None else nullcontext():
                speaker = Speaker(self.trainer.model if reference is None else reference, site)
                tensors[REFERENCE] = self._scores(batch, speaker).log_probs

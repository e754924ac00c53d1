"""BuPOTrainer: GRPO whose first rollout batches optimise an internal layer policy (arXiv 2512.19673, eq. 10).

What is TRL's stays TRL's: sampling, rewards, losses, vLLM, PEFT, checkpoints. In the first phase (internal policy alignment,
IPA, eq. 9) the clipped ratio is the layer policy's, `pi_Layer^l(o_t) / pi_Layer,old^l(o_t)`, and so is the reference of a KL
penalty; only layers 1..l run in an update. A phase covers whole rollout batches: old and new log-probs are of one policy.
"""

import time
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from bupo.models.residual_stream import Family, ResidualStream, Site
from bupo.models.verification import probe_tokens
from bupo.training import failure_messages, model_card, prompt_settings
from bupo.training.callbacks.benchmark_evaluation import Evaluations
from bupo.training.callbacks.nonfinite_updates import FiniteUpdates
from bupo.training.callbacks.phase_controller import Watch
from bupo.training.callbacks.probes import repetition
from bupo.training.checkpoints import trainer_state
from bupo.training.checkpoints.callback_states import CallbackStates
from bupo.training.checkpoints.resume import of_given
from bupo.training.config import BuPOConfig
from bupo.training.distributed.deepspeed import step_only_reached
from bupo.training.dropout import without_dropout
from bupo.training.objective.advantages import estimate
from bupo.training.objective.critic import critic_of
from bupo.training.objective.layer_parameters import freeze, kept_still, rate_factors, scale_rates
from bupo.training.objective.phases import Stage
from bupo.training.objective.policy_head import Read
from bupo.training.objective.policy_scoring import Alignment, Speaker
from bupo.training.objective.rollout_batch import OLD, RolloutBatch, weighted
from bupo.training.precision import loaded, masters, say_dtype
from bupo.training.rollout_generation import set_up_generation
from bupo.training.trl_internals import EpochEnds, TRLTrainer, checked_models
from bupo.training.validation.arguments import (
    check_arguments,
    check_evaluations,
    check_run,
    check_scoring,
    open_stream,
    positions_of,
)
from bupo.training.validation.reward_signatures import check_inputs
from bupo.training.validation.trainable_parameters import (
    Moved,
    check_gradient,
    check_layer,
    check_trainable,
    frozen_since,
)
from bupo.utils.errors import UserError


class BuPOTrainer(TRLTrainer):
    """Trainer for Bottom-up Policy Optimization: a [`~trl.GRPOTrainer`] with a [`BuPOConfig`].

    It also logs `phase` (1 or 2), `rollout_batch` (from 1), `rollout_time` (seconds), `completions/repetition`, `critic/...`,
    `probe/...`, `warning/...` ([`~bupo.training.callbacks.failure_detection.Symptoms`]), in phase 1 `internal/layer` and `internal/entropy`, and
    where two policies are optimised `internal/weight`. `entropy` is the language model policy's in both phases (in phase 1 at
    the rollout), clip ratios and `kl_old` (half the mean squared log ratio to the sampling policy) are of the policy in force.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`), reward_funcs, kwargs: as for [`~trl.GRPOTrainer`]; a text model.
        args ([`BuPOConfig`]): configuration of the run.
        family ([`~bupo.Family`], *optional*): where the residual writes are, for an unknown model family.
        benchmarks (`dict[str, Dataset]`, *optional*): the problems of `eval_benchmarks` by label; by default loaded by name.

    Raises:
        UserError: if the layer does not exist, or the model's residual stream is not what its family's rules say.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs=None,
        args: BuPOConfig | None = None,
        *positional,
        family: Family | None = None,
        benchmarks: dict[str, Dataset] | None = None,
        **kwargs,
    ):
        check_arguments(model, args, family, positional[2] if len(positional) > 2 else kwargs.get("processing_class"))
        check_inputs(reward_funcs, args, *positional, **kwargs)
        assert args is not None, "it was looked at"
        args, half = masters(model, args, positional[7] if len(positional) > 7 else kwargs.get("peft_config"))
        with checked_models():
            super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self.loaded_dtype = loaded(self.model, self.ref_model, half, args)
        check_run(self, args := self.args)
        check_evaluations(self)
        set_up_generation(self, args)
        without_dropout(self.model, args, probe_tokens(self.model))
        self.given = of_given(self)
        self.guard_asynchronous_rewards(failure_messages.without_exits)
        self.stream = open_stream(self.model, args, family)
        reference = self.stream and self.ref_model and ResidualStream(self.ref_model, like=self.stream)
        self.alignment = Alignment(self, self.stream, reference, args)
        check_scoring(self)
        self.critic = critic_of(self.stream, self.accelerator, args)
        freeze(self.stream, kept_still(args))
        decode, positions = self.processing_class.decode, positions_of(self.model)
        self.watch = Watch(self.model, self.stream, self.accelerator, args, decode, positions)
        self.finite = FiniteUpdates(lambda: self.where(self.last_batch))
        self.add_callback(self.finite)
        self.add_callback(EpochEnds(self))
        self.moved = Moved(self.accelerator, lambda: self.phase_of(self.last_batch), self.advantages_differ)
        self.add_callback(self.moved)
        self.parts: dict[str, trainer_state.Part] = {"watch": self.watch, "finite": self.finite, "moved": self.moved}
        self.parts |= {"critic": self.critic} if self.critic else {}
        self.parts["callbacks"] = CallbackStates(self, self.accelerator.print)
        # transformers would put new callbacks in their place, which start with the states they are made with
        args.restore_callback_states_from_checkpoint = False
        if args.eval_benchmarks:
            self.add_callback(Evaluations(self, benchmarks))

    @property
    def stage(self) -> Stage | None:
        """The stage of the first phase that the rollout batch belongs to; None in the second."""
        return self.watch.schedule.stage(self.rollout_batch)

    @property
    def phase(self) -> int:
        """1 while an internal policy is optimised, 2 afterwards (eq. 10)."""
        return 1 if self.stage else 2

    @property
    def site(self) -> Site | None:
        """The internal policy that is optimised, if one is. Evaluation always speaks for the language model policy."""
        return self.alignment.site(self.stage.layer) if self.stage and self.model.training else None

    def phase_of(self, batch: int) -> tuple[int, str]:
        """A number for the stage that a rollout batch belongs to, -1 in the second phase; and where that is, in words."""
        place = self.watch.schedule.place(batch)
        return -1 if place is None else place, self.where(batch)

    def advantages_differ(self) -> bool:
        """Return whether any answer of this process that is trained on has an advantage."""
        pieces = map(RolloutBatch, self.pieces or [])
        return any(bool((piece.by_answer(piece.tensors["advantages"]) * piece.mask.any(1)).any()) for piece in pieces)

    def where(self, batch: int) -> str:
        """A rollout batch, its policy and the learning rate, for messages."""
        return f"rollout batch {batch} ({self.watch.optimised(batch)}, learning rate {self.learning_rate:.3g})"

    def rollout(self, inputs):
        started, metrics = time.perf_counter(), self.train_metrics
        self.watch.before_rollouts(self.rollout_batch, self.optimizer, metrics)
        voices = self.alignment.voices(self.stage, self.watch.mixed(self.rollout_batch))
        with failure_messages.sampling(self.where(self.rollout_batch)):
            sampled = self.sampled(inputs, voices)
        rewards = weighted(sampled.rewards, self.reward_weights)  # (G,), of all processes
        batch = RolloutBatch(sampled.tensors, rewards, self.accelerator.process_index)
        answers = batch.answers(self.num_generations)
        if self.stage and self.stage.layer is None:
            self.watch.decide(answers, self.state.max_steps)
            check_layer(self, self.stage.layer)
        self._estimate(batch)
        if voices and (site := voices.site or self.site):
            self.alignment.align(batch, site, sampled.scores, voices)
        metrics["completions/repetition"].append(self.mean(repetition([answer for _, answer in answers])))
        self.watch.after_rollouts(self.rollout_batch, answers, rewards, metrics)
        metrics["rollout_time"].append(time.perf_counter() - started)
        return batch.tensors

    def arranged(self, pieces):
        return self.alignment.arranged(pieces)

    def grading(self):
        return failure_messages.grading(self.reward_funcs, self.reward_func_names, self.rollout_batch)

    def _estimate(self, batch: RolloutBatch) -> None:
        """Put the estimator's advantages where TRL has put GRPO's."""
        args, scores = self.args, partial(self.alignment.scores, batch, self.site)
        values = self.critic.values(batch, self.site, scores) * batch.mask if self.critic else None
        gae = (args.gae_gamma, args.gae_lambda)
        if estimate(args.advantage_estimator, batch, self.num_generations, self.total, values, *gae):
            self.show_advantages(batch.by_answer(batch.tensors["advantages"]))

    def loss(self, model, inputs):
        batch, site, metrics = RolloutBatch(inputs), self.site, self.train_metrics
        if not self.model.training:
            with self.measuring(batch):
                return self.policy_loss(model, inputs)
        metrics["phase"].append(self.phase)
        metrics["rollout_batch"].append(self.rollout_batch)
        mixed = self.watch.mixed(self.rollout_batch)
        speaker = Speaker(model, site, inputs.get(OLD), also=mixed and self.alignment.site(mixed.layer))

        def policy_loss(read: Read | None) -> torch.Tensor:
            speaker.read = read
            return self.policy_loss(speaker, inputs)

        with self.measuring(batch) as measured:
            if self.critic:
                share = (
                    self.current_gradient_accumulation_steps / self.args.steps_per_generation
                )  # of the rollout batch
                loss, logged = self.critic.loss(batch, site, share, policy_loss)
                for name, value in logged.items():
                    metrics[name].append(value)
            else:
                loss = self.alignment.mixed(policy_loss(None), mixed, batch, speaker, metrics)
            self.alignment.log(batch, speaker, self.stage, metrics)
        if not loss.requires_grad:
            raise UserError(frozen_since(self.where(self.rollout_batch)))
        last = (self.passes_done + 1) % self.passes_a_batch == 0
        self.watch.after_pass(self.rollout_batch, metrics if measured else {}, metrics, last)
        return loss

    def training_step(self, *args, **kwargs):
        """As TRL's; a critic steps with the policy."""
        with self.alignment.kept():
            loss = super().training_step(*args, **kwargs)
        check_gradient(self)
        self.alignment.keep_above(self.watch.schedule.stage(self.last_batch))
        if self.critic and self.accelerator.sync_gradients:
            self.critic.step()
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """TRL's, with groups of their own for layers that have another learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made:
            scale_rates(optimizer, rate_factors(self.stream, self.args))
            step_only_reached(self, optimizer)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As TRL's, from a whole checkpoint of the same run; the probes also see the last weights."""
        check_trainable(self)
        return self.train_from(trainer_state.chosen(self, resume_from_checkpoint), *args, **kwargs)

    def train_from(self, found: str | None, *args, **kwargs):
        """`train`, from a checkpoint that is known to be whole and of the same run."""
        check_evaluations(self)  # callbacks may have been added
        self.ended_early = False
        result = super().train(found, *args, **kwargs)
        if self.args.logging_steps * self.args.gradient_accumulation_steps == self.passes_a_batch:  # the default
            failure_messages.repeat_last(self.state.log_history)
        self.watch.after_training(self.rollout_batch, self.inside_batch)
        return result

    def save_model(self, output_dir=None, *args, **kwargs):
        super().save_model(output_dir, *args, **kwargs)
        if self.loaded_dtype and self.args.should_save:
            say_dtype(Path(output_dir or self.args.output_dir), self.loaded_dtype)
        for beside in (prompt_settings, model_card):
            beside.write(self, Path(output_dir or self.args.output_dir))

    create_model_card = model_card.create

    def save_parts(self, folder: Path) -> None:
        trainer_state.save(self, folder, self.args.first_phase, self.parts)

    def load_parts(self, folder: Path) -> None:
        trainer_state.load(self, folder, self.args.first_phase, self.parts)

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

from bupo.models.residual_stream import Activation, Family, ResidualStream
from bupo.models.verification import make_probe_tokens
from bupo.training import failure_messages, model_card, prompt_settings
from bupo.training.callbacks.benchmark_evaluation import BenchmarkCallback
from bupo.training.callbacks.nonfinite_updates import SkipNonFiniteUpdatesCallback
from bupo.training.callbacks.phase_controller import PhaseController
from bupo.training.callbacks.probes import compute_repetition
from bupo.training.checkpoints import trainer_state
from bupo.training.checkpoints.callback_states import CallbackStates
from bupo.training.checkpoints.resume import fingerprint_inputs
from bupo.training.config import BuPOConfig
from bupo.training.distributed.deepspeed import step_reached_groups_only
from bupo.training.dropout import apply_dropout_option
from bupo.training.objective.advantages import set_advantages
from bupo.training.objective.critic import make_critic
from bupo.training.objective.layer_parameters import (
    apply_lr_multipliers,
    freeze_layers,
    get_frozen_layers,
    get_lr_multipliers,
)
from bupo.training.objective.phases import Stage
from bupo.training.objective.policy_head import StatesCallback
from bupo.training.objective.policy_scoring import InternalPolicyAlignment, PolicyScorer
from bupo.training.objective.rollout_batch import OLD_LOG_PROBS, RolloutBatch, sum_weighted_rewards
from bupo.training.precision import finish_master_weights, prepare_master_weights, write_config_dtype
from bupo.training.rollout_generation import set_up_generation
from bupo.training.trl_internals import EpochEndCallback, GRPOTrainerHooks, checked_model_loading
from bupo.training.validation.arguments import (
    check_arguments,
    check_evaluations,
    check_run,
    check_scoring,
    get_max_positions,
    open_residual_stream,
)
from bupo.training.validation.reward_signatures import check_inputs
from bupo.training.validation.trainable_parameters import (
    WeightChangeCallback,
    check_auto_layer,
    check_gradient,
    check_trainable,
    describe_missing_gradient,
)
from bupo.utils.errors import UserError


class BuPOTrainer(GRPOTrainerHooks):
    """Trainer for Bottom-up Policy Optimization: a [`~trl.GRPOTrainer`] with a [`BuPOConfig`].

    It also logs `phase` (1 or 2), `rollout_batch` (from 1), `rollout_time` (seconds), `completions/repetition`, `critic/...`,
    `probe/...`, `warning/...` ([`~bupo.training.callbacks.failure_detection.FailureDetector`]), in phase 1 `internal/layer` and `internal/entropy`, and
    where two policies are optimised `internal/weight`. `entropy` is the language model policy's in both phases (in phase 1 at
    the rollout), clip ratios and `approx_kl` (half the mean squared log ratio to the sampling policy) are of the policy in force.

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
        args, half = prepare_master_weights(
            model, args, positional[7] if len(positional) > 7 else kwargs.get("peft_config")
        )
        with checked_model_loading():
            super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self.loaded_dtype = finish_master_weights(self.model, self.ref_model, half, args)
        check_run(self, args := self.args)
        check_evaluations(self)
        set_up_generation(self, args)
        apply_dropout_option(self.model, args, make_probe_tokens(self.model))
        self.input_fingerprint = fingerprint_inputs(self)
        self.wrap_async_rewards(failure_messages.wrap_async_reward)
        self.stream = open_residual_stream(self.model, args, family)
        reference = self.stream and self.ref_model and ResidualStream(self.ref_model, like=self.stream)
        self.policy_alignment = InternalPolicyAlignment(self, self.stream, reference, args)
        check_scoring(self)
        self.critic = make_critic(self.stream, self.accelerator, args)
        freeze_layers(self.stream, get_frozen_layers(args, self.stream.num_layers if self.stream else 0))
        decode, positions = self.processing_class.decode, get_max_positions(self.model)
        self.phase_controller = PhaseController(self.model, self.stream, self.accelerator, args, decode, positions)
        self.nonfinite_callback = SkipNonFiniteUpdatesCallback(
            lambda: self.describe_rollout_batch(self.last_rollout_batch)
        )
        self.add_callback(self.nonfinite_callback)
        self.add_callback(EpochEndCallback(self))
        self.weight_change_callback = WeightChangeCallback(
            self.accelerator, lambda: self.identify_stage(self.last_rollout_batch), self.has_nonzero_advantage
        )
        self.add_callback(self.weight_change_callback)
        self.checkpoint_parts: dict[str, trainer_state.CheckpointPart] = {
            "watch": self.phase_controller,
            "finite": self.nonfinite_callback,
            "moved": self.weight_change_callback,
        }
        self.checkpoint_parts |= {"critic": self.critic} if self.critic else {}
        self.checkpoint_parts["callbacks"] = CallbackStates(self, self.accelerator.print)
        # transformers would put new callbacks in their place, which start with the states they are made with
        args.restore_callback_states_from_checkpoint = False
        if args.eval_benchmarks:
            self.add_callback(BenchmarkCallback(self, benchmarks))

    @property
    def stage(self) -> Stage | None:
        """The stage of the first phase that the rollout batch belongs to; None in the second."""
        return self.phase_controller.schedule.get_stage(self.rollout_batch)

    @property
    def phase(self) -> int:
        """1 while an internal policy is optimised, 2 afterwards (eq. 10)."""
        return 1 if self.stage else 2

    @property
    def target_activation(self) -> Activation | None:
        """The internal policy that is optimised, if one is. Evaluation always speaks for the language model policy."""
        return self.policy_alignment.get_activation(self.stage.layer) if self.stage and self.model.training else None

    def identify_stage(self, batch: int) -> tuple[int, str]:
        """A number for the stage that a rollout batch belongs to, -1 in the second phase; and where that is, in words."""
        place = self.phase_controller.schedule.get_stage_index(batch)
        return -1 if place is None else place, self.describe_rollout_batch(batch)

    def has_nonzero_advantage(self) -> bool:
        """Return whether any answer of this process that is trained on has an advantage."""
        pieces = map(RolloutBatch, self.pieces or [])
        return any(
            bool((piece.mean_per_completion(piece.tensors["advantages"]) * piece.loss_mask.any(1)).any())
            for piece in pieces
        )

    def describe_rollout_batch(self, batch: int) -> str:
        """A rollout batch, its policy and the learning rate, for messages."""
        return f"rollout batch {batch} ({self.phase_controller.describe_policy(batch)}, learning rate {self.learning_rate:.3g})"

    def generate_rollouts(self, inputs):
        started, metrics = time.perf_counter(), self.train_metrics
        self.phase_controller.before_rollouts(self.rollout_batch, self.optimizer, metrics)
        voices = self.policy_alignment.make_rollout_scorers(
            self.stage, self.phase_controller.get_auxiliary_objective(self.rollout_batch)
        )
        with failure_messages.wrap_sampling_errors(self.describe_rollout_batch(self.rollout_batch)):
            sampled = self.sampled(inputs, voices)
        rewards = sum_weighted_rewards(sampled.rewards, self.reward_weights)  # (G,), of all processes
        batch = RolloutBatch(sampled.tensors, rewards, self.accelerator.process_index)
        answers = batch.get_prompt_completion_ids(self.num_generations)
        if self.stage and self.stage.layer is None:
            self.phase_controller.choose_auto_layer(answers, self.state.max_steps)
            check_auto_layer(self, self.stage.layer)
        self._set_advantages(batch)
        if voices and (site := voices.activation or self.target_activation):
            self.policy_alignment.set_internal_log_probs(batch, site, sampled.scores, voices)
        metrics["completions/repetition"].append(self.mean(compute_repetition([answer for _, answer in answers])))
        self.phase_controller.after_rollouts(self.rollout_batch, answers, rewards, metrics)
        metrics["rollout_time"].append(time.perf_counter() - started)
        return batch.tensors

    def arrange_micro_batches(self, pieces):
        return self.policy_alignment.arrange_micro_batches(pieces)

    def grading(self):
        return failure_messages.wrap_reward_errors(self.reward_funcs, self.reward_func_names, self.rollout_batch)

    def _set_advantages(self, batch: RolloutBatch) -> None:
        """Put the estimator's advantages where TRL has put GRPO's."""
        args, scores = self.args, partial(self.policy_alignment.score_batch, batch, self.target_activation)
        values = (
            self.critic.compute_values(batch, self.target_activation, scores) * batch.loss_mask if self.critic else None
        )
        gae = (args.gamma, args.lam)
        if set_advantages(args.advantage_estimator, batch, self.num_generations, self.total, values, *gae):
            self.replace_logged_advantages(batch.mean_per_completion(batch.tensors["advantages"]))

    def loss(self, model, inputs):
        batch, site, metrics = RolloutBatch(inputs), self.target_activation, self.train_metrics
        if not self.model.training:
            with self.dropping_empty_metrics(batch):
                return self.compute_policy_loss(model, inputs)
        metrics["phase"].append(self.phase)
        metrics["rollout_batch"].append(self.rollout_batch)
        mixed = self.phase_controller.get_auxiliary_objective(self.rollout_batch)
        speaker = PolicyScorer(
            model,
            site,
            inputs.get(OLD_LOG_PROBS),
            extra_activation=mixed and self.policy_alignment.get_activation(mixed.layer),
        )

        def policy_loss(read: StatesCallback | None) -> torch.Tensor:
            speaker.states_callback = read
            return self.compute_policy_loss(speaker, inputs)

        with self.dropping_empty_metrics(batch) as measured:
            if self.critic:
                share = (
                    self.current_gradient_accumulation_steps / self.args.steps_per_generation
                )  # of the rollout batch
                loss, logged = self.critic.compute_loss(batch, site, share, policy_loss)
                for name, value in logged.items():
                    metrics[name].append(value)
            else:
                loss = self.policy_alignment.add_auxiliary_loss(policy_loss(None), mixed, batch, speaker, metrics)
            self.policy_alignment.log(batch, speaker, self.stage, metrics)
        if not loss.requires_grad:
            raise UserError(describe_missing_gradient(self.describe_rollout_batch(self.rollout_batch)))
        last = (self.micro_steps_done + 1) % self.micro_steps_per_rollout_batch == 0
        self.phase_controller.after_loss(self.rollout_batch, metrics if measured else {}, metrics, last)
        return loss

    def training_step(self, *args, **kwargs):
        """As TRL's; a critic steps with the policy."""
        with self.policy_alignment.packed_rows_for_backward():
            loss = super().training_step(*args, **kwargs)
        check_gradient(self)
        self.policy_alignment.drop_gradients_above(self.phase_controller.schedule.get_stage(self.last_rollout_batch))
        if self.critic and self.accelerator.sync_gradients:
            self.critic.step()
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """TRL's, with groups of their own for layers that have another learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made:
            apply_lr_multipliers(optimizer, get_lr_multipliers(self.stream, self.args))
            step_reached_groups_only(self, optimizer)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As TRL's, from a whole checkpoint of the same run; the probes also see the last weights."""
        check_trainable(self)
        return self.train_from_checkpoint(
            trainer_state.select_checkpoint(self, resume_from_checkpoint), *args, **kwargs
        )

    def train_from_checkpoint(self, found: str | None, *args, **kwargs):
        """`train`, from a checkpoint that is known to be whole and of the same run."""
        check_evaluations(self)  # callbacks may have been added
        self.stopped_by_callback = False
        result = super().train(found, *args, **kwargs)
        if (
            self.args.logging_steps * self.args.gradient_accumulation_steps == self.micro_steps_per_rollout_batch
        ):  # the default
            failure_messages.complete_last_log(self.state.log_history)
        self.phase_controller.after_training(self.rollout_batch, self.is_inside_rollout_batch)
        return result

    def save_model(self, output_dir=None, *args, **kwargs):
        super().save_model(output_dir, *args, **kwargs)
        if self.loaded_dtype and self.args.should_save:
            write_config_dtype(Path(output_dir or self.args.output_dir), self.loaded_dtype)
        run_directory = Path(output_dir or self.args.output_dir)
        prompt_settings.write_prompt_settings(self, run_directory)
        model_card.write_model_card(self, run_directory)

    create_model_card = model_card.create_model_card

    def save_extra_state(self, folder: Path) -> None:
        trainer_state.save_state(self, folder, self.args.first_phase, self.checkpoint_parts)

    def load_extra_state(self, folder: Path) -> None:
        trainer_state.load_state(self, folder, self.args.first_phase, self.checkpoint_parts)

"""BuPOTrainer: GRPO whose first rollout batches optimise an internal layer policy.

TRL does the sampling, rewards, clipped loss, vLLM, PEFT and checkpoints. This module adds the first phase of
[BuPO](https://arxiv.org/abs/2512.19673), advantage estimators and a critic.
"""

import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from bupo.models.residual_stream import Family, ResidualStream
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
    drop_gradients_above,
    freeze_layers,
    get_frozen_layers,
    get_lr_multipliers,
)
from bupo.training.objective.phases import Objective
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
    """Trainer for Bottom-up Policy Optimization (BuPO): a [`~trl.GRPOTrainer`] with a [`BuPOConfig`].

    An internal layer policy applies the unembedding to the states of layer l
    ([eq. 7](https://arxiv.org/abs/2512.19673)). In the first phase, the clipped objective is the layer policy's, with the
    ratio `pi_Layer^l(o_t) / pi_Layer,old^l(o_t)` ([eq. 9](https://arxiv.org/abs/2512.19673), internal policy alignment).
    A KL penalty compares the layer policies of the model and of the reference model, and an update runs layers 1 to l
    only. In the second phase, the language model policy is optimised as in GRPO
    ([eq. 10](https://arxiv.org/abs/2512.19673)). A phase covers full rollout batches, so that old and new log-probs are
    of one policy; [`~bupo.training.objective.phases.Objective`] describes the objective of each.

    The methods follow the order of a rollout batch: `generate_rollouts` samples, computes advantages and scores the
    policies; `compute_micro_batch_loss` computes the loss of a micro-batch; `training_step` adds the critic's step.

    Metrics in addition to TRL's: `phase` (1 or 2), `rollout_batch` (from 1), `rollout_time` (seconds),
    `completions/repetition`, `approx_kl` (half the mean squared log ratio to the sampling policy), `critic/...`,
    `probe/...`, `warning/...` ([`~bupo.training.callbacks.failure_detection.FailureDetector`]), in phase 1
    `internal/layer` and `internal/entropy`, and with an auxiliary objective `internal/weight`. `entropy` is the
    language model policy's in both phases (in phase 1, at the rollout); clip ratios and `approx_kl` are the target
    policy's.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`), reward_funcs, kwargs: as for [`~trl.GRPOTrainer`]; a text
            model.
        args ([`BuPOConfig`]): configuration of the run.
        family ([`~bupo.Family`], *optional*): module names of an unknown model family.
        benchmarks (`dict[str, Dataset]`, *optional*): problems of `eval_benchmarks` by label; by default loaded by
            name.

    Raises:
        UserError: if the layer does not exist, or the model's residual stream does not follow the rules of its family.
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
        assert args is not None, "check_arguments refuses None"
        peft_config = positional[7] if len(positional) > 7 else kwargs.get("peft_config")
        args, half_dtype = prepare_master_weights(model, args, peft_config)
        with checked_model_loading():
            super().__init__(model, reward_funcs, args, *positional, **kwargs)
        args = self.args
        self.saved_dtype = finish_master_weights(self.model, self.ref_model, half_dtype, args)
        check_run(self, args)
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
        decode, max_positions = self.processing_class.decode, get_max_positions(self.model)
        self.phase_controller = PhaseController(self.model, self.stream, self.accelerator, args, decode, max_positions)

        self.nonfinite_callback = SkipNonFiniteUpdatesCallback(
            lambda: self.describe_rollout_batch(self.last_rollout_batch)
        )
        self.weight_change_callback = WeightChangeCallback(
            self.accelerator, lambda: self.identify_stage(self.last_rollout_batch), self.has_nonzero_advantage
        )
        self.add_callback(self.nonfinite_callback)
        self.add_callback(EpochEndCallback(self))
        self.add_callback(self.weight_change_callback)
        self.checkpoint_parts: dict[str, trainer_state.CheckpointPart] = {
            "phase_controller": self.phase_controller,
            "nonfinite": self.nonfinite_callback,
            "weight_change": self.weight_change_callback,
        }
        self.checkpoint_parts |= {"critic": self.critic} if self.critic else {}
        self.checkpoint_parts["callbacks"] = CallbackStates(self, self.accelerator.print)
        # transformers would replace the callbacks by new ones in their initial state
        args.restore_callback_states_from_checkpoint = False
        if args.eval_benchmarks:
            self.add_callback(BenchmarkCallback(self, benchmarks))

    @property
    def objective(self) -> Objective:
        """Objective of the current rollout batch."""
        return self.phase_controller.get_objective(self.rollout_batch)

    # -- sample, compute advantages, score the policies ----------------------------------------------------------------

    def generate_rollouts(self, inputs: list[dict]) -> dict[str, Any]:
        """Sample a rollout batch with the language model policy, and prepare it for the loss."""
        start, metrics = time.perf_counter(), self.train_metrics
        self.phase_controller.before_rollouts(self.rollout_batch, self.optimizer, metrics)
        scorers = self.policy_alignment.make_rollout_scorers(self.objective)
        with failure_messages.wrap_sampling_errors(self.describe_rollout_batch(self.rollout_batch)):
            sampled = self.sample_and_score(inputs, scorers)
        rewards = sum_weighted_rewards(sampled.rewards, self.reward_weights)  # of all processes
        batch = RolloutBatch(sampled.tensors, rewards, self.accelerator.process_index)
        completions = batch.get_prompt_completion_ids(self.num_generations)
        if self.objective.phase == 1 and self.objective.layer is None:
            self.phase_controller.choose_auto_layer(completions, self.state.max_steps)
            check_auto_layer(self, self.objective.layer)

        self._set_advantages(batch)
        if scorers and (activation := self.objective.internal_activation):  # the one difference of phase 1
            self.policy_alignment.set_internal_log_probs(batch, activation, sampled.scores, scorers)

        repetition = compute_repetition([completion for _, completion in completions])
        metrics["completions/repetition"].append(self.mean_over_processes(repetition))
        self.phase_controller.after_rollouts(self.rollout_batch, completions, rewards, metrics)
        metrics["rollout_time"].append(time.perf_counter() - start)
        return batch.tensors

    def _set_advantages(self, batch: RolloutBatch) -> None:
        """Replace the advantages of TRL's GRPO by those of another estimator."""
        args, activation, values = self.args, self.objective.activation, None
        if self.critic:
            score = partial(self.policy_alignment.score_batch, batch, activation)
            values = self.critic.compute_values(batch, activation, score) * batch.loss_mask
        if set_advantages(
            args.advantage_estimator,
            batch,
            self.num_generations,
            self.sum_over_processes,
            values,
            args.gamma,
            args.lam,
        ):
            self.replace_logged_advantages(batch.mean_per_completion(batch.tensors["advantages"]))

    # -- loss and step -------------------------------------------------------------------------------------------------

    def compute_micro_batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the clipped objective of the target policy, and the losses of a critic or an auxiliary policy."""
        batch, metrics = RolloutBatch(inputs), self.train_metrics
        if not self.model.training:  # evaluation is of the language model policy
            with self.dropping_empty_metrics(batch):
                return self.compute_policy_loss(model, inputs)
        objective = self.objective
        metrics["phase"].append(objective.phase)
        metrics["rollout_batch"].append(self.rollout_batch)
        scorer = PolicyScorer(
            model, objective.activation, inputs.get(OLD_LOG_PROBS), extra_activation=objective.auxiliary
        )
        with self.dropping_empty_metrics(batch) as has_tokens:
            if self.critic:
                loss = self._compute_actor_critic_loss(batch, scorer)
            else:
                loss = self.compute_policy_loss(scorer, inputs)
            if objective.auxiliary:
                loss = self.policy_alignment.add_auxiliary_loss(loss, objective, batch, scorer, metrics)
            self.policy_alignment.log(batch, scorer, objective, metrics)
        if not loss.requires_grad:
            raise UserError(describe_missing_gradient(self.describe_rollout_batch(self.rollout_batch)))
        is_last = (self.micro_steps_done + 1) % self.micro_steps_per_rollout_batch == 0
        self.phase_controller.after_loss(self.rollout_batch, metrics if has_tokens else {}, metrics, is_last)
        return loss

    def _compute_actor_critic_loss(self, batch: RolloutBatch, scorer: PolicyScorer) -> torch.Tensor:
        """Compute the policy's loss, and the critic's: a separate backward pass, or a term of the same loss."""

        def compute_policy_loss(states_callback: StatesCallback | None) -> torch.Tensor:
            scorer.states_callback = states_callback
            return self.compute_policy_loss(scorer, batch.tensors)

        assert self.critic is not None
        update_share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        loss, critic_metrics = self.critic.compute_loss(batch, scorer.activation, update_share, compute_policy_loss)
        for name, value in critic_metrics.items():
            self.train_metrics[name].append(value)
        return loss

    def training_step(self, *args, **kwargs):
        """Run TRL's forward and backward pass; a critic steps with the policy."""
        with self.policy_alignment.packed_rows_for_backward():
            loss = super().training_step(*args, **kwargs)
        check_gradient(self)
        frozen_above = self.phase_controller.get_objective(self.last_rollout_batch).frozen_above
        if self.stream and frozen_above:
            drop_gradients_above(self.stream, frozen_above)
        if self.critic and self.accelerator.sync_gradients:
            self.critic.step()
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create TRL's optimizer, with separate groups for layers that have another learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            apply_lr_multipliers(optimizer, get_lr_multipliers(self.stream, self.args))
            step_reached_groups_only(self, optimizer)
        return optimizer

    # -- runs ----------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train, or resume from an intact checkpoint of the same run. The probes also measure the final weights."""
        check_trainable(self)
        checkpoint = trainer_state.select_checkpoint(self, resume_from_checkpoint)
        return self.train_from_checkpoint(checkpoint, *args, **kwargs)

    def train_from_checkpoint(self, checkpoint: str | None, *args, **kwargs):
        """Train from a checkpoint that is known to be intact and of the same run."""
        check_evaluations(self)  # callbacks may have been added
        self.stopped_by_callback = False
        result = super().train(checkpoint, *args, **kwargs)
        logs_once_a_batch = (
            self.args.logging_steps * self.args.gradient_accumulation_steps == self.micro_steps_per_rollout_batch
        )
        if logs_once_a_batch:
            failure_messages.complete_last_log(self.state.log_history)
        self.phase_controller.after_training(self.rollout_batch, self.is_inside_rollout_batch)
        return result

    # -- messages ------------------------------------------------------------------------------------------------------

    def describe_rollout_batch(self, rollout_batch: int) -> str:
        """Describe a rollout batch by its number, its objective and the learning rate."""
        objective = self.phase_controller.get_objective(rollout_batch)
        return f"rollout batch {rollout_batch} ({objective}, learning rate {self.learning_rate:.3g})"

    def identify_stage(self, rollout_batch: int) -> tuple[int, str]:
        """Return the index of a rollout batch's stage (-1 in the second phase), and a description for messages."""
        stage = self.phase_controller.get_objective(rollout_batch).stage
        return -1 if stage is None else stage, self.describe_rollout_batch(rollout_batch)

    def has_nonzero_advantage(self) -> bool:
        """Return whether any completion of this process that the loss counts has an advantage."""
        for batch in map(RolloutBatch, self.micro_batches or []):
            advantages = batch.mean_per_completion(batch.tensors["advantages"])
            if (advantages * batch.loss_mask.any(1)).any():
                return True
        return False

    # -- hooks of GRPOTrainerHooks, and saving -------------------------------------------------------------------------

    def arrange_micro_batches(self, micro_batches: list[dict]) -> list[dict]:
        return self.policy_alignment.arrange_micro_batches(micro_batches)

    def reward_call_context(self) -> AbstractContextManager[None]:
        return failure_messages.wrap_reward_errors(self.reward_funcs, self.reward_func_names, self.rollout_batch)

    def save_model(self, output_dir=None, *args, **kwargs):
        """Save the model, with its original dtype, the prompt settings and a model card."""
        super().save_model(output_dir, *args, **kwargs)
        folder = Path(output_dir or self.args.output_dir)
        if self.saved_dtype and self.args.should_save:
            write_config_dtype(folder, self.saved_dtype)
        prompt_settings.write_prompt_settings(self, folder)
        model_card.write_model_card(self, folder)

    create_model_card = model_card.create_model_card

    def save_extra_state(self, folder: Path) -> None:
        trainer_state.save_state(self, folder, self.args.phase_schedule, self.checkpoint_parts)

    def load_extra_state(self, folder: Path) -> None:
        trainer_state.load_state(self, folder, self.args.phase_schedule, self.checkpoint_parts)

"""All uses of private names of TRL, transformers and accelerate, which [`bupo.training.trl_contract`] lists.

The rest of the project uses public names only: [`GRPOTrainerHooks`] gives access to the private ones by plain arguments
and results.
"""

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import IterableDataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainerCallback, TrainerControl
from transformers.optimization import GreedyLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import get_config_model_id, is_async_callable, use_adapter

from bupo.models.cpu_decoding import fast_generate
from bupo.models.generation_settings import policy_generation_config
from bupo.models.residual_stream import eval_mode
from bupo.models.weight_checks import LOADING_REPORT_KWARGS, check_weights, suppress_load_report
from bupo.training.callbacks.best_metric import describe_unknown_metric, get_metric_value, list_eval_metrics
from bupo.training.checkpoints.stream_position import StreamPosition
from bupo.training.checkpoints.weights import check_optimizer_state, has_renamed_parameters, load_weights
from bupo.training.checkpoints.writer import (
    STAGING_DIR,
    commit_checkpoint,
    commit_node_checkpoint,
    delete_old_checkpoints,
    move_files,
    wrap_write_errors,
)
from bupo.training.distributed.fsdp2 import only_trainable, read_stepped_parameters
from bupo.training.objective.rollout_batch import (
    OLD_LOG_PROBS,
    CompletionScores,
    RolloutBatch,
    SampledRollouts,
    get_equal_reward_ratio,
    mask_ungraded_completions,
    mask_ungraded_rewards,
    sum_weighted_rewards,
)
from bupo.utils.errors import UserError, wrap_library_errors
from bupo.utils.files import make_folder

logger = get_logger(__name__)

# metrics that describe a micro-batch, and are kept for one without a token
BATCH_INFO_METRICS = ("phase", "rollout_batch", "internal/layer", "internal/weight", "entropy_coef")

__all__ = [
    "GRPOTrainerHooks",
    "checked_model_loading",
    "disable_gradient_checkpointing",
    "get_config_model_id",
    "use_adapter",
]


@contextmanager
def checked_model_loading() -> Iterator[None]:
    """Check the models that TRL loads by name in this context, references included, as `load_model` does.

    Models whose files lack tensors, or hold unusable numbers, are refused.
    """
    create_model = grpo_trainer.create_model_from_path

    def create_checked_model(model_id, *args, **kwargs):
        with suppress_load_report():
            model, report = create_model(model_id, *args, **kwargs | LOADING_REPORT_KWARGS)
        check_weights(model_id, model_id, model, report, kwargs.get("revision"))
        return model

    grpo_trainer.create_model_from_path = create_checked_model
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = create_model


class GRPOTrainerHooks(GRPOTrainer):
    """GRPOTrainer with public hooks in place of its private methods, and with its private state as properties.

    Hooks, for subclasses: `generate_rollouts`, `compute_micro_batch_loss`, `arrange_micro_batches`,
    `reward_call_context`, `save_extra_state` and `load_extra_state`.
    """

    _tag_names: ClassVar = ["trl", "grpo", "bupo"]
    control: TrainerControl
    data_collator: Any
    # sampling
    rollout_scorers: Callable[[nn.Module], Callable] | None = (
        None  # makes the policy that TRL scores in a model's place
    )
    rollout_scores: list[CompletionScores]  # of each scoring pass over the rollout batch that is being sampled
    function_rewards: torch.Tensor  # (all completions, functions): of the last rollout batch
    # epochs and logs
    epoch_ended = False  # the log, evaluation and checkpoint of an epoch's end are being made, or were made
    last_update_stats: tuple[Any, float | None] = (None, None)  # gradient norm and learning rate, for an epoch's log
    stream_position: StreamPosition | None = None  # position in a streamed dataset
    # checkpoints
    staging_dir: Path | None = None  # folder in which a checkpoint is being written
    resumed_checkpoint: str | None = None
    resumed_at_step = 0  # updates done before this start
    rng_state_restored = False  # the log of an interrupted epoch's end has restored the random state
    stopped_by_callback = False  # a callback ended the run that is resumed
    input_fingerprint: dict[str, Any]  # properties of the model and the problems that affect training
    # prompts and model card
    system_prompt: str | None = None  # of all problems; a plain-text prompt does not show it
    dataset_name: str | None = None

    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        state = AcceleratorState._shared_state
        differs = args is not None and state.get("_mixed_precision", args.mixed_precision) != args.mixed_precision
        if differs and state["distributed_type"] != DistributedType.DEEPSPEED:
            AcceleratorState._reset_state()  # an earlier run of this process had another mixed precision
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def generate_rollouts(self, inputs: list[dict]) -> dict[str, Any]:
        """Sample a rollout batch in training, and return the tensors that the loss reads."""
        return self.sample_and_score(inputs).tensors

    def compute_micro_batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the loss of a micro-batch."""
        return self.compute_policy_loss(model, inputs)

    def arrange_micro_batches(self, micro_batches: list[dict]) -> list[dict]:
        """Return the micro-batches of a rollout batch, which replace TRL's."""
        return micro_batches

    def reward_call_context(self) -> AbstractContextManager[None]:
        """Return a context for the calls of reward functions."""
        return nullcontext()

    def save_extra_state(self, folder: Path) -> None:
        """Write the part of a checkpoint that TRL does not write; called before TRL writes its part."""

    def load_extra_state(self, folder: Path) -> None:
        """Load the part of a checkpoint that `save_extra_state` wrote."""

    # -- methods of TRL as functions -----------------------------------------------------------------------------------

    def sample_and_score(
        self, inputs: list[dict], scorers: Callable[[nn.Module], Callable] | None = None
    ) -> SampledRollouts:
        """Sample a rollout batch by TRL, and grade it.

        Args:
            inputs (`list[dict]`): rows of the dataset.
            scorers (`Callable`, *optional*): returns the policy to score in place of the model that TRL passes. With
                it, the scores of the sampling policy are returned too.
        """
        self.rollout_scorers, self.rollout_scores = scorers, []
        try:
            tensors = super()._generate_and_score_completions(inputs)
        finally:
            self.rollout_scorers = None
        rewards, scores = self.function_rewards, self.rollout_scores
        self.mask_ungraded(tensors, rewards)
        # the first pass scores the sampling policy; without old log-probs the only pass is the reference model's
        return SampledRollouts(tensors, rewards, scores[0] if scores and OLD_LOG_PROBS in tensors else None)

    def mask_ungraded(self, tensors: dict[str, Any], rewards: torch.Tensor) -> None:
        """Mask ungraded completions out of the loss, and log their share. TRL gives them an advantage of 0.

        Args:
            tensors (`dict`): for the loss.
            rewards (`torch.Tensor` of shape `(all completions, functions)`): from [`mask_ungraded_rewards`].
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        is_graded = ~rewards.isnan().all(1)
        metrics["completions/ungraded_ratio"].append(1 - is_graded.float().mean().item())
        if is_graded.all():
            return
        rows = len(tensors["completion_ids"])
        process_slice = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        tokens = mask_ungraded_completions(tensors, is_graded[process_slice])
        tensors["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        if not is_graded.any():
            metrics["frac_reward_zero_std"][-1] = math.nan
        elif self.multi_objective_aggregation == "sum_then_normalize":
            num_generations = self.num_generations if self.model.training else self.num_generations_eval
            compared = len(rewards) if self.scale_rewards == "batch" else num_generations
            summed = sum_weighted_rewards(rewards, self.reward_weights)
            metrics["frac_reward_zero_std"][-1] = get_equal_reward_ratio(summed, compared)

    @contextmanager
    def dropping_empty_metrics(self, batch: RolloutBatch) -> Iterator[bool]:
        """Drop the metrics of a micro-batch without a token to train on, for which TRL logs zeros.

        Yields:
            `bool`: whether any process has such a token.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        before = {name: len(values) for name, values in metrics.items()}
        has_tokens = bool(self.sum_over_processes(batch.loss_mask.sum()) > 0)
        yield has_tokens
        for name in () if has_tokens else list(metrics):
            if name not in BATCH_INFO_METRICS:
                del metrics[name][before.get(name, 0) :]

    def score_completions(
        self,
        policy: Callable,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_length: int,
        batch_size: int,
    ) -> CompletionScores:
        """Score the last `completion_length` tokens of each row by TRL's scoring call, `batch_size` rows at a time.

        Args:
            policy (`Callable`): a model, or a scorer in its place.
            input_ids, attention_mask (`torch.Tensor` of shape `(B, T)`): prompts and completions.
            completion_length, batch_size (`int`): see above.
        """
        log_probs, entropies, _ = super()._get_per_token_logps_and_entropies(
            policy, input_ids, attention_mask, completion_length, batch_size=batch_size, compute_entropy=True
        )
        return CompletionScores(log_probs, entropies)

    def try_scoring(self) -> None:
        """Score two tokens by the call that scores each micro-batch, without gradient, dropout or use of random numbers."""
        ids = torch.ones(1, 4, dtype=torch.long, device=self.accelerator.device)
        aux = {"compute_entropy": True, "compute_aux_loss": self.aux_loss_enabled}
        with torch.no_grad(), torch.random.fork_rng(), eval_mode(self.model), self.without_gradient_checkpointing():
            super()._get_per_token_logps_and_entropies(self.model, ids, torch.ones_like(ids), 2, batch_size=1, **aux)

    def compute_policy_loss(self, policy: Callable, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute TRL's loss of a micro-batch, with the log-probs of `policy`.

        An update without a token to train on leaves the adaptive entropy coefficient unchanged; TRL would count an
        entropy of 0.
        """
        if not (self.use_adaptive_entropy and self.model.training):
            return super()._compute_loss(policy, inputs)
        coefficient: float = self.entropy_coef  # type: ignore[has-type]
        entropy: float = self._last_world_entropy  # type: ignore[has-type]
        window = self._entropy_window_stats
        loss = super()._compute_loss(policy, inputs)
        tokens = RolloutBatch(inputs).loss_mask.sum() + (0 if window is None else window[1])
        if self._entropy_window_stats is None and self.sum_over_processes(tokens) == 0:  # the update's last micro-batch
            self.entropy_coef, self._last_world_entropy = coefficient, entropy
            self.train_metrics["entropy_coef"][-1] = coefficient
        return loss

    def without_gradient_checkpointing(self) -> AbstractContextManager[None]:
        """Turn gradient checkpointing off in this context, for passes that are not differentiated."""
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def reference_adapter(self) -> AbstractContextManager[None]:
        """Turn a PEFT model into its reference in this context: without its adapter, or with the initial one."""
        peft_model = self.accelerator.unwrap_model(self.model)
        return use_adapter(peft_model, adapter_name="ref" if "ref" in peft_model.peft_config else None)

    def sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over processes."""
        return self.accelerator.reduce(sums, "sum")

    def mean_over_processes(self, value: float) -> float:
        """Return the mean of a number over processes."""
        return self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).mean().item()

    def wrap_async_rewards(self, wrapper: Callable[[Callable], Callable]) -> None:
        """Apply a wrapper to each asynchronous reward function."""
        functions: list[Any] = self.reward_funcs or []
        self.reward_funcs: list[Any] = [wrapper(each) if is_async_callable(each) else each for each in functions]

    # -- private state of TRL and transformers -------------------------------------------------------------------------

    @property
    def micro_steps_done(self) -> int:
        """Forward and backward passes done."""
        return self._step

    @property
    def micro_steps_per_rollout_batch(self) -> int:
        """Forward and backward passes on one rollout batch."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def rollout_batch(self) -> int:
        """Number of the current rollout batch, from 1."""
        return self._step // self.micro_steps_per_rollout_batch + 1

    @property
    def last_rollout_batch(self) -> int:
        """Number of the rollout batch of the last forward and backward pass, from 1."""
        return max(0, self._step - 1) // self.micro_steps_per_rollout_batch + 1

    @property
    def is_inside_rollout_batch(self) -> bool:
        """Return whether training is between two micro-batches of one rollout batch."""
        return self._step % self.micro_steps_per_rollout_batch != 0

    def restore_position(self, micro_steps: int, micro_batches: list[dict] | None) -> None:
        """Continue after a number of micro-steps, inside a rollout batch if its micro-batches are given."""
        self._step, self._buffered_inputs = micro_steps, micro_batches

    @property
    def micro_batches(self) -> list[dict] | None:
        """Micro-batches of the current rollout batch."""
        return self._buffered_inputs

    @property
    def train_metrics(self) -> dict[str, list[float]]:
        """Metrics of the next training log, which averages the values of each."""
        return self._metrics["train"]

    @property
    def learning_rate(self) -> float:
        return self._get_learning_rate() if self.lr_scheduler else self.args.learning_rate

    @property
    def is_vlm(self) -> bool:
        return self._is_vlm

    @property
    def is_stream_exhausted(self) -> bool:
        """Return whether a pass over a stream has read all rows; a stopped run may end an epoch earlier."""
        return self.epoch_ended and not self.control.should_training_stop

    @property
    def log_counters(self) -> dict[str, Any]:
        """Counters of transformers for the next log and the end of the run, which its checkpoints lack."""
        return {
            "since_log": self._tr_loss.item(),
            "logged": self._total_loss_scalar,
            "last_log": self._globalstep_last_logged,
            "first_step": self._initial_global_step,
            "epoch_ended": self.epoch_ended,
            "last_update": [None if value is None else float(value) for value in self.last_update_stats],
            "stream": self.stream_position
            and self.stream_position.state(self.micro_steps_done, self.is_stream_exhausted),
        }

    @log_counters.setter
    def log_counters(self, value: dict[str, Any]) -> None:
        self._tr_loss += value["since_log"]
        self._total_loss_scalar, self._globalstep_last_logged = value["logged"], value["last_log"]
        self._initial_global_step = value["first_step"]
        self.epoch_ended, self.last_update_stats = value["epoch_ended"], tuple(value["last_update"])
        if self.stream_position and value["stream"]:
            self.stream_position.load(value["stream"])

    @property
    def completions_table(self) -> str | None:
        """TRL's table of completions as JSON; None if it is not logged."""
        if not self.log_completions:
            return None
        return json.dumps(
            {name: value for name, value in self._logs.items() if name != "images"}, default=serialize_deque
        )

    @completions_table.setter
    def completions_table(self, table: str | None) -> None:
        for name, values in json.loads(table or "{}").items():
            if isinstance(values, dict):
                for column, inner in values.items():
                    self._logs[name][column].extend(inner)
            else:
                self._logs[name].extend(values)

    def replace_logged_advantages(self, advantages_B: torch.Tensor) -> None:
        """Replace the last advantages in TRL's table of completions."""
        advantages, logged = self.accelerator.gather(advantages_B).tolist(), self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages)

    # -- overridden: sampling and loss ---------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        # fast generation computes outside of the model's forward, and so without its autocast
        generation = fast_generate(self.model) if self.accelerator.mixed_precision == "no" else nullcontext()
        with policy_generation_config(self.model, self.processing_class), generation:
            return self.generate_rollouts(inputs) if self.model.training else self.sample_and_score(inputs).tensors

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self.reward_call_context():
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.function_rewards = mask_ungraded_rewards(rewards, self.reward_weights)
        return self.function_rewards

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        if self.rollout_scorers is None:
            return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)
        scorer = self.rollout_scorers(model)
        scores = super()._get_per_token_logps_and_entropies(scorer, *args, compute_entropy=True, **kwargs)
        self.rollout_scores.append(CompletionScores(*scores[:2]))
        return scores

    def _compute_loss(self, model, inputs):
        return self.compute_micro_batch_loss(model, inputs)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        micro_batches = self._buffered_inputs
        if not self.model.training or micro_batches is None or micro_batches is before:
            return inputs
        self._buffered_inputs = self.arrange_micro_batches(micro_batches)  # TRL has just split a new rollout batch
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_train_sampler(self, dataset=None):
        """Return TRL's sampler with `set_epoch`: a resumed run must see the problems in the order of an uninterrupted
        one.

        TRL seeds the generator once and draws a permutation an epoch.
        """
        sampler = super()._get_train_sampler(dataset)

        def set_epoch(epoch: int) -> None:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(epoch):
                torch.randperm(sampler.num_samples, generator=sampler.generator)

        if sampler.shuffle:
            sampler.set_epoch = set_epoch
        return sampler

    # -- overridden: checkpoints ---------------------------------------------------------------------------------------

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self.staging_dir is None else str(self.staging_dir)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.staging_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with wrap_write_errors(checkpoint), self.staging_folder(run_dir) as staging:
            staged = staging / checkpoint.name
            make_folder(staged, run_dir)
            self.save_extra_state(staged)
            super()._save_checkpoint(model, trial)
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == checkpoint or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                commit_checkpoint(staged, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.is_local_process_zero() and not self.args.should_save:
                commit_node_checkpoint(staged, checkpoint)
        if self.args.should_save:
            delete_old_checkpoints(run_dir, self.args.save_total_limit, checkpoint, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    @contextmanager
    def staging_folder(self, folder: Path) -> Iterator[Path]:
        """Write checkpoints into a staging folder in this context, and delete it after an error."""
        self.staging_dir = folder / STAGING_DIR
        try:
            yield self.staging_dir
        except BaseException:
            shutil.rmtree(self.staging_dir, ignore_errors=True)
            raise
        finally:
            self.staging_dir = None

    def save_model_atomically(self, folder: Path) -> None:
        """Save the model and its tokenizer, each file by an atomic move."""
        staged = folder / STAGING_DIR / "model"
        with wrap_write_errors(folder), self.staging_folder(folder):
            make_folder(staged, folder)
            self.save_model(str(staged), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_files(staged, folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self.load_renamed_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self.load_renamed_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def load_renamed_weights(self, checkpoint: str) -> bool:
        """Load a checkpoint whose parameters have other names, which transformers' Trainer would skip.

        Returns:
            `bool`: whether the checkpoint is such a one and was loaded.
        """
        if (
            self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or not has_renamed_parameters(self.model, Path(checkpoint))
        ):
            return False
        load_weights(self.model, Path(checkpoint))
        return True

    def _load_optimizer_and_scheduler(self, checkpoint):
        base_lrs = list(getattr(self.lr_scheduler, "base_lrs", []))  # DeepSpeed has loaded its optimizer's already
        stepped = read_stepped_parameters(Path(checkpoint)) if checkpoint and self.accelerator.is_fsdp2 else None
        trainable = nullcontext() if stepped is None else only_trainable(self.model, stepped)
        errors = wrap_library_errors(f"{checkpoint} is damaged: its optimizer.pt or scheduler.pt cannot be loaded")
        with trainable, errors if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            check_optimizer_state(self.optimizer, Path(checkpoint))
        self.state.compute_steps(self.args, self.state.max_steps)  # logging and saving follow the options
        self.resumed_at_step, self.resumed_checkpoint = self.state.global_step, checkpoint
        self.apply_configured_lr(base_lrs)
        self.load_extra_state(Path(checkpoint))

    def apply_configured_lr(self, base_lrs: list[float]) -> None:
        """Replace the loaded learning rate and schedule by the options', which may have changed."""
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            return
        lrs = [
            base_lr * factor(scheduler.last_epoch)
            for base_lr, factor in zip(base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": base_lrs, "_last_lr": lrs})
        for group, base_lr, lr in zip(self.optimizer.param_groups, base_lrs, lrs, strict=True):
            group["initial_lr"], group["lr"] = base_lr, lr

    def restore_log_counters(self, counters: dict[str, Any]) -> None:
        """Set `log_counters` when training begins, after transformers has set them to zero."""
        self.add_callback(RestoreLogCountersCallback(self, counters))

    def finish_interrupted_epoch(self, train_dataloader: Any) -> None:
        """Log, evaluate and save the end of an epoch before which a run was stopped.

        Training continues with the random state after the evaluation. The epoch of a stream ends when all its rows are
        read.
        """
        updates = self.state.global_step
        is_finished = updates >= self.state.max_steps
        if self.epoch_ended or not updates or (self.stream_position and not is_finished):
            return
        if not is_finished:
            updates_per_epoch = math.ceil(len(train_dataloader) / self.args.gradient_accumulation_steps)
            if updates % max(1, updates_per_epoch):
                return
        self._load_rng_state(self.resumed_checkpoint)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.control.should_training_stop = is_finished
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        epoch = int(self.state.epoch or 0)
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, time.time())
        self.rng_state_restored = not is_finished

    # -- overridden: epochs, evaluation and logs -----------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        if grad_norm is None and learning_rate is None:  # no update since the run was resumed
            grad_norm, learning_rate = self.last_update_stats
            self.model_wrapped.train()  # else TRL would log the metrics of an evaluation
        else:
            self.last_update_stats = grad_norm, learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _load_rng_state(self, checkpoint):
        if self.rng_state_restored:
            self.rng_state_restored = False
            return
        with wrap_library_errors(f"{checkpoint} is damaged: its random numbers (rng_state*.pth) cannot be loaded"):
            super()._load_rng_state(checkpoint)

    def get_train_dataloader(self):
        """Return TRL's dataloader, which records the position in a streamed dataset."""
        if not isinstance(self.train_dataset, IterableDataset):
            self.stream_position = None
            return super().get_train_dataloader()
        collator, self.stream_position = self.data_collator, StreamPosition()
        self.data_collator = self.stream_position.wrap_collator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _run_epoch(self, **kwargs):
        if self.state.global_step >= self.state.max_steps or self.stopped_by_callback:
            self.control.should_training_stop = True
            return
        if stream := self.stream_position:
            skipped = 0
            if kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
                skipped = kwargs["steps_trained_in_current_epoch"] = stream.get_batches_to_skip(
                    kwargs["resume_from_checkpoint"]
                )
            kwargs["epoch"] += stream.first_pass
            kwargs["epochs_trained"] += stream.first_pass
            stream.begin_pass(kwargs["epoch"], self.micro_steps_done, skipped)
        super()._run_epoch(**kwargs)
        if stream:
            stream.check_position_reached()

    def _evaluate(self, *args, skip_scheduler=False, **kwargs):
        if skip_scheduler and self.state.global_step:
            return None
        metrics = super()._evaluate(*args, skip_scheduler=True, **kwargs)
        if not skip_scheduler and isinstance(self.lr_scheduler, ReduceLROnPlateau | GreedyLR):
            value = self.get_best_metric(metrics)
            if value is not None:
                self.lr_scheduler.step(value)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        if self.args.metric_for_best_model is None or self.get_best_metric(metrics) is None:
            return False
        return super()._determine_best_metric(metrics, trial)

    def get_best_metric(self, metrics: dict[str, Any]) -> float | None:
        """Return the value of `metric_for_best_model`; None, with a warning, if this evaluation graded too little for
        it.

        Raises:
            UserError: if no evaluation measures it.
        """
        args, value = self.args, get_metric_value(self.args, metrics)
        eval_datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else None
        known = list_eval_metrics(args, self.reward_func_names, eval_datasets)
        if value is None and args.metric_for_best_model.removeprefix("eval_") not in known:
            raise UserError(describe_unknown_metric(args, args.metric_for_best_model, known))
        if value is None:
            logger.warning(
                f"{args.metric_for_best_model} has no value in this evaluation, whose answers were not graded"
            )
        return value

    def log(self, logs, start_time=None):
        """Log by TRL, without metrics that have no measured value.

        The speeds at the end of a run count the updates since it was resumed.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
            del metrics[name]
        for name in {"train_samples_per_second", "train_steps_per_second"} & set(logs):
            logs[name] *= 1 - self.resumed_at_step / max(1, self.state.global_step)
        super().log(logs, start_time)


class RestoreLogCountersCallback(TrainerCallback):
    """Sets a resumed run's log counters once, when training begins."""

    def __init__(self, trainer: GRPOTrainerHooks, counters: dict[str, Any]):
        self.trainer, self.counters = trainer, counters

    def on_train_begin(self, args, state, control, **kwargs):
        if self.counters:
            self.trainer.log_counters, self.counters = self.counters, {}
            self.trainer.finish_interrupted_epoch(kwargs["train_dataloader"])


class EpochEndCallback(TrainerCallback):
    """Records whether an epoch has ended. A checkpoint after its last update may precede the epoch's log and evaluation."""

    def __init__(self, trainer: GRPOTrainerHooks):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.epoch_ended = True


def serialize_deque(values: Any) -> Any:
    return list(values) if isinstance(values, deque) else str(values)

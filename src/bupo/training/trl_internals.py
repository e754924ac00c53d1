"""The one file that knows private names of TRL, transformers and accelerate; [`bupo.training.trl_contract`] lists them.

Everything else in the project uses public names only: [`GRPOTrainerHooks`] offers what it needs of the private ones as plain
arguments and results.
"""

import ast
import inspect
import json
import math
import shutil
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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

# metrics that say what a micro-batch is, or hold without one
BATCH_INFO_METRICS = ("phase", "rollout_batch", "internal/layer", "internal/weight", "entropy_coef")

__all__ = [
    "GRPOTrainerHooks",
    "checked_model_loading",
    "disable_gradient_checkpointing",
    "get_accepted_values",
    "get_config_model_id",
    "use_adapter",
]


def get_accepted_values(option: str) -> tuple[str, ...]:
    """Values of an option that TRL's loss asks for by name, such as `loss_type`'s; empty where its source is not at hand.

    TRL itself refuses an unknown value at the first update only, after a rollout batch has been sampled.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss)))
    except (OSError, TypeError, SyntaxError):
        return ()
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == option:
            constants = [part for side in node.comparators for part in ast.walk(side) if isinstance(part, ast.Constant)]
            found += [part.value for part in constants if isinstance(part.value, str)]
    return tuple(dict.fromkeys(found))


@contextmanager
def checked_model_loading() -> Iterator[None]:
    """Inside, models that TRL loads by their names, references too, are refused as those of `load_model` are: where their files
    lack tensors, or hold no usable numbers."""
    inner = grpo_trainer.create_model_from_path

    def create(model_id, *args, **kwargs):
        with suppress_load_report():
            model, report = inner(model_id, *args, **kwargs | LOADING_REPORT_KWARGS)
        check_weights(model_id, model_id, model, report, kwargs.get("revision"))
        return model

    grpo_trainer.create_model_from_path = create
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = inner


class GRPOTrainerHooks(GRPOTrainer):
    """GRPOTrainer with public hooks (`rollout`, `loss`, `grading`, `save_parts`, `load_parts`) in place of its private methods,
    and with its private state as properties.
    """

    _tag_names: ClassVar = ["trl", "grpo", "bupo"]
    staging_dir: Path | None = None  # where a checkpoint is being written
    epoch_ended = False  # whether the logs, evaluation and checkpoint of an epoch's end are being made, or were
    # gradient norm and learning rate, which an epoch's log repeats
    last_update_stats: tuple[Any, float | None] = (None, None)
    control: TrainerControl
    data_collator: Any
    stream_position: StreamPosition | None = None  # where the run is in its problems, if they are a stream
    resumed_checkpoint: str | None = None
    rng_state_restored = False  # by the end of an epoch that a resumed run has made up for
    resumed_at_step = 0  # updates that were done before this start
    stopped_by_callback = False  # a callback has ended the run that is resumed
    given: dict[str, Any]  # what decides the run of the model and the problems that were given
    system_prompt: str | None = None  # of all problems, where prompts are plain text and do not show it
    dataset_name: str | None = None  # of the problems, for the card

    def __init__(self, model, reward_funcs=None, args=None, *positional, **kwargs):
        state = AcceleratorState._shared_state
        other = args is not None and state.get("_mixed_precision", args.mixed_precision) != args.mixed_precision
        if other and state["distributed_type"] != DistributedType.DEEPSPEED:
            AcceleratorState._reset_state()  # as new arguments do: an earlier run of this process may have had another
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def generate_rollouts(self, inputs: list[dict]) -> dict[str, Any]:
        """A rollout batch while training: what the loss will read."""
        return self.sample_and_score(inputs).tensors

    def compute_micro_batch_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a micro-batch."""
        return self.compute_policy_loss(model, inputs)

    def arrange_micro_batches(self, pieces: list[dict]) -> list[dict]:
        """The micro-batches of a rollout batch, in the stead of TRL's."""
        return pieces

    def reward_call_context(self) -> AbstractContextManager[None]:
        """Around the reward functions."""
        return nullcontext()

    def save_extra_state(self, folder: Path) -> None:
        """What a checkpoint holds besides TRL's files, which are written after it."""

    def load_extra_state(self, folder: Path) -> None:
        """What `save_parts` wrote."""

    # -- what TRL does, as functions ---------------------------------------------------------------------------------

    def sample_and_score(self, inputs: list[dict], voice: Callable | None = None) -> SampledRollouts:
        """TRL's rollout batch, with the rewards.

        Args:
            inputs (`list[dict]`): rows of the dataset.
            voice (`Callable`, *optional*): gives what stands in a model's place while TRL scores answers, and asks for scores.
        """
        rewards: list[torch.Tensor] = []
        scored: list[tuple] = []
        with ExitStack() as hearing:
            hearing.enter_context(_intercepted_method(self, "_calculate_rewards", rewards.append))
            if voice:
                name = "_get_per_token_logps_and_entropies"
                hearing.enter_context(_intercepted_method(self, name, scored.append, voice, compute_entropy=True))
            tensors = super()._generate_and_score_completions(inputs)
        # the first pass over the answers is the sampling policy's; a second would be the reference model's
        own = scored and "old_per_token_logps" in tensors
        self.mask_ungraded(tensors, rewards[-1])
        return SampledRollouts(tensors, rewards[-1], CompletionScores(*scored[0][:2]) if own else None)

    def mask_ungraded(self, tensors: dict[str, Any], rewards: torch.Tensor) -> None:
        """Mask ungraded answers out of the loss, and log their share. TRL gives them an advantage of 0.

        Args:
            tensors (`dict`): what the loss will read.
            rewards (`torch.Tensor` of shape `(G, functions)`): of [`mask_ungraded_rewards`].
        """
        metrics, training = self._metrics["train" if self.model.training else "eval"], self.model.training
        graded_G = ~rewards.isnan().all(1)
        metrics["completions/ungraded_ratio"].append(1 - graded_G.float().mean().item())
        if graded_G.all():
            return
        size = len(tensors["completion_ids"])
        here = slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)
        counted = mask_ungraded_completions(tensors, graded_G[here])
        tensors["num_items_in_batch"] = self.accelerator.gather(counted).sum()
        if not graded_G.any():
            metrics["frac_reward_zero_std"][-1] = math.nan
        elif self.multi_objective_aggregation == "sum_then_normalize":
            group = self.num_generations if training else self.num_generations_eval
            compared = len(rewards) if self.scale_rewards == "batch" else group
            metrics["frac_reward_zero_std"][-1] = get_equal_reward_ratio(
                sum_weighted_rewards(rewards, self.reward_weights), compared
            )

    @contextmanager
    def dropping_empty_metrics(self, batch: RolloutBatch) -> Iterator[bool]:
        """Inside, a micro-batch is measured; one without a token to train on has no metrics, and TRL's zeros are dropped.

        Yields:
            `bool`: whether any process' part has such a token.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        before = {name: len(values) for name, values in metrics.items()}
        measured = bool(self.sum_over_processes(batch.loss_mask.sum()) > 0)
        yield measured
        for name in () if measured else list(metrics):
            if name not in BATCH_INFO_METRICS:
                del metrics[name][before.get(name, 0) :]

    def score_completions(
        self, policy: Callable, input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: int, size: int
    ) -> CompletionScores:
        """Log-probs and entropies of the last `tokens` of each row, `size` rows at a time, by TRL's scoring call of `policy`: a
        model, or what stands for one."""
        log_probs, entropies, _ = super()._get_per_token_logps_and_entropies(
            policy, input_ids, attention_mask, tokens, batch_size=size, compute_entropy=True
        )
        return CompletionScores(log_probs, entropies)

    def try_scoring(self) -> None:
        """Score two tokens as each micro-batch is scored, without a gradient, dropout or random numbers."""
        ids = torch.ones(1, 4, dtype=torch.long, device=self.accelerator.device)
        aux = {"compute_entropy": True, "compute_aux_loss": self.aux_loss_enabled}
        with torch.no_grad(), torch.random.fork_rng(), eval_mode(self.model), self.without_gradient_checkpointing():
            super()._get_per_token_logps_and_entropies(self.model, ids, torch.ones_like(ids), 2, batch_size=1, **aux)

    def compute_policy_loss(self, policy: Callable, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of a micro-batch, with `policy` answering its scoring call.

        The adaptive entropy coefficient stays as it is over an update without a token to train on: TRL takes its entropy for 0.
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
        """Inside, the model keeps its activations: what is not differentiated needs no recomputation."""
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def reference_adapter(self) -> AbstractContextManager[None]:
        """Inside, a PEFT model speaks for its reference: without its adapter, or with that it started from."""
        peft = self.accelerator.unwrap_model(self.model)
        return use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None)

    def sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        """Summed over processes."""
        return self.accelerator.reduce(sums, "sum")

    def mean_over_processes(self, value: float) -> float:
        """Mean over processes."""
        return self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).mean().item()

    def wrap_async_rewards(self, guarded: Callable[[Callable], Callable]) -> None:
        """Replace each asynchronous reward function by what `guarded` makes of it."""
        functions: list[Any] = self.reward_funcs or []
        self.reward_funcs: list[Any] = [guarded(each) if is_async_callable(each) else each for each in functions]

    # -- TRL's private state -----------------------------------------------------------------------------------------

    @property
    def micro_steps_done(self) -> int:
        """Forward and backward passes so far."""
        return self._step

    @property
    def micro_steps_per_rollout_batch(self) -> int:
        """Forward and backward passes that one rollout batch is used for."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def rollout_batch(self) -> int:
        """The rollout batch that is being trained on, from 1."""
        return self._step // self.micro_steps_per_rollout_batch + 1

    @property
    def last_rollout_batch(self) -> int:
        """The rollout batch of the last forward and backward pass, from 1."""
        return max(0, self._step - 1) // self.micro_steps_per_rollout_batch + 1

    @property
    def is_inside_rollout_batch(self) -> bool:
        """Whether a rollout batch has been trained on in part."""
        return self._step % self.micro_steps_per_rollout_batch != 0

    def restore_position(self, passes: int, pieces: list[dict] | None) -> None:
        """Go on after so many passes, inside a rollout batch if its pieces are given."""
        self._step, self._buffered_inputs = passes, pieces

    @property
    def micro_batches(self) -> list[dict] | None:
        """The rollout batch that is being trained on, in its micro-batches."""
        return self._buffered_inputs

    @property
    def train_metrics(self) -> dict[str, list[float]]:
        """What the next log of training will hold the means of."""
        return self._metrics["train"]

    @property
    def learning_rate(self) -> float:
        return self._get_learning_rate() if self.lr_scheduler else self.args.learning_rate

    @property
    def is_vlm(self) -> bool:
        return self._is_vlm

    @property
    def is_stream_exhausted(self) -> bool:
        """Whether all rows of a pass over a stream were read; a run that stops ends an epoch in the middle of one."""
        return self.epoch_ended and not self.control.should_training_stop

    @property
    def log_counters(self) -> dict[str, Any]:
        """What transformers counts towards the next log and the end of the run, which its checkpoints do not hold."""
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
        self.epoch_ended = value.get("epoch_ended", True)  # checkpoints of earlier versions do not say
        self.last_update_stats = tuple(value.get("last_update", (None, None)))
        if self.stream_position and value.get("stream"):
            self.stream_position.load(value["stream"])

    @property
    def completions_table(self) -> str | None:
        """TRL's table of completions as JSON, if it is shown."""
        if not self.log_completions:
            return None
        return json.dumps(
            {name: value for name, value in self._logs.items() if name != "images"}, default=_serialize_deque
        )

    @completions_table.setter
    def completions_table(self, table: str | None) -> None:
        for name, values in json.loads(table or "{}").items():
            if isinstance(values, dict):
                for column, inner in values.items():
                    self._logs[name][column].extend(inner)
            else:
                self._logs[name].extend(values)

    def replace_logged_advantages(self, by_answer: torch.Tensor) -> None:
        """Put these, `(B,)`, into TRL's table of completions, in the stead of the last ones."""
        advantages, logged = self.accelerator.gather(by_answer).tolist(), self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages)

    # -- overridden --------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        # our loop of decoding computes outside the model's forward, and so outside of autocast
        loop = fast_generate(self.model) if self.accelerator.mixed_precision == "no" else nullcontext()
        with policy_generation_config(self.model, self.processing_class), loop:
            return self.generate_rollouts(inputs) if self.model.training else self.sample_and_score(inputs).tensors

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self.reward_call_context():
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return mask_ungraded_rewards(rewards, self.reward_weights)

    def _compute_loss(self, model, inputs):
        return self.compute_micro_batch_loss(model, inputs)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        pieces = self._buffered_inputs
        if not self.model.training or pieces is None or pieces is before:
            return inputs
        self._buffered_inputs = self.arrange_micro_batches(pieces)  # of a rollout batch that has just been cut
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_train_sampler(self, dataset=None):
        """TRL's, which can be put at the start of any epoch: a resumed run must see the order of one that was not stopped.

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

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self.staging_dir is None else str(self.staging_dir)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.staging_dir is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial))
        place = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with wrap_write_errors(place), self.staging_folder(run) as staging:
            staged = staging / place.name
            make_folder(staged, run)
            self.save_extra_state(staged)
            super()._save_checkpoint(model, trial)
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == place or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                commit_checkpoint(staged, place)
            self.accelerator.wait_for_everyone()
            if self.is_local_process_zero() and not self.args.should_save:
                commit_node_checkpoint(staged, place)
        if self.args.should_save:
            delete_old_checkpoints(run, self.args.save_total_limit, place, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    @contextmanager
    def staging_folder(self, run: Path) -> Iterator[Path]:
        """Inside, checkpoints go into a folder beside; nothing is left of it."""
        self.staging_dir = run / STAGING_DIR
        try:
            yield self.staging_dir
        except BaseException:
            shutil.rmtree(self.staging_dir, ignore_errors=True)
            raise
        finally:
            self.staging_dir = None

    def save_model_atomically(self, folder: Path) -> None:
        """Save the model and its tokenizer: each file appears at once."""
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
        """Load the weights of a checkpoint that transformers' Trainer would leave out, if it would; return whether."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not has_renamed_parameters(self.model, Path(checkpoint)):
            return False
        load_weights(self.model, Path(checkpoint))
        return True

    def _load_optimizer_and_scheduler(self, checkpoint):
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))  # DeepSpeed has loaded its optimizer's already
        stepped = read_stepped_parameters(Path(checkpoint)) if checkpoint and self.accelerator.is_fsdp2 else None
        reading = wrap_library_errors(f"{checkpoint} is damaged: its optimizer.pt or scheduler.pt cannot be loaded")
        some = nullcontext() if stepped is None else only_trainable(self.model, stepped)
        with some, reading if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            check_optimizer_state(self.optimizer, Path(checkpoint))
        self.state.compute_steps(self.args, self.state.max_steps)  # how often is logged and saved is the options'
        self.resumed_at_step, self.resumed_checkpoint = self.state.global_step, checkpoint
        self.apply_configured_lr(rates)
        self.load_extra_state(Path(checkpoint))

    def apply_configured_lr(self, rates: list[float]) -> None:
        """Put the options' learning rate and schedule in the stead of the loaded ones; the same if the options are."""
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            return
        now = [rate * of(scheduler.last_epoch) for rate, of in zip(rates, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": rates, "_last_lr": now})
        for group, rate, lr in zip(self.optimizer.param_groups, rates, now, strict=True):
            group["initial_lr"], group["lr"] = rate, lr

    def restore_log_counters(self, numbers: dict[str, Any]) -> None:
        """Set `numbers` once training begins, where transformers sets them to zero."""
        self.add_callback(RestoreLogCountersCallback(self, numbers))

    def finish_interrupted_epoch(self, train_dataloader: Any) -> None:
        """Make up for the end of an epoch (its log, evaluation and checkpoint), where a run was stopped right before it.

        The run goes on with the random numbers that the evaluation has left. A stream's epoch ends once it is read to its end.
        """
        done, every = self.state.global_step, self.args.gradient_accumulation_steps
        stopped = done >= self.state.max_steps
        if self.epoch_ended or not done or (self.stream_position and not stopped):
            return
        if not stopped and done % max(1, -(-len(train_dataloader) // every)):
            return
        self._load_rng_state(self.resumed_checkpoint)
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.control.should_training_stop = stopped
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        epoch = int(self.state.epoch or 0)
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, time.time())
        self.rng_state_restored = not stopped

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        if grad_norm is None and learning_rate is None:  # no update since a resume: the last one's
            grad_norm, learning_rate = self.last_update_stats
            self.model_wrapped.train()  # or TRL would log the metrics of an evaluation
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
        """TRL's. Of a stream, the rows that are read are also noted."""
        if not isinstance(self.train_dataset, IterableDataset):
            self.stream_position = None
            return super().get_train_dataloader()
        collate, self.stream_position = self.data_collator, StreamPosition()
        self.data_collator = self.stream_position.wrap_collator(collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

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
        """Return what `metric_for_best_model` names; None, and a warning, where this evaluation graded too little for it.

        Raises:
            UserError: if no evaluation measures it.
        """
        args, value = self.args, get_metric_value(self.args, metrics)
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else None
        known = list_eval_metrics(args, self.reward_func_names, sets)
        if value is None and args.metric_for_best_model.removeprefix("eval_") not in known:
            raise UserError(describe_unknown_metric(args, args.metric_for_best_model, known))
        if value is None:
            logger.warning(
                f"{args.metric_for_best_model} has no value in this evaluation, whose answers were not graded"
            )
        return value

    def log(self, logs, start_time=None):
        """As TRL's. The speed at the end is that of the updates of this start. A metric without a measured value is absent."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
            del metrics[name]
        for name in {"train_samples_per_second", "train_steps_per_second"} & set(logs):
            logs[name] *= 1 - self.resumed_at_step / max(1, self.state.global_step)
        super().log(logs, start_time)


class RestoreLogCountersCallback(TrainerCallback):
    def __init__(self, trainer: GRPOTrainerHooks, numbers: dict[str, Any]):
        self.trainer, self.counters = trainer, numbers

    def on_train_begin(self, args, state, control, **kwargs):
        if self.counters:
            self.trainer.numbers, self.counters = self.counters, {}
            self.trainer.finish_interrupted_epoch(kwargs["train_dataloader"])


class EpochEndCallback(TrainerCallback):
    """Tells a trainer whether it is inside an epoch. A checkpoint after an epoch's last update may be of before its end."""

    def __init__(self, trainer: GRPOTrainerHooks):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.epoch_ended = True


def _serialize_deque(values: Any) -> Any:
    return list(values) if isinstance(values, deque) else str(values)


@contextmanager
def _intercepted_method(
    trainer: GRPOTrainerHooks, name: str, hear: Callable, voice: Callable | None = None, **options
) -> Iterator[None]:
    """Inside, each result of one of the trainer's methods is also given to `hear`; `voice` replaces the first argument of its
    calls, and `options` go into them."""
    inner, shadowed = getattr(trainer, name), trainer.__dict__.get(name)

    def method(*args, **kwargs):
        args = (voice(args[0]), *args[1:]) if voice else args
        result = inner(*args, **{**kwargs, **options})
        hear(result)
        return result

    trainer.__dict__[name] = method
    try:
        yield
    finally:
        if shadowed is None:
            del trainer.__dict__[name]
        else:
            trainer.__dict__[name] = shadowed

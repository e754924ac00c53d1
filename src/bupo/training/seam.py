"""The one file that knows private names of TRL, transformers and accelerate; [`bupo.training.contract`] lists them.

Everything else in the project uses public names only: [`TRLTrainer`] offers what it needs of the private ones as plain
arguments and results.
"""

import ast
import inspect
import json
import shutil
import textwrap
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, is_async_callable, use_adapter

from bupo.model.decoding import quick
from bupo.training.rollouts import Sampled, Scores
from bupo.training.saving import STAGING, move_files, move_in, move_in_own, rotate, writing
from bupo.training.sharding import asking_for, stepped_in

__all__ = ["TRLTrainer", "accepted", "disable_gradient_checkpointing", "get_config_model_id", "use_adapter"]


def accepted(option: str) -> tuple[str, ...]:
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


class TRLTrainer(GRPOTrainer):
    """GRPOTrainer with public hooks (`rollout`, `loss`, `grading`, `save_parts`, `load_parts`) in place of its private methods,
    and with its private state as properties.
    """

    _tag_names: ClassVar = ["trl", "grpo", "bupo"]
    staging: Path | None = None  # where a checkpoint is being written
    resumed_at = 0  # updates that were done before this start
    given: dict[str, Any]  # what decides the run of the model and the problems that were given
    system_prompt: str | None = None  # of all problems, where prompts are plain text and do not show it
    dataset_name: str | None = None  # of the problems, for the card

    # -- hooks -------------------------------------------------------------------------------------------------------

    def rollout(self, inputs: list[dict]) -> dict[str, Any]:
        """A rollout batch while training: what the loss will read."""
        return self.sampled(inputs).tensors

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a micro-batch."""
        return self.policy_loss(model, inputs)

    def arranged(self, pieces: list[dict]) -> list[dict]:
        """The micro-batches of a rollout batch, in the stead of TRL's."""
        return pieces

    def grading(self) -> AbstractContextManager[None]:
        """Around the reward functions."""
        return nullcontext()

    def save_parts(self, folder: Path) -> None:
        """What a checkpoint holds besides TRL's files, which are written after it."""

    def load_parts(self, folder: Path) -> None:
        """What `save_parts` wrote."""

    # -- what TRL does, as functions ---------------------------------------------------------------------------------

    def sampled(self, inputs: list[dict], voice: Callable | None = None) -> Sampled:
        """TRL's rollout batch, with the rewards.

        Args:
            inputs (`list[dict]`): rows of the dataset.
            voice (`Callable`, *optional*): gives what stands in a model's place while TRL scores answers, and asks for scores.
        """
        rewards: list[torch.Tensor] = []
        scored: list[tuple] = []
        with ExitStack() as hearing:
            hearing.enter_context(_heard(self, "_calculate_rewards", rewards.append))
            if voice:
                name = "_get_per_token_logps_and_entropies"
                hearing.enter_context(_heard(self, name, scored.append, voice, compute_entropy=True))
            tensors = super()._generate_and_score_completions(inputs)
        # the first pass over the answers is the sampling policy's; a second would be the reference model's
        own = scored and "old_per_token_logps" in tensors
        return Sampled(tensors, rewards[-1], Scores(*scored[0][:2]) if own else None)

    def score(
        self, policy: Callable, input_ids: torch.Tensor, attention_mask: torch.Tensor, tokens: int, size: int
    ) -> Scores:
        """Log-probs and entropies of the last `tokens` of each row, `size` rows at a time, by TRL's scoring call of `policy`: a
        model, or what stands for one."""
        log_probs, entropies, _ = super()._get_per_token_logps_and_entropies(
            policy, input_ids, attention_mask, tokens, batch_size=size, compute_entropy=True
        )
        return Scores(log_probs, entropies)

    def policy_loss(self, policy: Callable, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of a micro-batch, with `policy` answering its scoring call."""
        return super()._compute_loss(policy, inputs)

    def without_checkpointing(self) -> AbstractContextManager[None]:
        """Inside, the model keeps its activations: what is not differentiated needs no recomputation."""
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def as_reference(self) -> AbstractContextManager[None]:
        """Inside, a PEFT model speaks for its reference: without its adapter, or with that it started from."""
        peft = self.accelerator.unwrap_model(self.model)
        return use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None)

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Summed over processes."""
        return self.accelerator.reduce(sums, "sum")

    def mean(self, value: float) -> float:
        """Mean over processes."""
        return self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).mean().item()

    def guard_asynchronous_rewards(self, guarded: Callable[[Callable], Callable]) -> None:
        """Replace each asynchronous reward function by what `guarded` makes of it."""
        functions: list[Any] = self.reward_funcs or []
        self.reward_funcs: list[Any] = [guarded(each) if is_async_callable(each) else each for each in functions]

    # -- TRL's private state -----------------------------------------------------------------------------------------

    @property
    def passes_done(self) -> int:
        """Forward and backward passes so far."""
        return self._step

    @property
    def passes_a_batch(self) -> int:
        """Forward and backward passes that one rollout batch is used for."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def rollout_batch(self) -> int:
        """The rollout batch that is being trained on, from 1."""
        return self._step // self.passes_a_batch + 1

    @property
    def last_batch(self) -> int:
        """The rollout batch of the last forward and backward pass, from 1."""
        return max(0, self._step - 1) // self.passes_a_batch + 1

    @property
    def inside_batch(self) -> bool:
        """Whether a rollout batch has been trained on in part."""
        return self._step % self.passes_a_batch != 0

    def restore_place(self, passes: int, pieces: list[dict] | None) -> None:
        """Go on after so many passes, inside a rollout batch if its pieces are given."""
        self._step, self._buffered_inputs = passes, pieces

    @property
    def pieces(self) -> list[dict] | None:
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
    def reads_images(self) -> bool:
        return self._is_vlm

    @property
    def numbers(self) -> dict[str, float]:
        """What transformers counts towards the next log and the end of the run, which its checkpoints do not hold."""
        return {
            "since_log": self._tr_loss.item(),
            "logged": self._total_loss_scalar,
            "last_log": self._globalstep_last_logged,
            "first_step": self._initial_global_step,
        }

    @numbers.setter
    def numbers(self, value: dict[str, float]) -> None:
        self._tr_loss += value["since_log"]
        self._total_loss_scalar, self._globalstep_last_logged = value["logged"], value["last_log"]
        self._initial_global_step = value["first_step"]

    @property
    def completions(self) -> str | None:
        """TRL's table of completions as JSON, if it is shown."""
        if not self.log_completions:
            return None
        return json.dumps({name: value for name, value in self._logs.items() if name != "images"}, default=as_list)

    @completions.setter
    def completions(self, table: str | None) -> None:
        for name, values in json.loads(table or "{}").items():
            if isinstance(values, dict):
                for column, inner in values.items():
                    self._logs[name][column].extend(inner)
            else:
                self._logs[name].extend(values)

    def show_advantages(self, by_answer: torch.Tensor) -> None:
        """Put these, `(B,)`, into TRL's table of completions, in the stead of the last ones."""
        advantages, logged = self.accelerator.gather(by_answer).tolist(), self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages)

    # -- overridden --------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        with quick(self.model):
            return self.rollout(inputs) if self.model.training else super()._generate_and_score_completions(inputs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self.grading():
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _compute_loss(self, model, inputs):
        return self.loss(model, inputs)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        pieces = self._buffered_inputs
        if not self.model.training or pieces is None or pieces is before:
            return inputs
        self._buffered_inputs = self.arranged(pieces)  # of a rollout batch that has just been cut
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
        return super()._get_output_dir(trial) if self.staging is None else str(self.staging)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial))
        place = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing(place), self.beside(run) as staging:
            staged = staging / place.name
            staged.mkdir(parents=True, exist_ok=True)
            self.save_parts(staged)
            super()._save_checkpoint(model, trial)
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == place or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                move_in(staged, place)
            self.accelerator.wait_for_everyone()
            if self.is_local_process_zero() and not self.args.should_save:
                move_in_own(staged, place)
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, place, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    @contextmanager
    def beside(self, run: Path) -> Iterator[Path]:
        """Inside, checkpoints go into a folder beside; nothing is left of it."""
        self.staging = run / STAGING
        try:
            yield self.staging
        except BaseException:
            shutil.rmtree(self.staging, ignore_errors=True)
            raise
        finally:
            self.staging = None

    def save_whole(self, folder: Path) -> None:
        """Save the model and its tokenizer: each file appears at once."""
        staged = folder / STAGING / "model"
        with writing(folder), self.beside(folder):
            self.save_model(str(staged), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_files(staged, folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_optimizer_and_scheduler(self, checkpoint):
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))  # DeepSpeed has loaded its optimizer's already
        stepped = stepped_in(Path(checkpoint)) if checkpoint and self.accelerator.is_fsdp2 else None
        with nullcontext() if stepped is None else asking_for(self.model, stepped):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.state.compute_steps(self.args, self.state.max_steps)  # how often is logged and saved is the options'
        self.resumed_at = self.state.global_step
        self.rate_of_options(rates)
        self.load_parts(Path(checkpoint))

    def rate_of_options(self, rates: list[float]) -> None:
        """Put the options' learning rate and schedule in the stead of the loaded ones; the same if the options are."""
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            return
        now = [rate * of(scheduler.last_epoch) for rate, of in zip(rates, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": rates, "_last_lr": now})
        for group, rate, lr in zip(self.optimizer.param_groups, rates, now, strict=True):
            group["initial_lr"], group["lr"] = rate, lr

    def resume_numbers(self, numbers: dict[str, float]) -> None:
        """Set `numbers` once training begins, where transformers sets them to zero."""
        self.add_callback(Numbers(self, numbers))

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args, skip_scheduler=False, **kwargs):
        if not (skip_scheduler and self.state.global_step):
            return super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)

    def log(self, logs, start_time=None):
        """As TRL's. The speed at the end is that of the updates of this start."""
        for name in {"train_samples_per_second", "train_steps_per_second"} & set(logs):
            logs[name] *= 1 - self.resumed_at / max(1, self.state.global_step)
        super().log(logs, start_time)


class Numbers(TrainerCallback):
    def __init__(self, trainer: TRLTrainer, numbers: dict[str, float]):
        self.trainer, self.numbers = trainer, numbers

    def on_train_begin(self, args, state, control, **kwargs):
        if self.numbers:
            self.trainer.numbers, self.numbers = self.numbers, {}


def as_list(values: Any) -> Any:
    return list(values) if isinstance(values, deque) else str(values)


@contextmanager
def _heard(trainer: TRLTrainer, name: str, hear: Callable, voice: Callable | None = None, **options) -> Iterator[None]:
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

"""The one file that knows private names of TRL, transformers and accelerate.

`PRIVATE` lists each with its reason and the shape that is relied on; `tests/test_contract.py` fails with the name where an
installed version differs (`make test-newest` asks the newest ones). Everything else in the project uses public names only:
[`TRLTrainer`] offers what it needs of the private ones as plain arguments and results.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

__all__ = ["PRIVATE", "TRLTrainer", "accepted", "disable_gradient_checkpointing", "get_config_model_id", "use_adapter"]


class Private(NamedTuple):
    """A private name that is relied on.

    Attributes:
        signature (`str`): the parameters of a method, as Python writes them; empty for an attribute.
        reason (`str`): what it is used or overridden for.
    """

    signature: str
    reason: str


PRIVATE = {
    "_generate_and_score_completions": Private("(self, inputs)", "overridden: the first phase scores rollouts anew"),
    "_calculate_rewards": Private(
        "(self, inputs, prompts, completions, completion_ids_list)",
        "overridden and heard: the rewards of all processes, which estimators and the guard need",
    ),
    "_get_per_token_logps_and_entropies": Private(
        "(self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, *)",
        "called with a policy in the model's place; heard while rollouts are scored, for their entropies",
    ),
    "_compute_loss": Private("(self, model, inputs)", "overridden, and called with a policy in the model's place"),
    "_get_train_sampler": Private("(self, dataset)", "overridden: it can be put at the start of any epoch"),
    "_save_checkpoint": Private("(self, model, trial)", "overridden: bupo's part of a checkpoint is written first"),
    "_load_optimizer_and_scheduler": Private("(self, checkpoint)", "overridden: a resumed run takes up bupo's part"),
    "_get_output_dir": Private("(self, trial)", "called: where a checkpoint goes"),
    "_get_learning_rate": Private("(self)", "called: for messages"),
    "_step": Private("", "read and set: forward and backward passes done, which decide the rollout batch"),
    "_buffered_inputs": Private("", "read and set: the rollout batch in its pieces, which a checkpoint keeps"),
    "_metrics": Private("", "read and added to: what the next log holds"),
    "_logs": Private("", "read and set: the advantages of the table of completions"),
    "_is_vlm": Private("", "read: models with images are refused"),
    "_tag_names": Private("", "overridden: tags of the model card"),
    "_name": Private("", "overridden: the method's name in the model card"),
    "_paper": Private("", "overridden: the paper of the model card"),
}

# public in name, but in no library's documented interface: where they are, and their parameters
UNDOCUMENTED = {
    "trl.models.utils.disable_gradient_checkpointing": "(model, gradient_checkpointing_kwargs)",
    "trl.trainer.utils.use_adapter": "(model, adapter_name)",
    "trl.trainer.utils.get_config_model_id": "(config)",
    "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func": (
        "(gate_logits, num_experts, top_k, attention_mask)"
    ),
}
# attributes of a GRPOTrainer that are read
STATE = (
    *("num_generations", "num_iterations", "max_completion_length", "current_gradient_accumulation_steps"),
    *(
        "reward_weights",
        "reward_func_names",
        "ref_model",
        "processing_class",
        "is_fsdp_enabled",
        "is_deepspeed_enabled",
    ),
)
# what TRL's scoring and sampling leave in the dict that the loss reads, at the least
ROLLOUT_KEYS = (
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"),
    *("old_per_token_logps", "ref_per_token_logps"),  # where there are several updates, or a KL penalty
)
# metrics of TRL's that bupo reads, moves or draws
METRICS = (
    *("reward", "reward_std", "frac_reward_zero_std", "entropy", "clip_ratio/region_mean", "step_time"),
    *("completions/mean_length", "completions/clipped_ratio", "num_tokens"),
)


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


class Scores(NamedTuple):
    """What a policy says of a rollout's answers: `(B, C)` each; entropies in nats."""

    log_probs: torch.Tensor
    entropies: torch.Tensor


class Sampled(NamedTuple):
    """TRL's rollouts.

    Attributes:
        tensors (`dict`): what the loss will read.
        rewards (`torch.Tensor` of shape `(G, functions)`): of all processes' answers; NaN where a function gave none.
        scores ([`Scores`], *optional*): the sampling policy's, where TRL scored the answers.
    """

    tensors: dict[str, Any]
    rewards: torch.Tensor
    scores: Scores | None


class TRLTrainer(GRPOTrainer):
    """GRPOTrainer with public hooks (`rollout`, `loss`, `grading`, `save_parts`, `load_parts`) in place of its private methods,
    and with its private state as properties.
    """

    _tag_names: ClassVar = ["trl", "grpo", "bupo"]
    _name = "BuPO"
    _paper: ClassVar = {
        "title": "Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies",
        "id": "2512.19673",
    }

    # -- hooks -------------------------------------------------------------------------------------------------------

    def rollout(self, inputs: list[dict]) -> dict[str, Any]:
        """A rollout batch while training: what the loss will read."""
        return self.sampled(inputs).tensors

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a micro-batch."""
        return self.policy_loss(model, inputs)

    def grading(self) -> AbstractContextManager[None]:
        """Around the reward functions."""
        return nullcontext()

    def save_parts(self, folder: Path) -> None:
        """What a checkpoint holds besides TRL's files, which are written after it."""

    def load_parts(self, folder: Path) -> None:
        """What `save_parts` wrote."""

    # -- what TRL does, as functions ---------------------------------------------------------------------------------

    def sampled(self, inputs: list[dict], scores: bool = True) -> Sampled:
        """TRL's rollout batch, with the rewards and, if wanted, the scores that it comes by."""
        rewards: list[torch.Tensor] = []
        scored: list[tuple] = []
        with ExitStack() as hearing:
            hearing.enter_context(_heard(self, "_calculate_rewards", rewards.append))
            if scores:
                name = "_get_per_token_logps_and_entropies"
                hearing.enter_context(_heard(self, name, scored.append, compute_entropy=True))
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
        return self._get_learning_rate()

    @property
    def reads_images(self) -> bool:
        return self._is_vlm

    def show_advantages(self, by_answer: torch.Tensor) -> None:
        """Put these, `(B,)`, into TRL's table of completions, in the stead of the last ones."""
        advantages, logged = self.accelerator.gather(by_answer).tolist(), self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages)

    # -- overridden --------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        return self.rollout(inputs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self.grading():
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _compute_loss(self, model, inputs):
        return self.loss(model, inputs)

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

    def _save_checkpoint(self, model, trial):
        # before the trainer's own files, whose last marks the checkpoint as whole
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.save_parts(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_parts(Path(checkpoint))


@contextmanager
def _heard(trainer: TRLTrainer, name: str, hear: Callable[[Any], None], **options) -> Iterator[None]:
    """Inside, each result of one of the trainer's methods is also given to `hear`; `options` go into its calls."""
    inner, shadowed = getattr(trainer, name), trainer.__dict__.get(name)

    def method(*args, **kwargs):
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

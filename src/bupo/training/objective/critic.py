"""PPO's critic (arXiv 1707.06347): a value head on a copy of the model, or on the states of the policy.

Both backbones have one interface: `compute_values` of a rollout batch, `compute_loss` of a micro-batch, `step` with the
optimizer, `state` and `load` for checkpoints.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from bupo.models.packing import PackedLayout, build_packed_decoder
from bupo.models.residual_stream import Activation, ResidualStream
from bupo.training.distributed.deepspeed import uses_deepspeed, wrap_in_ddp
from bupo.training.distributed.fsdp2 import get_full_training_state, load_full_training_state, shard_model, uses_fsdp
from bupo.training.objective.advantages import CRITIC_ESTIMATORS
from bupo.training.objective.policy_head import StatesCallback
from bupo.training.objective.rollout_batch import RETURNS_KEY, VALUES_KEY, RolloutBatch

MetricSums = dict[str, torch.Tensor]


class ValueModel(nn.Module):
    """Value function V(s_t): the expected reward of a completion, from the tokens before o_t. The value head starts at
    zero.

    Args:
        decoder (`PreTrainedModel`): the model without its unembedding, which is copied.
    """

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        self.packing = build_packed_decoder(self.decoder)
        self.head = nn.Linear(decoder.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(next(decoder.parameters()).device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> torch.Tensor:
        """Return the values `(B, C)` before each of the last `completion_length` tokens, in fp32."""
        prompt_length = input_ids.size(1) - completion_length
        layout = PackedLayout.from_rows(input_ids, attention_mask, prompt_length) if self.packing else None
        if self.packing is None or layout is None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            hidden = self.decoder(**inputs, use_cache=False).last_hidden_state
        else:
            with self.packing.use_layout(layout):
                hidden = layout.unpack(self.decoder(**layout.inputs, use_cache=False).last_hidden_state[0])
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden[:, prompt_length - 1 : -1].float()).squeeze(-1)


def compute_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute half the squared error of the value, or of the value clipped to `old_values ± cliprange`, whichever is
    larger.

    Returns:
        `tuple`: the loss, and whether it is the clipped one, both of the shape of the arguments.
    """
    error = (values - returns).square()
    clipped_error = (torch.clamp(values, old_values - cliprange, old_values + cliprange) - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), clipped_error > error


def sum_value_loss(values: torch.Tensor, batch: RolloutBatch, cliprange: float) -> tuple[torch.Tensor, MetricSums]:
    """Sum the value loss, and the quantities that are logged, over the tokens of a micro-batch.

    Args:
        values (`torch.Tensor` of shape `(B, C)`): with gradient.
        batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): with the values and returns of the rollout.
        cliprange (`float`): of [`compute_value_loss`].

    Returns:
        `tuple`: the loss, and a `dict` of the sums `loss`, `clipped`, `error` (squared), `returns`, `squares` and
        `tokens`.
    """
    returns = batch.tensors[RETURNS_KEY]
    token_losses, clipped = compute_value_loss(values, batch.tensors[VALUES_KEY], returns, cliprange)
    sums = {
        "loss": token_losses.detach(),
        "clipped": clipped.float(),
        "error": (values.detach() - returns).square(),
        "returns": returns,
        "squares": returns.square(),
        "tokens": torch.ones_like(returns),
    }
    return (token_losses * batch.loss_mask).sum(), {
        name: (value * batch.loss_mask).sum() for name, value in sums.items()
    }


def compute_value_metrics(sums: MetricSums, accelerator: Accelerator) -> dict[str, float]:
    """Return the logged metrics from the sums of [`sum_value_loss`], over all processes."""
    totals = accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum")
    sums = dict(zip(sums, totals, strict=True))
    count = sums["tokens"].clamp(min=1.0)
    metrics = {"value_loss": sums["loss"] / count, "clip_ratio": sums["clipped"] / count}
    variance = sums["squares"] / count - (sums["returns"] / count) ** 2
    if variance > 1e-6:  # undefined for equal returns
        metrics["explained_variance"] = 1 - sums["error"] / count / variance
    return {f"critic/{name}": value.item() for name, value in metrics.items()}


class CopiedCritic:
    """Critic with a separate model and optimizer (AdamW), updated once for each update of the policy.

    Under FSDP2 its weights, gradients and optimizer are sharded like the policy's, and its state is gathered for a
    checkpoint. Under DeepSpeed each process has a full copy.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): of the model whose decoder is copied.
        accelerator (`Accelerator`): of the trainer.
        args ([`~bupo.BuPOConfig`]): `critic_learning_rate` (constant), `cliprange_value`, and the policy's betas,
            weight decay, gradient clipping and checkpointing.
    """

    def __init__(self, stream: ResidualStream, accelerator: Accelerator, args):
        self.accelerator, self.args, self.is_sharded = accelerator, args, uses_fsdp(accelerator)
        critic = ValueModel(stream.decoder)
        self._packed_rows_for_backward = critic.packing.keep_for_backward if critic.packing else nullcontext
        if args.gradient_checkpointing or (self.is_sharded and accelerator.state.fsdp_plugin.activation_checkpointing):
            critic.decoder.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        if self.is_sharded:
            blocks = critic.decoder.get_submodule(stream.family.layers).children()
            shard_model(critic, blocks, critic.head, accelerator)
        optimizer = torch.optim.AdamW(
            (p for p in critic.parameters() if p.requires_grad),
            lr=args.critic_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.weight_decay,
        )
        self.is_outside_deepspeed = uses_deepspeed(accelerator)  # DeepSpeed's engine holds the policy only
        prepare = (
            partial(wrap_in_ddp, accelerator=accelerator) if self.is_outside_deepspeed else accelerator.prepare_model
        )
        self.value_model = critic if self.is_sharded else prepare(critic)
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    @torch.no_grad()
    def compute_values(
        self, batch: RolloutBatch, activation: Activation | None, score: Callable[[StatesCallback], Any]
    ) -> torch.Tensor:
        """Return the values `(B, C)` of a rollout batch. The other arguments are those of [`SharedCritic`]."""
        self.value_model.eval()
        batch_size = self.args.per_device_train_batch_size
        rows = zip(batch.input_ids.split(batch_size), batch.attention_mask.split(batch_size), strict=True)
        return torch.cat([self._compute_values(ids, mask, batch.completion_length) for ids, mask in rows])

    def _compute_values(self, ids: torch.Tensor, mask: torch.Tensor, completion_length: int) -> torch.Tensor:
        # a model that accelerate has prepared applies autocast itself
        needs_autocast = self.is_outside_deepspeed and self.args.bf16
        with torch.autocast(ids.device.type, torch.bfloat16) if needs_autocast else nullcontext():
            return self.value_model(ids, mask, completion_length)

    def compute_loss(
        self,
        batch: RolloutBatch,
        activation: Activation | None,
        share: float,
        policy_loss: Callable[[StatesCallback | None], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Add the gradient of a micro-batch to the critic, and return the unchanged loss of the policy.

        Args:
            batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): a micro-batch.
            activation ([`~bupo.models.residual_stream.Activation`], *optional*): states of the target policy.
            share (`float`): of the rollout batch, that an update takes; the value loss is a mean over its tokens.
            policy_loss (`Callable`): computes the policy's loss, and passes the states of the target policy to its
                argument.

        Returns:
            `tuple`: the loss, and the metrics of the critic.
        """
        self.value_model.train()
        # a sharded gradient is reduced at once: an unreduced one is as large as the model on every process
        reduces_gradient = self.is_sharded or self.accelerator.sync_gradients
        no_sync: Any = (
            self.value_model.no_sync
            if self.is_outside_deepspeed
            else partial(self.accelerator.no_sync, self.value_model)
        )
        backward = torch.Tensor.backward if self.is_outside_deepspeed else self.accelerator.backward
        with self._packed_rows_for_backward(), nullcontext() if reduces_gradient else no_sync():
            values = self._compute_values(batch.input_ids, batch.attention_mask, batch.completion_length)
            loss, sums = sum_value_loss(values, batch, self.args.cliprange_value)
            backward(loss / batch.get_tokens_per_update(share, self.accelerator.num_processes))
        if self.accelerator.sync_gradients:
            self._step_optimizer()  # frees the gradient, as large as the model, before the policy's activations are computed
        return policy_loss(None), compute_value_metrics(sums, self.accelerator)

    def step(self) -> None:
        """Do nothing: `compute_loss` has updated the critic."""

    def _step_optimizer(self) -> None:
        """Clip the gradient, and step if it is finite."""
        self.accelerator.unscale_gradients(self.optimizer)
        if self.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.value_model.parameters(), self.args.max_grad_norm)
        if all(bool(torch.isfinite(p.grad).all()) for p in self.value_model.parameters() if p.grad is not None):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict:
        """Return the weights and the optimizer's state; of a sharded critic, on the main process only."""
        if self.is_sharded:
            weights, optimizer_state = get_full_training_state(self.value_model, self.optimizer.optimizer)
        else:
            weights = self.accelerator.unwrap_model(self.value_model).state_dict()
            optimizer_state = self.optimizer.state_dict()
        return {"critic": weights, "optimizer": optimizer_state}

    def load(self, state: dict, rollout_batch: int) -> None:
        """Load a checkpoint's state."""
        if self.is_sharded:
            load_full_training_state(self.value_model, self.optimizer.optimizer, state["critic"], state["optimizer"])
        else:
            self.accelerator.unwrap_model(self.value_model).load_state_dict(state["critic"])
            self.optimizer.load_state_dict(state["optimizer"])
        _set_configured_lr(self.optimizer, self.args)


class SharedCritic:
    """Critic with a value head on the states of the target policy; the value loss also trains the layers below.

    In phase 1 these are the internal policy's states, so that the value loss does not move layers above l. Each policy has
    a separate value head, which starts at zero. States are divided by their root mean square, because their scale differs
    by layer.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        accelerator (`Accelerator`): of the trainer.
        args ([`~bupo.BuPOConfig`]): `critic_learning_rate` (of the value head), `vf_coef`, `cliprange_value`.
    """

    def __init__(self, stream: ResidualStream, accelerator: Accelerator, args):
        self.stream, self.accelerator, self.args = stream, accelerator, args
        self.value_heads: dict[str, nn.Linear] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def _get_value_head(self, name: str) -> nn.Linear:
        """Return the value head of a policy, which is created at the first call."""
        if name not in self.value_heads:
            weight = self.stream.get_unembedding().weight
            head = nn.Linear(weight.size(1), 1, device=weight.device, dtype=torch.float32)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.value_heads[name] = head
            self.optimizers[name] = torch.optim.AdamW(
                head.parameters(), lr=self.args.critic_learning_rate, weight_decay=self.args.weight_decay
            )
        return self.value_heads[name]

    def _make_states_callback(self, activation: Activation | None) -> tuple[StatesCallback, list[torch.Tensor]]:
        """Return a callback for states, and the list to which it appends their values `(B, T - 1)`."""
        name = "language_model" if activation is None else f"{activation.kind} {activation.layer}"
        head, values = self._get_value_head(name), []

        def append_values(states: torch.Tensor) -> None:
            states = states.float()
            states = states * states.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            with torch.autocast(states.device.type, enabled=False):
                values.append(head(states).squeeze(-1))

        return append_values, values

    @torch.no_grad()
    def compute_values(
        self, batch: RolloutBatch, activation: Activation | None, score: Callable[[StatesCallback], Any]
    ) -> torch.Tensor:
        """Return the values `(B, C)` of a rollout batch.

        Args:
            batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): sampled.
            activation ([`~bupo.models.residual_stream.Activation`], *optional*): states of the target policy.
            score (`Callable`): scores the batch with the target policy, and passes its states to a callback.
        """
        callback, values = self._make_states_callback(activation)
        score(callback)
        return torch.cat(values)[:, -batch.completion_length :]

    def compute_loss(
        self,
        batch: RolloutBatch,
        activation: Activation | None,
        share: float,
        policy_loss: Callable[[StatesCallback | None], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the sum of the policy's loss and the weighted value loss. Arguments and result as of [`CopiedCritic`]."""
        callback, values = self._make_states_callback(activation)
        loss = policy_loss(callback)
        value_loss, sums = sum_value_loss(
            torch.cat(values)[:, -batch.completion_length :], batch, self.args.cliprange_value
        )
        tokens = batch.get_tokens_per_update(share, self.accelerator.num_processes)
        return loss + self.args.vf_coef * value_loss / tokens, compute_value_metrics(sums, self.accelerator)

    def step(self) -> None:
        """Update the value heads that have a gradient, with its mean over processes."""
        for name, head in self.value_heads.items():
            if head.weight.grad is None:
                continue
            for parameter in head.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            if torch.isfinite(head.weight.grad).all():
                self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def state(self) -> dict:
        """Return the weights and the optimizer's state of each value head, by policy."""
        return {
            name: (head.state_dict(), self.optimizers[name].state_dict()) for name, head in self.value_heads.items()
        }

    def load(self, state: dict, rollout_batch: int) -> None:
        """Load a checkpoint's state."""
        for name, (weights, optimizer) in state.items():
            self._get_value_head(name).load_state_dict(weights)
            self.optimizers[name].load_state_dict(optimizer)
            _set_configured_lr(self.optimizers[name], self.args)


def _set_configured_lr(optimizer, args) -> None:
    """Replace a loaded learning rate by the options'."""
    for group in optimizer.param_groups:
        group["lr"] = args.critic_learning_rate


def make_critic(stream: ResidualStream | None, accelerator: Accelerator, args) -> CopiedCritic | SharedCritic | None:
    """Return the critic with the backbone of `critic_backbone`, or None for an estimator without a critic."""
    if args.advantage_estimator not in CRITIC_ESTIMATORS:
        return None
    assert stream is not None, "validation opens the stream of a run with a critic"
    if args.critic_backbone == "shared":
        return SharedCritic(stream, accelerator, args)
    return CopiedCritic(stream, accelerator, args)

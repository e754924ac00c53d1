"""PPO's critic: a value head on a copy of the model, or on the policy's own states (arXiv 1707.06347).

Values are of the language model policy's rollouts in both phases. Both backbones have one interface: `values` of a rollout
batch, `loss` around the policy's, `step` where an accumulation window ends, `state` and `load`.
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
    """V(s_t): what reward the answer is expected to get, from the tokens before o_t.

    Args:
        decoder (`PreTrainedModel`): the model without its unembedding; it is copied. The value head starts at zero.
    """

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        self.packing = build_packed_decoder(self.decoder)
        self.head = nn.Linear(decoder.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(next(decoder.parameters()).device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer: int) -> torch.Tensor:
        """`(batch, answer)`: the values before each of the last `answer` tokens, in fp32."""
        layout = PackedLayout.from_rows(input_ids, attention_mask, input_ids.size(1) - answer) if self.packing else None
        if self.packing is None or layout is None:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            hidden = self.decoder(**inputs, use_cache=False).last_hidden_state
        else:
            with self.packing.use_layout(layout):
                hidden = layout.unpack(self.decoder(**layout.inputs, use_cache=False).last_hidden_state[0])
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden[:, -answer - 1 : -1].float()).squeeze(-1)


def compute_value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error, the larger of that of the value and of the value clipped to `old ± clip`.

    Returns:
        `tuple`: the loss, and whether clipping made it, both of the arguments' shape.
    """
    plain = (values - returns).square()
    clipped = (torch.clamp(values, old - clip, old + clip) - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def sum_value_loss(values: torch.Tensor, batch: RolloutBatch, clip: float) -> tuple[torch.Tensor, MetricSums]:
    """The value loss summed over a micro-batch's tokens, and sums for the logs.

    Args:
        values (`torch.Tensor` of shape `(B, C)`): with their graph.
        batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): with the values and returns of the rollout.
        clip (`float`): of `value_loss`.

    Returns:
        `tuple`: the loss, and a `dict` of `loss`, `clipped`, `error` (squared), `returns`, `squares` and `tokens`.
    """
    returns = batch.tensors[RETURNS_KEY]
    per_token, clipped = compute_value_loss(values, batch.tensors[VALUES_KEY], returns, clip)
    sums = {
        "loss": per_token.detach(),
        "clipped": clipped.float(),
        "error": (values.detach() - returns).square(),
        "returns": returns,
        "squares": returns.square(),
        "tokens": torch.ones_like(returns),
    }
    return (per_token * batch.loss_mask).sum(), {name: (value * batch.loss_mask).sum() for name, value in sums.items()}


def compute_value_metrics(sums: MetricSums, accelerator: Accelerator) -> dict[str, float]:
    """What is logged of `token_sums`, over all processes."""
    totals = accelerator.reduce(torch.stack([value.float() for value in sums.values()]), "sum")
    sums = dict(zip(sums, totals, strict=True))
    count = sums["tokens"].clamp(min=1.0)
    found = {"value_loss": sums["loss"] / count, "clip_ratio": sums["clipped"] / count}
    variance = sums["squares"] / count - (sums["returns"] / count) ** 2
    if variance > 1e-6:  # else all returns are alike
        found["explained_variance"] = 1 - sums["error"] / count / variance
    return {f"critic/{name}": value.item() for name, value in found.items()}


class CopiedCritic:
    """The critic as a model of its own, its AdamW and its updates: one for each update of the policy.

    Under FSDP2 it is sharded as the policy is, weights, gradients and optimizer, and its state is gathered for a checkpoint.
    Under DeepSpeed each process holds all of it.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): of the model whose decoder the critic starts from.
        accelerator (`Accelerator`): the trainer's.
        args ([`~bupo.BuPOConfig`]): `critic_learning_rate` (constant), `cliprange_value`, and the policy's betas, weight decay,
            gradient clipping and checkpointing.
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
        self.is_outside_deepspeed = uses_deepspeed(accelerator)  # of the policy's, whose backward pass is accelerate's
        prepare = (
            partial(wrap_in_ddp, accelerator=accelerator) if self.is_outside_deepspeed else accelerator.prepare_model
        )
        self.value_model = critic if self.is_sharded else prepare(critic)
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    @torch.no_grad()
    def compute_values(
        self, batch: RolloutBatch, site: Activation | None, scored: Callable[[StatesCallback], Any]
    ) -> torch.Tensor:
        """`(B, C)`: of a rollout batch, by the critic's own model."""
        self.value_model.eval()
        size = self.args.per_device_train_batch_size
        rows = zip(batch.input_ids.split(size), batch.attention_mask.split(size), strict=True)
        return torch.cat([self._compute_values(ids, mask, batch.completion_length) for ids, mask in rows])

    def _compute_values(self, ids: torch.Tensor, mask: torch.Tensor, answer: int) -> torch.Tensor:
        # where accelerate has prepared the critic, it casts by itself
        cast = self.is_outside_deepspeed and self.args.bf16
        with torch.autocast(ids.device.type, torch.bfloat16) if cast else nullcontext():
            return self.value_model(ids, mask, answer)

    def compute_loss(
        self,
        batch: RolloutBatch,
        site: Activation | None,
        share: float,
        policy_loss: Callable[[StatesCallback | None], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The policy's loss as it is, after one micro-batch's gradient of the critic; and what is logged of the values.

        Args:
            batch ([`~bupo.training.objective.rollout_batch.RolloutBatch`]): a micro-batch.
            site ([`~bupo.models.residual_stream.Activation`], *optional*): the policy in force.
            share (`float`): of the rollout batch, that an update takes: values are averaged over its tokens.
            policy_loss (`Callable`): computes the policy's loss; what it is given sees the states on the way.
        """
        self.value_model.train()
        # a sharded gradient is reduced at once: kept back, it would be as large as the model on every process
        reduced = self.is_sharded or self.accelerator.sync_gradients
        unreduced: Any = (
            self.value_model.no_sync
            if self.is_outside_deepspeed
            else partial(self.accelerator.no_sync, self.value_model)
        )
        backward = torch.Tensor.backward if self.is_outside_deepspeed else self.accelerator.backward
        with self._packed_rows_for_backward(), nullcontext() if reduced else unreduced():
            values = self._compute_values(batch.input_ids, batch.attention_mask, batch.completion_length)
            loss, sums = sum_value_loss(values, batch, self.args.cliprange_value)
            backward(loss / batch.get_tokens_per_update(share, self.accelerator.num_processes))
        if self.accelerator.sync_gradients:
            self._step_optimizer()  # before the policy's activations are made: the gradient is as large as the model
        return policy_loss(None), compute_value_metrics(sums, self.accelerator)

    def step(self) -> None:
        """Nothing is left to do: `loss` has updated the critic."""

    def _step_optimizer(self) -> None:
        """One step, if the gradient is finite."""
        self.accelerator.unscale_gradients(self.optimizer)
        if self.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.value_model.parameters(), self.args.max_grad_norm)
        if all(bool(torch.isfinite(p.grad).all()) for p in self.value_model.parameters() if p.grad is not None):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict:
        """Weights and optimizer; of a sharded critic, on the main process."""
        if self.is_sharded:
            weights, moments = get_full_training_state(self.value_model, self.optimizer.optimizer)
        else:
            weights, moments = self.accelerator.unwrap_model(self.value_model).state_dict(), self.optimizer.state_dict()
        return {"critic": weights, "optimizer": moments}

    def load(self, state: dict, rollout_batch: int) -> None:
        """What `state` gave."""
        if self.is_sharded:
            load_full_training_state(self.value_model, self.optimizer.optimizer, state["critic"], state["optimizer"])
        else:
            self.accelerator.unwrap_model(self.value_model).load_state_dict(state["critic"])
            self.optimizer.load_state_dict(state["optimizer"])
        _set_configured_lr(self.optimizer, self.args)


class SharedCritic:
    """A value head on the states that the policy in force gives its unembedding; the value loss trains the layers below.

    In phase 1 these are the internal policy's states, so nothing above layer l is moved by values either. Each policy has a
    head of its own, which starts at zero. States are divided by their root mean square: raw ones may be of any size.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        accelerator (`Accelerator`): the trainer's.
        args ([`~bupo.BuPOConfig`]): `critic_learning_rate` (of the value head), `vf_coef`, `cliprange_value`.
    """

    def __init__(self, stream: ResidualStream, accelerator: Accelerator, args):
        self.stream, self.accelerator, self.args = stream, accelerator, args
        self.value_heads: dict[str, nn.Linear] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def _get_value_head(self, name: str) -> nn.Linear:
        """The value head of a policy."""
        if name not in self.value_heads:
            weight = self.stream.get_unembedding().weight
            linear = nn.Linear(weight.size(1), 1, device=weight.device, dtype=torch.float32)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.value_heads[name] = linear
            self.optimizers[name] = torch.optim.AdamW(
                linear.parameters(), lr=self.args.critic_learning_rate, weight_decay=self.args.weight_decay
            )
        return self.value_heads[name]

    def _make_states_callback(self, site: Activation | None) -> tuple[StatesCallback, list[torch.Tensor]]:
        """What reads states, and the list that it fills with values `(B, T - 1)`, with their graph."""
        linear, values = self._get_value_head("language_model" if site is None else f"{site.kind} {site.layer}"), []

        def read(states: torch.Tensor) -> None:
            states = states.float()
            unit = states * states.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            with torch.autocast(states.device.type, enabled=False):
                values.append(linear(unit).squeeze(-1))

        return read, values

    @torch.no_grad()
    def compute_values(
        self, batch: RolloutBatch, site: Activation | None, scored: Callable[[StatesCallback], Any]
    ) -> torch.Tensor:
        """`(B, C)`: of a rollout batch, on the states of a scoring pass."""
        read, values = self._make_states_callback(site)
        scored(read)
        return torch.cat(values)[:, -batch.completion_length :]

    def compute_loss(
        self,
        batch: RolloutBatch,
        site: Activation | None,
        share: float,
        policy_loss: Callable[[StatesCallback | None], torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The policy's loss and the weighted value loss of the same states. Arguments and result as of [`CopiedCritic`]."""
        read, values = self._make_states_callback(site)
        policy = policy_loss(read)
        value, sums = sum_value_loss(torch.cat(values)[:, -batch.completion_length :], batch, self.args.cliprange_value)
        tokens = batch.get_tokens_per_update(share, self.accelerator.num_processes)
        return policy + self.args.vf_coef * value / tokens, compute_value_metrics(sums, self.accelerator)

    def step(self) -> None:
        """Update the value heads that have a gradient, with the mean of all processes'."""
        for name, linear in self.value_heads.items():
            if linear.weight.grad is None:
                continue
            for parameter in linear.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            if torch.isfinite(linear.weight.grad).all():
                self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def state(self) -> dict:
        """Weights and optimizers, by policy."""
        return {name: (x.state_dict(), self.optimizers[name].state_dict()) for name, x in self.value_heads.items()}

    def load(self, state: dict, rollout_batch: int) -> None:
        """What `state` gave."""
        for name, (weights, optimizer) in state.items():
            self._get_value_head(name).load_state_dict(weights)
            self.optimizers[name].load_state_dict(optimizer)
            _set_configured_lr(self.optimizers[name], self.args)


def _set_configured_lr(optimizer, args) -> None:
    """The options' learning rate in the stead of a loaded one."""
    for group in optimizer.param_groups:
        group["lr"] = args.critic_learning_rate


def make_critic(stream: ResidualStream | None, accelerator: Accelerator, args) -> CopiedCritic | SharedCritic | None:
    """The critic on the backbone that `critic_backbone` names, for a method that has one."""
    if args.advantage_estimator not in CRITIC_ESTIMATORS:
        return None
    assert stream is not None, "setup has opened the stream of a method with a critic"
    if args.critic_backbone == "shared":
        return SharedCritic(stream, accelerator, args)
    return CopiedCritic(stream, accelerator, args)

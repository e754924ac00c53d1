"""PPO's critic: a value head on a copy of the model, or on the policy's own states (arXiv 1707.06347).

Values are of the language model policy's rollouts in both phases.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from bupo.training.head import PolicyHead

CRITIC_FILE = "critic.pt"


class Critic(nn.Module):
    """V(s_t): what reward the answer is expected to get, from the tokens before o_t.

    Args:
        decoder (`PreTrainedModel`): the model without its unembedding; it is copied. The value head starts at zero.
    """

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        self.head = nn.Linear(decoder.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(next(decoder.parameters()).device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer: int) -> torch.Tensor:
        """`(batch, answer)`: the values before each of the last `answer` tokens, in fp32."""
        hidden = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden[:, -answer - 1 : -1].float()).squeeze(-1)


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error, the larger of that of the value and of the value clipped to `old ± clip`.

    Returns:
        `tuple`: the loss, and whether clipping made it, both of the arguments' shape.
    """
    plain = (values - returns).square()
    clipped = (torch.clamp(values, old - clip, old + clip) - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def token_sums(
    values: torch.Tensor, inputs: dict, mask: torch.Tensor, clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The value loss summed over a micro-batch's tokens, and sums for the logs.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): with their graph.
        inputs (`dict`): of the trainer's loss, with `values` and `returns` of the rollout, `(B, T)`.
        mask (`torch.Tensor` of shape `(B, T)`): real tokens.

    Returns:
        `tuple`: the loss, and a `dict` of `loss`, `clipped`, `error` (squared), `returns`, `squares` and `tokens`.
    """
    returns = inputs["returns"]
    per_token, clipped = value_loss(values, inputs["values"], returns, clip)
    sums = {
        "loss": per_token.detach(),
        "clipped": clipped.float(),
        "error": (values.detach() - returns).square(),
        "returns": returns,
        "squares": returns.square(),
        "tokens": torch.ones_like(returns),
    }
    return (per_token * mask).sum(), {name: (value * mask).sum() for name, value in sums.items()}


class CopiedCritic:
    """The critic as a model of its own, its AdamW and its updates: one for each update of the policy.

    Args:
        decoder (`PreTrainedModel`): what the critic starts from.
        accelerator (`Accelerator`): the trainer's.
        args ([`~bupo.BuPOConfig`]): `critic_learning_rate` (constant), `value_clip`, and the policy's betas, weight decay,
            gradient clipping and checkpointing.
    """

    def __init__(self, decoder: PreTrainedModel, accelerator: Accelerator, args):
        self.accelerator, self.args = accelerator, args
        critic = Critic(decoder)
        if args.gradient_checkpointing:
            critic.decoder.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        optimizer = torch.optim.AdamW(
            (p for p in critic.parameters() if p.requires_grad),
            lr=args.critic_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.weight_decay,
        )
        self.critic, self.optimizer = accelerator.prepare(critic, optimizer)

    @torch.no_grad()
    def values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer: int, size: int) -> torch.Tensor:
        """`(batch, answer)`: values of a rollout, `size` answers at a time."""
        self.critic.eval()
        rows = zip(input_ids.split(size), attention_mask.split(size), strict=True)
        return torch.cat([self.critic(ids, mask, answer) for ids, mask in rows])

    def learn(self, inputs: dict, mask: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """One micro-batch's gradient, and the update where an accumulation window ends.

        Args:
            inputs (`dict`), mask (`torch.Tensor` of shape `(B, T)`): as for `token_sums`, whose sums are returned.
            tokens (`torch.Tensor`): real tokens of the window, a process.
        """
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        last = self.accelerator.sync_gradients
        self.critic.train()
        with nullcontext() if last else self.accelerator.no_sync(self.critic):
            values = self.critic(ids, attention, inputs["completion_ids"].size(1))
            loss, sums = token_sums(values, inputs, mask, self.args.value_clip)
            self.accelerator.backward(loss / tokens)
        if last:
            if self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm)
            if all(bool(torch.isfinite(p.grad).all()) for p in self.critic.parameters() if p.grad is not None):
                self.optimizer.step()
            self.optimizer.zero_grad()
        return sums

    def save(self, folder: Path) -> None:
        """Weights and optimizer, from the main process."""
        if self.accelerator.is_main_process:
            critic = self.accelerator.unwrap_model(self.critic)
            torch.save({"critic": critic.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / CRITIC_FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote, on every process."""
        saved = torch.load(folder / CRITIC_FILE, map_location=self.accelerator.device, weights_only=True)
        self.accelerator.unwrap_model(self.critic).load_state_dict(saved["critic"])
        self.optimizer.load_state_dict(saved["optimizer"])


class SharedCritic:
    """A value head on the states that the policy in force gives its unembedding; the value loss trains the layers below.

    In phase 1 these are the internal policy's states, so nothing above layer l is moved by values either. Each policy has a
    head of its own, which starts at zero. States are divided by their root mean square: raw ones may be of any size.

    Args:
        head ([`~bupo.training.head.PolicyHead`]): of the model.
        accelerator (`Accelerator`): the trainer's.
        args ([`~bupo.BuPOConfig`]): `critic_learning_rate` (of the value head), `value_coef`, `value_clip`.
    """

    def __init__(self, head: PolicyHead, accelerator: Accelerator, args):
        self.head, self.accelerator, self.args = head, accelerator, args
        self.linears: dict[str, nn.Linear] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def _linear(self) -> nn.Linear:
        """The value head of the policy in force."""
        name = "language_model" if self.head.site is None else f"{self.head.site.kind} {self.head.site.layer}"
        if name not in self.linears:
            weight = self.head.stream.head().weight
            linear = nn.Linear(weight.size(1), 1, device=weight.device, dtype=torch.float32)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.linears[name] = linear
            self.optimizers[name] = torch.optim.AdamW(
                linear.parameters(), lr=self.args.critic_learning_rate, weight_decay=self.args.weight_decay
            )
        return self.linears[name]

    @contextmanager
    def collecting(self) -> Iterator[list[torch.Tensor]]:
        """Inside, every scoring call leaves its values `(B, time - 1)`, with their graph, in the yielded list."""
        values: list[torch.Tensor] = []

        def keep(states: torch.Tensor) -> None:
            states = states.float()
            unit = states * states.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            with torch.autocast(states.device.type, enabled=False):
                values.append(self._linear()(unit).squeeze(-1))

        self.head.on_states = keep
        try:
            yield values
        finally:
            self.head.on_states = None

    def loss(self, values: list[torch.Tensor], inputs: dict, mask: torch.Tensor, tokens: torch.Tensor):
        """What is added to the policy's loss, and the sums of `token_sums`."""
        predicted = torch.cat(values)[:, -mask.size(1) :]
        loss, sums = token_sums(predicted, inputs, mask, self.args.value_clip)
        return self.args.value_coef * loss / tokens, sums

    def step(self) -> None:
        """Update the value heads that have a gradient, with the mean of all processes'."""
        for name, linear in self.linears.items():
            if linear.weight.grad is None:
                continue
            for parameter in linear.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            if torch.isfinite(linear.weight.grad).all():
                self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def save(self, folder: Path) -> None:
        """Weights and optimizers, from the main process."""
        if self.accelerator.is_main_process:
            saved = {name: (x.state_dict(), self.optimizers[name].state_dict()) for name, x in self.linears.items()}
            torch.save(saved, folder / CRITIC_FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote, on every process."""
        saved = torch.load(folder / CRITIC_FILE, map_location=self.accelerator.device, weights_only=True)
        for name, (weights, optimizer) in saved.items():
            kind, _, layer = name.partition(" ")
            with self.head.scoring(kind, int(layer)) if layer else nullcontext():
                self._linear().load_state_dict(weights)
            self.optimizers[name].load_state_dict(optimizer)

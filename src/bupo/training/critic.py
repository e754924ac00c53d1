"""PPO's critic: a copy of the model with a value head, learned beside the policy (arXiv 1707.06347).

Values are of the language model policy's rollouts in both phases, so one critic serves them all.
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

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


class CriticLearner:
    """The critic, its AdamW and its updates: one for each update of the policy.

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
            inputs (`dict`): of the trainer's loss, with `values` and `returns` of the rollout, `(B, T)`.
            mask (`torch.Tensor` of shape `(B, T)`): real tokens.
            tokens (`torch.Tensor`): real tokens of the window, a process.

        Returns:
            `dict`: sums over this micro-batch's tokens: `loss`, `clipped`, `error` (squared), and `tokens`.
        """
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        last = self.accelerator.sync_gradients
        self.critic.train()
        with nullcontext() if last else self.accelerator.no_sync(self.critic):
            values = self.critic(ids, attention, inputs["completion_ids"].size(1))
            per_token, clipped = value_loss(values, inputs["values"], inputs["returns"], self.args.value_clip)
            self.accelerator.backward((per_token * mask).sum() / tokens)
        if last:
            if self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        error = (values.detach() - inputs["returns"]).square()
        sums = {
            "loss": per_token.detach(),
            "clipped": clipped.float(),
            "error": error,
            "tokens": torch.ones_like(error),
        }
        return {name: (value * mask).sum() for name, value in sums.items()}

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

"""Bottom-up Policy Optimization (arXiv 2512.19673) in one file of plain torch, to be read from top to bottom.

    python examples/bottom_up.py            # a minute or two on one CPU core

Only the model that is trained and its problems come from bupo. `BuPOTrainer` computes the same losses, as a test shows, for any
model, loss and number of GPUs, and faster: here all layers run while only the lower ones learn, and rows are padded.
"""

import argparse
import re
from dataclasses import dataclass
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo.data.arithmetic import make_arithmetic_problem

PROMPTS, GROUP, ANSWER = 16, 8, 32  # prompts of a rollout batch, answers of a prompt, tokens of an answer
UPDATES = 4  # of a rollout batch, each over a quarter of it
CLIP, DUAL_CLIP, MAX_NORM = 0.2, 10.0, 1.0


# --- 1. A model is a stack of policies ---------------------------------------------------------------------------------------


def log_probs(model, ids: torch.Tensor, mask: torch.Tensor, layer: int | None) -> torch.Tensor:
    """Log-probs (N, T - 1) of every next token of `ids` (N, T) by the policy of a layer, or by the whole model (None).

    Layer l's policy is softmax(H^l E_u^T): the residual stream behind block l, read by the model's own unembedding, without the
    final norm (eq. 7). The last layer's is left out here: transformers gives its state behind that norm.
    """
    decoder = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    states = decoder.last_hidden_state if layer is None else decoder.hidden_states[layer]
    logits = states[:, :-1] @ model.lm_head.weight.T
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


# --- 2. A rollout batch: answers, rewards, advantages ------------------------------------------------------------------------


@dataclass
class Rollouts:
    """A rollout batch of N answers.

    Attributes:
        ids (N, T): prompts, padded on the left, and answers, padded on the right.
        mask (N, T): 1 where there is a token.
        answered (N, T - 1): 1 where the next token belongs to an answer; its end-of-text token does.
        advantages (N,): of the answers.
        old (N, T - 1): log-probs before the first update, of the policy that is optimised.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    answered: torch.Tensor
    advantages: torch.Tensor
    old: torch.Tensor

    def __getitem__(self, rows) -> "Rollouts":
        return Rollouts(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def reward(text: str, answer: str) -> float:
    """1 for an answer that ends in the right number, boxed."""
    found = re.fullmatch(r".*\\boxed\{(-?\d+)\}", text.strip(), re.DOTALL)
    return float(found is not None and found[1] == answer)


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """GRPO's: how far a reward (N,) lies above the mean of its group, in standard deviations of that group."""
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


@torch.no_grad()
def sample(model, tokenizer, batch: int, seed: int, layer: int | None) -> tuple[Rollouts, float]:
    """A rollout batch, sampled by the whole model whatever is optimised, and its mean reward."""
    problems = [make_arithmetic_problem("train", seed, batch * PROMPTS + i) for i in range(PROMPTS)]
    chats = [[{"role": "user", "content": problem.question}] for problem in problems for _ in range(GROUP)]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    width = prompts["input_ids"].size(1)
    ids = model.generate(**prompts, max_new_tokens=ANSWER, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    answers = ids[:, width:]
    ended = (answers == tokenizer.eos_token_id).int()
    kept = ended.cumsum(1) - ended == 0  # up to the first end of text, with it
    mask = torch.cat([prompts["attention_mask"], kept.long()], 1)
    answered = torch.cat([torch.zeros_like(prompts["attention_mask"]), kept.long()], 1)[:, 1:]
    said = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rewards = torch.tensor([reward(text, problems[i // GROUP].answer) for i, text in enumerate(said)])
    old = log_probs(model, ids, mask, layer)
    return Rollouts(ids, mask, answered, advantages(rewards), old), rewards.mean().item()


# --- 3. The objective --------------------------------------------------------------------------------------------------------


def objective(new: torch.Tensor, part: Rollouts, tokens: float) -> torch.Tensor:
    """The loss of a part of a rollout batch: GRPO's clipped objective, a mean over `tokens` answer tokens.

    With the log-probs of a layer's policy this is internal policy alignment (eq. 9), with the whole model's it is GRPO. The
    dual clip bounds the ratio where the advantage is negative.
    """
    ratio, gain = (new - part.old).exp(), part.advantages[:, None]
    clipped = torch.min(ratio.clamp(max=DUAL_CLIP) * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
    return -(clipped * part.answered).sum() / tokens


def update(model, optimizer, rollouts: Rollouts, layer: int | None, order: torch.Tensor) -> list[float]:
    """The updates of a rollout batch, each over rows of its own of `order` (N,); their losses.

    In the first phase the layers above `layer` get no gradient, and so AdamW leaves them alone.
    """
    losses = []
    for rows in order.chunk(UPDATES):
        part = rollouts[rows]
        new = log_probs(model, part.ids, part.mask, layer)
        loss = objective(new, part, tokens=rollouts.answered.sum().item() / UPDATES)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


# --- 4. Bottom up: first a layer's policy for a while, then the whole (eq. 10) -----------------------------------------------


def optimised(batch: int, layer: int, internal_batches: int) -> int | None:
    """The layer whose policy rollout batch `batch` (from 0) optimises; None: the whole model's."""
    return layer if batch < internal_batches else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, default=5, help="layer whose policy is optimised first (1 to 7)")
    parser.add_argument("--internal_batches", type=int, default=5, help="rollout batches of the first phase; 0 is GRPO")
    parser.add_argument("--batches", type=int, default=40, help="rollout batches in all")
    parser.add_argument("--learning_rate", type=float, default=2.5e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    folder = str(files("bupo") / "embedded" / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if not 1 <= args.layer < model.config.num_hidden_layers:
        parser.error(f"--layer must be 1 to {model.config.num_hidden_layers - 1}, got {args.layer}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for batch in range(args.batches):
        layer = optimised(batch, args.layer, args.internal_batches)
        rollouts, mean = sample(model, tokenizer, batch, args.seed, layer)
        losses = update(model, optimizer, rollouts, layer, torch.randperm(len(rollouts.ids)))
        policy = "whole model" if layer is None else f"layer {layer}"
        print(f"{batch + 1:3d}  {policy:11s}  reward {mean:.3f}  first loss {losses[0]:+.4f}", flush=True)


if __name__ == "__main__":
    main()

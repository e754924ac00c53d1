"""Bottom-up Policy Optimization (arXiv 2512.19673) in one file of plain PyTorch.

    python examples/bottom_up.py            # a minute or two on one CPU core

Only the model and its problems come from bupo. `BuPOTrainer` computes the same losses (a test compares them) for any model,
loss and number of GPUs, and faster: this file runs all layers although only the lower ones learn, and pads the rows.
"""

import argparse
import re
from dataclasses import dataclass, fields
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bupo.data.arithmetic import make_arithmetic_problem

NUM_PROMPTS, NUM_GENERATIONS = 16, 8  # prompts of a rollout batch, completions of a prompt
MAX_COMPLETION_LENGTH = 32  # tokens
UPDATES_PER_BATCH = 4  # each uses a quarter of the rollout batch
EPSILON, DUAL_CLIP, MAX_GRAD_NORM = 0.2, 10.0, 1.0


# --- 1. A model is a stack of policies ---------------------------------------------------------------------------------------


def compute_log_probs(model, ids: torch.Tensor, attention_mask: torch.Tensor, layer: int | None) -> torch.Tensor:
    """Compute the log-probs of every next token by the policy of a layer, or by the final layer's policy.

    The policy of layer l is softmax(H^l E_u^T): the residual stream after block l, multiplied by the model's unembedding
    without
    the final norm (eq. 7). The last layer is excluded, because transformers returns its state after that norm.

    Args:
        model: the causal LM.
        ids (B, T): token ids.
        attention_mask (B, T): 1 for tokens, 0 for padding.
        layer: layer l of the policy, or None for the final layer's policy (the model's own output).

    Returns:
        Log-probs (B, T - 1) of `ids[:, 1:]`.
    """
    output = model.model(input_ids=ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    states = output.last_hidden_state if layer is None else output.hidden_states[layer]
    logits = states[:, :-1] @ model.lm_head.weight.T
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


# --- 2. A rollout batch: completions, rewards, advantages --------------------------------------------------------------------


@dataclass
class Rollouts:
    """A rollout batch of B completions.

    Attributes:
        ids (B, T): prompts, padded on the left, and completions, padded on the right.
        attention_mask (B, T): 1 for tokens, 0 for padding.
        completion_mask (B, T - 1): 1 if the next token belongs to a completion, including its end token.
        advantages (B,): advantages of the completions.
        old_log_probs (B, T - 1): log-probs of the optimised policy before the first update.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    advantages: torch.Tensor
    old_log_probs: torch.Tensor

    def __getitem__(self, rows) -> "Rollouts":
        return Rollouts(*(getattr(self, field.name)[rows] for field in fields(self)))


def compute_reward(text: str, answer: str) -> float:
    """Return 1 for a completion that ends with the correct number in a box, else 0."""
    match = re.fullmatch(r".*\\boxed\{(-?\d+)\}", text.strip(), re.DOTALL)
    return float(match is not None and match[1] == answer)


def compute_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Compute GRPO's advantages (B,): rewards normalised by the mean and standard deviation of their group."""
    groups = rewards.view(-1, NUM_GENERATIONS)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


@torch.no_grad()
def sample_rollouts(model, tokenizer, batch: int, seed: int, layer: int | None) -> tuple[Rollouts, float]:
    """Sample a rollout batch and return it with its mean reward. In both phases the full model generates the completions."""
    problems = [make_arithmetic_problem("train", seed, batch * NUM_PROMPTS + i) for i in range(NUM_PROMPTS)]
    chats = [[{"role": "user", "content": problem.question}] for problem in problems for _ in range(NUM_GENERATIONS)]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    prompt_length, prompt_mask = prompts["input_ids"].size(1), prompts["attention_mask"]
    ids = model.generate(
        **prompts, max_new_tokens=MAX_COMPLETION_LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    completion_ids = ids[:, prompt_length:]
    is_end = (completion_ids == tokenizer.eos_token_id).int()
    is_completion = (is_end.cumsum(1) - is_end == 0).long()  # up to the first end token, including it
    attention_mask = torch.cat([prompt_mask, is_completion], 1)
    completion_mask = torch.cat([torch.zeros_like(prompt_mask), is_completion], 1)[:, 1:]
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    answers = [problem.answer for problem in problems for _ in range(NUM_GENERATIONS)]
    rewards = torch.tensor([compute_reward(text, answer) for text, answer in zip(completions, answers, strict=True)])
    old_log_probs = compute_log_probs(model, ids, attention_mask, layer)
    rollouts = Rollouts(ids, attention_mask, completion_mask, compute_advantages(rewards), old_log_probs)
    return rollouts, rewards.mean().item()


# --- 3. The objective --------------------------------------------------------------------------------------------------------


def compute_loss(log_probs: torch.Tensor, rollouts: Rollouts, num_tokens: float) -> torch.Tensor:
    """Compute GRPO's clipped loss of some rollouts, divided by `num_tokens`.

    With the log-probs of a layer's policy this is internal policy alignment (eq. 9). With those of the final layer's policy it
    is GRPO. The dual clip bounds the ratio for negative advantages.

    Args:
        log_probs (B, T - 1): log-probs of the optimised policy.
        rollouts: the rollouts.
        num_tokens: the number of completion tokens of a mini-batch.

    Returns:
        The loss, a scalar.
    """
    ratio, advantages = (log_probs - rollouts.old_log_probs).exp(), rollouts.advantages[:, None]
    unclipped = ratio.clamp(max=DUAL_CLIP) * advantages
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages
    return -(torch.min(unclipped, clipped) * rollouts.completion_mask).sum() / num_tokens


def update(model, optimizer, rollouts: Rollouts, layer: int | None, order: torch.Tensor) -> list[float]:
    """Run the updates of a rollout batch, each on a mini-batch of its rows.

    In the first phase the layers above `layer` get no gradient, so AdamW does not change them.

    Args:
        model, optimizer: the causal LM and its optimizer.
        rollouts: the rollout batch.
        layer: the layer whose policy is optimised, or None for the final layer's policy.
        order (B,): a permutation of the rows, which is divided into mini-batches.

    Returns:
        The loss of each update.
    """
    losses = []
    num_tokens = rollouts.completion_mask.sum().item() / UPDATES_PER_BATCH
    for rows in order.chunk(UPDATES_PER_BATCH):
        mini_batch = rollouts[rows]
        log_probs = compute_log_probs(model, mini_batch.ids, mini_batch.attention_mask, layer)
        loss = compute_loss(log_probs, mini_batch, num_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


# --- 4. Bottom up: first a layer's policy, then the final layer's (eq. 10) ---------------------------------------------------


def get_optimized_layer(batch: int, layer: int, internal_batches: int) -> int | None:
    """Return the layer whose policy a rollout batch (counted from 0) optimises, or None for the final layer's policy."""
    return layer if batch < internal_batches else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, default=5, help="layer whose policy the first phase optimises (1 to 7)")
    parser.add_argument("--internal_batches", type=int, default=5, help="rollout batches of the first phase; 0 is GRPO")
    parser.add_argument("--batches", type=int, default=40, help="rollout batches of both phases")
    parser.add_argument("--learning_rate", type=float, default=2.5e-5, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems and of sampling")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model_dir = str(files("bupo") / "embedded" / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    if not 1 <= args.layer < model.config.num_hidden_layers:
        parser.error(f"--layer must be 1 to {model.config.num_hidden_layers - 1}, got {args.layer}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for batch in range(args.batches):
        layer = get_optimized_layer(batch, args.layer, args.internal_batches)
        rollouts, mean_reward = sample_rollouts(model, tokenizer, batch, args.seed, layer)
        losses = update(model, optimizer, rollouts, layer, torch.randperm(len(rollouts.ids)))
        policy = "full model" if layer is None else f"layer {layer}"
        print(f"{batch + 1:3d}  {policy:10s}  reward {mean_reward:.3f}  first loss {losses[0]:+.4f}", flush=True)


if __name__ == "__main__":
    main()

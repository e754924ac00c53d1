"""Most likely tokens of every layer at each position of an answer."""

from functools import cache, partial

import torch
from transformers import PreTrainedTokenizerBase

from bupo.analysis.rollouts import Rollout
from bupo.data.token_text import format_token
from bupo.models.internal_policy import InternalPolicies
from bupo.models.residual_stream import Activation

MAX_VIEW_ROLLOUTS, MAX_VIEW_TOKENS, VIEW_TOP_K = 6, 96, 5  # limits of the token x layer view


@torch.no_grad()
def get_top_tokens(
    policies: InternalPolicies,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    answer: list[int],
    top: int = VIEW_TOP_K,
) -> dict:
    """Return the most likely tokens of every layer's policy at each answer position.

    Returns:
        `dict`: `ids` and `tokens` (ids of the answer's T tokens, and their texts by
        [`~bupo.data.token_text.format_token`]), and by layer 1..L and token: `entropy` (nats), `chosen` (probability of the
        generated token), `top` (pairs of text and probability, most likely first) and `top_ids` (their ids). Compare tokens
        by id: several may have the same text.
    """
    stream = policies.stream
    layers = range(1, stream.num_layers + 1)
    first = len(prompt) - 1
    device = stream.model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    states = stream.compute_activations([Activation("layer", n) for n in layers], ids, select=lambda x: x[0, first:])
    targets = torch.tensor(answer)[:, None]
    format_cached = cache(partial(format_token, tokenizer))
    view: dict = {"ids": list(answer), "tokens": [format_cached(t) for t in answer]}
    view |= {"entropy": [], "chosen": [], "top": [], "top_ids": []}
    for layer in layers:
        rows: dict[str, list] = {"entropy": [], "chosen": [], "top": [], "top_ids": []}
        x = stream.apply_lens(states[Activation("layer", layer)], policies.lens)
        for piece, target in zip(x.split(32), targets.split(32), strict=True):
            log_p = stream.logits(piece, policies.temperature).log_softmax(-1).cpu()
            rows["entropy"] += [round(h, 3) for h in torch.special.entr(log_p.exp()).sum(-1).tolist()]
            rows["chosen"] += [round(p, 4) for p in log_p.gather(1, target)[:, 0].exp().tolist()]
            best = log_p.topk(min(top, log_p.size(1)))
            for values, tokens in zip(best.values.exp().tolist(), best.indices.tolist(), strict=True):
                rows["top"].append([[format_cached(t), round(p, 4)] for t, p in zip(tokens, values, strict=True)])
                rows["top_ids"].append(tokens)
        for name, values in rows.items():
            view[name].append(values)
    return view


def build_token_views(
    policies: InternalPolicies, tokenizer: PreTrainedTokenizerBase, rollouts: list[Rollout]
) -> list[dict]:
    """Return the token x layer views of the first answers, with their prompts."""
    return [
        {"prompt": r.prompt, **get_top_tokens(policies, tokenizer, r.prompt_ids, r.completion_ids[:MAX_VIEW_TOKENS])}
        for r in rollouts[:MAX_VIEW_ROLLOUTS]
    ]

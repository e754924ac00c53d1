"""Training dynamics (figs. 4, 5 and 7): a fixed set of answers, from the first rollout batch, measured again and again.

The series are those of `bupo analyze --rollouts RUN/probes.jsonl --model RUN/checkpoint-N`, computed here for the layers
of the first phase and those above them only.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from bupo.analysis.vocab_streaming import StreamedPolicies
from bupo.models.residual_stream import Activation, Lens, ResidualStream

MAX_PROBE_TOKENS = 256  # of a probe; longer answers are cut
MAX_COMPUTE_SHARE = 0.03  # of a rollout batch's arithmetic, for the default of probe_every
ROWS_PER_CHUNK = 1024  # answer positions that meet a tile of the vocabulary together
MAX_STATE_ELEMENTS = 1 << 26  # numbers in the states of one forward pass

PromptCompletionIds = Sequence[tuple[list[int], list[int]]]  # token ids of prompts and answers


@torch.no_grad()
def probe_layers(
    stream: ResidualStream,
    answers: PromptCompletionIds,
    layers: Sequence[int],
    lens: Lens = "raw",
    temperature: float = 1.0,
) -> list[dict]:
    """Measure layers against those above them.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model, in evaluation mode.
        answers (`list[tuple[list[int], list[int]]]`): token ids of prompts and answers.
        layers (`list[int]`): the layers l, from 1.
        lens (`str`), temperature (`float`): of the policies.

    Returns:
        `list[dict]`: rows of `measure`, `layer`, `later_layer` and `value`, means over the answers' tokens, in nats: of
        pi_theta `entropy` and `perplexity`; of each l `entropy_layer`, `d_entropy_layer` (eq. 11) and `kl_language_model`;
        of each l and later m `kl` (KL(pi_Layer^l || pi_Layer^m)) and `cosine` (of H^l and H^m).
    """
    sums: dict[tuple, float] = defaultdict(float)
    tokens = 0
    for states, targets in _iterate_hidden_states(stream, answers, layers):
        tokens += len(targets)
        for layer in layers:
            for later in range(layer + 1, stream.num_layers + 1):
                pair = (states[Activation("layer", layer)], states[Activation("layer", later)])
                sums["cosine", layer, later] += torch.cosine_similarity(*pair, dim=-1).double().sum().item()
        for start in range(0, len(targets), ROWS_PER_CHUNK):
            piece = {site.layer: values[start : start + ROWS_PER_CHUNK] for site, values in states.items()}
            for key, values in _measure_policies(
                stream, piece, targets[start : start + ROWS_PER_CHUNK], layers, lens, temperature
            ):
                sums[key] += values.double().sum().item()
    found = [
        {"measure": measure, "layer": layer, "later_layer": later, "value": total / tokens}
        for (measure, layer, later), total in sums.items()
    ]
    for row in found:
        if row["measure"] == "perplexity":
            row["value"] = math.exp(min(row["value"], 700.0))
    return found


def _measure_policies(stream, states, targets, layers, lens, temperature) -> Iterator[tuple[tuple, torch.Tensor]]:
    """What needs logits, `(rows,)` by measure, layer and later layer. `states` are by layer."""
    last, lowest = stream.num_layers, min(layers, default=stream.num_layers + 1) - 1
    head = stream.head(temperature)
    theta = stream.apply_lens(states[last], "final_norm")
    read = [stream.apply_lens(states[layer], lens) for layer in range(last, lowest - 1, -1)] if layers else []
    kind = torch.promote_types(theta.dtype, torch.float32)
    device = head.weight.device
    fold = StreamedPolicies([x.to(device, kind) for x in (theta, *read)], num_compared=1 + len(read), pairs=True)
    fold.accumulate(head, targets.to(device))
    yield ("entropy", None, None), fold.entropy[0]
    yield ("perplexity", None, None), fold.log_normalizers[0] - fold.chosen_logit[0]
    to_theta, _, between = fold.compute_kl()
    assert between is not None, "asked for all pairs"
    place = {layer: last - layer for layer in range(lowest, last + 1)}  # among the layers, the last of which came first
    for layer in layers:
        entropy = fold.entropy[1 + place[layer]]
        yield ("entropy_layer", layer, None), entropy
        yield ("d_entropy_layer", layer, None), entropy - fold.entropy[1 + place[layer - 1]]
        yield ("kl_language_model", layer, None), to_theta[place[layer]]
        for later in range(layer + 1, last + 1):
            yield ("kl", layer, later), between[place[layer], place[later]]


def _iterate_hidden_states(
    stream: ResidualStream, answers: PromptCompletionIds, layers: Sequence[int]
) -> Iterator[tuple[dict[Activation, torch.Tensor], torch.Tensor]]:
    """States `(rows, D)` and next tokens `(rows,)` at the answers' positions, some answers at a time."""
    first = min(layers, default=stream.num_layers + 1)
    numbers = sorted({stream.num_layers, *range(first, stream.num_layers + 1), *(layer - 1 for layer in layers)})
    sites = [Activation("layer", number) for number in numbers]
    embedding = stream.model.get_input_embeddings().weight
    longest = max(len(prompt) + len(answer) for prompt, answer in answers)
    size = max(1, MAX_STATE_ELEMENTS // (longest * len(sites) * embedding.size(1)))
    for start in range(0, len(answers), size):
        some = answers[start : start + size]
        time = max(len(prompt) + len(answer) for prompt, answer in some)
        ids = torch.zeros(len(some), time, dtype=torch.long)
        mask, here = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(some):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            mask[row, :end] = 1
            here[row, len(prompt) - 1 : end - 1] = True
        targets = ids[:, 1:][here[:, :-1]]
        select = functools.partial(_select_rows, here=here)
        yield (
            stream.compute_activations(sites, ids.to(embedding.device), mask.to(embedding.device), select=select),
            targets,
        )


def _select_rows(states: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    return states[here.to(states.device)]


def get_default_probe_interval(
    stream: ResidualStream, answers: PromptCompletionIds, layers: Sequence[int], batch_tokens: int
) -> int:
    """Rollout batches between probes that keep them within `SHARE` of the run's arithmetic.

    A forward pass is two operations a parameter and token, a rollout batch some four forward passes (sampling, scoring,
    update), a projection 2 D a vocabulary entry and about 500 more for its exponentials.

    Args:
        batch_tokens (`int`): prompt and answer tokens of a rollout batch, a process.
    """
    entries, width = stream.get_unembedding().weight.shape
    forward = 2 * sum(p.numel() for p in stream.model.parameters())
    sites = stream.num_layers - min(layers) + 3
    rows = sum(len(answer) for _, answer in answers)
    cost = sum(len(p) + len(a) for p, a in answers) * forward + rows * sites * entries * (2 * width + 500)
    return max(1, math.ceil(cost / (MAX_COMPUTE_SHARE * 4 * max(1, batch_tokens) * forward)))


def compute_repetition(answers: Sequence[Sequence[int]], n: int = 4) -> float:
    """Mean share of an answer's n-grams that it has said before; answers shorter than n + 1 tokens have none."""
    shares = []
    for ids in answers:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / max(1, len(shares))

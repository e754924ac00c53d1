"""Training dynamics (figs. 4, 5 and 7): repeated measurements of a fixed set of answers from the first rollout batch.

The series equal those of `bupo analyze --rollouts RUN/probes.jsonl --model RUN/checkpoint-N`, for the layers of the first phase
and those above them only.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from bupo.analysis.vocab_streaming import StreamedPolicies
from bupo.models.residual_stream import Activation, Lens, ResidualStream

MAX_PROBE_TOKENS = 256  # per answer; longer ones are cut
MAX_COMPUTE_SHARE = 0.03  # of the run's arithmetic, for the default of probe_every
ROWS_PER_CHUNK = 1024  # answer positions that are projected onto a tile of the vocabulary at once
MAX_STATE_ELEMENTS = 1 << 26  # elements of the hidden states of one forward pass

PromptCompletionIds = Sequence[tuple[list[int], list[int]]]  # token ids of prompts and answers


@torch.no_grad()
def probe_layers(
    stream: ResidualStream,
    answers: PromptCompletionIds,
    layers: Sequence[int],
    lens: Lens = "raw",
    temperature: float = 1.0,
) -> list[dict]:
    """Measure layers and compare them with those above.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model, in evaluation mode.
        answers (`list[tuple[list[int], list[int]]]`): token ids of prompts and answers.
        layers (`list[int]`): the layers l, from 1.
        lens (`str`), temperature (`float`): of the policies.

    Returns:
        `list[dict]`: rows of `measure`, `layer`, `later_layer` and `value`, means over the answers' tokens, in nats. The
        language model policy has `entropy` and `perplexity`; each layer l has `entropy_layer`, `d_entropy_layer` (eq. 11) and
        `kl_language_model`; each l and later m have `kl` (KL(pi_Layer^l || pi_Layer^m)) and `cosine` (of H^l and H^m).
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
            chunk = {each.layer: values[start : start + ROWS_PER_CHUNK] for each, values in states.items()}
            for key, values in _measure_policies(
                stream, chunk, targets[start : start + ROWS_PER_CHUNK], layers, lens, temperature
            ):
                sums[key] += values.double().sum().item()
    rows = [
        {"measure": measure, "layer": layer, "later_layer": later, "value": total / tokens}
        for (measure, layer, later), total in sums.items()
    ]
    for row in rows:
        if row["measure"] == "perplexity":
            row["value"] = math.exp(min(row["value"], 700.0))
    return rows


def _measure_policies(stream, states, targets, layers, lens, temperature) -> Iterator[tuple[tuple, torch.Tensor]]:
    """Yield the measures that need logits.

    Args:
        states (`dict[int, torch.Tensor]`): hidden states `(tokens, D)` by layer.
        targets (`torch.Tensor` of shape `(tokens,)`): the next tokens.

    Yields:
        `tuple[tuple, torch.Tensor]`: (measure, layer, later layer), and values `(tokens,)`.
    """
    last, lowest = stream.num_layers, min(layers, default=stream.num_layers + 1) - 1
    head = stream.get_unembedding(temperature)
    model_states = stream.apply_lens(states[last], "final_norm")
    layer_states = [stream.apply_lens(states[layer], lens) for layer in range(last, lowest - 1, -1)] if layers else []
    dtype = torch.promote_types(model_states.dtype, torch.float32)
    device = head.weight.device
    inputs = [values.to(device, dtype) for values in (model_states, *layer_states)]
    policies = StreamedPolicies(inputs, num_compared=len(inputs), pairs=True)
    policies.accumulate(head, targets.to(device))
    yield ("entropy", None, None), policies.entropy[0]
    yield ("perplexity", None, None), policies.log_normalizers[0] - policies.chosen_logit[0]
    kl_to_model, _, kl_between_layers = policies.compute_kl()
    assert kl_between_layers is not None, "pairs is true"
    index = {layer: last - layer for layer in range(lowest, last + 1)}  # `layer_states` begins with the last layer
    for layer in layers:
        entropy = policies.entropy[1 + index[layer]]
        yield ("entropy_layer", layer, None), entropy
        yield ("d_entropy_layer", layer, None), entropy - policies.entropy[1 + index[layer - 1]]
        yield ("kl_language_model", layer, None), kl_to_model[index[layer]]
        for later in range(layer + 1, last + 1):
            yield ("kl", layer, later), kl_between_layers[index[layer], index[later]]


def _iterate_hidden_states(
    stream: ResidualStream, answers: PromptCompletionIds, layers: Sequence[int]
) -> Iterator[tuple[dict[Activation, torch.Tensor], torch.Tensor]]:
    """Yield the hidden states `(tokens, D)` and next tokens `(tokens,)` at the answers' positions, a few answers at a time."""
    first = min(layers, default=stream.num_layers + 1)
    numbers = sorted({stream.num_layers, *range(first, stream.num_layers + 1), *(layer - 1 for layer in layers)})
    activations = [Activation("layer", number) for number in numbers]
    embedding = stream.model.get_input_embeddings().weight
    longest = max(len(prompt) + len(answer) for prompt, answer in answers)
    size = max(1, MAX_STATE_ELEMENTS // (longest * len(activations) * embedding.size(1)))
    for start in range(0, len(answers), size):
        batch = answers[start : start + size]
        length = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)  # (B, T)
        mask, positions = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            mask[row, :end] = 1
            positions[row, len(prompt) - 1 : end - 1] = True
        targets = ids[:, 1:][positions[:, :-1]]
        select = functools.partial(_select_rows, positions=positions)
        inputs = (ids.to(embedding.device), mask.to(embedding.device))
        yield stream.compute_activations(activations, *inputs, select=select), targets


def _select_rows(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return states[positions.to(states.device)]


def get_default_probe_interval(
    stream: ResidualStream, answers: PromptCompletionIds, layers: Sequence[int], batch_tokens: int
) -> int:
    """Return the rollout batches between probes that keep the probes within `MAX_COMPUTE_SHARE` of the run's arithmetic.

    A forward pass takes two operations per parameter and token, a rollout batch some four forward passes (sampling, scoring,
    update), and a projection 2 D operations per vocabulary entry and about 500 more for its exponentials.

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model.
        answers, layers: as for [`probe_layers`].
        batch_tokens (`int`): prompt and answer tokens of a rollout batch, per process.
    """
    entries, width = stream.get_unembedding().weight.shape
    forward = 2 * sum(p.numel() for p in stream.model.parameters())
    projections = stream.num_layers - min(layers) + 3
    tokens = sum(len(answer) for _, answer in answers)
    cost = sum(len(p) + len(a) for p, a in answers) * forward + tokens * projections * entries * (2 * width + 500)
    return max(1, math.ceil(cost / (MAX_COMPUTE_SHARE * 4 * max(1, batch_tokens) * forward)))


def compute_repetition(answers: Sequence[Sequence[int]], n: int = 4) -> float:
    """Return the mean share of repeated n-grams in an answer, 0 for answers of fewer than n + 1 tokens."""
    shares = []
    for ids in answers:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / max(1, len(shares))

"""`internal_layer: auto`: the boundary layer, measured on the first rollout batch of a run."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from bupo.analysis.measures import MEASURES, measure_completions
from bupo.analysis.stages import classify_stages
from bupo.analysis.tables import BootstrapMeans, CompletionSums
from bupo.models.internal_policy import Lens
from bupo.models.residual_stream import ResidualStream
from bupo.training.objective.phases import MAX_FIRST_PHASE_BATCHES
from bupo.utils.errors import UserError

MAX_MEASURED_TOKENS = 4096  # completion tokens, of all processes
MIN_AGREEMENT = 0.9  # share of resamples with the same boundary layer, or a neighbour


def find_boundary_layer(
    stream: ResidualStream,
    completions: Sequence[tuple[list[int], list[int]]],
    lens: Lens,
    temperature: float,
    max_tokens: int = MAX_MEASURED_TOKENS,
    gather: Callable[[list], list] = lambda sums: sums,
) -> dict:
    """Find the last layer with a significantly positive `dH_FFN`, which is the layer to optimise (paper, section 5).

    The bootstrap resamples prompts, because completions of one prompt are similar. The layer is ambiguous if resamples
    choose other layers than its neighbours. The paper does not distinguish neighbours either (27 and 26 for
    OctoThinker-3B, 31 and 30 for 8B).

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model, in evaluation mode.
        completions (`list[tuple[list[int], list[int]]]`): token ids of this process' prompts and completions.
        lens (`str`), temperature (`float`): of the policies.
        max_tokens (`int`, *optional*): number of tokens after which no further completion is measured.
        gather (`Callable`, *optional*): joins a list over processes.

    Returns:
        `dict`: result of [`~bupo.analysis.stages.classify_stages`], with `layers`: mean and 95 % interval of `dH_FFN`
        by layer.

    Raises:
        UserError: if no layer's `dH_FFN` is positive, or the resamples disagree; the message lists all layers and the
            options.
    """
    prompts = _measure_by_prompt(stream, take_first_answers(completions, max_tokens), lens, temperature, gather)
    if not prompts:
        raise UserError("internal_layer auto: the first rollout batch has no completions to measure (all are masked)")
    result = classify_stages(prompts)
    resampled, row = BootstrapMeans(prompts), MEASURES.index("d_entropy_ffn")
    low, high = (bound[row] for bound in resampled.compute_interval())
    result["layers"] = np.stack([resampled.mean[row], low, high], 1).round(4).tolist()
    if (reason := _explain_ambiguity(result)) is None:
        return result
    means = ", ".join(f"{number}: {mean:+.2f}" for number, (mean, _, _) in enumerate(result["layers"], 1))
    raise UserError(
        f"internal_layer auto: {reason} ({len(prompts)} prompts of the first rollout batch); dH_FFN in nats by layer: "
        f"{means}; choose internal_layer yourself (1 to {stream.num_layers}), or internal_steps 0 for no first phase"
    )


def take_first_answers(
    completions: Sequence[tuple[list[int], list[int]]], max_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Return the first completions, until their tokens reach `max_tokens`."""
    first, tokens = [], 0
    for prompt, completion in completions:
        if tokens >= max_tokens:
            break
        first.append((prompt, completion))
        tokens += len(completion)
    return first


def describe_first_phase_length(result: dict) -> str:
    """Describe the length of the first phase, and the recommended one if the options differ."""
    steps, recommended, batches = result["internal_steps"], result["recommended_steps"], result["rollout_batches"]
    reason = f"a tenth of the run's {batches} rollout batches, {MAX_FIRST_PHASE_BATCHES} at most (paper, table 2)"
    if steps == recommended:
        return f"internal_steps: {steps}, {reason}"
    return f"internal_steps: {steps} as given; recommended are {recommended}, {reason}"


def _measure_by_prompt(stream, completions, lens, temperature, gather) -> list[CompletionSums]:
    """Measure the completions of all processes, and merge those of one prompt."""
    measures = measure_completions(stream, completions, lens, temperature)
    prompt_sums = [
        (tuple(prompt), CompletionSums.from_measures(measure))
        for (prompt, _), measure in zip(completions, measures, strict=True)
    ]
    by_prompt = defaultdict(list)
    for prompt, sums in gather(prompt_sums):
        by_prompt[prompt].append(sums)
    return [CompletionSums.merge(sums) for sums in by_prompt.values()]


def _explain_ambiguity(result: dict) -> str | None:
    """Return the reason not to train on a boundary layer, or None."""
    layer, shares = result["boundary_layer"], result["boundary_shares"]
    if layer is None:
        return result["explanation"]
    if sum(share for other, share in shares.items() if other and abs(other - layer) <= 1) >= MIN_AGREEMENT:
        return None
    rivals = ", ".join(f"{other or 'none'} in {100 * share:.0f} %" for other, share in shares.items())
    return f"the boundary layer is ambiguous: of the resamples, layer {rivals}"

"""`internal_layer: auto`: the boundary layer, measured on a run's first rollout batch, and how long to optimise it."""

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

MAX_MEASURED_TOKENS = 4096  # answer tokens that are measured, of all processes
MIN_AGREEMENT = 0.9  # share of resamples that must name the boundary layer or a neighbour


def find_boundary_layer(
    stream: ResidualStream,
    answers: Sequence[tuple[list[int], list[int]]],
    lens: Lens,
    temperature: float,
    tokens: int = MAX_MEASURED_TOKENS,
    gather: Callable[[list], list] = lambda sums: sums,
) -> dict:
    """The last layer whose `dH_FFN` is positive beyond doubt, which is the layer to optimise (paper, section 5).

    Whole prompts are resampled: answers to one prompt say much the same. The layer is ambiguous where resamples name others
    than its neighbours, between which the paper itself does not choose (27 and 26 for OctoThinker-3B, 31 and 30 for 8B).

    Args:
        stream ([`~bupo.models.residual_stream.ResidualStream`]): the model, in evaluation mode.
        answers (`list[tuple[list[int], list[int]]]`): prompts and answers of this process, as token ids.
        lens (`str`), temperature (`float`): of the policies.
        tokens (`int`, *optional*): start no further answer after so many tokens.
        gather (`Callable`, *optional*): joins a list over processes.

    Returns:
        `dict`: what [`~bupo.analysis.tables.stages`] says, with `layers`: mean and 95 % interval of `dH_FFN` by layer.

    Raises:
        UserError: where no layer's is positive, or the resamples do not agree: with the row and the choices.
    """
    prompts = _measure_by_prompt(stream, take_first_answers(answers, tokens), lens, temperature, gather)
    if not prompts:
        raise UserError("internal_layer auto: the first rollout batch has no answers to measure (all are masked)")
    found = classify_stages(prompts)
    resampled, row = BootstrapMeans(prompts), MEASURES.index("d_entropy_ffn")
    low, high = (bound[row] for bound in resampled.compute_interval())
    found["layers"] = np.stack([resampled.mean[row], low, high], 1).round(4).tolist()
    if (why := _explain_ambiguity(found)) is None:
        return found
    means = ", ".join(f"{number}: {mean:+.2f}" for number, (mean, _, _) in enumerate(found["layers"], 1))
    raise UserError(
        f"internal_layer auto: {why} ({len(prompts)} prompts of the first rollout batch); dH_FFN in nats by layer: "
        f"{means}; choose internal_layer yourself (1 to {stream.num_layers}), or internal_steps 0 for no first phase"
    )


def take_first_answers(
    answers: Sequence[tuple[list[int], list[int]]], tokens: int
) -> list[tuple[list[int], list[int]]]:
    """The first answers, of which none begins after so many tokens: those that [`find_boundary_layer`] measures of them."""
    found, spent = [], 0
    for prompt, answer in answers:
        if spent >= tokens:
            break
        found.append((prompt, answer))
        spent += len(answer)
    return found


def describe_first_phase_length(found: dict) -> str:
    """The line about a first phase's length: that which was given is kept, whatever is recommended."""
    used, of, recommended = found["internal_steps"], found["rollout_batches"], found["recommended_steps"]
    why = f"a tenth of the run's {of} rollout batches, {MAX_FIRST_PHASE_BATCHES} at most (paper, table 2)"
    if used == recommended:
        return f"internal_steps: {used}, {why}"
    return f"internal_steps: {used} as given; recommended are {recommended}, {why}"


def _measure_by_prompt(stream, answers, lens, temperature, gather) -> list[CompletionSums]:
    """The sums of all processes' answers, those to one prompt joined."""
    found = zip(answers, measure_completions(stream, answers, lens, temperature), strict=True)
    measured = [(tuple(prompt), CompletionSums.from_measures(answer)) for (prompt, _), answer in found]
    by_prompt = defaultdict(list)
    for prompt, sums in gather(measured):
        by_prompt[prompt].append(sums)
    return [CompletionSums.merge(sums) for sums in by_prompt.values()]


def _explain_ambiguity(found: dict) -> str | None:
    """Why a boundary layer is none to train on."""
    layer, shares = found["boundary_layer"], found["boundary_shares"]
    if layer is None:
        return found["explanation"]
    if sum(share for other, share in shares.items() if other and abs(other - layer) <= 1) >= MIN_AGREEMENT:
        return None
    rivals = ", ".join(f"{other or 'none'} in {100 * share:.0f} %" for other, share in shares.items())
    return f"the boundary layer is ambiguous: of the resamples, layer {rivals}"

"""`internal_layer: auto`: the boundary layer, measured on a run's first rollout batch, and how long to optimise it."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from bupo.analysis.measures import MEASURES, measure
from bupo.analysis.stages import stages
from bupo.analysis.tables import AnswerSums, Resampled
from bupo.models.internal_policy import Lens
from bupo.models.residual_stream import ResidualStream
from bupo.training.objective.phases import LONGEST
from bupo.utils.errors import UserError

TOKENS = 4096  # answer tokens that are measured, of all processes
SURE = 0.9  # share of resamples that must name the boundary layer or a neighbour


def boundary_layer(
    stream: ResidualStream,
    answers: Sequence[tuple[list[int], list[int]]],
    lens: Lens,
    temperature: float,
    tokens: int = TOKENS,
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
    prompts = _by_prompt(stream, up_to(answers, tokens), lens, temperature, gather)
    if not prompts:
        raise UserError("internal_layer auto: the first rollout batch has no answers to measure (all are masked)")
    found = stages(prompts)
    resampled, row = Resampled(prompts), MEASURES.index("d_entropy_ffn")
    low, high = (bound[row] for bound in resampled.interval())
    found["layers"] = np.stack([resampled.mean[row], low, high], 1).round(4).tolist()
    if (why := _doubt(found)) is None:
        return found
    means = ", ".join(f"{number}: {mean:+.2f}" for number, (mean, _, _) in enumerate(found["layers"], 1))
    raise UserError(
        f"internal_layer auto: {why} ({len(prompts)} prompts of the first rollout batch); dH_FFN in nats by layer: "
        f"{means}; choose internal_layer yourself (1 to {stream.num_layers}), or internal_steps 0 for no first phase"
    )


def up_to(answers: Sequence[tuple[list[int], list[int]]], tokens: int) -> list[tuple[list[int], list[int]]]:
    """The first answers, of which none begins after so many tokens: those that [`boundary_layer`] measures of them."""
    found, spent = [], 0
    for prompt, answer in answers:
        if spent >= tokens:
            break
        found.append((prompt, answer))
        spent += len(answer)
    return found


def said_of_length(found: dict) -> str:
    """The line about a first phase's length: that which was given is kept, whatever is recommended."""
    used, of, recommended = found["internal_steps"], found["rollout_batches"], found["recommended_steps"]
    why = f"a tenth of the run's {of} rollout batches, {LONGEST} at most (paper, table 2)"
    if used == recommended:
        return f"internal_steps: {used}, {why}"
    return f"internal_steps: {used} as given; recommended are {recommended}, {why}"


def _by_prompt(stream, answers, lens, temperature, gather) -> list[AnswerSums]:
    """The sums of all processes' answers, those to one prompt joined."""
    found = zip(answers, measure(stream, answers, lens, temperature), strict=True)
    measured = [(tuple(prompt), AnswerSums.of(answer)) for (prompt, _), answer in found]
    by_prompt = defaultdict(list)
    for prompt, sums in gather(measured):
        by_prompt[prompt].append(sums)
    return [AnswerSums.joined(sums) for sums in by_prompt.values()]


def _doubt(found: dict) -> str | None:
    """Why a boundary layer is none to train on."""
    layer, shares = found["boundary_layer"], found["boundary_shares"]
    if layer is None:
        return found["explanation"]
    if sum(share for other, share in shares.items() if other and abs(other - layer) <= 1) >= SURE:
        return None
    rivals = ", ".join(f"{other or 'none'} in {100 * share:.0f} %" for other, share in shares.items())
    return f"the boundary layer is ambiguous: of the resamples, layer {rivals}"

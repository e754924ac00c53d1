"""`internal_layer: auto`: the boundary layer, measured on a run's first rollout batch."""

from collections.abc import Callable, Sequence

import numpy as np

from bupo.analysis.measure import MEASURES, measure
from bupo.analysis.tables import AnswerSums, Resampled, stages
from bupo.errors import UserError
from bupo.policy import Lens
from bupo.residual import ResidualStream

TOKENS = 4096  # answer tokens that are measured, of all processes
SURE = 0.75  # share of resamples that must agree on the boundary layer


def boundary_layer(
    stream: ResidualStream,
    answers: Sequence[tuple[list[int], list[int]]],
    lens: Lens,
    temperature: float,
    tokens: int = TOKENS,
    gather: Callable[[list], list] = lambda sums: sums,
) -> dict:
    """The last layer whose `dH_FFN` is positive beyond doubt, which is the layer to optimise (paper, section 5).

    Args:
        stream ([`~bupo.residual.ResidualStream`]): the model, in evaluation mode.
        answers (`list[tuple[list[int], list[int]]]`): prompts and answers of this process, as token ids.
        lens (`str`), temperature (`float`): of the policies.
        tokens (`int`, *optional*): start no further answer after so many tokens.
        gather (`Callable`, *optional*): joins a list over processes.

    Returns:
        `dict`: what [`~bupo.analysis.tables.stages`] says, with `layers`: mean and 95 % interval of `dH_FFN` by layer.

    Raises:
        UserError: where no layer's is positive, or the resamples do not agree on one: with the row and the choices.
    """
    sums, spent = [], 0
    for answer in measure(stream, answers, lens, temperature):
        sums.append(AnswerSums.of(answer))
        spent += answer.tokens
        if spent >= tokens:
            break
    sums = gather(sums)
    found = stages(sums)
    resampled, row = Resampled(sums), MEASURES.index("d_entropy_ffn")
    low, high = (bound[row] for bound in resampled.interval())
    found["layers"] = np.stack([resampled.mean[row], low, high], 1).round(4).tolist()
    layer = found["boundary_layer"]
    if layer is None:
        why = found["explanation"]
    elif found["boundary_shares"].get(layer, 0) < SURE:
        rivals = ", ".join(f"{n or 'none'} in {100 * share:.0f} %" for n, share in found["boundary_shares"].items())
        why = f"the boundary layer is ambiguous: of the resamples, layer {rivals}"
    else:
        return found
    means = ", ".join(f"{number}: {mean:+.2f}" for number, (mean, _, _) in enumerate(found["layers"], 1))
    raise UserError(
        f"internal_layer auto: {why} ({len(sums)} answers of the first rollout batch); dH_FFN in nats by layer: {means}; "
        f"choose internal_layer yourself (1 to {stream.num_layers}), or internal_steps 0 for no first phase"
    )

"""How a model reasons, read from the entropy change of its FFNs: the stage of each layer, the boundary layer, the pattern."""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np

from bupo.analysis.measures import MEASURES
from bupo.analysis.tables import BootstrapMeans, CompletionSums

ENTROPY_TOLERANCE = 0.05  # nats: an entropy change within it is integration
REASONING_STAGES = ("exploration", "integration", "convergence")
MIN_STAGE_FIT = 2 / 3  # share of layers that must be in their range's stage, for a pattern
ABRUPT_DIVISOR = 8  # a convergence that takes no more than an eighth of the layers is abrupt


def classify_stages(answers: Sequence[CompletionSums], tolerance: float = ENTROPY_TOLERANCE) -> dict:
    """Stages, boundary and pattern from `dH_FFN`.

    A layer explores where the whole 95 % interval of its mean `dH_FFN` lies above the tolerance, converges where it lies
    below minus the tolerance, and integrates otherwise. The boundary layer is the last that explores: the last whose
    `dH_FFN` is positive beyond doubt. The paper's own rule takes the last whose mean is positive, and stands beside it.

    Returns:
        `dict`: `stages` (by layer), `boundary_layer` (`int` or `None`), `boundary_shares` (by layer, the share of resamples in
        which it is the last above the tolerance; 0 stands for none), `paper_boundary_layer` (by the paper's rule),
        `tolerance` (nats), `explanation`; `ranges` and `fit` of `ranges_of`, `pattern` and `verdict` of `pattern_of`.
    """
    resampled, row = BootstrapMeans(answers), MEASURES.index("d_entropy_ffn")
    mean, (low, high) = resampled.mean[row], (bound[row] for bound in resampled.compute_interval())
    boundary, paper = _find_last_layer(low > tolerance), _find_last_layer(mean > 0)
    if np.isnan(low).any():
        names, shares = ["undecided"] * len(mean), dict[int, float]()
        explanation = "one answer leaves nothing to resample: measure more answers"
    else:
        names = [
            "exploration" if a > tolerance else "convergence" if b < -tolerance else "integration"
            for a, b in zip(low, high, strict=True)
        ]
        last = np.array([_find_last_layer(draw > tolerance) or 0 for draw in resampled.draws[:, row]])
        shares = {int(layer): float(np.mean(last == layer)) for layer in np.unique(last)}
        explanation = _describe_boundary(boundary, shares, mean, low, high, tolerance) + _describe_paper_boundary(
            boundary, paper
        )
    ranges, fit = find_stage_ranges(names, mean)
    pattern, verdict = classify_pattern(ranges, fit, len(mean))
    return {
        "stages": names,
        "boundary_layer": boundary,
        "boundary_shares": shares,
        "paper_boundary_layer": paper,
        "tolerance": tolerance,
        "explanation": explanation,
        "ranges": ranges,
        "fit": fit,
        "pattern": pattern,
        "verdict": verdict,
    }


def _find_last_layer(holds: np.ndarray) -> int | None:
    """The last layer for which `(L,)` something holds, from 1."""
    places = np.flatnonzero(holds)
    return int(places[-1]) + 1 if len(places) else None


def _describe_boundary(boundary: int | None, shares: dict[int, float], mean, low, high, tolerance: float) -> str:
    """The boundary in words, from dH_FFN by layer: means and the bounds of their intervals."""
    layer = boundary or int(mean.argmax()) + 1
    number = f"{mean[layer - 1]:+.3f} nats [{low[layer - 1]:+.3f}, {high[layer - 1]:+.3f}]"
    if boundary:
        return (
            f"layer {layer} is the last whose dH_FFN is positive beyond doubt: {number}; it is the last above "
            f"{tolerance:g} in {100 * shares.get(layer, 0):.0f} % of resamples"
        )
    return (
        f"no layer's dH_FFN is positive beyond doubt: the FFNs only converge; the largest is {number} in layer {layer}"
    )


def _describe_paper_boundary(boundary: int | None, paper: int | None) -> str:
    if boundary == paper:
        return ""
    return f"; by the paper's rule, the last layer with a positive mean, it would be {f'layer {paper}' if paper else 'none'}"


def find_stage_ranges(names: Sequence[str], mean: np.ndarray) -> tuple[dict[str, list[int] | None], float]:
    """Three contiguous ranges of layers that explore, integrate and converge, as the paper gives them (Qwen3-4B: 1 to 6, 7 to
    26, 27 to 36).

    Of all ways to cut the layers in three, the one where most layers are in their range's stage; of several, the one whose
    integrating layers change entropy least.

    Args:
        names (`list[str]`): the stage of each layer.
        mean (`np.ndarray` of shape `(L,)`): mean `dH_FFN`.

    Returns:
        first and last layer by stage (None where the range is empty), and the share of layers that agree.
    """
    size = len(names)

    def merit(cuts: tuple[int, int]) -> tuple[int, float]:
        wanted = (
            [REASONING_STAGES[0]] * cuts[0]
            + [REASONING_STAGES[1]] * (cuts[1] - cuts[0])
            + [REASONING_STAGES[2]] * (size - cuts[1])
        )
        agree = sum(own == other for own, other in zip(names, wanted, strict=True))
        return agree, -float(np.abs(mean[cuts[0] : cuts[1]]).sum())

    first, second = max(combinations_with_replacement(range(size + 1), 2), key=merit)
    ends = zip(REASONING_STAGES, (0, first, second), (first, second, size), strict=True)
    ranges = {stage: [start + 1, stop] if stop > start else None for stage, start, stop in ends}
    return ranges, merit((first, second))[0] / size


def classify_pattern(ranges: dict[str, list[int] | None], fit: float, layers: int) -> tuple[str, str]:
    """The pattern by name, and in words with the numbers that it rests on.

    `progressive`: exploration, integration and convergence one after another, as Qwen's. `abrupt`: convergence in the last
    eighth of the layers or less, as Llama's. `neither` is all else, and what fits no three ranges.
    """
    parts = [f"{stage} {bounds[0]} to {bounds[1]}" for stage, bounds in ranges.items() if bounds]
    numbers = f"{', '.join(parts)}; {100 * fit:.0f} % of the layers agree"
    end = ranges["convergence"]
    if fit < MIN_STAGE_FIT:
        return "neither", f"neither progressive nor abrupt: no three ranges fit (best: {numbers})"
    if end and end[1] - end[0] + 1 <= max(1, layers // ABRUPT_DIVISOR):
        return "abrupt", f"abrupt: converges in the last layers only ({numbers})"
    if all(ranges.values()):
        return "progressive", f"progressive: explores, integrates, converges ({numbers})"
    missing = " and no ".join(stage for stage, bounds in ranges.items() if not bounds)
    return "neither", f"neither progressive nor abrupt: no {missing} ({numbers})"

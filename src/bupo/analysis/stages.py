"""Reasoning stages of a model, from the entropy change of its FFNs: stage of each layer, boundary layer, pattern."""

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np

from bupo.analysis.measures import MEASURES
from bupo.analysis.tables import BootstrapMeans, CompletionSums

ENTROPY_TOLERANCE = 0.05  # nats; a smaller entropy change counts as integration
REASONING_STAGES = ("exploration", "integration", "convergence")
MIN_STAGE_FIT = 2 / 3  # smallest share of layers in the stage of their range, for a pattern
ABRUPT_DIVISOR = 8  # convergence in at most an eighth of the layers is abrupt


def classify_stages(answers: Sequence[CompletionSums], tolerance: float = ENTROPY_TOLERANCE) -> dict:
    """Return stages, boundary and pattern from `dH_FFN`.

    A layer explores if the 95 % interval of its mean `dH_FFN` lies above the tolerance, converges if it lies below minus the
    tolerance, and integrates otherwise. The boundary layer is the last that explores: the last whose `dH_FFN` is significantly
    positive. The paper's rule, the last layer with a positive mean, is reported as well.

    Returns:
        `dict`: `stages` (by layer), `boundary_layer` (`int` or `None`), `boundary_shares` (by layer, the share of resamples in
        which it is the last above the tolerance; key 0 for no layer), `paper_boundary_layer` (by the paper's rule),
        `tolerance` (nats), `explanation`; `ranges` and `fit` of `find_stage_ranges`, `pattern` and `verdict` of
        `classify_pattern`.
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


def _find_last_layer(mask: np.ndarray) -> int | None:
    """Return the last true layer of a mask `(L,)`, counted from 1, or None."""
    indices = np.flatnonzero(mask)
    return int(indices[-1]) + 1 if len(indices) else None


def _describe_boundary(boundary: int | None, shares: dict[int, float], mean, low, high, tolerance: float) -> str:
    """Describe the boundary, given mean and interval of dH_FFN by layer."""
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
    """Return three contiguous ranges of layers that explore, integrate and converge, as in the paper (Qwen3-4B: 1 to 6, 7 to
    26, 27 to 36).

    The split maximises the number of layers in the stage of their range. Ties go to the split whose integrating layers change
    the entropy least.

    Args:
        names (`list[str]`): stage of each layer.
        mean (`np.ndarray` of shape `(L,)`): mean `dH_FFN`.

    Returns:
        first and last layer by stage (None for an empty range), and the share of layers that agree.
    """
    size = len(names)

    def score(cuts: tuple[int, int]) -> tuple[int, float]:
        expected = (
            [REASONING_STAGES[0]] * cuts[0]
            + [REASONING_STAGES[1]] * (cuts[1] - cuts[0])
            + [REASONING_STAGES[2]] * (size - cuts[1])
        )
        num_agreeing = sum(name == stage for name, stage in zip(names, expected, strict=True))
        return num_agreeing, -float(np.abs(mean[cuts[0] : cuts[1]]).sum())

    first, second = max(combinations_with_replacement(range(size + 1), 2), key=score)
    ends = zip(REASONING_STAGES, (0, first, second), (first, second, size), strict=True)
    ranges = {stage: [start + 1, stop] if stop > start else None for stage, start, stop in ends}
    return ranges, score((first, second))[0] / size


def classify_pattern(ranges: dict[str, list[int] | None], fit: float, layers: int) -> tuple[str, str]:
    """Return the pattern's name, and a description with the numbers behind it.

    `progressive`: exploration, integration and convergence one after another, as in Qwen. `abrupt`: convergence in the last
    eighth of the layers or less, as in Llama. `neither`: everything else.
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

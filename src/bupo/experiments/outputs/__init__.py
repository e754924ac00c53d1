"""From finished runs to a figure or table, by kind."""

from collections.abc import Callable

from bupo.experiments.outputs.analysis_cost import cost
from bupo.experiments.outputs.comparison_table import Output
from bupo.experiments.outputs.curves import curves
from bupo.experiments.outputs.dynamics import dynamics
from bupo.experiments.outputs.finished_runs import Finished
from bupo.experiments.outputs.layers import layers
from bupo.experiments.outputs.outcomes import outcomes
from bupo.experiments.outputs.pass_at_k import passes
from bupo.experiments.outputs.scores import scores

OUTPUTS: dict[str, Callable[[Finished], Output]] = {
    "scores": scores,
    "outcomes": outcomes,
    "layers": layers,
    "curves": curves,
    "dynamics": dynamics,
    "passes": passes,
    "cost": cost,
}

__all__ = ["OUTPUTS", "Finished", "Output"]

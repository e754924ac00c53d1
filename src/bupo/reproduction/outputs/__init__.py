"""From finished runs to a figure or table, by kind."""

from collections.abc import Callable

from bupo.reproduction.outputs.cost import cost
from bupo.reproduction.outputs.curves import curves
from bupo.reproduction.outputs.dynamics import dynamics
from bupo.reproduction.outputs.finished import Finished
from bupo.reproduction.outputs.layers import layers
from bupo.reproduction.outputs.outcomes import outcomes
from bupo.reproduction.outputs.passes import passes
from bupo.reproduction.outputs.scores import scores
from bupo.reproduction.outputs.table import Output

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

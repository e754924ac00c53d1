"""From finished runs to a figure or table, by kind."""

from collections.abc import Callable

from bupo.reproduce.outputs.cost import cost
from bupo.reproduce.outputs.curves import curves
from bupo.reproduce.outputs.dynamics import dynamics
from bupo.reproduce.outputs.finished import Finished
from bupo.reproduce.outputs.layers import layers
from bupo.reproduce.outputs.passes import passes
from bupo.reproduce.outputs.scores import scores
from bupo.reproduce.outputs.table import Output

OUTPUTS: dict[str, Callable[[Finished], Output]] = {
    "scores": scores,
    "layers": layers,
    "curves": curves,
    "dynamics": dynamics,
    "passes": passes,
    "cost": cost,
}

__all__ = ["OUTPUTS", "Finished", "Output"]

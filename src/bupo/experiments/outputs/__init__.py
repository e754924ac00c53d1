"""Outputs of finished experiments: figures and tables by kind."""

from collections.abc import Callable

from bupo.experiments.outputs.analysis_cost import make_cost_output
from bupo.experiments.outputs.comparison_table import ExperimentOutput
from bupo.experiments.outputs.curves import make_curves_output
from bupo.experiments.outputs.dynamics import make_dynamics_output
from bupo.experiments.outputs.finished_runs import FinishedExperiment
from bupo.experiments.outputs.layers import make_layers_output
from bupo.experiments.outputs.outcomes import make_outcomes_output
from bupo.experiments.outputs.pass_at_k import make_pass_at_k_output
from bupo.experiments.outputs.scores import make_scores_output

OUTPUT_MAKERS: dict[str, Callable[[FinishedExperiment], ExperimentOutput]] = {
    "scores": make_scores_output,
    "outcomes": make_outcomes_output,
    "layers": make_layers_output,
    "curves": make_curves_output,
    "dynamics": make_dynamics_output,
    "passes": make_pass_at_k_output,
    "cost": make_cost_output,
}

__all__ = ["OUTPUT_MAKERS", "ExperimentOutput", "FinishedExperiment"]

"""Figures, drawn from a run's tables."""

from bupo.reports.figures.analysis import draw_analysis_figure, draw_analysis_figures
from bupo.reports.figures.dynamics import draw_dynamics_figure
from bupo.reports.figures.evaluation import draw_pass_figure
from bupo.reports.figures.training import draw_guard_figure, draw_training_figure

__all__ = [
    "draw_analysis_figure",
    "draw_analysis_figures",
    "draw_dynamics_figure",
    "draw_guard_figure",
    "draw_pass_figure",
    "draw_training_figure",
]

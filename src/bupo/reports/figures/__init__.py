"""Figures. They read a run's tables only, never a model."""

from bupo.reports.figures.analysis import analysis_figure, analysis_figures
from bupo.reports.figures.dynamics import dynamics_figure
from bupo.reports.figures.evaluation import pass_figure
from bupo.reports.figures.training import guard_figure, training_figure

__all__ = ["analysis_figure", "analysis_figures", "dynamics_figure", "guard_figure", "pass_figure", "training_figure"]

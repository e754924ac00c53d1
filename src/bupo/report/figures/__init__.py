"""Figures. They read a run's tables only, never a model."""

from bupo.report.figures.analysis import analysis_figure, analysis_figures
from bupo.report.figures.dynamics import dynamics_figure
from bupo.report.figures.evaluation import pass_figure
from bupo.report.figures.training import guard_figure, training_figure

__all__ = ["analysis_figure", "analysis_figures", "dynamics_figure", "guard_figure", "pass_figure", "training_figure"]

"""Bottom-up policy optimization: train and measure the internal policies of a language model, layer by layer."""

import importlib
from typing import TYPE_CHECKING

from bupo.version import VERSION

if TYPE_CHECKING:  # the names that `__getattr__` resolves
    from bupo.analysis.options import AnalyzeOptions as AnalyzeOptions
    from bupo.analysis.run import analyze as analyze
    from bupo.data.problems import load_problems as load_problems
    from bupo.evaluation.options import EvalOptions as EvalOptions
    from bupo.evaluation.run import evaluate as evaluate
    from bupo.experiments.run import ReproduceOptions as ReproduceOptions
    from bupo.experiments.run import reproduce as reproduce
    from bupo.models.internal_policy import InternalPolicies as InternalPolicies
    from bupo.models.internal_policy import InternalPolicy as InternalPolicy
    from bupo.models.loading import load_model as load_model
    from bupo.models.loading import load_tokenizer as load_tokenizer
    from bupo.models.residual_stream import Family as Family
    from bupo.models.token_scoring import score_tokens as score_tokens
    from bupo.planning.options import PlanOptions as PlanOptions
    from bupo.planning.plan import Plan as Plan
    from bupo.planning.plan import plan as plan
    from bupo.reports.runs_page import report_runs as report_runs
    from bupo.rewards.grader import MathGrader as MathGrader
    from bupo.rewards.math_reward import math_reward as math_reward
    from bupo.training.config import BuPOConfig as BuPOConfig
    from bupo.training.run import TrainingRun as TrainingRun
    from bupo.training.run import train as train
    from bupo.training.train_data import TrainOptions as TrainOptions
    from bupo.training.trainer import BuPOTrainer as BuPOTrainer
    from bupo.utils.errors import UserError as UserError

__version__ = VERSION

_EXPORTS = {
    "AnalyzeOptions": "bupo.analysis.options",
    "BuPOConfig": "bupo.training.config",
    "BuPOTrainer": "bupo.training.trainer",
    "EvalOptions": "bupo.evaluation.options",
    "Family": "bupo.models.residual_stream",
    "InternalPolicies": "bupo.models.internal_policy",
    "InternalPolicy": "bupo.models.internal_policy",
    "MathGrader": "bupo.rewards.grader",
    "Plan": "bupo.planning.plan",
    "PlanOptions": "bupo.planning.options",
    "ReproduceOptions": "bupo.experiments.run",
    "TrainOptions": "bupo.training.train_data",
    "TrainingRun": "bupo.training.run",
    "UserError": "bupo.utils.errors",
    "analyze": "bupo.analysis.run",
    "evaluate": "bupo.evaluation.run",
    "load_model": "bupo.models.loading",
    "load_problems": "bupo.data.problems",
    "load_tokenizer": "bupo.models.loading",
    "math_reward": "bupo.rewards.math_reward",
    "plan": "bupo.planning.plan",
    "report_runs": "bupo.reports.runs_page",
    "reproduce": "bupo.experiments.run",
    "score_tokens": "bupo.models.token_scoring",
    "train": "bupo.training.run",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    # importing torch and TRL takes seconds; `bupo --help` and the graders' child processes do not need them
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'bupo' has no attribute {name!r}")


def __dir__():
    return __all__

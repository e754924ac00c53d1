"""Language models as stacks of policies: measure them, train them from the bottom up."""

import importlib

__version__ = "0.2.0"

_EXPORTS = {
    "BuPOConfig": "bupo.training.config",
    "BuPOTrainer": "bupo.training.trainer",
    "Family": "bupo.model.residual",
    "InternalPolicies": "bupo.model.policy",
    "InternalPolicy": "bupo.model.policy",
    "MathGrader": "bupo.rewards.grader",
    "TrainOptions": "bupo.training.run",
    "TrainingRun": "bupo.training.run",
    "UserError": "bupo.errors",
    "load_problems": "bupo.data.problems",
    "math_reward": "bupo.rewards.math_reward",
    "score_tokens": "bupo.model.scoring",
    "train": "bupo.training.run",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    # torch and TRL take seconds to import: `bupo --help` and the graders' child processes do without
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'bupo' has no attribute {name!r}")


def __dir__():
    return __all__

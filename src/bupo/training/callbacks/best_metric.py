"""Checks of `metric_for_best_model`, which selects checkpoints, stops a run early or lowers its learning rate.

transformers looks the metric up at the first evaluation only, and does not check that the run evaluates at all.
"""

import dis
import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback

from bupo.rewards.math_reward import math_reward
from bupo.utils.errors import UserError

EVAL_PREFIX = "eval_"
METRICS_PER_EVAL_SET = ("loss", "runtime", "samples_per_second", "steps_per_second")
LENGTH_METRICS = (
    "mean_length",
    "min_length",
    "max_length",
    "mean_terminated_length",
    "min_terminated_length",
    "max_terminated_length",
)
EVAL_METRICS = (
    "reward", "reward_std", "frac_reward_zero_std", "entropy", "num_tokens", "completions/clipped_ratio",
    "completions/ungraded_ratio", *(f"completions/{name}" for name in LENGTH_METRICS),
)  # fmt: skip
CLIP_METRICS = tuple(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"))
METRICS_BY_LOSS_TYPE = {
    "cispo": ("cispo_clip_ratio",),
    "vespo": ("vespo/phi_seq_mean",),
    "sapo": (),
}  # for other loss types, CLIP_METRICS
ADAPTIVE_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # schedules that a metric drives; their state holds the rate
GRADING_PREFIX = "grading/"  # metrics of `math_reward`
EVALUATION_METHODS = (
    "evaluate",
    "evaluation_loop",
    "prediction_step",
    "compute_loss",
    "log",
)  # a subclass that overrides one may add metrics
KNOWN_LIBRARIES = ("transformers", "trl", "bupo", "accelerate", "peft")
EXAMPLE_METRICS = ("loss", "reward", "entropy", "completions/mean_length")  # shown in messages


def check_best_metric(
    args: Any,
    functions: Sequence[Any],
    names: Sequence[str | None],
    callbacks: Iterable[Any],
    sets: Mapping[str, Any] | None = None,
    others: Sequence[str] = ("aux_loss",),
    trainer: type | None = None,
) -> None:
    """Refuse options and callbacks that need a metric which no evaluation of the run measures.

    Args:
        args ([`~bupo.BuPOConfig`]): the options.
        functions, names (`list`): the reward functions and TRL's names of them; None for a name that is not known yet.
        callbacks (`list`): of the run.
        sets (`dict`, *optional*): the evaluation problems by name, if there are several sets.
        others (`list[str]`, *optional*): further metrics, or the first part of their names up to a slash.
        trainer (`type`, *optional*): the trainer's class.

    Raises:
        UserError: with the option, and what to do.
    """
    callbacks = list(callbacks)
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    users = sorted({type(callback).__name__ for callback in callbacks if isinstance(callback, EarlyStoppingCallback)})
    users += [f"lr_scheduler_type {scheduler}"] if scheduler in ADAPTIVE_SCHEDULERS else []
    users += ["load_best_model_at_end"] if args.load_best_model_at_end else []
    users += ["save_strategy best"] if getattr(args.save_strategy, "value", args.save_strategy) == "best" else []
    if getattr(args.eval_strategy, "value", args.eval_strategy) == "no":
        if users:
            raise UserError(f"{users[0]} needs evaluations, and eval_strategy is no: set eval_strategy and eval_steps")
        return
    if args.metric_for_best_model is None:
        if users:
            raise UserError(f"{users[0]} needs metric_for_best_model, such as reward with greater_is_better true")
        return
    metric = args.metric_for_best_model.removeprefix(EVAL_PREFIX)
    known = list_eval_metrics(args, names, sets)
    prefixes = [*others, *(["sampling/"] if args.use_vllm else []), *(["rewards/"] if None in names else [])]
    prefixes += [GRADING_PREFIX] if math_reward in functions else []
    if metric in known or any(metric == each or (each.endswith("/") and metric.startswith(each)) for each in prefixes):
        return
    methods = [getattr(trainer, name, None) for name in EVALUATION_METHODS]
    methods += [getattr(type(callback), "on_evaluate", None) for callback in callbacks]
    # user code may add the metric, in a method or by TRL's `log_metric`: the first evaluation shows it
    if any(map(can_log_metrics, functions)) or any(map(_is_user_defined, methods)):
        return
    raise UserError(describe_unknown_metric(args, metric, known))


def describe_unknown_metric(args: Any, metric: str, known: Iterable[str]) -> str:
    """Return the message about a metric that no evaluation measures."""
    examples = [each for each in known if each in EXAMPLE_METRICS or each.endswith(("/mean", "_loss"))]
    note = "; the scores of eval_benchmarks do not select checkpoints" if args.eval_benchmarks else ""
    return f"metric_for_best_model {metric!r} is not measured by evaluations: use {', '.join(examples[:8])}{note}"


def list_eval_metrics(args: Any, names: Sequence[str | None], sets: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of the metrics that TRL's evaluation measures, without `eval_`.

    Args:
        args, names, sets: as for [`check_best_metric`].
    """
    metrics = list(METRICS_PER_EVAL_SET)
    if sets:
        metrics = [f"{each}_{name}" for each in sets for name in METRICS_PER_EVAL_SET]
    metrics += EVAL_METRICS
    metrics += [f"rewards/{name}/{kind}" for name in names if name is not None for kind in ("mean", "std")]
    metrics += METRICS_BY_LOSS_TYPE.get(args.loss_type, CLIP_METRICS)
    metrics += ["kl"] if args.beta != 0 else []
    metrics += ["policy_loss"] if args.entropy_coef or args.use_adaptive_entropy else []
    return metrics


def can_log_metrics(function: Any) -> bool:
    """Return whether a reward function may log further metrics: it uses TRL's `log_metric` or forwards its keyword
    arguments."""
    if isinstance(function, nn.Module) or function is math_reward:
        return False
    if not hasattr(function, "__code__"):
        function = getattr(function, "func", None) or getattr(function, "__wrapped__", None) or type(function).__call__
    code = getattr(function, "__code__", None)
    return not isinstance(code, types.CodeType) or _can_reach_log_metric(code)


def _can_reach_log_metric(code: types.CodeType) -> bool:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    words = (*code.co_varnames, *code.co_names, *code.co_freevars, *code.co_consts)
    calls = [step for step in dis.get_instructions(code) if step.opname == "CALL_FUNCTION_EX"]
    forwards_kwargs = code.co_flags & inspect.CO_VARKEYWORDS and any(step.arg is None or step.arg & 1 for step in calls)
    return "log_metric" in words or bool(forwards_kwargs) or any(map(_can_reach_log_metric, inner))


def _is_user_defined(function: Any) -> bool:
    """Return whether a method is defined outside the known libraries, which add no further metrics."""
    return function is not None and getattr(function, "__module__", "").split(".")[0] not in KNOWN_LIBRARIES


def get_metric_value(args: Any, metrics: Mapping[str, Any]) -> Any:
    """Return the metric that `metric_for_best_model` names, or None if the evaluation did not measure it."""
    return metrics.get(EVAL_PREFIX + args.metric_for_best_model.removeprefix(EVAL_PREFIX))

"""The metric that chooses checkpoints, stops a run early or lowers its learning rate: one that an evaluation measures.

transformers looks for it at the first evaluation only, and an evaluation that a run never makes chooses nothing.
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
}  # others: `CLIPPED`
ADAPTIVE_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")
GRADING_PREFIX = "grading/"  # metrics of `math_reward`
EVALUATION_METHODS = (
    "evaluate",
    "evaluation_loop",
    "prediction_step",
    "compute_loss",
    "log",
)  # methods that may measure more
KNOWN_LIBRARIES = ("transformers", "trl", "bupo", "accelerate", "peft")
EXAMPLE_METRICS = ("loss", "reward", "entropy", "completions/mean_length")  # in messages


def check_best_metric(
    args: Any,
    functions: Sequence[Any],
    names: Sequence[str | None],
    callbacks: Iterable[Any],
    sets: Mapping[str, Any] | None = None,
    others: Sequence[str] = ("aux_loss",),
    trainer: type | None = None,
) -> None:
    """Refuse options and callbacks that need a metric which no evaluation of the run will measure.

    Args:
        args ([`~bupo.BuPOConfig`]): the options.
        functions, names (`list`): the reward functions and TRL's names of them; None where a name is not known yet.
        callbacks (`list`): of the run.
        sets (`dict`, *optional*): the evaluation problems by name, where there are several sets.
        others (`list[str]`, *optional*): further metrics, or the first part of their names up to a slash.
        trainer (`type`, *optional*): the trainer's class.

    Raises:
        UserError: with the option, and what to do.
    """
    callbacks = list(callbacks)
    kinds = {type(callback).__name__ for callback in callbacks if isinstance(callback, EarlyStoppingCallback)}
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    needing = [f"{name}" for name in sorted(kinds)]
    needing += [f"lr_scheduler_type {kind}"] if kind in ADAPTIVE_SCHEDULERS else []
    needing += ["load_best_model_at_end"] if args.load_best_model_at_end else []
    needing += ["save_strategy best"] if getattr(args.save_strategy, "value", args.save_strategy) == "best" else []
    if getattr(args.eval_strategy, "value", args.eval_strategy) == "no":
        if needing:
            raise UserError(
                f"{needing[0]} needs evaluations, and eval_strategy is no: set eval_strategy and eval_steps"
            )
        return
    if args.metric_for_best_model is None:
        if needing:
            raise UserError(f"{needing[0]} needs metric_for_best_model, such as reward with greater_is_better true")
        return
    name = args.metric_for_best_model.removeprefix(EVAL_PREFIX)
    known = list_eval_metrics(args, names, sets)
    begins = [*others, *(["sampling/"] if args.use_vllm else []), *(["rewards/"] if None in names else [])]
    begins += [GRADING_PREFIX] if math_reward in functions else []
    if name in known or any(name == each or (each.endswith("/") and name.startswith(each)) for each in begins):
        return
    written = [getattr(trainer, name, None) for name in EVALUATION_METHODS]  # in a class that a user has derived
    written += [getattr(type(callback), "on_evaluate", None) for callback in callbacks]
    if any(map(can_log_metrics, functions)) or any(map(_is_user_defined, written)):
        return  # by TRL's `log_metric`, or into the metrics of an evaluation: the first evaluation tells
    raise UserError(describe_unknown_metric(args, name, known))


def describe_unknown_metric(args: Any, name: str, known: Iterable[str]) -> str:
    """Return the message about a metric that no evaluation measures."""
    known = list(known)
    shown = [each for each in known if each in EXAMPLE_METRICS or each.endswith(("/mean", "_loss"))]
    scores = "; the scores of eval_benchmarks choose no checkpoint" if args.eval_benchmarks else ""
    return f"metric_for_best_model {name!r} is not what an evaluation measures: give {', '.join(shown[:8])}{scores}"


def list_eval_metrics(args: Any, names: Sequence[str | None], sets: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of what TRL's evaluation of a run measures, without `eval_`.

    Args:
        args, names, sets: as of [`check_best_metric`].
    """
    found = [f"{each}_{name}" for each in sets for name in METRICS_PER_EVAL_SET] if sets else list(METRICS_PER_EVAL_SET)
    found += EVAL_METRICS
    found += [f"rewards/{name}/{kind}" for name in names if name is not None for kind in ("mean", "std")]
    found += METRICS_BY_LOSS_TYPE.get(args.loss_type, CLIP_METRICS)
    found += ["kl"] if args.beta != 0 else []
    found += ["policy_loss"] if args.entropy_coef or args.use_adaptive_entropy else []
    return found


def can_log_metrics(function: Any) -> bool:
    """Return whether a reward function may log unknown metrics: it names TRL's `log_metric`, or hands its arguments on."""
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
    hands_on = code.co_flags & inspect.CO_VARKEYWORDS and any(step.arg is None or step.arg & 1 for step in calls)
    return "log_metric" in words or bool(hands_on) or any(map(_can_reach_log_metric, inner))


def _is_user_defined(function: Any) -> bool:
    """Return whether a method comes from none of the libraries, which are known to add no metric."""
    return function is not None and getattr(function, "__module__", "").split(".")[0] not in KNOWN_LIBRARIES


def get_metric_value(args: Any, metrics: Mapping[str, Any]) -> Any:
    """Return the metric of an evaluation, and None where it was not measured."""
    return metrics.get(EVAL_PREFIX + args.metric_for_best_model.removeprefix(EVAL_PREFIX))

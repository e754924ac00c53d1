"""Check that TRL can call the reward functions, before a model is loaded.

TRL calls a reward function by keyword: `prompts`, `completions`, `completion_ids`, every other column of the data set,
`trainer_state`, `log_extra`, `log_metric`, and `environments` where there are any.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from torch import nn

from bupo.data.problems import check_prompt_texts
from bupo.rewards.math_reward import math_reward
from bupo.utils.errors import UserError

TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
DROPPED_COLUMNS = ("prompt", "completion")  # columns that TRL does not pass
NAME_SUGGESTIONS = {"prompt": "prompts", "completion": "completions", "completions_ids": "completion_ids"}


def check_signatures(
    rewards: Any,
    datasets: Iterable[Any],
    remove_unused_columns: bool = False,
    environments: bool = False,
    more_columns: bool = False,
) -> None:
    """Check that the parameters of reward functions are those that TRL passes.

    Reward models, model names and callables without a signature are left to TRL.

    Args:
        rewards: a reward or a list of them, as for [`~trl.GRPOTrainer`].
        datasets: datasets to train and evaluate on; None and nested dicts are allowed. Datasets without known columns, such as
            some streams, are not checked.
        remove_unused_columns (`bool`, *optional*, defaults to `False`): TRL's option, with which it passes no column.
        environments (`bool`, *optional*, defaults to `False`): whether there is an `environment_factory`.
        more_columns (`bool`, *optional*, defaults to `False`): whether a `rollout_func` may add columns.

    Raises:
        UserError: with the function, its missing columns and the columns of the problems.
    """
    functions = [reward for reward in as_list(rewards) if callable(reward) and not isinstance(reward, nn.Module)]
    for columns in filter(None, map(get_column_names, _flatten_datasets(datasets))):
        passable = [] if remove_unused_columns else [column for column in columns if column not in DROPPED_COLUMNS]
        for function in functions:
            _check_column_clash(function, passable)
            _check_parameters(function, passable, columns, environments, more_columns)


def check_rewards(rewards: Sequence[Any], args: Any) -> None:
    """Raise [`UserError`] for an empty list of rewards, or for weights that do not match their number."""
    if not rewards:
        raise UserError("reward_funcs is empty: give 'math' or a dotted import path such as my_rewards.f")
    weights = args.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise UserError(f"reward_weights holds {len(weights)} weights for {len(rewards)} reward_funcs: give one each")


def check_inputs(
    rewards: Any,
    args: Any,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    *positional: Any,
    rollout_func: Any = None,
    environment_factory: Any = None,
    **others: Any,
) -> None:
    """Check that a trainer can use its datasets and rewards together. Arguments as for [`~trl.GRPOTrainer`].

    Raises:
        UserError: for prompts that are messages written as text, or a reward that TRL cannot call.
    """
    check_signatures(
        rewards,
        (train_dataset, eval_dataset),
        bool(args.remove_unused_columns),
        environments=environment_factory is not None,
        more_columns=rollout_func is not None,
    )
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        for rows in _flatten_datasets([dataset]):
            if isinstance(rows, Dataset):
                check_prompt_texts(rows, name)


def as_list(rewards: Any) -> list:
    """Return one reward or several as a list."""
    if rewards is None:
        return []
    return list(rewards) if isinstance(rewards, list | tuple) else [rewards]


def get_column_names(dataset: Any) -> list[str] | None:
    """Return the columns of a dataset, or None if they are not known without reading a row."""
    names = getattr(dataset, "column_names", None)
    format_type = (getattr(dataset, "format", None) or {}).get("type") if hasattr(dataset, "format") else None
    return list(names) if isinstance(names, list) and format_type != "custom" else None


def _flatten_datasets(datasets: Iterable[Any]) -> Iterable[Any]:
    for dataset in datasets:
        if isinstance(dataset, Mapping):
            yield from _flatten_datasets(dataset.values())
        else:
            yield dataset


def _get_function_name(function: Callable) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _check_column_clash(function: Callable, columns: Sequence[str]) -> None:
    clashing = [column for column in columns if column in ("prompts", "completions")]  # TRL overwrites the others
    if clashing:
        raise UserError(
            f"the problems have a column {clashing[0]}, and TRL passes another {clashing[0]} to reward functions such as "
            f"{_get_function_name(function)}: rename the column"
        )


def _check_parameters(
    function: Callable, columns: Sequence[str], all_columns: Sequence[str], environments: bool, more_columns: bool
) -> None:
    """Compare a function's parameters with the arguments of TRL's call."""
    try:
        # a decorator's own parameters count: it may supply arguments of the decorated function
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (ValueError, TypeError):  # built-in functions
        return
    passed = [*TRL_ARGUMENTS, *columns, *(["environments"] if environments else [])]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_position = [p.name for p in required if p.kind is p.POSITIONAL_ONLY]
    missing = [p.name for p in required if p.name not in passed and p.name not in by_position]
    if function is math_reward and "answer" not in columns:
        missing.append("answer")
    names = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    refused = [] if open_ended else [name for name in passed if name not in names]
    if by_position:
        raise UserError(
            f"reward function {_get_function_name(function)} takes {', '.join(by_position)} by position only, and TRL passes "
            "all by name: leave out the / in its parameters"
        )
    if missing and not more_columns:
        raise UserError(
            f"reward function {_get_function_name(function)} needs {_describe_mismatch(missing, columns, all_columns)}"
        )
    if refused:
        raise UserError(
            f"reward function {_get_function_name(function)} does not take {', '.join(refused)}, which TRL passes by name: "
            "add **kwargs to its parameters"
        )


def _describe_mismatch(missing: Sequence[str], columns: Collection[str], all_columns: Sequence[str]) -> str:
    """Return the missing arguments, the available columns and a remedy."""
    misspelt = [name for name in missing if name in NAME_SUGGESTIONS and name not in columns]
    if misspelt:
        corrections = ", ".join(f"{NAME_SUGGESTIONS[name]}, not {name}" for name in misspelt)
        return (
            f"an argument {', '.join(misspelt)}, which TRL does not pass: it passes {corrections}; rename the parameter"
        )
    available = ", ".join(all_columns) or "none"
    if set(missing) <= set(all_columns):
        return (
            f"the column {', '.join(missing)}, which remove_unused_columns removes: leave that option out; "
            f"columns: {available}"
        )
    kind = "column" if len(missing) == 1 else "columns"
    return (
        f"the {kind} {', '.join(missing)}, and the columns of the problems are {available}: rename a column or the parameter, "
        "or give it a default value"
    )

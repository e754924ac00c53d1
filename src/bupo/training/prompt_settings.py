"""Prompt and sampling settings of a training run, saved with its model so that evaluations use the same."""

from pathlib import Path
from typing import Any

from bupo.data.prompt_settings import TrainingPromptSettings
from bupo.models.generation_settings import find_unaccounted_settings
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.files import make_folder

MAX_CHECKED_PROBLEMS = 64  # spread over the data set


def get_shared_system_prompt(problems: Any) -> str | None:
    """Return the system message that all checked problems begin with, or None. Streams of problems are not read."""
    try:
        step = max(1, len(problems) // MAX_CHECKED_PROBLEMS)
        rows = [problems[index] for index in range(0, len(problems), step)]
    except TypeError:
        return None
    messages = {_get_system_message(row.get("prompt")) for row in rows}
    return messages.pop() if len(messages) == 1 else None


def _get_system_message(prompt: Any) -> str | None:
    """Return the system message of a conversational prompt, or None."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if not isinstance(first, dict) or first.get("role") != "system":
        return None
    return first["content"] if isinstance(first.get("content"), str) else None


def get_prompt_settings(trainer: GRPOTrainerHooks) -> TrainingPromptSettings:
    """Return the prompt and sampling settings of a trainer's options, with the system message of its problems."""
    args = trainer.args
    sampling = find_unaccounted_settings(
        {name: getattr(args, name) for name in ("top_k", "min_p", "repetition_penalty")}
    )
    return TrainingPromptSettings(
        trainer.system_prompt or get_shared_system_prompt(trainer.train_dataset),
        dict(args.chat_template_kwargs or {}),
        args.max_completion_length,
        float(args.temperature),
        1.0 if args.top_p is None else float(args.top_p),
        sampling | dict(args.generation_kwargs or {}),
    )


def write_prompt_settings(trainer: GRPOTrainerHooks, folder: Path) -> None:
    """Write `evaluation.json` into the folder of a model that was just saved."""
    if trainer.args.should_save:
        make_folder(folder)
        get_prompt_settings(trainer).write(folder)

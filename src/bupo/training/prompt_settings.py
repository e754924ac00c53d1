"""What a run knows of how its model is to be evaluated: as it was asked and sampled while it was trained."""

from pathlib import Path
from typing import Any

from bupo.data.prompt_settings import TrainingPromptSettings
from bupo.models.generation_settings import find_unaccounted_settings
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.files import make_folder

MAX_CHECKED_PROBLEMS = 64  # problems, spread over all


def get_shared_system_prompt(problems: Any) -> str | None:
    """The system message that problems begin with, where they share one. A stream of problems is not looked at."""
    try:
        rows = [problems[place] for place in range(0, len(problems), max(1, len(problems) // MAX_CHECKED_PROBLEMS))]
    except TypeError:
        return None
    found = {_get_system_message(row.get("prompt")) for row in rows}
    return found.pop() if len(found) == 1 else None


def _get_system_message(prompt: Any) -> str | None:
    """The system message of a prompt, if it is of messages and begins with one."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if not isinstance(first, dict) or first.get("role") != "system":
        return None
    return first["content"] if isinstance(first.get("content"), str) else None


def get_prompt_settings(trainer: GRPOTrainerHooks) -> TrainingPromptSettings:
    """How a trainer asks its model: by its options, and by the system message of its problems."""
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
    """Beside a model that has just been saved, `evaluation.json`."""
    if trainer.args.should_save:
        make_folder(folder)
        get_prompt_settings(trainer).write(folder)

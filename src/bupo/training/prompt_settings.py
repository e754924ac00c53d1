"""What a run knows of how its model is to be evaluated: as it was asked and sampled while it was trained."""

from pathlib import Path
from typing import Any

from bupo.data.prompt_settings import AsTrained
from bupo.models.generation_settings import unaccounted
from bupo.training.trl_internals import TRLTrainer
from bupo.utils.files import make_folder

LOOKED_AT = 64  # problems, spread over all


def system_prompt_of(problems: Any) -> str | None:
    """The system message that problems begin with, where they share one. A stream of problems is not looked at."""
    try:
        rows = [problems[place] for place in range(0, len(problems), max(1, len(problems) // LOOKED_AT))]
    except TypeError:
        return None
    found = {_system(row.get("prompt")) for row in rows}
    return found.pop() if len(found) == 1 else None


def _system(prompt: Any) -> str | None:
    """The system message of a prompt, if it is of messages and begins with one."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if not isinstance(first, dict) or first.get("role") != "system":
        return None
    return first["content"] if isinstance(first.get("content"), str) else None


def as_asked(trainer: TRLTrainer) -> AsTrained:
    """How a trainer asks its model: by its options, and by the system message of its problems."""
    args = trainer.args
    sampling = unaccounted({name: getattr(args, name) for name in ("top_k", "min_p", "repetition_penalty")})
    return AsTrained(
        trainer.system_prompt or system_prompt_of(trainer.train_dataset),
        dict(args.chat_template_kwargs or {}),
        args.max_completion_length,
        float(args.temperature),
        1.0 if args.top_p is None else float(args.top_p),
        sampling | dict(args.generation_kwargs or {}),
    )


def write(trainer: TRLTrainer, folder: Path) -> None:
    """Beside a model that has just been saved, `evaluation.json`."""
    if trainer.args.should_save:
        make_folder(folder)
        as_asked(trainer).write(folder)

"""What a run knows of how its model is to be evaluated: as it was asked and sampled while it was trained."""

from pathlib import Path
from typing import Any

from bupo.data.as_trained import AsTrained
from bupo.training.seam import TRLTrainer

LOOKED_AT = 64  # problems, spread over all
USUAL = {"top_k": (None, 0, -1), "min_p": (None, 0.0), "repetition_penalty": (None, 1.0)}


def system_prompt_of(problems: Any) -> str | None:
    """The system message that problems begin with, where they share one. A stream of problems is not looked at."""
    try:
        rows = [problems[place] for place in range(0, len(problems), max(1, len(problems) // LOOKED_AT))]
    except TypeError:
        return None
    prompts = [row.get("prompt") for row in rows]
    first = [prompt[0] if isinstance(prompt, list) and prompt else {} for prompt in prompts]
    found = {message["content"] if message.get("role") == "system" else None for message in first}
    return found.pop() if len(found) == 1 else None


def as_asked(trainer: TRLTrainer) -> AsTrained:
    """How a trainer asks its model: by its options, and by the system message of its problems."""
    args = trainer.args
    sampling = {name: getattr(args, name) for name, usual in USUAL.items() if getattr(args, name) not in usual}
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
        as_asked(trainer).write(folder)

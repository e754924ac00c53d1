"""A model's card: how it was trained, what it came to, and how to go on with it. `push_to_hub` sends it along, as TRL's."""

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from bupo.files import in_one_piece
from bupo.text import printable
from bupo.training.config import BuPOConfig
from bupo.training.seam import TRLTrainer
from bupo.version import VERSION

CARD = "README.md"
TAGS = ["bupo", "grpo", "trl", "generated_from_trainer"]
PACKAGES = ("transformers", "trl", "torch")
SHOWN = {
    "reward": "reward",
    "entropy": "entropy of the policy (nats)",
    "completions/mean_length": "answer length (tokens)",
}
CITATION = """@misc{bupo2025,
  title         = {Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies},
  year          = {2025},
  eprint        = {2512.19673},
  archivePrefix = {arXiv}
}"""


def create(
    trainer: TRLTrainer, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
) -> None:
    """As TRL's `create_model_card`, into the run's folder."""
    if trainer.is_world_process_zero():
        write(trainer, Path(trainer.args.output_dir), model_name, dataset_name, tags)


def write(
    trainer: TRLTrainer,
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Beside a model that has just been saved, its card."""
    if not trainer.args.should_save:
        return
    folder.mkdir(parents=True, exist_ok=True)
    name = model_name or trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name
    found = of_model(trainer, name, dataset_name, [tags] if isinstance(tags, str) else list(tags or []))
    with in_one_piece(folder / CARD) as part:
        part.write_text(found, encoding="utf-8")


def of_model(trainer: TRLTrainer, name: str, dataset: str | None, tags: list[str]) -> str:
    """The card as Markdown, its head as the hub reads it. Folders of this machine are not named."""
    args = trainer.args
    data = ModelCardData(
        base_model=_on_the_hub(trainer.model.config.name_or_path),
        datasets=_on_the_hub(dataset or trainer.dataset_name),
        library_name="peft" if hasattr(trainer.model, "peft_config") else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({*TAGS, *tags}),
    )
    rows = [row for row in trainer.state.log_history if "reward" in row and "rollout_batch" in row]
    parts = [
        f"# {printable(name)}",
        f"Trained by {_method(trainer)} with [bupo](https://arxiv.org/abs/2512.19673) {VERSION}.",
        _table(("", ""), _setting(trainer, args)),
        "## What it came to",
        _table(("of rollout batch", *SHOWN.values()), _results(rows)) if rows else "Nothing was logged.",
        *_evaluations(trainer.state.log_history),
        "## Go on with it",
        "```\n"
        "bupo eval --model FOLDER --benchmarks math500:16     # asked and sampled as it was trained\n"
        "bupo analyze --model FOLDER                          # what every layer decides\n"
        "bupo train --config FOLDER/config.yaml               # the same run again\n"
        "```",
        "## Cite",
        f"```bibtex\n{CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _on_the_hub(name: str | None) -> str | None:
    """The name of a model or data set, if it is of the hub, and no folder's."""
    if not name or name.count("/") != 1 or name.startswith((".", "/", "~")) or os.path.exists(name):
        return None
    return name


def _method(trainer: TRLTrainer) -> str:
    estimator = trainer.args.advantage_estimator.upper()
    return f"BuPO ({estimator}'s advantages)" if _stages(trainer) else estimator


def _stages(trainer: TRLTrainer) -> list[tuple[int, int]]:
    """Layers and lengths of the first phase as it was: `auto` and the guard have decided."""
    return [(stage.layer, stage.batches) for stage in trainer.watch.schedule.stages if stage.layer and stage.batches]


def _setting(trainer: TRLTrainer, args: BuPOConfig) -> list[tuple[str, str]]:
    phases = [f"layer {layer} for {batches} rollout batches" for layer, batches in _stages(trainer)]
    answers = args.generation_batch_size
    rows = {
        "first phase": ", then ".join(phases) or "none",
        "policy of the first phase": f"{args.internal_objective}, {args.internal_module}, lens {args.internal_lens}"
        if phases
        else "",
        "rollout batch": f"{answers // args.num_generations} prompts, {args.num_generations} answers to each",
        "updates": f"{trainer.state.global_step} of {trainer.state.max_steps}",
        "loss": f"{args.loss_type}, epsilon {args.epsilon}, beta {args.beta}",
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "layers": _layers(args),
        "sampling": f"temperature {args.temperature:g}, at most {args.max_completion_length} tokens",
        "seed": str(args.seed),
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }
    return [(name, said) for name, said in rows.items() if said]


def _layers(args: BuPOConfig) -> str:
    """Those that are trained less."""
    if args.frozen_up_to_layer:
        return f"1 to {args.frozen_up_to_layer} frozen"
    if args.slow_above_layer:
        return f"above {args.slow_above_layer} at {args.slow_factor:g} of the learning rate"
    return "rates " + ", ".join(f"{rate:g}" for rate in args.layer_rates) if args.layer_rates else ""


def _results(rows: list[dict]) -> list[tuple[str, ...]]:
    """The first and the last rollout batch that were logged."""
    return [
        (f"{row['rollout_batch']:g}", *(f"{row[name]:.3f}" if name in row else "" for name in SHOWN))
        for row in (rows[:1] if len(rows) == 1 else [rows[0], rows[-1]])
    ]


def _evaluations(history: list[dict]) -> list[str]:
    """The first and last evaluation while training, of each benchmark."""
    found: dict[str, list[float]] = {}
    for row in history:
        for name, value in row.items():
            if name.startswith("eval_") and "/avg@" in name:
                found.setdefault(name.removeprefix("eval_"), []).append(value)
    rows = [
        (printable(name), f"{100 * values[0]:.1f} %", f"{100 * values[-1]:.1f} %") for name, values in found.items()
    ]
    return [_table(("benchmark", "first", "last"), rows)] if rows else []


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

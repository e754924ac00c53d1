"""Model card of a run: training settings, results and commands. `push_to_hub` uploads it, like TRL's."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from bupo.run_files.provenance import CONFIG_FILE
from bupo.training.config import BuPOConfig
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.files import make_folder, write_text
from bupo.utils.log_values import format_number, get_number, get_numbers
from bupo.utils.sanitize import escape_markdown_cell, escape_text, format_markdown_table
from bupo.version import VERSION

CARD_FILE = "README.md"
TAGS = ["bupo", "trl", "generated_from_trainer"]
PACKAGES = ("transformers", "trl", "torch")
METRIC_LABELS = {
    "reward": "reward",
    "entropy": "entropy of the policy (nats)",
    "completions/mean_length": "answer length (tokens)",
}
UNGRADED = "not graded"
OBJECTIVE_LABELS = {
    "layer": "the layer's policy",
    "frozen_upper": "the final layer's policy, with the layers above frozen (a control)",
    "shuffled_vocab": "the layer's policy over a shuffled vocabulary (a control)",
}
CITATION = """@misc{bupo2025,
  title         = {Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies},
  year          = {2025},
  eprint        = {2512.19673},
  archivePrefix = {arXiv}
}"""


def create_model_card(
    trainer: GRPOTrainerHooks, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
) -> None:
    """Write the card into the run's folder. Replaces TRL's `create_model_card`."""
    write_model_card(trainer, Path(trainer.args.output_dir), model_name, dataset_name, tags)


def write_model_card(
    trainer: GRPOTrainerHooks,
    folder: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Write the card into the folder of a model that was just saved.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): of the run.
        folder (`Path`): with the model.
        model_name, dataset_name (`str`, *optional*): for the card; by default those of the run.
        tags (`str` or `list[str]`, *optional*): further tags.
    """
    if not trainer.args.should_save:
        return
    make_folder(folder)
    name = model_name or (trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name).split("/")[-1]
    card = render_model_card(trainer, name, dataset_name, [tags] if isinstance(tags, str) else list(tags or []))
    write_text(folder / CARD_FILE, card)


def render_model_card(trainer: GRPOTrainerHooks, name: str, dataset: str | None, tags: list[str]) -> str:
    """Return the card as Markdown, with the hub's YAML metadata. It names no local folders."""
    args, history, base = trainer.args, trainer.state.log_history, _get_hub_id(trainer.model.config.name_or_path)
    adapter = hasattr(trainer.model, "peft_config")
    data = ModelCardData(
        base_model=base,
        datasets=dataset or _get_hub_id(trainer.dataset_name),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({*TAGS, *tags}),
    )
    parts = [
        f"# {escape_markdown_cell(escape_text(name))}",
        f"Trained by {_describe_method(trainer)} with bupo {VERSION} ([arXiv 2512.19673](https://arxiv.org/abs/2512.19673)).",
        format_markdown_table(
            [{"setting": name, "value": value} for name, value in _describe_run(trainer).items() if value]
        ),
        "## Results",
        _format_results(history) or "Nothing was logged.",
        _format_evaluations(history),
        "## Use",
        f"```\n{_format_commands(args, base, adapter)}\n```",
        "## Cite",
        f"```bibtex\n{CITATION}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _get_hub_id(name: str | None) -> str | None:
    """Return the name of a model or data set if it is a hub id, not a folder."""
    if not name or name.count("/") != 1 or name.startswith((".", "/", "~")) or os.path.exists(name):
        return None
    return name


def _format_commands(args: BuPOConfig, base: str | None, adapter: bool) -> str:
    model = f"--model {base or 'BASE'} --adapter FOLDER" if adapter else "--model FOLDER"
    comments = {
        f"bupo eval {model} --benchmarks math500:16": "prompts and sampling as in training",
        f"bupo analyze {model}": "policies of all layers",
    }
    if (Path(args.output_dir) / CONFIG_FILE).exists():
        comments[f"bupo train --config FOLDER/{CONFIG_FILE}"] = "repeat the run"
    width = max(map(len, comments)) + 4
    return "\n".join(f"{command.ljust(width)}# {comment}" for command, comment in comments.items())


def _describe_method(trainer: GRPOTrainerHooks) -> str:
    estimator = trainer.args.advantage_estimator.upper()
    uses_bupo = _list_stages(trainer) or trainer.args.has_auxiliary_objective
    return f"BuPO ({estimator} advantages)" if uses_bupo else estimator


def _list_stages(trainer: GRPOTrainerHooks) -> list[tuple[int, int]]:
    """Return the layers and lengths of the first phase as trained, after `auto` and early stopping."""
    return [
        (stage.layer, stage.batches)
        for stage in trainer.phase_controller.schedule.stages
        if stage.layer and stage.batches
    ]


def _format_count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def _describe_run(trainer: GRPOTrainerHooks) -> dict[str, str]:
    args = trainer.args
    phases = [
        f"layer {layer} for {_format_count(batches, 'rollout batch', 'rollout batches')}"
        for layer, batches in _list_stages(trainer)
    ]
    module = "" if args.internal_module == "layer" else f", of the layer's {args.internal_module}"
    prompts = _format_count(args.generation_batch_size // args.num_generations, "prompt", "prompts")
    return {
        "first phase": ", then ".join(phases) or "none",
        "objective of the first phase": f"{OBJECTIVE_LABELS[args.internal_objective]}{module}, lens {args.internal_lens}"
        if phases
        else "",
        "second phase": _describe_second_phase(args),
        "rollout batch": f"{prompts}, {_format_count(args.num_generations, 'answer', 'answers')} each",
        "updates": f"{trainer.state.global_step} of {trainer.state.max_steps}",
        "loss": f"{args.loss_type}, epsilon {args.epsilon}, beta {args.beta}",
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "layers": _describe_layer_rates(args),
        "sampling": f"temperature {args.temperature:g}, at most {args.max_completion_length} tokens",
        "seed": str(args.seed),
        "versions": ", ".join(f"{package} {version(package)}" for package in PACKAGES),
    }


def _describe_second_phase(args: BuPOConfig) -> str:
    """Return how much of the layer's objective remains in the second phase."""
    parts = []
    if batches := args.internal_fade_batches:
        parts.append(
            f"the layer's objective fades out over {_format_count(batches, 'rollout batch', 'rollout batches')}"
        )
    if args.internal_loss_weight:
        parts.append(f"the layer's objective has weight {args.internal_loss_weight:g}")
    return ", ".join(parts)


def _describe_layer_rates(args: BuPOConfig) -> str:
    """Return the layers that are frozen or have another learning rate."""
    parts = []
    if args.frozen_up_to_layer:
        parts.append(f"1 to {args.frozen_up_to_layer} frozen")
    multipliers = args.layer_lr_multipliers
    if isinstance(multipliers, dict):
        parts += [
            f"{layer} and above at {multiplier:g} of the learning rate" for layer, multiplier in multipliers.items()
        ]
    elif multipliers:
        parts.append("learning rate times " + ", ".join(f"{multiplier:g}" for multiplier in multipliers))
    return "; ".join(parts)


def _format_results(history: list[dict]) -> str:
    """Return a table of the first and last logged rollout batch."""
    rows = [get_numbers(row) for row in history]
    rows = [row for row in rows if "rollout_batch" in row]
    rows = [
        row for row in rows if "completions/mean_length" in row
    ] or rows  # the first log of a batch holds its rewards
    shown = {row["rollout_batch"]: row for row in rows[:1] + rows[-1:]}
    table = [
        {"of rollout batch": f"{batch:g}"} | {label: _format_metric(row, name) for name, label in METRIC_LABELS.items()}
        for batch, row in shown.items()
    ]
    return format_markdown_table(table) if table else ""


def _format_metric(row: dict[str, float], name: str) -> str:
    """Return a metric of a rollout batch, or why it has none."""
    return UNGRADED if name == "reward" and row.get("completions/ungraded_ratio") == 1 else format_number(row.get(name))


def _format_evaluations(history: list[dict]) -> str:
    """Return a table of the first and last evaluation of each benchmark during training."""
    scores: dict[str, list[Any]] = {}
    for row in history:
        for name, value in row.items():
            if name.startswith("eval_") and "/avg@" in name:
                scores.setdefault(name.removeprefix("eval_"), []).append(
                    None if get_number(value) is None else 100 * value
                )
    table = [
        {
            "benchmark": escape_markdown_cell(escape_text(name)),
            "first": format_number(values[0], ".1f", " %"),
            "last": format_number(values[-1], ".1f", " %"),
        }
        for name, values in scores.items()
    ]
    return format_markdown_table(table) if table else ""

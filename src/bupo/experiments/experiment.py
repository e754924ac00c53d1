"""Figures and tables of the paper as runs of the public commands, at a scale. Each is a short YAML file in `definitions/`.

A file has a `title`, its `source` in the paper, a `kind` (its runs and its output), the paper's numbers as `printed`, and its
`rows` by scale: a method of the scale, or a method with other options. Models, methods, seeds and evaluation of a scale are in
`scales.yaml`.
"""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bupo.utils.errors import UserError

EXPERIMENTS_FOLDER = Path(__file__).parent / "definitions"
RECIPES_FOLDER = Path(__file__).parents[1] / "recipes"
PROBLEMS_FOLDER = Path(__file__).parent / "problems"
SCALES_FILE = "scales.yaml"
MAX_RUN_NAME_LENGTH = 120  # characters of a folder's name
# commands whose runs a kind of figure or table needs
COMMANDS_BY_KIND: dict[str, tuple[str, ...]] = {
    "scores": ("train", "eval"),
    "outcomes": ("train", "eval"),
    "layers": ("analyze",),
    "curves": ("train",),
    "dynamics": ("train",),
    "passes": ("train", "eval"),
    "cost": ("train", "analyze"),
}
EXPERIMENT_NAMES = tuple(sorted(
    (path.stem for path in EXPERIMENTS_FOLDER.glob("*.yaml") if path.name != SCALES_FILE),
    key=lambda name: (not name.startswith("fig"), not name.startswith("table"), int("".join(filter(str.isdigit, name)) or 0)),
))  # fmt: skip


@dataclass(frozen=True)
class CommandRun:
    """One run of a public command.

    Attributes:
        name (`str`): of its folder. Experiments that need the same run share it.
        command (`str`): `train`, `eval` or `analyze`.
        options (`dict`): of the command, without `output`.
        recipe (`str`, *optional*): a recipe that the options override, such as `cpu/embedded-bupo`.
        needs (`CommandRun`, *optional*): the run whose model this one reads. In options, `{run}` is its folder, and
            `{problems}` the folder of the problems that come with the experiments.
        launch (`tuple[str, ...]`): words before the command, such as a launcher on a cluster.
        cost (`float`): an estimate, in seconds or in the GPU hours of the scale.
    """

    name: str
    command: str
    options: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    needs: "CommandRun | None" = None
    launch: tuple[str, ...] = ()
    cost: float = 0.0

    def get_arguments(self, get_run_folder: Callable[[str], Path]) -> list[str]:
        """Return the words of the command line.

        Args:
            get_run_folder (`Callable`): returns the folder of a run by its name.
        """
        start = list(self.launch) or [sys.executable, "-m", "bupo.cli.main"]
        flags = ["--config", str(RECIPES_FOLDER / f"{self.recipe}.yaml")] if self.recipe else []
        model = {"model": str(get_run_folder(self.needs.name))} if self.needs else {}
        placeholders = {"run": model.get("model"), "problems": PROBLEMS_FOLDER}
        for name, value in {**model, **self.options}.items():
            texts = [item if isinstance(item, str) else json.dumps(item) for item in _as_list(value)]
            flags += [f"--{name}", *(_fill_placeholders(text, placeholders) for text in texts)]
        resume = ["--resume_from_checkpoint", "true"] if self.command == "train" else []
        return [*start, self.command, *flags, *resume, "--output", str(get_run_folder(self.name))]

    def format_command(self, get_run_folder: Callable[[str], Path]) -> str:
        """Return the command line for a shell."""
        return shlex.join(self.get_arguments(get_run_folder))

    def compute_digest(self) -> str:
        """Return a hash of everything that determines the run's results: options, recipe, problems and the run it needs."""
        recipe = read_recipe(self.recipe) if self.recipe else None
        options = {name: str(self.options[name]) for name in sorted(self.options)}
        files = re.findall(r"\{problems\}/([^,\s]+)", " ".join(options.values()))
        contents = [hashlib.sha256((PROBLEMS_FOLDER / name).read_bytes()).hexdigest() for name in files]
        inputs = [self.command, options, recipe, self.needs.compute_digest() if self.needs else None, *contents]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One model, row and seed of a figure or table, and its runs.

    Attributes:
        model (`str`): label of the model.
        row (`str`): a method, or a method with other options; empty without rows.
        seed (`int`): of the runs.
        options (`dict`): that the row sets.
        runs (`dict[str, CommandRun]`): by command; without `train` for an untrained model.
    """

    model: str
    row: str
    seed: int
    options: dict[str, Any]
    runs: dict[str, CommandRun]


@dataclass(frozen=True)
class Experiment:
    """A figure or table at a scale.

    Attributes:
        name, title, kind, scale (`str`): from the definition.
        source (`str`): place in the paper.
        about (`str`): description of the scale.
        paper_values (`dict[str, dict[str, Any]]`): the paper's numbers, by model and row.
        output_options (`dict`): measures, columns and figure of the output.
        cells (`tuple[Cell, ...]`): every model, row and seed.
        has_custom_model (`bool`): whether the model is not one of the scale's.
    """

    name: str
    title: str
    source: str
    kind: str
    scale: str
    about: str
    paper_values: dict[str, dict[str, Any]]
    output_options: dict[str, Any]
    cells: tuple[Cell, ...]
    has_custom_model: bool = False

    @property
    def runs(self) -> list[CommandRun]:
        """Return each run once, after the run that it needs, seed by seed so that finished seeds can be compared early."""
        models = list(dict.fromkeys(cell.model for cell in self.cells))
        cells = sorted(self.cells, key=lambda cell: (models.index(cell.model), cell.seed))
        runs = [run for cell in cells for run in sorted(cell.runs.values(), key=lambda run: run.needs is not None)]
        return list({run.name: run for run in runs}.values())

    def compute_digest(self) -> str:
        """Return a hash of the runs and of the output's options. A result with another digest is stale."""
        output = [self.kind, self.paper_values, self.output_options, [(c.model, c.row, c.seed) for c in self.cells]]
        runs = sorted(run.compute_digest() for run in self.runs)
        return hashlib.sha256(json.dumps([output, runs], sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_recipe(name: str) -> dict[str, Any]:
    """Return the options of a recipe such as `cpu/embedded-bupo`."""
    return yaml.safe_load((RECIPES_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def read_scales() -> dict[str, dict[str, Any]]:
    """Return the content of `scales.yaml`."""
    return yaml.safe_load((EXPERIMENTS_FOLDER / SCALES_FILE).read_text(encoding="utf-8"))


def list_experiments(scale: str) -> tuple[str, ...]:
    """Return the names of a scale's experiments.

    Raises:
        UserError: for an unknown scale.
    """
    scales = read_scales()
    if scale not in scales:
        raise UserError(f"scale must be {', '.join(scales)}, got {scale!r:.80}")
    base = scales[scale].get("like", scale)
    return tuple(name for name in EXPERIMENT_NAMES if base in _read_experiment_file(name)["scales"])


def _read_experiment_file(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXPERIMENTS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def read_experiment(name: str, scale: str, model: str | None = None, seeds: int | None = None) -> Experiment:
    """Return a figure or table with its runs.

    Args:
        name (`str`): such as `fig3` or `table2`.
        scale (`str`): of `scales.yaml`.
        model (`str`, *optional*): the name of one of the scale's models, or another model to train with the same recipes and
            layers.
        seeds (`int`, *optional*): number of seeds; all by default.

    Raises:
        UserError: for an unknown experiment or scale.
    """
    names = list_experiments(scale)
    if name not in names:
        raise UserError(f"unknown figure or table {name!r:.80} at scale {scale}: choose {', '.join(names)}, or all")
    definition, scales = _read_experiment_file(name), read_scales()
    base = scales[scale].get("like", scale)
    scale_settings = {**scales[base], **scales[scale]}
    settings = {key: value for key, value in definition.items() if key in ("rows", "models", "draw")}
    settings |= definition["scales"][base] or {}
    builder = _CellBuilder(scale_settings, settings, definition["kind"], model)
    return Experiment(
        name,
        title=definition["title"],
        source=definition.get("source", ""),
        kind=definition["kind"],
        scale=scale,
        about=scale_settings["about"],
        paper_values=definition.get("printed", {}),
        output_options=settings.get("draw", {}),
        cells=tuple(builder.build_cells(seeds)),
        has_custom_model=model is not None and model not in scale_settings["models"],
    )


class _CellBuilder:
    """Builder of an experiment's cells from the settings of the scale and those of the experiment."""

    def __init__(self, scale: Mapping[str, Any], settings: Mapping[str, Any], kind: str, model: str | None):
        self.scale, self.settings, self.kind, self.model = scale, settings, kind, model

    def build_cells(self, max_seeds: int | None) -> Iterable[Cell]:
        """Yield the cell of every model, row and seed."""
        seeds = self.scale["seeds"] if "like" in self.scale else self.settings.get("seeds", self.scale["seeds"])
        if not {"train", "eval"} & set(COMMANDS_BY_KIND[self.kind]):
            seeds = seeds[:1]
        for label, words in self._list_models().items():
            for row, (recipe, options) in self._list_rows(words).items():
                for seed in seeds[:max_seeds]:
                    yield Cell(label, row, seed, options, self._build_runs(words, recipe, options, seed))

    def _list_models(self) -> dict[str, dict[str, Any]]:
        """Return, by model, the words for the placeholders in recipes and options."""
        models = self.scale["models"]
        labels = self.settings.get("models") or list(models)
        if self.model in models:
            labels = [label for label in models if label == self.model]
        words = {label: models[label] | {"problems": "{problems}"} for label in labels}
        if self.model and self.model not in models:
            first = next(iter(words.values()))
            return {Path(self.model).name.removesuffix(".gguf"): first | {"base": self.model, "own_model": True}}
        return words

    def _list_rows(self, words: Mapping[str, Any]) -> dict[str, tuple[str | None, dict[str, Any]]]:
        """Return recipe and options by row. A row without a recipe is not trained."""
        definitions = self.settings.get("rows")
        if definitions is None or self.kind == "layers":
            return {"": (None, {})}
        if isinstance(definitions, list):
            definitions = {row: {"method": row} for row in definitions}
        rows = {}
        for row, options in definitions.items():
            options = dict(options)
            method = self.scale["methods"][options.pop("method", "BuPO")] or {}
            options = {name: _fill_placeholders(value, words) for name, value in {**method, **options}.items()}
            rows[row] = (options.pop("recipe", None), options)
        return rows

    def _build_runs(
        self, words: Mapping[str, Any], recipe: str | None, row_options: dict[str, Any], seed: int
    ) -> dict[str, CommandRun]:
        runs = {}
        if recipe and "train" in COMMANDS_BY_KIND[self.kind]:
            options = self._get_options("train", words) | row_options
            for name, limit in self.scale.get("at_most", {}).items():
                value = options.get(name, read_recipe(recipe).get(name))
                if value is not None:
                    options[name] = min(value, limit)
            model = {"model": words["base"]} if words.get("own_model") else {}  # replaces the recipe's
            runs["train"] = self._build_run("train", words, {**model, **options, "seed": seed}, recipe=recipe)
        trained = runs.get("train")
        untrained = {name: _fill_placeholders(value, words) for name, value in self.scale.get("untrained", {}).items()}
        if "eval" in COMMANDS_BY_KIND[self.kind]:
            options = self._get_options("eval", words) | ({} if trained else {"model": words["base"], **untrained})
            runs["eval"] = self._build_run("eval", words, {**options, "seed": seed}, needs=trained)
        if "analyze" in COMMANDS_BY_KIND[self.kind]:
            options = {"model": words["base"]} | self._get_options("analyze", words)
            runs["analyze"] = self._build_run("analyze", words, options)
        if "checkpoints" in self.settings:  # sharded runs have no probes: analyse their checkpoints
            checkpoints = ["{run}/checkpoint-" + str(number) for number in self.settings["checkpoints"]]
            options = {"model": [words["base"], *checkpoints, "{run}"], "rollouts": "{run}/probes.jsonl"}
            runs["analyze"] = self._build_run("analyze", words, options | {"device_map": "auto"}, needs=trained)
        return runs

    def _get_options(self, command: str, words: Mapping[str, Any]) -> dict[str, Any]:
        """Return a command's options: the scale's, overridden by the experiment's, overridden by a rehearsal's."""
        options = {**(self.scale.get(command) or {}), **(self.settings.get(command) or {})}
        options |= (self.scale.get("rehearsed") or {}).get(command, {})
        return {name: _fill_placeholders(value, words) for name, value in options.items() if value is not None}

    def _build_run(
        self,
        command: str,
        words: Mapping[str, Any],
        options: dict[str, Any],
        recipe: str | None = None,
        needs: CommandRun | None = None,
    ) -> CommandRun:
        scale = self.scale
        subject = recipe or (needs.name if needs else str(options.get("model")))
        # Options that every run of the scale has are left out of its name.
        usual = {
            **(scale.get(command) or {}),
            **scale.get("rehearsed", {}).get(command, {}),
            **scale.get("untrained", {}),
        }
        usual = {name: _fill_placeholders(value, words) for name, value in usual.items()}
        usual |= {
            "model": read_recipe(recipe)["model"] if recipe else options.get("model"),
            "rollouts": "{run}/probes.jsonl",
            "device_map": "auto",
        }
        named_options = {name: value for name, value in options.items() if usual.get(name) != value}
        launcher = scale.get("launch", ()) if command == "train" else ()
        launch = tuple(_fill_placeholders(word, {"recipes": RECIPES_FOLDER}) for word in launcher)
        cost = float({**scale["cost"], **words.get("cost", {}), **self.settings.get("cost", {})}[command])
        if recipe and "max_steps" in options:
            cost *= options["max_steps"] / read_recipe(recipe)["max_steps"]
        if command == "eval":
            cost *= options.get("size", 1) * options.get("k", 1) / scale["cost"].get("eval_answers", 1)
        name = _make_run_name(command, subject, named_options)
        return CommandRun(name, command, options, recipe, needs, launch, cost)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _fill_placeholders(value: Any, words: Mapping[str, Any]) -> Any:
    """Replace `{word}` by its value. A text that is a single placeholder becomes the value with its type."""
    if not isinstance(value, str):
        return value
    single = re.fullmatch(r"\{(\w+)\}", value)
    return words[single[1]] if single else re.sub(r"\{(\w+)\}", lambda match: str(words[match[1]]), value)


def _make_run_name(command: str, subject: str, options: Mapping[str, Any]) -> str:
    """Return a readable and unique name of a run's folder, from its command and options."""
    named = [f"{name}-{options[name]}" for name in sorted(options) if name != "seed"]
    parts = [command, subject.removeprefix("train_"), *named]
    parts += [f"seed-{options['seed']}"] if "seed" in options else []
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", "_".join(map(str, parts))).strip("-.")
    if len(text) <= MAX_RUN_NAME_LENGTH:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: MAX_RUN_NAME_LENGTH - 9]}-{digest}"

"""A figure or table of the paper as runs of the public commands, at a scale. Each is a short YAML file in `experiments/`.

A file has a `title`, its `source` in the paper, a `kind` (which runs it needs, and what is drawn of them), the numbers that are
`printed` there, and by scale its `rows`: a method of the scale, or one with other options. What scales have in common, models,
methods, seeds, evaluation, stands in `scales.yaml`.
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
MAX_RUN_NAME_LENGTH = 120  # of a run's folder
# what each kind of figure or table is drawn of
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
        name (`str`): of its folder; what several experiments need is run once.
        command (`str`): `train`, `eval` or `analyze`.
        options (`dict`): of the command, but for `output`.
        recipe (`str`, *optional*): the recipe that the options are on top of, such as `cpu/embedded-bupo`.
        needs (`Run`, *optional*): the run whose model this one reads. In options, `{run}` is its folder, and `{problems}` that
            of the problems that come with the experiments.
        launch (`tuple[str, ...]`): what starts the command, on a cluster a launcher.
        cost (`float`): an estimate, in seconds here, or in GPU hours where the scale has some.
    """

    name: str
    command: str
    options: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    needs: "CommandRun | None" = None
    launch: tuple[str, ...] = ()
    cost: float = 0.0

    def get_arguments(self, place: Callable[[str], Path]) -> list[str]:
        """The command line.

        Args:
            place (`Callable`): the folder of a run, by its name.
        """
        start = list(self.launch) or [sys.executable, "-m", "bupo.cli.main"]
        given = ["--config", str(RECIPES_FOLDER / f"{self.recipe}.yaml")] if self.recipe else []
        of_run = {"model": str(place(self.needs.name))} if self.needs else {}
        filled = {"run": of_run.get("model"), "problems": PROBLEMS_FOLDER}
        for name, value in {**of_run, **self.options}.items():
            texts = [item if isinstance(item, str) else json.dumps(item) for item in _as_list(value)]
            given += [f"--{name}", *(_fill_placeholders(text, filled) for text in texts)]
        going_on = ["--resume_from_checkpoint", "true"] if self.command == "train" else []
        return [*start, self.command, *given, *going_on, "--output", str(place(self.name))]

    def format_command(self, place: Callable[[str], Path]) -> str:
        """The command line for a shell."""
        return shlex.join(self.get_arguments(place))

    def compute_digest(self) -> str:
        """Of all that decides what the run leaves: another digest is another run."""
        recipe = read_recipe(self.recipe) if self.recipe else None
        options = {name: str(self.options[name]) for name in sorted(self.options)}
        files = re.findall(r"\{problems\}/([^,\s]+)", " ".join(options.values()))
        contents = [hashlib.sha256((PROBLEMS_FOLDER / name).read_bytes()).hexdigest() for name in files]
        decided = [self.command, options, recipe, self.needs.compute_digest() if self.needs else None, *contents]
        return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One model, row and seed of a figure or table, and its runs.

    Attributes:
        model (`str`), row (`str`), seed (`int`): a row is a method, or one with other options; empty where there are none.
        options (`dict`): the row's own.
        runs (`dict[str, Run]`): by command; a model that is not trained has no `train`.
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
        name, title, source, kind, scale, about (`str`): `source` is where the paper has it, `about` what the scale is.
        printed (`dict[str, dict[str, Any]]`): the paper's numbers, by model and row.
        draw (`dict`): for the output: which measures, columns, figure.
        cells (`tuple[Cell, ...]`): all of it.
        given (`bool`): whether another model than the scale's is asked for.
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
        """Each once, what another needs before it; seed by seed, so that what is done by then can be compared."""
        models = list(dict.fromkeys(cell.model for cell in self.cells))
        cells = sorted(self.cells, key=lambda cell: (models.index(cell.model), cell.seed))
        runs = [run for cell in cells for run in sorted(cell.runs.values(), key=lambda run: run.needs is not None)]
        return list({run.name: run for run in runs}.values())

    def compute_digest(self) -> str:
        """Of all its runs and of what is drawn: a result of another digest is stale."""
        decided = [self.kind, self.paper_values, self.output_options, [(c.model, c.row, c.seed) for c in self.cells]]
        runs = sorted(run.compute_digest() for run in self.runs)
        return hashlib.sha256(json.dumps([decided, runs], sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's options, such as those of `cpu/embedded-bupo`."""
    return yaml.safe_load((RECIPES_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def read_scales() -> dict[str, dict[str, Any]]:
    """What `scales.yaml` says."""
    return yaml.safe_load((EXPERIMENTS_FOLDER / SCALES_FILE).read_text(encoding="utf-8"))


def list_experiments(scale: str) -> tuple[str, ...]:
    """The experiments that a scale has.

    Raises:
        UserError: if there is no such scale.
    """
    known = read_scales()
    if scale not in known:
        raise UserError(f"scale must be {', '.join(known)}, got {scale!r:.80}")
    return tuple(
        name for name in EXPERIMENT_NAMES if known[scale].get("like", scale) in _read_experiment_file(name)["scales"]
    )


def _read_experiment_file(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXPERIMENTS_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def read_experiment(name: str, scale: str, model: str | None = None, seeds: int | None = None) -> Experiment:
    """A figure or table as runs.

    Args:
        name (`str`): such as `fig3` or `table2`.
        scale (`str`): of `scales.yaml`.
        model (`str`, *optional*): one of the scale's alone, by its name, or another, to which recipes and layers stay.
        seeds (`int`, *optional*): the first so many seeds only.

    Raises:
        UserError: if there is no such experiment or scale.
    """
    there = list_experiments(scale)
    if name not in there:
        raise UserError(f"unknown figure or table {name!r:.80} at scale {scale}: choose {', '.join(there)}, or all")
    text, known = _read_experiment_file(name), read_scales()
    like = known[scale].get("like", scale)
    own = {key: value for key, value in text.items() if key in ("rows", "models", "draw")}
    section = _ScaledExperiment(
        {**known[like], **known[scale]}, own | (text["scales"][like] or {}), text["kind"], model
    )
    cells = tuple(section.cells(seeds))
    heads = {"title": text["title"], "source": text.get("source", ""), "kind": text["kind"]}
    return Experiment(
        name, **heads, scale=scale, about=known[scale]["about"], paper_values=text.get("printed", {}),
        output_options=section.settings.get("draw", {}), cells=cells, has_custom_model=model is not None and model not in known[scale]["models"],
    )  # fmt: skip


class _ScaledExperiment:
    """An experiment at a scale: what the scale says, and what the experiment says there."""

    def __init__(self, scale: Mapping[str, Any], own: Mapping[str, Any], kind: str, model: str | None):
        self.scale, self.settings, self.kind, self.model = scale, own, kind, model

    def cells(self, most: int | None) -> Iterable[Cell]:
        """Every model, row and seed."""
        seeds = self.scale["seeds"] if "like" in self.scale else self.settings.get("seeds", self.scale["seeds"])
        if not {"train", "eval"} & set(COMMANDS_BY_KIND[self.kind]):
            seeds = seeds[:1]
        for label, words in self._models().items():
            for row, (recipe, options) in self._rows(words).items():
                for seed in seeds[:most]:
                    yield Cell(label, row, seed, options, self._runs(words, recipe, options, seed))

    def _models(self) -> dict[str, dict[str, Any]]:
        """Words by model, which recipes and options are filled with."""
        known = self.scale["models"]
        labels = self.settings.get("models") or list(known)
        if self.model in known:
            labels = [label for label in known if label == self.model]
        words = {label: known[label] | {"problems": "{problems}"} for label in labels}
        if self.model and self.model not in known:
            first = next(iter(words.values()))
            return {Path(self.model).name.removesuffix(".gguf"): first | {"base": self.model, "own_model": True}}
        return words

    def _rows(self, words: Mapping[str, Any]) -> dict[str, tuple[str | None, dict[str, Any]]]:
        """Recipe and options by row; no recipe is no training."""
        wanted = self.settings.get("rows")
        if wanted is None or self.kind == "layers":
            return {"": (None, {})}
        wanted = {row: {"method": row} for row in wanted} if isinstance(wanted, list) else wanted
        rows = {}
        for row, given in wanted.items():
            given = dict(given)
            method = self.scale["methods"][given.pop("method", "BuPO")] or {}
            filled = {name: _fill_placeholders(value, words) for name, value in {**method, **given}.items()}
            rows[row] = (filled.pop("recipe", None), filled)
        return rows

    def _runs(
        self, words: Mapping[str, Any], recipe: str | None, options: dict[str, Any], seed: int
    ) -> dict[str, CommandRun]:
        runs = {}
        if recipe and "train" in COMMANDS_BY_KIND[self.kind]:
            given = self._options("train", words) | options
            for name, most in self.scale.get("at_most", {}).items():
                value = given.get(name, read_recipe(recipe).get(name))
                if value is not None:
                    given[name] = min(value, most)
            base = {"model": words["base"]} if words.get("own_model") else {}  # in the recipe's stead
            runs["train"] = self._run("train", words, {**base, **given, "seed": seed}, recipe=recipe)
        trained = runs.get("train")
        untrained = {name: _fill_placeholders(value, words) for name, value in self.scale.get("untrained", {}).items()}
        if "eval" in COMMANDS_BY_KIND[self.kind]:
            about = {} if trained else {"model": words["base"], **untrained}
            runs["eval"] = self._run(
                "eval", words, {**self._options("eval", words), **about, "seed": seed}, needs=trained
            )
        if "analyze" in COMMANDS_BY_KIND[self.kind]:
            runs["analyze"] = self._run("analyze", words, {"model": words["base"]} | self._options("analyze", words))
        if "checkpoints" in self.settings:  # of runs that are sharded, which have no probes of their own
            places = ["{run}/checkpoint-" + str(number) for number in self.settings["checkpoints"]]
            given = {"model": [words["base"], *places, "{run}"], "rollouts": "{run}/probes.jsonl", "device_map": "auto"}
            runs["analyze"] = self._run("analyze", words, given, needs=trained)
        return runs

    def _options(self, command: str, words: Mapping[str, Any]) -> dict[str, Any]:
        """Of the scale, then of the experiment; a rehearsal's own last."""
        given = {**(self.scale.get(command) or {}), **(self.settings.get(command) or {})}
        given |= (self.scale.get("rehearsed") or {}).get(command, {})
        return {name: _fill_placeholders(value, words) for name, value in given.items() if value is not None}

    def _run(self, command: str, words: Mapping[str, Any], options: dict[str, Any], **more: Any) -> CommandRun:
        scale, recipe, needs = self.scale, more.get("recipe"), more.get("needs")
        subject = recipe or (needs.name if needs else str(options.get("model")))
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
        given = {name: value for name, value in options.items() if usual.get(name) != value}
        launch = (
            tuple(_fill_placeholders(word, {"recipes": RECIPES_FOLDER}) for word in scale.get("launch", ()))
            if command == "train"
            else ()
        )
        cost = float({**scale["cost"], **words.get("cost", {}), **self.settings.get("cost", {})}[command])
        if recipe and "max_steps" in options:
            cost *= options["max_steps"] / read_recipe(recipe)["max_steps"]
        if command == "eval":
            cost *= options.get("size", 1) * options.get("k", 1) / scale["cost"].get("eval_answers", 1)
        return CommandRun(_make_run_name(command, subject, given), command, options, launch=launch, cost=cost, **more)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _fill_placeholders(value: Any, words: Mapping[str, Any]) -> Any:
    """`{late}` alone is the word as it is, in a text its text."""
    if not isinstance(value, str):
        return value
    alone = re.fullmatch(r"\{(\w+)\}", value)
    return words[alone[1]] if alone else re.sub(r"\{(\w+)\}", lambda found: str(words[found[1]]), value)


def _make_run_name(command: str, subject: str, options: Mapping[str, Any]) -> str:
    """A folder's name that says what the run is: readable, and of its own."""
    own = {name: options[name] for name in sorted(options) if name != "seed"}
    parts = [command, subject.removeprefix("train_"), *(f"{name}-{value}" for name, value in own.items())]
    parts += [f"seed-{options['seed']}"] if "seed" in options else []
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", "_".join(map(str, parts))).strip("-.")
    if len(text) <= MAX_RUN_NAME_LENGTH:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: MAX_RUN_NAME_LENGTH - 9]}-{digest}"

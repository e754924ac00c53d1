"""Runs that are the same but for the seed, joined; and the paper's tables over them. Pure: from records to numbers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bupo.reports.run_records import (
    AnalysisRecord,
    Dynamics,
    EvaluationRecord,
    LayerCurve,
    RunRecord,
    Score,
    TrainingRecord,
)
from bupo.reports.run_settings import VANILLA, RunSettings

Seed = int | None  # None: of no training
# label, metric (of pass@K: answers to each problem), problems, sampling
BenchmarkKey = tuple[str, str, int, tuple[tuple[str, str], ...]]
TRAINING_EVALUATION = (("sampled", "while training"),)
METHOD_ORDER = (VANILLA, "PPO", "REINFORCE++", "RLOO", "GRPO", "BuPO")  # in the order of the paper's table 1
UNTRAINED = "as given"  # what no run of the set has trained, or began with


@dataclass
class SeedGroup:
    """Runs of one setting, over their seeds.

    Attributes:
        setting ([`RunSettings`]): what they share.
        name, label (`str`): unique names; the label leaves the model out.
        runs (`list[Trained]`): the training runs.
        scores (`dict`): by benchmark and seed.
        passes (`dict`): pass@K by benchmark, seed and K.
        layers (`dict[Seed, dict]`): an analysis' curves by seed and measure.
        dynamics (`dict[Seed, dict]`): by seed, the run's own, or where it has none an analysis' of its checkpoints.
    """

    setting: RunSettings
    name: str = ""
    label: str = ""
    runs: list[TrainingRecord] = field(default_factory=list)
    scores: dict[BenchmarkKey, dict[Seed, Score]] = field(default_factory=dict)
    pass_curves: dict[BenchmarkKey, dict[Seed, dict[int, float]]] = field(default_factory=dict)
    layers: dict[Seed, dict[str, LayerCurve]] = field(default_factory=dict)
    dynamics: dict[Seed, Dynamics] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether one of its training runs is."""
        return any(run.is_finished for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        """Of all that is known of it, ascending."""
        known = {run.seed for run in self.runs}.union(*self.scores.values(), *self.pass_curves.values(), self.layers)
        return sorted(seed for seed in known if seed is not None)


def group_runs(runs: Iterable[RunRecord]) -> list[SeedGroup]:
    """Runs by setting; each evaluation and analysis with the training run whose model it looks at.

    In the order of the paper's table 1: by model, method, layer and length of the first phase.
    """
    runs = list(runs)
    trained = [run for run in runs if isinstance(run, TrainingRecord)]
    owners = {path: run for run in trained for path in (run.folder.absolute(), run.folder.resolve())}
    found: dict[RunSettings, SeedGroup] = {}
    several: dict[tuple[RunSettings, BenchmarkKey], dict[Seed, list[Score]]] = defaultdict(lambda: defaultdict(list))
    curves: dict[tuple[RunSettings, BenchmarkKey], dict[Seed, list[dict]]] = defaultdict(lambda: defaultdict(list))

    def of(setting: RunSettings) -> SeedGroup:
        return found.setdefault(setting, SeedGroup(setting))

    for owner in trained:
        of(owner.setting).runs.append(owner)
        if owner.dynamics:
            of(owner.setting).dynamics[owner.seed] = owner.dynamics
    for run in runs:
        if isinstance(run, EvaluationRecord):
            setting, seed = _find_trained_run(run.model, run.model_path, run.policy, owners)
            asked = tuple(run.sampling.items())
            for key, score in run.scores.items():
                several[setting, (*key, asked)][seed].append(score)
            for key, curve in run.pass_curves.items():
                curves[setting, (*key, asked)][seed].append(curve)
        elif isinstance(run, AnalysisRecord):
            for model in run.models:
                setting, seed = _find_trained_run(model.model, model.model_path, "", owners)
                of(setting).layers[seed] = model.curves
                if run.dynamics and seed is not None:
                    of(replace(setting, snapshot="")).dynamics.setdefault(seed, run.dynamics)
    if not any(owner.setting == setting for setting, _ in several for owner in trained):
        _add_training_evaluations(trained, several)
    for (setting, benchmark), by_seed in several.items():
        of(setting).scores[benchmark] = {seed: _average_scores(scores) for seed, scores in by_seed.items()}
    for (setting, benchmark), of_seed in curves.items():
        of(setting).pass_curves[benchmark] = {seed: _average_curves(repeated) for seed, repeated in of_seed.items()}
    return _assign_names(sorted(found.values(), key=lambda group: _get_sort_key(group.setting)))


def _find_trained_run(
    model: str, place: Path, policy: str, owners: Mapping[Path, TrainingRecord]
) -> tuple[RunSettings, Seed]:
    """Whose model it is: a training run's, one of its checkpoints, or what no run of the set has trained."""
    run, at = owners.get(place) or owners.get(Path(place).resolve()), policy
    if run is None and place.name.startswith("checkpoint-"):
        run = owners.get(place.parent) or owners.get(place.parent.resolve())
        at = ", ".join(filter(None, [place.name.replace("checkpoint-", "update "), policy]))
    if run is not None:
        return replace(run.setting, snapshot=at), run.seed
    base = any(owner.setting.model == model for owner in owners.values())
    return RunSettings(model, VANILLA if base else UNTRAINED, snapshot=policy), None


def _add_training_evaluations(trained: Sequence[TrainingRecord], several: dict) -> None:
    """The scores of evaluations while training, before it and at its end, for sets without others."""
    for run in trained:
        for name, points in run.series.items():
            if "/avg@" in name:
                _, label, metric = name.split("/", 2)
                benchmark = (label, metric, 0, TRAINING_EVALUATION)
                for setting, batch in ((RunSettings(run.setting.model, VANILLA), 0), (run.setting, run.batches)):
                    if batch in points:
                        several[setting, benchmark][run.seed].append(Score(points[batch], points[batch], points[batch]))


def _average_scores(scores: Sequence[Score]) -> Score:
    """Of several evaluations of one model, such as with other seeds of sampling."""
    return Score(*(sum(getattr(s, name) for s in scores) / len(scores) for name in ("value", "low", "high")))


def _average_curves(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """The same of pass@K, where all have it."""
    return {
        k: sum(curve[k] for curve in curves) / len(curves) for k in curves[0] if all(k in curve for curve in curves)
    }


def _get_sort_key(setting: RunSettings) -> tuple:
    base = "BuPO" if setting.stages and setting.objective != "frozen_upper" else setting.estimator
    place = METHOD_ORDER.index(base) if base in METHOD_ORDER else len(METHOD_ORDER) - 1
    baselines = (
        setting.upper_lr_multiplier is not None,
        setting.frozen_up_to_layer is not None,
        bool(setting.layer_lr_multipliers),
    )
    changed = (*baselines, setting.lens != "raw", setting.module != "layer")
    controls = (setting.objective != "layer", setting.fade_batches, setting.auxiliary_weight)
    stages = [(layer.zfill(6), batches) for layer, batches in setting.stages]
    return (
        setting.estimator == UNTRAINED,
        setting.model,
        place,
        changed,
        controls,
        stages,
        setting.snapshot.zfill(40),
        setting.other_options,
    )


def _assign_names(groups: list[SeedGroup]) -> list[SeedGroup]:
    """With names that tell them apart: by what else differs, where method and first phase are the same."""
    alike: dict[tuple[str, str], list[SeedGroup]] = defaultdict(list)
    for group in groups:
        alike[group.setting.model, group.setting.description].append(group)
    models = {model: shorten_model_name(model) for model, _ in alike}
    if len(set(models.values())) < len(models):
        models = {model: model for model in models}
    for (model, name), same in alike.items():
        options = [
            dict(group.setting.other_options)
            | {"internal_early_stopping": str(group.setting.has_early_stopping).lower()}
            for group in same
        ]
        differ = sorted({key for each in options for key in each if len({o.get(key) for o in options}) > 1})
        for group, own in zip(same, options, strict=True):
            words = [f"{key} {own[key]}" if key in own else f"no {key}" for key in differ]
            group.label = ", ".join([name, *words])
            group.name = group.label if len(models) == 1 else f"{models[model]}: {group.label}"
    return groups


def shorten_model_name(model: str) -> str:
    """The last part of a path; a hub id as it is."""
    local = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return model.rstrip("/").rpartition("/")[2] or model if local else model


def get_benchmark_names(groups: Sequence[SeedGroup], of: str = "scores") -> dict[BenchmarkKey, str]:
    """Names of the benchmarks of all groups: label and metric, and what else tells two apart.

    A curve of pass@K (`of` is `passes`) is over so many problems and answers: `math, 128 problems, 64 answers each`.
    """
    known = list(dict.fromkeys(benchmark for group in groups for benchmark in getattr(group, of)))
    names = {}
    for benchmark in known:
        label, metric, problems, asked = benchmark
        same = [other for other in known if other[:2] == benchmark[:2]]
        words = [f"{problems} problems"] if of == "scores" and len({other[2] for other in same}) > 1 else []
        differ = {key for other in same for key, value in other[3] if dict(asked).get(key) != value}
        words += [f"{key} {value}" for key, value in asked if key in differ or asked == TRAINING_EVALUATION]
        head = f"{label} {metric}" if of == "scores" else f"{label}, {problems} problems, {metric}"
        names[benchmark] = ", ".join([head, *words])
    return names


def find_comparable_groups(
    groups: Iterable[SeedGroup], blank: Callable[[RunSettings], RunSettings]
) -> list[list[SeedGroup]]:
    """Groups that are the same but for what `blank` takes away, several each."""
    found: dict[RunSettings, list[SeedGroup]] = defaultdict(list)
    for group in groups:
        found[blank(group.setting)].append(group)
    return [same for same in found.values() if len(same) > 1]

"""Groups of runs that differ in the seed only, with the scores and analyses of their models."""

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

Seed = int | None  # None: not a trained model
# label, metric (for pass@K: answers to each problem), problems, sampling
BenchmarkKey = tuple[str, str, int, tuple[tuple[str, str], ...]]
TRAINING_EVALUATION = (("sampled", "while training"),)
METHOD_ORDER = (VANILLA, "PPO", "REINFORCE++", "RLOO", "GRPO", "BuPO")  # order of the paper's table 1
UNTRAINED = "as given"  # label of a model that no run trained or started from


@dataclass
class SeedGroup:
    """Runs with the same settings and several seeds.

    Attributes:
        setting ([`RunSettings`]): common settings.
        name, label (`str`): unique names; the label omits the model.
        runs (`list[TrainingRecord]`): training runs.
        scores (`dict`): scores by benchmark and seed.
        pass_curves (`dict`): pass@K by benchmark, seed and K.
        layers (`dict[Seed, dict]`): curves of an analysis by seed and measure.
        dynamics (`dict[Seed, dict]`): dynamics by seed, from the run or from an analysis of its checkpoints.
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
        """Return whether at least one training run is finished."""
        return any(run.is_finished for run in self.runs)

    @property
    def seeds(self) -> list[int]:
        """Seeds of all runs, scores and analyses, ascending."""
        known = {run.seed for run in self.runs}.union(*self.scores.values(), *self.pass_curves.values(), self.layers)
        return sorted(seed for seed in known if seed is not None)


def group_runs(runs: Iterable[RunRecord]) -> list[SeedGroup]:
    """Group runs by settings; assign each evaluation and analysis to the training run of its model.

    The order is that of the paper's table 1: by model, method, layer and length of phase 1.
    """
    runs = list(runs)
    trained = [run for run in runs if isinstance(run, TrainingRecord)]
    owners = {path: run for run in trained for path in (run.folder.absolute(), run.folder.resolve())}
    groups: dict[RunSettings, SeedGroup] = {}
    score_lists: dict[tuple[RunSettings, BenchmarkKey], dict[Seed, list[Score]]] = defaultdict(
        lambda: defaultdict(list)
    )
    curves: dict[tuple[RunSettings, BenchmarkKey], dict[Seed, list[dict]]] = defaultdict(lambda: defaultdict(list))

    def get_group(setting: RunSettings) -> SeedGroup:
        return groups.setdefault(setting, SeedGroup(setting))

    for owner in trained:
        get_group(owner.setting).runs.append(owner)
        if owner.dynamics:
            get_group(owner.setting).dynamics[owner.seed] = owner.dynamics
    for run in runs:
        if isinstance(run, EvaluationRecord):
            setting, seed = _find_trained_run(run.model, run.model_path, run.policy, owners)
            sampling = tuple(run.sampling.items())
            for key, score in run.scores.items():
                score_lists[setting, (*key, sampling)][seed].append(score)
            for key, curve in run.pass_curves.items():
                curves[setting, (*key, sampling)][seed].append(curve)
        elif isinstance(run, AnalysisRecord):
            for model in run.models:
                setting, seed = _find_trained_run(model.model, model.model_path, "", owners)
                get_group(setting).layers[seed] = model.curves
                if run.dynamics and seed is not None:
                    get_group(replace(setting, snapshot="")).dynamics.setdefault(seed, run.dynamics)
    if not any(owner.setting == setting for setting, _ in score_lists for owner in trained):
        _add_training_evaluations(trained, score_lists)
    for (setting, benchmark), by_seed in score_lists.items():
        get_group(setting).scores[benchmark] = {seed: _average_scores(scores) for seed, scores in by_seed.items()}
    for (setting, benchmark), curves_by_seed in curves.items():
        get_group(setting).pass_curves[benchmark] = {
            seed: _average_curves(repeated) for seed, repeated in curves_by_seed.items()
        }
    return _assign_names(sorted(groups.values(), key=lambda group: _get_sort_key(group.setting)))


def _find_trained_run(
    model: str, path: Path, policy: str, owners: Mapping[Path, TrainingRecord]
) -> tuple[RunSettings, Seed]:
    """Return settings and seed of the training run of a model or checkpoint; the seed is None for other models."""
    run, snapshot = owners.get(path) or owners.get(Path(path).resolve()), policy
    if run is None and path.name.startswith("checkpoint-"):
        run = owners.get(path.parent) or owners.get(path.parent.resolve())
        snapshot = ", ".join(filter(None, [path.name.replace("checkpoint-", "update "), policy]))
    if run is not None:
        return replace(run.setting, snapshot=snapshot), run.seed
    is_initial = any(owner.setting.model == model for owner in owners.values())
    return RunSettings(model, VANILLA if is_initial else UNTRAINED, snapshot=policy), None


def _add_training_evaluations(trained: Sequence[TrainingRecord], score_lists: dict) -> None:
    """Add scores from before training and its end, logged by the runs, if there are no evaluations of their models."""
    for run in trained:
        for name, points in run.series.items():
            if "/avg@" in name:
                _, label, metric = name.split("/", 2)
                benchmark = (label, metric, 0, TRAINING_EVALUATION)
                for setting, batch in ((RunSettings(run.setting.model, VANILLA), 0), (run.setting, run.batches)):
                    if batch in points:
                        score_lists[setting, benchmark][run.seed].append(
                            Score(points[batch], points[batch], points[batch])
                        )


def _average_scores(scores: Sequence[Score]) -> Score:
    """Average several evaluations of one model, such as with different sampling seeds."""
    return Score(*(sum(getattr(s, name) for s in scores) / len(scores) for name in ("value", "low", "high")))


def _average_curves(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Average pass@K at each K that all curves have."""
    return {
        k: sum(curve[k] for curve in curves) / len(curves) for k in curves[0] if all(k in curve for curve in curves)
    }


def _get_sort_key(setting: RunSettings) -> tuple:
    base = "BuPO" if setting.stages and setting.objective != "frozen_upper" else setting.estimator
    rank = METHOD_ORDER.index(base) if base in METHOD_ORDER else len(METHOD_ORDER) - 1
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
        rank,
        changed,
        controls,
        stages,
        setting.snapshot.zfill(40),
        setting.other_options,
    )


def _assign_names(groups: list[SeedGroup]) -> list[SeedGroup]:
    """Assign unique names; groups with the same method and phase 1 are named by the options that differ."""
    by_description: dict[tuple[str, str], list[SeedGroup]] = defaultdict(list)
    for group in groups:
        by_description[group.setting.model, group.setting.description].append(group)
    models = {model: shorten_model_name(model) for model, _ in by_description}
    if len(set(models.values())) < len(models):
        models = {model: model for model in models}
    for (model, name), similar in by_description.items():
        options = [
            dict(group.setting.other_options)
            | {"internal_early_stopping": str(group.setting.has_early_stopping).lower()}
            for group in similar
        ]
        differ = sorted(
            {key for group_options in options for key in group_options if len({o.get(key) for o in options}) > 1}
        )
        for group, group_options in zip(similar, options, strict=True):
            words = [f"{key} {group_options[key]}" if key in group_options else f"no {key}" for key in differ]
            group.label = ", ".join([name, *words])
            group.name = group.label if len(models) == 1 else f"{models[model]}: {group.label}"
    return groups


def shorten_model_name(model: str) -> str:
    """Return the last part of a path; hub ids stay unchanged."""
    local = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return model.rstrip("/").rpartition("/")[2] or model if local else model


def get_benchmark_names(groups: Sequence[SeedGroup], field_name: str = "scores") -> dict[BenchmarkKey, str]:
    """Return unique names of the benchmarks of all groups: label, metric, and further settings that differ.

    With `field_name="pass_curves"`, a name is `math, 128 problems, 64 answers each`.
    """
    known = list(dict.fromkeys(benchmark for group in groups for benchmark in getattr(group, field_name)))
    names = {}
    for benchmark in known:
        label, metric, problems, sampling = benchmark
        similar = [other for other in known if other[:2] == benchmark[:2]]
        words = [f"{problems} problems"] if field_name == "scores" and len({other[2] for other in similar}) > 1 else []
        differ = {key for other in similar for key, value in other[3] if dict(sampling).get(key) != value}
        words += [f"{key} {value}" for key, value in sampling if key in differ or sampling == TRAINING_EVALUATION]
        head = f"{label} {metric}" if field_name == "scores" else f"{label}, {problems} problems, {metric}"
        names[benchmark] = ", ".join([head, *words])
    return names


def find_comparable_groups(
    groups: Iterable[SeedGroup], drop: Callable[[RunSettings], RunSettings]
) -> list[list[SeedGroup]]:
    """Return lists of two or more groups whose settings are equal after `drop`."""
    by_setting: dict[RunSettings, list[SeedGroup]] = defaultdict(list)
    for group in groups:
        by_setting[drop(group.setting)].append(group)
    return [comparable for comparable in by_setting.values() if len(comparable) > 1]

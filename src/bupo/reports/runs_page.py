"""Self-contained HTML page over any runs: curves over seeds, the paper's tables, pass@K, layers before and after training.

The page's script averages over seeds, because readers may filter them. Its data are therefore the curves of every run and the
numbers of every seed.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from bupo.reports.analysis_page import MEASURE_NAMES
from bupo.reports.html import dump_script_json, write_html
from bupo.reports.paper_tables import PaperTable, SeedStatistic, build_paper_tables
from bupo.reports.run_records import (
    LAYER_MEASURES,
    AnalysisRecord,
    EvaluationRecord,
    Points,
    RunRecord,
    TrainingRecord,
    read_runs,
)
from bupo.reports.run_settings import VANILLA
from bupo.reports.seed_comparison import SeedGroup, get_benchmark_names, group_runs, shorten_model_name
from bupo.reports.table_files import sanitize_name
from bupo.utils.errors import UserError
from bupo.utils.files import check_writable_folder
from bupo.utils.statistics import compute_seed_statistics

GENERATOR = "bupo report"  # marks pages that may be replaced
MAX_NUMBERS = 1 << 20  # points of all curves, about 7 MB
MIN_POINTS, MAX_POINTS = 40, 400  # points of one curve
SERIES_NAMES = {
    "reward": "reward",
    "entropy": "entropy of the language model policy (nats)",
    "internal/entropy": "entropy of the layer policy (nats)",
    "completions/mean_length": "response length (tokens)",
    "clip_ratio/region_mean": "clipped ratios (share of tokens)",
    "clip_ratio/low_mean": "ratios clipped from below (share)",
    "clip_ratio/high_mean": "ratios clipped from above (share)",
    "completions/clipped_ratio": "answers cut at the limit (share)",
    "completions/repetition": "repetition in answers",
    "reward_std": "standard deviation of the reward",
    "frac_reward_zero_std": "prompts whose answers have one reward (share)",
    "kl": "KL to the reference (nats)",
    "approx_kl": "KL to the policy that sampled (nats)",
    "grad_norm": "norm of the gradient",
    "loss": "loss",
    "learning_rate": "learning rate",
    "critic/value_loss": "value loss of the critic",
    "critic/explained_variance": "explained variance of the critic",
    "probe/perplexity": "perplexity of the probes",
    "probe/d_entropy_layer": "dH_Layer on the probes (nats)",
    "rollout_time": "time of sampling (s)",
    "step_time": "time of an update (s)",
}


@dataclass(frozen=True)
class RunsReport:
    """Results of a set of runs.

    Attributes:
        groups (`list[SeedGroup]`): runs that differ in the seed only.
        tables (`list[PaperTable]`): the paper's tables, with `to_dataframe()` and `to_markdown()`.
        skipped (`list[tuple[str, str]]`): folders without a run, with the reason.
        runs (`list[RunRecord]`): all runs.
        path (`Path`): the HTML page.
    """

    groups: list[SeedGroup]
    tables: list[PaperTable]
    skipped: list[tuple[str, str]]
    runs: list[RunRecord]
    path: Path

    def __str__(self) -> str:
        kinds = (("training run", TrainingRecord), ("evaluation", EvaluationRecord), ("analysis", AnalysisRecord))
        counts = [(sum(isinstance(run, kind) for run in self.runs), name) for name, kind in kinds]
        plural = {"analysis": "analyses"}
        return ", ".join(f"{n} {name if n == 1 else plural.get(name, name + 's')}" for n, name in counts if n)


def report_runs(folders: Iterable[str | Path], output: str | Path = "runs/report.html") -> RunsReport:
    """Write one page over run folders: training runs, evaluations and analyses, in any mix.

    Args:
        folders (`list[str]`): folders of the runs.
        output (`str`): HTML file to write. A page of `bupo report` is replaced, any other file is not.

    Raises:
        UserError: if no folder holds a run, or the page cannot be written.
    """
    path = Path(output)
    check_page_path(path)
    run_dirs = [folder for folder in map(Path, folders) if os.path.realpath(folder) != os.path.realpath(path)]
    runs, skipped = read_runs(run_dirs)
    if not runs:
        raise UserError(f"no folder holds a run: {describe_skipped(skipped) or 'give run folders, such as runs/*'}")
    groups = group_runs(runs)
    report = RunsReport(groups, build_paper_tables(groups), skipped, runs, path)
    data = build_runs_data(report)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_html(
            path, "runs.html.jinja", data=dump_script_json(data), plotly=get_plotlyjs(), shown=data, generator=GENERATOR
        )
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"output {path} cannot be written: {error.strerror}; choose another output") from error
    return report


def check_page_path(path: Path) -> None:
    """Raise [`UserError`] if the page would replace another file, or cannot be written."""
    if not path.name:
        raise UserError("output is empty: name the file of the page, such as runs/report.html")
    check_writable_folder("output", path.parent)
    if path.is_dir():
        raise UserError(f"output {str(path)!r} is a folder: name the file of the page, such as {path / 'report.html'}")
    if not path.exists():
        return
    if not path.is_file() or path.is_symlink():
        raise UserError(f"output {path} is not a regular file: choose another output")
    with path.open("rb") as file:
        if f'content="{GENERATOR}"'.encode() not in file.read(1024):
            raise UserError(f"output {path} is not a page of bupo report: choose another output")


def describe_skipped(skipped: Sequence[tuple[str, str]], limit: int = 8) -> str:
    """Describe skipped folders in one line."""
    words = [f"{sanitize_name(folder)} ({reason})" for folder, reason in skipped[:limit]]
    return ", ".join(words) + (f" and {len(skipped) - limit} more" if len(skipped) > limit else "")


def build_runs_data(report: RunsReport) -> dict[str, Any]:
    """Return the data of the page's script."""
    trained = [run for group in report.groups for run in group.runs]
    width = _get_block_width(trained)
    evaluated = [name for run in trained for name in run.series if name.startswith("eval/")]
    names = dict.fromkeys([*SERIES_NAMES, *evaluated])
    present = [name for name in names if any(name in run.series for run in trained)]
    most_seeds = max((len(group.seeds) for group in report.groups), default=0)
    return {
        "summary": str(report),
        "left_out": [f"{sanitize_name(folder)} ({reason})" for folder, reason in report.skipped],
        "groups": [_build_group_data(group, report.groups) for group in report.groups],
        "runs": [
            _build_run_data(run, number, width) for number, group in enumerate(report.groups) for run in group.runs
        ],
        "series": {name: SERIES_NAMES.get(name) or _describe_evaluation(name) for name in present},
        "width": width,
        "tables": [_build_table_data(table, report.groups) for table in report.tables],
        "passes": _build_pass_data(report.groups),
        "layers": [_build_layer_data(n, seed, group) for n, group in enumerate(report.groups) for seed in group.layers],
        "layer_names": {name: MEASURE_NAMES[name] for name in LAYER_MEASURES},
        "dynamics": [lines for n, group in enumerate(report.groups) if (lines := _build_dynamics_data(n, group))],
        "student": [None, None, *(_get_student_factor(n) for n in range(2, most_seeds + 1))],
    }


def _get_student_factor(n: int) -> float:
    """Return the half width of Student's interval in units of `sd / sqrt(n)`, for the page's script."""
    statistics = compute_seed_statistics([0.0] * (n - 1) + [1.0])
    return (statistics.high - statistics.mean) / statistics.sd * math.sqrt(n)


def _build_group_data(group: SeedGroup, groups: Sequence[SeedGroup]) -> dict[str, Any]:
    setting, first = group.setting, [run.first_phase for run in group.runs if run.is_finished or not group.is_finished]
    final = [n for n, other in enumerate(groups) if other.setting == replace(setting, snapshot="")]
    untrained = [n for n, g in enumerate(groups) if g.setting.estimator == VANILLA and g.setting.model == setting.model]
    return {
        "name": group.name,
        "model": shorten_model_name(setting.model),
        "method": setting.method,
        "layer": setting.layer_label or "none",
        "first": sum(first) / len(first) if first else 0,
        "planned": setting.first_phase_batches,
        "at": setting.snapshot,
        "update": int(setting.snapshot[7:]) if re.fullmatch(r"update [0-9]{1,9}", setting.snapshot) else None,
        "of": final[0] if final else None,
        "vanilla": setting.estimator == VANILLA,
        "before": untrained[0] if untrained and setting.estimator != VANILLA else None,
    }


def _build_run_data(run: TrainingRecord, group: int, width: int) -> dict[str, Any]:
    series = {name: points for name, points in run.series.items() if points}
    return {
        "folder": sanitize_name(run.folder),
        "group": group,
        "seed": run.seed,
        "batches": run.batches,
        "first": run.first_phase,
        "chosen": run.auto_layer,
        "finished": run.is_finished,
        "y": {
            name: _thin_points(points, width, 100 if name.startswith("eval/") else 1) for name, points in series.items()
        },
    }


def _get_block_width(runs: Sequence[TrainingRecord]) -> int:
    """Return the rollout batches per point of a curve, the smallest number that the page's size allows."""
    curves = max(1, sum(len(run.series) for run in runs))
    points = min(MAX_POINTS, max(MIN_POINTS, MAX_NUMBERS // curves))
    return max(1, math.ceil(max((run.batches for run in runs), default=1) / points))


def _thin_points(points: Points, width: int, scale: float = 1) -> dict[str, Any]:
    """Average blocks of rollout batches, which are the same for all runs. Evaluations (`scale` not 1) are not averaged."""
    if width > 1 and scale == 1:
        blocks = defaultdict(list)
        for batch, value in points.items():
            blocks[(math.ceil(batch) - 1) // width].append(value)
        points = {block * width + (width + 1) / 2: sum(v) / len(v) for block, v in blocks.items()}
    y = [float(f"{scale * value:.5g}") for value in points.values()]
    x = [int(batch) if batch == int(batch) else batch for batch in points]
    is_contiguous = x == list(range(int(x[0]), int(x[0]) + len(x)))
    return {"y": y, "from": int(x[0])} if is_contiguous else {"y": y, "x": x}


def _describe_evaluation(name: str) -> str:
    _, label, metric = name.split("/", 2)
    return f"{metric} on {sanitize_name(label)} while training (%)"


def _build_table_data(table: PaperTable, groups: Sequence[SeedGroup]) -> dict[str, Any]:
    def cell(value: str | SeedStatistic | None) -> Any:
        if not isinstance(value, SeedStatistic):
            return value
        values = [[seed, number] for seed, number in value.values.items()]
        return {"values": values, "problems": value.problems, "kind": value.kind}

    rows = [{"group": groups.index(group), "cells": list(map(cell, cells))} for group, cells in table.rows]
    return {"number": table.number, "title": table.title, "note": table.note, "heads": table.columns, "rows": rows}


def _build_pass_data(groups: Sequence[SeedGroup]) -> dict[str, Any]:
    """Return pass@K in percent by benchmark, number of problems and answers."""
    curves_by_name: dict[str, list] = defaultdict(list)
    for benchmark, name in get_benchmark_names(groups, "pass_curves").items():
        for number, group in enumerate(groups):
            for seed, curve in group.pass_curves.get(benchmark, {}).items():
                points = sorted((k, 100 * share) for k, share in curve.items())
                curves_by_name[name].append(
                    {
                        "group": number,
                        "seed": seed,
                        "k": [k for k, _ in points],
                        "y": [float(f"{y:.5g}") for _, y in points],
                    }
                )
    return {name: curves for name, curves in curves_by_name.items() if max(len(curve["k"]) for curve in curves) > 1}


def _build_layer_data(number: int, seed: int | None, group: SeedGroup) -> dict[str, Any]:
    """Return an analysis's curves: means and both ends of the intervals by measure; None for a missing layer."""

    def column(curve, end: int) -> list[float | None]:
        return [None if point is None else float(f"{point[end]:.5g}") for point in curve]

    curves = {name: [column(curve, end) for end in range(3)] for name, curve in group.layers[seed].items()}
    return {"group": number, "seed": seed, "curves": curves}


def _build_dynamics_data(number: int, group: SeedGroup) -> dict[str, Any] | None:
    """Return cosine and KL of a layer with later ones (fig. 5): thinned means over seeds, where all were probed."""
    by_line: dict[tuple[str, int, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for dynamics in group.dynamics.values():
        for key, points in dynamics.items():
            for batch, value in points.items():
                by_line[key][batch].append(value)
    lines: list[dict[str, Any]] = []
    for (measure, layer, later), values in sorted(by_line.items()):
        if measure in ("cosine", "kl") and layer and later:
            num_seeds = max(map(len, values.values()))
            batches = sorted(batch for batch in values if len(values[batch]) == num_seeds)
            batches = batches[:: math.ceil(len(batches) / MIN_POINTS)]
            y = [float(f"{sum(values[batch]) / num_seeds:.4g}") for batch in batches]
            lines.append({"measure": measure, "layer": layer, "later": later, "x": batches, "y": y})
    return {"group": number, "lines": lines} if lines else None

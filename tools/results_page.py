"""Write the pages of results (`docs/results*.md`) from stored tables of runs.

    bupo reproduce all --scale worlds --jobs 2
    python tools/results_page.py runs/reproduce/worlds    # add finished runs to the tables, write the pages
    python tools/results_page.py                          # write the pages from the tables
    python tools/results_page.py --check                  # list stale pages, exit status 1

`docs/results` holds the tables: `runs.csv` with one row per training, and `layers.csv` with one row per world, measure and
layer. A world that is made again may be another model: `base` identifies the initial weights of a training, and a comparison
uses runs of one base only. The templates are there too (`PAGES`); `{table NAME}`, `{figure NAME}`, `{gain NAME WORLD | ROW}`
and so on are replaced by tables, figures and numbers. NAME is an experiment of the scale `worlds`; `compare@small` is one of
another scale.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from contrasts import NOTHING_STORED, contrasts_table, over_worlds
from gains import few, gains_figure, prediction, prediction_figure
from paper_page import small

from bupo.experiments.experiment import Cell, Experiment, list_experiments, read_experiment
from bupo.experiments.jobs import RunPaths, get_run_state
from bupo.experiments.outputs import FinishedExperiment
from bupo.experiments.outputs.comparison_table import ExperimentOutput, format_mean_interval
from bupo.experiments.outputs.outcomes import compare_outcomes, measure_outcome
from bupo.utils.errors import UserError
from bupo.utils.statistics import compute_paired_difference, compute_seed_statistics

ROOT = Path(__file__).resolve().parent.parent
RUNS, LAYERS = "runs.csv", "layers.csv"
PAGES = {
    "results.md": "page.md",
    "results_when.md": "when.md",
    "results_appendix.md": "appendix.md",
}  # by page its template
# the `--model` of `bupo reproduce`, by scale
MODELS = {"worlds": None, "small": "models/smollm2-135m.gguf"}
KEYS = ["run", "digest", "base"]
UNKNOWN = "first"  # base of a run that does not record its weights
FOLDED = "pass@K, area under the curve, reward, entropy and length"


@cache
def read(name: str) -> Experiment:
    """Return an experiment by its name in a template."""
    name, _, scale = name.partition("@")
    return read_experiment(name, scale or "worlds", MODELS[scale or "worlds"])


def ended(experiment: Experiment, run_paths: RunPaths) -> Iterator[Cell]:
    """Yield the cells whose runs are all finished with the current options."""
    for cell in experiment.cells:
        try:
            if all(get_run_state(run, run_paths) == "finished" for run in cell.runs.values()):
                yield cell
        except UserError:  # made with other options
            continue


def gather(root: Path, docs: Path, revision: str, scale: str = "worlds") -> None:
    """Add the finished runs to the tables. Existing rows stay.

    Args:
        root (`Path`): folder of the runs.
        docs (`Path`): folder of the tables.
        revision (`str`): code revision of runs that do not record one.
        scale (`str`): scale of the runs.
    """
    run_paths, rows, layers = RunPaths(root), [], []
    for name in list_experiments(scale):
        experiment = read(f"{name}@{scale}")
        finished = FinishedExperiment(experiment, run_paths.get_run_folder, run_paths.read_seconds)
        for cell in ended(experiment, run_paths):
            if "analyze" in cell.runs:
                layers.append(_layers(finished, cell))
            elif "train" in cell.runs:
                last = cell.runs.get("eval", cell.runs["train"])
                began = finished.read_file(cell.runs["train"], "run.json", lambda path: json.loads(path.read_text()))
                head = {
                    "run": last.name,
                    "digest": last.compute_digest(),
                    "base": began.get("weights", UNKNOWN)[:8],
                    "revision": _revision(began) or revision,
                    "world": cell.model,
                }
                rows.append(head | {"seed": cell.seed} | measure_outcome(finished, cell))
    docs.mkdir(parents=True, exist_ok=True)
    _merge(docs / RUNS, pd.DataFrame(rows).round(4), KEYS)
    _merge(docs / LAYERS, pd.concat(layers) if layers else pd.DataFrame(), ["world", "measure", "layer"])


def _revision(began: dict[str, Any]) -> str | None:
    """Return the short git revision of a run, or None if it is not one of this repository."""
    if not began.get("git"):
        return None
    words = ["git", "-C", str(ROOT), "cat-file", "-e", began["git"]["revision"]]
    here = subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0
    return began["git"]["revision"][:7] if here else None


def _layers(finished: FinishedExperiment, cell: Cell) -> pd.DataFrame:
    """Return the layer measures, boundary layer and pattern of a world's analysis."""
    run = cell.runs["analyze"]
    table = finished.read_dataframe(run, "layers.parquet")[["measure", "layer", "mean", "low", "high"]]
    model = finished.get_value(run, "summary.json", finished.read_summary(run), "models", 0)
    stages = [{"measure": "boundary", "layer": 0, "mean": model["boundary_layer"]}]
    stages += [{"measure": f"pattern {model['pattern']}", "layer": 0, "mean": 1}]
    return pd.concat([table, pd.DataFrame(stages)]).assign(world=cell.model).round(5)


def _merge(path: Path, new: pd.DataFrame, keys: list[str]) -> None:
    old = pd.read_csv(path) if path.exists() else pd.DataFrame()
    whole = pd.concat([old, new])
    if len(whole):
        whole.drop_duplicates(keys, keep="first").sort_values(keys[:1] + keys[1:]).to_csv(path, index=False)


class Tables:
    """The stored tables, by experiment.

    Args:
        docs (`Path`): folder of the tables.
    """

    def __init__(self, docs: Path):
        self.docs = docs
        self.runs = pd.read_csv(docs / RUNS)
        self.layers = pd.read_csv(docs / LAYERS)
        self.known: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.runs.to_dict("records"):
            self.known.setdefault((row["run"], row["digest"]), []).append(row)
        self.outputs: dict[str, ExperimentOutput | None] = {}  # a cache by experiment

    def experiment(self, name: str) -> Experiment:
        """Return an experiment by its name in a template."""
        return read(name)

    def found(self, experiment: Experiment) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
        """Return measures by world and row, then by seed, of stored runs with the current options.

        Runs of one world and seed share one base model, the one of most rows, so that no difference compares two models.
        """
        rows = [(cell, row) for cell in experiment.cells for row in self._stored(cell)]
        bases = Counter((cell.model, cell.seed, row["base"]) for cell, row in rows).most_common()
        most = {(world, seed): base for (world, seed, base), _ in reversed(bases)}
        found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        for cell, row in rows:
            if row["base"] == most[cell.model, cell.seed]:
                measures = {k: v for k, v in row.items() if k not in (*KEYS, "revision", "world", "seed") and v == v}
                found.setdefault((cell.model, cell.row), {})[cell.seed] = measures
        return found

    def _stored(self, cell: Cell) -> list[dict[str, Any]]:
        """Return the stored runs of a cell, one per base model."""
        last = cell.runs.get("eval", cell.runs["train"])
        return self.known.get((last.name, last.compute_digest()), [])

    def output(self, name: str) -> ExperimentOutput | None:
        """Return the output of an experiment, or None without stored runs."""
        if name not in self.outputs:
            found = self.found(read(name))
            self.outputs[name] = compare_outcomes(read(name), found) if found else None
        return self.outputs[name]

    def shown(self, name: str) -> list[str]:
        """Return an experiment's tables in Markdown."""
        output = self.output(name)
        return [table.to_markdown().rstrip("\n") for table in output.tables] if output else [NOTHING_STORED]


# -- placeholders of the templates -------- -----------------------------------------------------------------------------------


def filled(text: str, tables: Tables) -> str:
    """Return a template with its placeholders replaced."""
    return re.sub(r"\{(\w+) ([^{}]*)\}", lambda found: SAYS[found[1]](tables, found[2].strip()), text)


def _table(tables: Tables, name: str) -> str:
    """Return the main table of an experiment, for `{table NAME}`."""
    return tables.shown(name)[0]


def _more(tables: Tables, name: str) -> str:
    """Return the other tables of an experiment, folded, for `{more NAME}`."""
    others = "\n\n".join(tables.shown(name)[1:])
    return f'<details markdown="1">\n<summary>{FOLDED}</summary>\n\n{others}\n\n</details>' if others else ""


def _gain(tables: Tables, words: str) -> str:
    """Return a paired difference with its interval, for `{gain NAME WORLD | ROW}`.

    The difference is in points of avg@k to the row's baseline, with the significance of its table. `| area` selects another
    measure and `| less ROW` another baseline, both without a significance.
    """
    where, row, *more = (part.strip() for part in words.split("|"))
    name, world = where.split()
    experiment = read(name)
    others = [part.removeprefix("less ") for part in more if part.startswith("less ")] or [
        experiment.output_options["against"]
    ]
    measured = next((part for part in more if not part.startswith("less ")), "avg@k")
    found = tables.found(experiment)
    mine, other = ({seed: each[measured] for seed, each in found[world, which].items()} for which in (row, *others))
    difference = compute_paired_difference(other, mine)
    output = tables.output(name)
    assert output is not None, "a row is stored"
    rows = [] if more else output.tables[0].rows
    significance = [
        f"{each['from zero']}, " for each in rows if (each.get("model", world), each["method"]) == (world, row)
    ]
    return f"{format_mean_interval(difference, 1, '+')} ({''.join(significance)}{difference.n} seeds)"


def _mean(tables: Tables, words: str) -> str:
    """Return a row's avg@k in percent, for `{mean NAME WORLD | ROW}`."""
    where, row = (part.strip() for part in words.split("|"))
    name, world = where.split()
    return format_mean_interval(
        compute_seed_statistics([each["avg@k"] for each in tables.found(read(name))[world, row].values()])
    )


def _seeds(tables: Tables, name: str) -> str:
    """Return the seeds of an experiment's stored runs, for `{seeds NAME}`."""
    seeds = sorted({seed for row in tables.found(read(name)).values() for seed in row})
    return ", ".join(map(str, seeds))


def _revisions(tables: Tables, _: str) -> str:
    """Return the code revisions of the stored runs, for `{revisions of runs}`."""
    return ", ".join(f"`{revision}`" for revision in tables.runs["revision"].drop_duplicates())


def _figure(tables: Tables, name: str) -> str:
    """Draw a figure and return its Markdown, for `{figure NAME}`."""
    output = tables.output("depth" if name in DRAWN else name)
    if output is None or (name in DRAWN and few(tables)):
        return NOTHING_STORED
    title, draw = DRAWN.get(name, (f"Reward over training: {name}", lambda tables: output.figure))
    figure = draw(tables)
    assert figure is not None, "every kind that is stored has a figure"
    path = tables.docs / f"{name}.png"
    raw = path.with_suffix(".raw.png")
    figure.savefig(raw, dpi=150, format="png")
    small(raw, path)
    raw.unlink()
    return f"![{title}](results/{name}.png)"


DRAWN = {
    "gains": ("Gain of BuPO over GRPO by layer and world", lambda tables: gains_figure(tables, "depth")),
    "prediction": ("Measures before training, and the gain", prediction_figure),
}
SAYS = {
    "table": _table, "more": _more, "gain": _gain, "mean": _mean, "seeds": _seeds, "revisions": _revisions, "figure": _figure,
    "contrasts": contrasts_table, "overall": over_worlds,
    "prediction": lambda tables, name: prediction(tables) if tables.output(name) else NOTHING_STORED,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, help="folder of the runs, named like their scale")
    parser.add_argument("--check", action="store_true", help="write nothing, and list stale pages")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the docs' folder")
    parser.add_argument("--revision", help="code revision of runs that do not record one; by default the checkout's")
    arguments = parser.parse_args()
    stored = arguments.docs / "results"
    if arguments.runs is not None:
        words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        revision = arguments.revision or subprocess.check_output(words, text=True).strip()
        gather(arguments.runs, stored, revision, arguments.runs.resolve().name)
    tables = Tables(stored)
    stale = []
    for name, template in PAGES.items():
        page, text = arguments.docs / name, (stored / template).read_text()
        if not arguments.check:
            page.write_text(filled(text, tables))
            continue
        for figure in re.findall(r"\{figure (\w+)\}", text):
            text = text.replace(f"{{figure {figure}}}", _named(page, figure))
        if page.read_text() != filled(text, tables):
            stale.append(name)
    if arguments.check:
        print(f"stale: {', '.join(stale)}" if stale else f"the pages match {stored}")
        sys.exit(bool(stale))


def _named(page: Path, name: str) -> str:
    """Return a figure's line in the page, without drawing it again."""
    line = re.search(rf"!\[[^\]]*\]\(results/{name}\.png\)", page.read_text())
    return line[0] if line and (page.parent / "results" / f"{name}.png").exists() else NOTHING_STORED


if __name__ == "__main__":
    main()

"""docs/results.md: does bottom-up training win, when, why, and can one know before? From stored tables of runs.

    bupo reproduce all --scale worlds --jobs 2
    python tools/results_page.py runs/reproduce/worlds    # adds the runs that have ended to the tables, writes the page
    python tools/results_page.py                          # writes the page from the tables
    python tools/results_page.py --check                  # says what is stale, exit status 1

The tables stand in docs/results: `runs.csv`, a row a training, and `layers.csv`, a row a world, measure and layer. A world that
is made again may be another model: `base` tells the weights that a training began from, and what is compared is of one. The
page is `page.md` there, in which `{table NAME}`, `{figure NAME}`, `{gain NAME WORLD | ROW}` and the like stand for what the
tables say. An experiment is one of the scale `worlds`; `compare@small` is that of another.
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
# By scale, the model that is given to `bupo reproduce`.
MODELS = {"worlds": None, "small": "models/smollm2-135m.gguf"}
KEYS = ["run", "digest", "base"]
UNKNOWN = "first"  # weights of a run that does not say them
FOLDED = "pass@K, area under the curve, reward, entropy and length"


@cache
def read(name: str) -> Experiment:
    """An experiment by its name on the page."""
    name, _, scale = name.partition("@")
    return read_experiment(name, scale or "worlds", MODELS[scale or "worlds"])


def ended(experiment: Experiment, places: RunPaths) -> Iterator[Cell]:
    """The cells whose runs have all ended, of today's options."""
    for cell in experiment.cells:
        try:
            if all(get_run_state(run, places) == "finished" for run in cell.runs.values()):
                yield cell
        except UserError:  # made with other options than today's
            continue


def gather(root: Path, docs: Path, revision: str, scale: str = "worlds") -> None:
    """Put the runs that have ended into the tables. A row that is there already stays.

    Args:
        root (`Path`): the folder of the runs.
        docs (`Path`): that of the tables.
        revision (`str`): of the code that made the runs which do not say it themselves.
        scale (`str`): of the runs.
    """
    places, rows, layers = RunPaths(root), [], []
    for name in list_experiments(scale):
        experiment = read(f"{name}@{scale}")
        finished = FinishedExperiment(experiment, places.get_run_folder, places.read_seconds)
        for cell in ended(experiment, places):
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
    """Of the checkout that a run was started in, if it was one of this project."""
    if not began.get("git"):
        return None
    words = ["git", "-C", str(ROOT), "cat-file", "-e", began["git"]["revision"]]
    here = subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0
    return began["git"]["revision"][:7] if here else None


def _layers(finished: FinishedExperiment, cell: Cell) -> pd.DataFrame:
    """What the analysis of a world says of its layers."""
    run = cell.runs["analyze"]
    table = finished.read_dataframe(run, "layers.parquet")[["measure", "layer", "mean", "low", "high"]]
    model = finished.get_value(run, "summary.json", finished.read_summary(run), "models", 0)
    said = [{"measure": "boundary", "layer": 0, "mean": model["boundary_layer"]}]
    said += [{"measure": f"pattern {model['pattern']}", "layer": 0, "mean": 1}]
    return pd.concat([table, pd.DataFrame(said)]).assign(world=cell.model).round(5)


def _merge(path: Path, new: pd.DataFrame, keys: list[str]) -> None:
    old = pd.read_csv(path) if path.exists() else pd.DataFrame()
    whole = pd.concat([old, new])
    if len(whole):
        whole.drop_duplicates(keys, keep="first").sort_values(keys[:1] + keys[1:]).to_csv(path, index=False)


class Tables:
    """The stored tables, as the experiments ask for them."""

    def __init__(self, docs: Path):
        self.docs = docs
        self.runs = pd.read_csv(docs / RUNS)
        self.layers = pd.read_csv(docs / LAYERS)
        self.known: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.runs.to_dict("records"):
            self.known.setdefault((row["run"], row["digest"]), []).append(row)
        self.outputs: dict[
            str, ExperimentOutput | None
        ] = {}  # by experiment: the page says something of one in many places

    def experiment(self, name: str) -> Experiment:
        """By its name on the page."""
        return read(name)

    def found(self, experiment: Experiment) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
        """Measures by world and row, then by seed: of the runs that are stored and are of today's options. Those of one world
        and seed are of one base model, that which most of the experiment's rows have: no difference is between two."""
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
        """A run of each base model."""
        last = cell.runs.get("eval", cell.runs["train"])
        return self.known.get((last.name, last.compute_digest()), [])

    def output(self, name: str) -> ExperimentOutput | None:
        """None where no run is stored."""
        if name not in self.outputs:
            found = self.found(read(name))
            self.outputs[name] = compare_outcomes(read(name), found) if found else None
        return self.outputs[name]

    def shown(self, name: str) -> list[str]:
        """An experiment's tables."""
        output = self.output(name)
        return [table.to_markdown().rstrip("\n") for table in output.tables] if output else [NOTHING_STORED]


# -- what stands for braces in page.md -----------------------------------------------------------------------------------


def filled(text: str, tables: Tables) -> str:
    """The page's text, with what the tables say in the place of its braces."""
    return re.sub(r"\{(\w+) ([^{}]*)\}", lambda found: SAYS[found[1]](tables, found[2].strip()), text)


def _table(tables: Tables, name: str) -> str:
    """`{table NAME}`: the main table of an experiment."""
    return tables.shown(name)[0]


def _more(tables: Tables, name: str) -> str:
    """`{more NAME}`: its other tables, folded."""
    others = "\n\n".join(tables.shown(name)[1:])
    return f'<details markdown="1">\n<summary>{FOLDED}</summary>\n\n{others}\n\n</details>' if others else ""


def _gain(tables: Tables, words: str) -> str:
    """`{gain NAME WORLD | ROW}`: a row less the one that it is compared with, points of avg@k, told apart or not as its table
    says; with `| area` of that, with `| less ROW` less another one, and then the interval speaks for itself."""
    where, row, *more = (part.strip() for part in words.split("|"))
    name, world = where.split()
    experiment = read(name)
    others = [part.removeprefix("less ") for part in more if part.startswith("less ")] or [
        experiment.output_options["against"]
    ]
    measured = next((part for part in more if not part.startswith("less ")), "avg@k")
    found = tables.found(experiment)
    mine, other = ({seed: each[measured] for seed, each in found[world, which].items()} for which in (row, *others))
    apart = compute_paired_difference(other, mine)
    output = tables.output(name)
    assert output is not None, "a row is stored"
    rows = [] if more else output.tables[0].rows
    said = [f"{each['from zero']}, " for each in rows if (each.get("model", world), each["method"]) == (world, row)]
    return f"{format_mean_interval(apart, 1, '+')} ({''.join(said)}{apart.n} seeds)"


def _mean(tables: Tables, words: str) -> str:
    """`{mean NAME WORLD | ROW}`: a row's avg@k, in percent."""
    where, row = (part.strip() for part in words.split("|"))
    name, world = where.split()
    return format_mean_interval(
        compute_seed_statistics([each["avg@k"] for each in tables.found(read(name))[world, row].values()])
    )


def _seeds(tables: Tables, name: str) -> str:
    """`{seeds NAME}`: the seeds of an experiment's stored runs."""
    seeds = sorted({seed for row in tables.found(read(name)).values() for seed in row})
    return ", ".join(map(str, seeds))


def _revisions(tables: Tables, _: str) -> str:
    """`{revisions of runs}`: of the code that made them."""
    return ", ".join(f"`{revision}`" for revision in tables.runs["revision"].drop_duplicates())


def _figure(tables: Tables, name: str) -> str:
    """`{figure NAME}`: drawn, and named."""
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
    "prediction": ("What the analysis says before training, and the gain", prediction_figure),
}
SAYS = {
    "table": _table, "more": _more, "gain": _gain, "mean": _mean, "seeds": _seeds, "revisions": _revisions, "figure": _figure,
    "contrasts": contrasts_table, "overall": over_worlds,
    "prediction": lambda tables, name: prediction(tables) if tables.output(name) else NOTHING_STORED,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="?", type=Path, help="folder of the runs, called as their scale is")
    parser.add_argument("--check", action="store_true", help="write nothing, and say what is stale")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the docs' folder")
    parser.add_argument(
        "--revision", help="of the code that made the runs, where they do not say it; by default the checkout's"
    )
    given = parser.parse_args()
    stored = given.docs / "results"
    if given.runs is not None:
        words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        revision = given.revision or subprocess.check_output(words, text=True).strip()
        gather(given.runs, stored, revision, given.runs.resolve().name)
    text, page = (stored / "page.md").read_text(), given.docs / "results.md"
    tables = Tables(stored)
    if given.check:
        text = re.sub(r"\{figure (\w+)\}", lambda found: _named(page, found[1]), text)
        fresh = page.read_text() == filled(text, tables)
        print(f"{page} is {'' if fresh else 'not '}what {stored} gives")
        sys.exit(not fresh)
    page.write_text(filled(text, tables))


def _named(page: Path, name: str) -> str:
    """A figure's line in the page, which is not drawn again."""
    line = re.search(rf"!\[[^\]]*\]\(results/{name}\.png\)", page.read_text())
    return line[0] if line and (page.parent / "results" / f"{name}.png").exists() else NOTHING_STORED


if __name__ == "__main__":
    main()

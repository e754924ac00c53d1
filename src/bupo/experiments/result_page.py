"""Result files of an experiment: figure, table, data and a page that explains them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bupo.experiments.experiment import Experiment
from bupo.experiments.outputs import OUTPUT_MAKERS, ExperimentOutput, FinishedExperiment
from bupo.experiments.outputs.comparison_table import quote_name
from bupo.run_files.provenance import get_versions
from bupo.run_files.reading import PARSE_ERRORS
from bupo.utils.errors import UserError, summarize_error
from bupo.utils.files import atomic_write, make_folder, write_json, write_text
from bupo.utils.sanitize import escape_csv_cell

SCHEMA_VERSION = 1
RESULT_FILE, PAGE_FILE, TABLE_FILE, FIGURE_FILE = "result.json", "result.md", "table.md", "figure.png"
OTHER_MODELS_NOTE = (
    "The paper's numbers are of other models and other problems: only the direction of a difference may be compared with "
    "them, not its size."
)
PAPER_MODELS_NOTE = "The models and hyperparameters are the paper's."


@dataclass(frozen=True)
class ExperimentResult:
    """A finished figure or table.

    Attributes:
        name, title, source, kind, scale, about (`str`): of the experiment.
        digest (`str`): of the experiment. A result with another digest is stale.
        versions (`dict`): of the libraries that computed it.
        rows (`list[dict]`): of the table, for programs.
        notes (`list[str]`): limits of the numbers.
        files (`list[str]`): names of the files in `folder`.
        folder (`Path`): of the result.
    """

    name: str
    title: str
    source: str
    kind: str
    scale: str
    about: str
    digest: str
    versions: dict[str, str | None]
    rows: list[dict[str, Any]]
    notes: list[str]
    files: list[str]
    folder: Path


def make_result(
    experiment: Experiment,
    get_run_folder: Callable[[str], Path],
    folder: Path,
    get_seconds: Callable[[str], float | None],
) -> ExperimentResult:
    """Write the files of a figure or table from finished runs; `result.json` is the last.

    Args:
        experiment (`Experiment`): the figure or table.
        get_run_folder (`Callable`): returns the folder of a run by its name.
        folder (`Path`): for the result.
        get_seconds (`Callable`): returns the seconds of a run by its name, or None if they are unknown.

    Raises:
        UserError: if a file of a run is missing or damaged; nothing is written then.
    """
    try:
        output = OUTPUT_MAKERS[experiment.kind](FinishedExperiment(experiment, get_run_folder, get_seconds))
    except UserError:
        raise
    except PARSE_ERRORS as error:  # a value of another type, deep in a complete file
        raise UserError(
            f"{experiment.name} cannot be made: a file of its runs is damaged: {summarize_error(error)}; start the runs again"
        ) from error
    notes = [*output.notes, *_make_notes(experiment, output)]
    make_folder(folder, folder.parent)
    files = [
        _write_csv(output.rows, folder / "table.csv"),
        _write_csv(output.data.to_dict("records"), folder / "data.csv"),
    ]
    files.append(_write_text_file("\n".join(table.to_markdown() for table in output.tables), folder / TABLE_FILE))
    if output.figure is not None:
        files.append(_write_figure(output.figure, folder / FIGURE_FILE))
    files.append(_write_text_file(format_page(experiment, output, notes), folder / PAGE_FILE))
    head = {name: getattr(experiment, name) for name in ("name", "title", "source", "kind", "scale", "about")}
    result = ExperimentResult(
        **head, digest=experiment.compute_digest(), versions=get_versions(), rows=output.rows, notes=notes, files=files,
        folder=folder,
    )  # fmt: skip
    record = asdict(result)
    del record["folder"]
    write_json(folder / RESULT_FILE, {"schema_version": SCHEMA_VERSION, **record})
    return result


def format_page(experiment: Experiment, output: ExperimentOutput, notes: list[str]) -> str:
    """Return the text of `result.md`."""
    source = f"In the paper: {experiment.source}. " if experiment.source else ""
    figure = [f"![{experiment.title}]({FIGURE_FILE})", ""] if output.figure is not None else []
    return "\n".join([
        f"# {format_experiment_name(experiment.name)}: {experiment.title}", "",
        f"{source}Scale `{experiment.scale}`: {experiment.about}.", "",
        *figure,
        *(table.to_markdown() for table in output.tables),
        *(f"- {note}" for note in notes), "",
        f"Command: `bupo reproduce {experiment.name} --scale {experiment.scale}`. Numbers: [table.csv](table.csv), "
        "[data.csv](data.csv), [result.json](result.json).", "",
    ])  # fmt: skip


def format_experiment_name(name: str) -> str:
    """Return `Figure 3` for `fig3`."""
    return name.replace("fig", "Figure ").replace("table", "Table ")


def _make_notes(experiment: Experiment, output: ExperimentOutput) -> list[str]:
    """Return the notes that every result has: models, seeds, intervals and the baseline of differences."""
    is_paper_setting = experiment.scale == "paper" and not experiment.has_custom_model
    notes = [PAPER_MODELS_NOTE if is_paper_setting else OTHER_MODELS_NOTE]
    if "seeds" in output.data or any("seeds" in row for row in output.rows):
        bands = "" if output.figure is None else "; so are the bands around the lines"
        seeds = sorted({cell.seed for cell in experiment.cells})
        notes.append(
            f"One seed, {seeds[0]}: it has no interval, and says nothing about others."
            if len(seeds) == 1
            else f"Seeds {', '.join(map(str, seeds))}. Intervals are Student's, 95 %, of the mean over seeds{bands}."
        )
    baselines = sorted({str(row["against"]) for row in output.rows if row.get("against")})
    notes += [f"A difference to {quote_name(name)} is paired by seed." for name in baselines]
    return notes


def _write_csv(rows: list[dict[str, Any]], path: Path) -> str:
    """Write rows as CSV, a mapping as one column per key. Return the file's name."""
    flat = [
        {
            f"{name} {key}" if key is not None else name: escape_csv_cell(value) if isinstance(value, str) else value
            for name, cell in row.items()
            for key, value in (cell.items() if isinstance(cell, dict) else [(None, cell)])
        }
        for row in rows
    ]
    with atomic_write(path) as part:
        pd.DataFrame(flat).to_csv(part, index=False)
    return path.name


def _write_text_file(text: str, path: Path) -> str:
    write_text(path, text)
    return path.name


def _write_figure(figure: Figure, path: Path) -> str:
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png")
    return path.name

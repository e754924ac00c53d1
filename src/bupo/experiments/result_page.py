"""The result of an experiment: its figure and table, the data behind them, and a page that says what they are."""

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
    """A figure or table that was made.

    Attributes:
        name, title, source, kind, scale, about (`str`): as of the experiment.
        digest (`str`): of the experiment; where it is another by now, the result is stale.
        versions (`dict`): of what computed it.
        rows (`list[dict]`): of the table, as programs read them.
        notes (`list[str]`): what the numbers cannot say themselves.
        files (`list[str]`): in `folder`.
        folder (`Path`): where it is.
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
    place: Callable[[str], Path],
    folder: Path,
    seconds: Callable[[str], float | None],
) -> ExperimentResult:
    """Draw a figure or table of runs that have finished, in whole files; `result.json` is the last.

    Args:
        experiment (`Experiment`): which.
        place (`Callable`): the folder of a run, by its name.
        folder (`Path`): where the result goes.
        seconds (`Callable`): how long a run took here, by its name; None where that is not known.

    Raises:
        UserError: if a run's folder lacks something, or holds what is none of its files; nothing is written then.
    """
    try:
        output = OUTPUT_MAKERS[experiment.kind](FinishedExperiment(experiment, place, seconds))
    except UserError:
        raise
    except PARSE_ERRORS as error:  # a value of another type, deep in a file that is whole
        raise UserError(
            f"{experiment.name} cannot be made, for a file of its runs is damaged: {summarize_error(error)}; start the runs again"
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
    told = asdict(result)
    del told["folder"]
    write_json(folder / RESULT_FILE, {"schema_version": SCHEMA_VERSION, **told})
    return result


def format_page(experiment: Experiment, output: ExperimentOutput, notes: list[str]) -> str:
    """`result.md`."""
    source = f"In the paper: {experiment.source}. " if experiment.source else ""
    figure = [f"![{experiment.title}]({FIGURE_FILE})", ""] if output.figure is not None else []
    return "\n".join([
        f"# {format_experiment_name(experiment.name)}: {experiment.title}", "",
        f"{source}Made at the scale `{experiment.scale}`: {experiment.about}.", "",
        *figure,
        *(table.to_markdown() for table in output.tables),
        *(f"- {note}" for note in notes), "",
        f"Made by `bupo reproduce {experiment.name} --scale {experiment.scale}`. The numbers: [table.csv](table.csv), "
        "[data.csv](data.csv), [result.json](result.json).", "",
    ])  # fmt: skip


def format_experiment_name(name: str) -> str:
    """`fig3` in words."""
    return name.replace("fig", "Figure ").replace("table", "Table ")


def _make_notes(experiment: Experiment, output: ExperimentOutput) -> list[str]:
    """What every result has to say of itself."""
    theirs = experiment.scale == "paper" and not experiment.has_custom_model
    notes = [PAPER_MODELS_NOTE if theirs else OTHER_MODELS_NOTE]
    if "seeds" in output.data or any("seeds" in row for row in output.rows):
        band = "" if output.figure is None else "; so are the bands around the lines"
        seeds = sorted({cell.seed for cell in experiment.cells})
        notes.append(
            f"One seed, {seeds[0]}: it has no interval, and says nothing about others."
            if len(seeds) == 1
            else f"Seeds {', '.join(map(str, seeds))}. Intervals are Student's, 95 %, of the mean over seeds{band}."
        )
    against = sorted({str(row["against"]) for row in output.rows if row.get("against")})
    notes += [f"A difference to {quote_name(name)} is paired by seed." for name in against]
    return notes


def _write_csv(rows: list[dict[str, Any]], path: Path) -> str:
    """Rows as CSV: a mapping becomes columns of its own."""
    flat = [
        {
            f"{name} {key}" if key is not None else name: escape_csv_cell(value) if isinstance(value, str) else value
            for name, given in row.items()
            for key, value in (given.items() if isinstance(given, dict) else [(None, given)])
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

"""`bupo analyze`: entropy and predictions of every layer and module of a model, as tables, figures and a page."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bupo.analysis.options import AnalyzeOptions
from bupo.analysis.results import ModelReport
from bupo.analysis.run import analyze
from bupo.cli.interrupt import reported_interrupts
from bupo.cli.parsing import parse_options_and_values
from bupo.utils.progress import create_progress
from bupo.utils.sanitize import escape_line, escape_text

STAGE_COLOURS = {"exploration": "green", "convergence": "red", "integration": "dim", "undecided": "dim"}

OPTIONS = (AnalyzeOptions,)


def run(arguments: list[str]) -> None:
    """Analyse each model and print its layers."""
    (options,), given = parse_options_and_values(OPTIONS, arguments, "bupo analyze")
    console = Console()
    with reported_interrupts(Path(options.output)), create_progress(console) as bar:
        report = analyze(options.model, options, recorded_options=given, progress=bar)
    for model in report.models:
        console.print(_make_table(model))
        for line in (f"template {model.meta['template']}", model.explanation, model.verdict):
            console.print(escape_text(f"{model.meta['model']}: {line}"), highlight=False, markup=False)
    files = "report.html, layers.parquet, summary.json, figures/, config.yaml"
    files += ", dynamics.parquet" * (report.dynamics is not None)
    console.print(escape_line(f"run folder: {report.folder}  ({files})"), highlight=False, markup=False)


def _make_table(model: ModelReport) -> Table:
    """Return the table of a model's layers: H and dH in nats, KL and top-1 agreement with the final layer's policy."""
    meta, rows = model.meta, model.table.set_index(["measure", "layer"])
    title = f"{escape(model.label)}: {meta['answers']} answers, {meta['tokens']:,} tokens, lens {meta['lens']}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layer", "H layer", "dH attn", "dH ffn  [95 %]", "KL", "top-1", "stage"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for layer, stage in enumerate(model.stages, 1):
        mean = rows["mean"].xs(layer, level="layer")
        ffn = rows.loc[("d_entropy_ffn", layer)]
        table.add_row(
            f"{'▶ ' if layer == model.boundary_layer else ''}{layer}",
            f"{mean['entropy_layer']:.3f}",
            f"{mean['d_entropy_attn']:+.2f}",
            f"{ffn['mean']:+.2f} [{ffn['low']:+.2f}, {ffn['high']:+.2f}]",
            f"{mean['kl_language_model']:.2f}",
            f"{100 * mean['top1_agreement']:.0f} %",
            f"[{STAGE_COLOURS[stage]}]{stage}[/]",
        )
    return table

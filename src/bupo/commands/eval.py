"""`bupo eval`: avg@k, pass@k and majority@k of a model, or of a policy inside it, on benchmarks."""

from pathlib import Path

from rich.console import Console

from bupo.commands.keeping import keeping
from bupo.commands.parsing import parse_given
from bupo.evaluation.options import EvalOptions
from bupo.evaluation.run import evaluate
from bupo.progress import progress
from bupo.report.scores import score_tables
from bupo.text import printable


def run(arguments: list[str]) -> None:
    """Evaluate and print the numbers."""
    (options,), given = parse_given((EvalOptions,), arguments, "bupo eval")
    console = Console()
    with keeping(Path(options.output)), progress(console) as bar:
        found = evaluate(options.model, options, noted=given, bar=bar)
    console.print(printable(f"{found.meta['model']}: template {found.meta['template']}"), highlight=False, markup=False)
    for table in score_tables(found.summary()):
        console.print(table)
    files = ", ".join(sorted(path.name for path in found.folder.iterdir() if path.is_file()))
    console.print(printable(f"run folder: {found.folder}  ({files})"), highlight=False, markup=False)

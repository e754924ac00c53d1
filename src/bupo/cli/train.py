"""`bupo train`: a model, problems and a reward into a trained model, by BuPO or the methods it is compared with."""

from rich.console import Console
from trl import ModelConfig

from bupo.cli.parsing import parse_given
from bupo.training.callbacks.console import ConsoleLines
from bupo.training.config import BuPOConfig
from bupo.training.run import NotedRun, train
from bupo.training.train_data import TrainOptions
from bupo.utils.errors import UserError
from bupo.utils.sanitize import printable_line

OPTIONS = (TrainOptions, BuPOConfig, ModelConfig)


def run(arguments: list[str]) -> None:
    """Parse, train and show."""
    (options, config, model), given = parse_given(OPTIONS, arguments, "bupo train")
    if model.model_name_or_path is None:
        raise UserError("model is not set: give the folder of a model, a hub id or 'embedded'")
    console = Console(quiet=config.process_index > 0)
    lines = ConsoleLines(console)
    with lines.closing():
        done = train(
            model.model_name_or_path,
            config,
            options,
            loading=model,
            callbacks=[lines],
            note=NotedRun("train", given),
            say=lambda line: console.print(printable_line(line), highlight=False, markup=False),
        )
    files = ", ".join(sorted(path.name for path in done.folder.iterdir() if path.is_file()))
    console.print(printable_line(f"run folder: {done.folder}  ({files})"), highlight=False, markup=False)

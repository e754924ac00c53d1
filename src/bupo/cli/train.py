"""`bupo train`: train a model on problems and a reward by BuPO, or by a method that it is compared with."""

from rich.console import Console
from trl import ModelConfig

from bupo.cli.parsing import parse_options_and_values
from bupo.training.callbacks.console import ConsoleCallback
from bupo.training.config import BuPOConfig
from bupo.training.run import RunMetadataCallback, train
from bupo.training.train_data import TrainOptions
from bupo.utils.errors import UserError
from bupo.utils.sanitize import escape_line

OPTIONS = (TrainOptions, BuPOConfig, ModelConfig)


def run(arguments: list[str]) -> None:
    """Train and print the progress and the run folder."""
    (options, config, model), given = parse_options_and_values(OPTIONS, arguments, "bupo train")
    if model.model_name_or_path is None:
        raise UserError("model is not set: give the folder of a model, a hub id or 'embedded'")
    console = Console(quiet=config.process_index > 0)
    lines = ConsoleCallback(console)
    with lines.close_on_exit():
        done = train(
            model.model_name_or_path,
            config,
            options,
            loading=model,
            callbacks=[lines],
            metadata=RunMetadataCallback("train", given),
            log=lambda line: console.print(escape_line(line), highlight=False, markup=False),
        )
    files = ", ".join(sorted(path.name for path in done.folder.iterdir() if path.is_file()))
    console.print(escape_line(f"run folder: {done.folder}  ({files})"), highlight=False, markup=False)

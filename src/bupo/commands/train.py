"""`bupo train`: a model, problems and a reward into a trained model, by BuPO or the methods it is compared with."""

from rich.console import Console
from transformers import TrainerCallback
from trl import ModelConfig

from bupo.commands.parsing import parse_given
from bupo.errors import UserError
from bupo.provenance import note_run
from bupo.training.config import BuPOConfig
from bupo.training.console import ConsoleLines
from bupo.training.run import TrainOptions, train


class NotedRun(TrainerCallback):
    """Writes what was asked for into the run's folder, once training begins: what is refused leaves nothing."""

    def __init__(self, command: str, given: dict):
        self.command, self.given = command, given

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            note_run(args.output_dir, self.command, self.given)


def run(arguments: list[str]) -> None:
    """Parse, train and show."""
    (options, config, model), given = parse_given((TrainOptions, BuPOConfig, ModelConfig), arguments, "bupo train")
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
            callbacks=[NotedRun("train", given), lines],
            say=lambda line: console.print(line, highlight=False),
        )
    files = ", ".join(sorted(path.name for path in done.folder.iterdir() if path.is_file()))
    console.print(f"run folder: {done.folder}  ({files})", highlight=False)

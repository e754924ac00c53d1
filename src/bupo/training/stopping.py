"""A run that a signal ends: after a whole update, with a checkpoint that it goes on from as if it had not been stopped."""

import signal
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bupo.errors import Stopped
from bupo.signals import Heard


class Stop(TrainerCallback):
    """Once a signal was heard, in any process: saves at the update's end, whatever `save_strategy` says, and leaves the run.

    It leaves by [`~bupo.errors.Stopped`] and not by the trainer's own way out, which would log, probe and save a finished
    run: nothing may stand in the folder that a resumed run would not write in the same place. A signal during the last update
    comes too late to stop anything. It must be the last of the callbacks.

    Args:
        trainer ([`BuPOTrainer`]), heard ([`~bupo.signals.Heard`]): the run and its signals.
    """

    def __init__(self, trainer, heard: Heard):
        self.trainer, self.heard, self.stopping = trainer, heard, 0

    def on_step_end(self, args, state, control, **kwargs):
        came = self._agreed(self.heard.first)
        if came and state.global_step < state.max_steps:
            self.stopping, control.should_save = came, True
            args.save_only_model = False  # which nothing goes on from

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            name, folder = signal.Signals(self.stopping).name, Path(args.output_dir)
            raise Stopped(
                f"stopped by {name} after update {state.global_step} of {state.max_steps}, kept in "
                f"{folder / f'{PREFIX_CHECKPOINT_DIR}-{state.global_step}'}: the same command with "
                "--resume_from_checkpoint true goes on",
                self.stopping,
            )

    def _agreed(self, came: int) -> int:
        """The same for all processes: a signal may reach one of them only, or two of them around an update's end."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return came
        return int(accelerator.gather(torch.tensor([came], device=accelerator.device)).max())

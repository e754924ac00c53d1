"""End of a run: leave the process group and, after a signal, first save a checkpoint to resume from."""

import atexit
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bupo.utils import distributed_launch
from bupo.utils.errors import SignalInterrupt
from bupo.utils.signals import SignalRecorder

_left_groups: list[Any] = []


@contextmanager
def graceful_shutdown(trainer: Trainer, log: Callable[[str], None]) -> Iterator[None]:
    """Stop the run in the block at the end of an update after a signal, and leave its process group.

    Without a signal the group is left when the process exits, since another run may follow. After an error it is not left: the
    other processes may not know of the error, and leaving could wait for them.

    Args:
        trainer ([`BuPOTrainer`]): of the run.
        log (`Callable`): prints a line.

    Raises:
        SignalInterrupt: after a signal.
    """
    with SignalRecorder(log, distributed_launch.has_failed_process) as signals:
        trainer.add_callback(StopOnSignalCallback(trainer, signals))
        try:
            yield
        except SignalInterrupt:
            leave_process_group()
            raise
        _leave_process_group_at_exit()


def leave_process_group() -> None:
    """Leave the process group, if there is one.

    A reference to the group is kept until the process exits. Otherwise DDP's reducer, its last user, would destroy it: its
    destructor joins gloo's threads while it holds the GIL, a gloo thread that still releases its last collective waits for the
    GIL, and the process hangs forever. A colocated vLLM engine has subgroups of this group and must close them first.
    """
    if distributed.is_available() and distributed.is_initialized():
        _left_groups.append(distributed.group.WORLD)
        if "vllm.distributed" in sys.modules:
            sys.modules["vllm.distributed"].cleanup_dist_env_and_memory()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@cache
def _leave_process_group_at_exit() -> None:
    atexit.register(leave_process_group)


class StopOnSignalCallback(TrainerCallback):
    """Callback that saves a checkpoint at the end of an update after a signal, whatever `save_strategy` is, and ends the run.

    It raises [`~bupo.utils.errors.SignalInterrupt`] instead of setting `should_training_stop`, after which the trainer
    would log, probe and save a finished run: the folder must hold only what the resumed run writes too. A signal during
    the last update has no effect. The callback must be the last one.

    Args:
        trainer ([`BuPOTrainer`]): of the run.
        signal_recorder ([`~bupo.utils.signals.SignalRecorder`]): with the first signal of this process.
    """

    def __init__(self, trainer, signal_recorder: SignalRecorder):
        self.trainer, self.signal_handler, self.stop_signal = trainer, signal_recorder, 0

    def on_step_end(self, args, state, control, **kwargs):
        number = self._gather_signal(self.signal_handler.first_signal)
        if number and state.global_step < state.max_steps:
            self.stop_signal, control.should_save = number, True
            args.save_only_model = False  # a run cannot resume from the model alone

    def on_save(self, args, state, control, **kwargs):
        if self.stop_signal:
            name, folder = signal.Signals(self.stop_signal).name, Path(args.output_dir)
            raise SignalInterrupt(
                f"stopped by {name} after update {state.global_step} of {state.max_steps}, saved in "
                f"{folder / f'{PREFIX_CHECKPOINT_DIR}-{state.global_step}'}: resume with the same command and "
                "--resume_from_checkpoint true",
                self.stop_signal,
            )

    def _gather_signal(self, number: int) -> int:
        """Return the largest signal number of all processes: a signal may reach one of them only, or some of them later."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return number
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())

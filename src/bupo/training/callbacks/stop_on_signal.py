"""How a run ends: its process group closed, and after a signal with a checkpoint that it goes on from."""

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
def graceful_shutdown(trainer: Trainer, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, a run. Signals end it after a whole update, and its process group with it; else the group is left as this process
    ends, for there may be another run.

    Of an error the other processes may know nothing: then the group is not left, since they might be waited for.

    Raises:
        Stopped: after a signal.
    """
    with SignalRecorder(say, distributed_launch.has_failed_process) as heard:
        trainer.add_callback(StopOnSignalCallback(trainer, heard))
        try:
            yield
        except SignalInterrupt:
            leave_process_group()
            raise
        _leave_process_group_at_exit()


def leave_process_group() -> None:
    """Leave the process group, if there is one.

    The group itself is kept for as long as this process lives. It would else be destroyed with its last user, DDP's reducer,
    whose destructor joins gloo's threads while it holds the interpreter's lock; a thread of gloo's that is still letting go of
    its last collective waits for that lock, and the process hangs for ever.
    An engine of vLLM's beside the trainer has groups of its own within this one, and would close them after it, with an error.
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
    """Once a signal was heard, in any process: saves at the update's end, whatever `save_strategy` says, and leaves the run.

    It leaves by [`~bupo.utils.errors.SignalInterrupt`] and not by the trainer's own way out, which would log, probe and save a finished
    run: nothing may stand in the folder that a resumed run would not write in the same place. A signal during the last update
    comes too late to stop anything. It must be the last of the callbacks.

    Args:
        trainer ([`BuPOTrainer`]), heard ([`~bupo.utils.signals.SignalRecorder`]): the run and its signals.
    """

    def __init__(self, trainer, heard: SignalRecorder):
        self.trainer, self.signal_handler, self.stop_signal = trainer, heard, 0

    def on_step_end(self, args, state, control, **kwargs):
        came = self._gather_signal(self.signal_handler.first_signal)
        if came and state.global_step < state.max_steps:
            self.stop_signal, control.should_save = came, True
            args.save_only_model = False  # which nothing goes on from

    def on_save(self, args, state, control, **kwargs):
        if self.stop_signal:
            name, folder = signal.Signals(self.stop_signal).name, Path(args.output_dir)
            raise SignalInterrupt(
                f"stopped by {name} after update {state.global_step} of {state.max_steps}, kept in "
                f"{folder / f'{PREFIX_CHECKPOINT_DIR}-{state.global_step}'}: the same command with "
                "--resume_from_checkpoint true goes on",
                self.stop_signal,
            )

    def _gather_signal(self, came: int) -> int:
        """The same for all processes: a signal may reach one of them only, or two of them around an update's end."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return came
        return int(accelerator.gather(torch.tensor([came], device=accelerator.device)).max())

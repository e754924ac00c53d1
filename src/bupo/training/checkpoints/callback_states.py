"""States of callbacks in a checkpoint: those that transformers knows as `ExportableState`, such as `EarlyStoppingCallback`."""

import json
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class CallbackStates:
    """A part of a checkpoint. A resumed run has the callbacks' states of the run that was stopped, and ends where one of them
    had ended that.

    transformers restores them with `restore_callback_states_from_checkpoint` only, and of two of one kind the first states.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): its callbacks, and `ended_early`.
        say (`Callable`): takes a line about callbacks that start afresh.
    """

    def __init__(self, trainer: Any, say: Callable[[str], None]):
        self.trainer, self.logger = trainer, say

    def _get_stateful_callbacks(self) -> list[TrainerCallback]:
        return [each for each in self.trainer.callback_handler.callbacks if isinstance(each, ExportableState)]

    def state(self) -> dict:
        """Return what a checkpoint must hold: the states as JSON, and whether a callback has ended the run."""
        states = [(type(each).__name__, each.state()) for each in self._get_stateful_callbacks()]  # type: ignore[attr-defined]
        unfinished = self.trainer.state.global_step < self.trainer.state.max_steps
        ended = bool(states) and unfinished and self.trainer.control.should_training_stop
        return {"callbacks": json.dumps(states, default=_to_json_value), "ended": ended}

    def load(self, state: dict, rollout_batch: int) -> None:
        """Put what `state` returned into the callbacks of this run, if they are the same ones with the same options."""
        before, now = json.loads(state["callbacks"]), self._get_stateful_callbacks()
        options = [[type(each).__name__, each.state().get("args", {})] for each in now]  # type: ignore[attr-defined]
        if json.loads(json.dumps(options, default=_to_json_value)) != [
            [name, kept.get("args", {})] for name, kept in before
        ]:
            self.logger(
                f"callbacks start afresh: they are {_format_callbacks(options)} from here on, and were {_format_callbacks(before)}"
            )
            return
        for callback, (_, kept) in zip(now, before, strict=True):
            for name, value in kept.get("attributes", {}).items():
                setattr(callback, name, value)
        self.trainer.stopped_by_callback = state["ended"]


def _to_json_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _format_callbacks(states: list) -> str:
    return ", ".join(f"{name} {state.get('args', state)}" for name, state in states) or "none"

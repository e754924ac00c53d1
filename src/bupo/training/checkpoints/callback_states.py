"""Checkpointed states of callbacks that are an `ExportableState` of transformers, such as `EarlyStoppingCallback`."""

import json
from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import ExportableState


class CallbackStates:
    """Part of a checkpoint that holds the states of the callbacks, and whether one of them has stopped the run.

    transformers restores them only with `restore_callback_states_from_checkpoint`, and of two callbacks of one class it
    restores the first state twice.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): its callbacks, and `stopped_by_callback`.
        log (`Callable`): prints a line if callbacks start without their earlier state.
    """

    def __init__(self, trainer: Any, log: Callable[[str], None]):
        self.trainer, self.log = trainer, log

    def _get_stateful_callbacks(self) -> list[Any]:
        return [
            callback for callback in self.trainer.callback_handler.callbacks if isinstance(callback, ExportableState)
        ]

    def state(self) -> dict:
        """Return the states as JSON, and whether a callback has stopped the run."""
        states = [(type(callback).__name__, callback.state()) for callback in self._get_stateful_callbacks()]
        is_unfinished = self.trainer.state.global_step < self.trainer.state.max_steps
        stopped = bool(states) and is_unfinished and self.trainer.control.should_training_stop
        return {"callbacks": json.dumps(states, default=_to_json_value), "stopped": stopped}

    def load(self, state: dict, rollout_batch: int) -> None:
        """Restore the result of `state`, if this run has the same callbacks with the same options."""
        saved, callbacks = json.loads(state["callbacks"]), self._get_stateful_callbacks()
        options = [[type(callback).__name__, callback.state().get("args", {})] for callback in callbacks]
        saved_options = [[name, values.get("args", {})] for name, values in saved]
        if json.loads(json.dumps(options, default=_to_json_value)) != saved_options:
            self.log(
                f"callbacks start without their earlier state: they are {_format_callbacks(options)}, and were "
                f"{_format_callbacks(saved)}"
            )
            return
        for callback, (_, values) in zip(callbacks, saved, strict=True):
            for name, value in values.get("attributes", {}).items():
                setattr(callback, name, value)
        self.trainer.stopped_by_callback = state["stopped"]


def _to_json_value(value: Any) -> Any:
    """Return a NumPy or torch number as a plain one, and anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _format_callbacks(states: list) -> str:
    return ", ".join(f"{name} {state.get('args', state)}" for name, state in states) or "none"

"""Forward hooks that record the inputs and outputs of modules."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

TensorCallback = Callable[[torch.Tensor], None]


def add_input_hook(module: nn.Module, callback: TensorCallback, hooks: ExitStack) -> None:
    """Call `callback` with the input states of the module (its first argument, or `hidden_states`) until `hooks` closes."""

    def before(_module, args, kwargs):
        if args or "hidden_states" in kwargs:
            callback(args[0] if args else kwargs["hidden_states"])

    hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)


def add_output_hook(module: nn.Module, callback: TensorCallback, hooks: ExitStack) -> None:
    """Call `callback` with the module's output tensor (or the first of a tuple) until `hooks` closes."""

    def after(_module, _args, out):
        states = out[0] if isinstance(out, tuple) else out
        if isinstance(states, torch.Tensor):
            callback(states)

    hooks.callback(module.register_forward_hook(after).remove)

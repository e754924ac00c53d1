"""What modules read and return, while hooks watch."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

TensorCallback = Callable[[torch.Tensor], None]


def add_input_hook(module: nn.Module, put: TensorCallback, hooks: ExitStack) -> None:
    """Until `hooks` closes, give `put` the states that the module reads: its first argument, or `hidden_states`."""

    def before(_module, args, kwargs):
        if args or "hidden_states" in kwargs:
            put(args[0] if args else kwargs["hidden_states"])

    hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)


def add_output_hook(module: nn.Module, put: TensorCallback, hooks: ExitStack) -> None:
    """Until `hooks` closes, give `put` the tensor that the module returns, alone or first of a tuple."""

    def after(_module, _args, out):
        states = out[0] if isinstance(out, tuple) else out
        if isinstance(states, torch.Tensor):
            put(states)

    hooks.callback(module.register_forward_hook(after).remove)

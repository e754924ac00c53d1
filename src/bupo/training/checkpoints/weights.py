"""Weights of a checkpoint, which a resumed run and `load_best_model_at_end` load into a model that is there already.

transformers' Trainer loads them by the names of the modules and leaves out what has another name, with a warning only. Some
models are saved under other names (the experts of Qwen3-MoE, the head of GPT-NeoX): theirs are loaded by `from_pretrained`.
"""

import copy
import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bupo.models.weight_checks import LOADING_REPORT_KWARGS, check_loading_report, suppress_load_report
from bupo.utils.errors import UserError, wrap_library_errors

ADAPTER_FILE = "adapter_model.safetensors"
# states of torch's optimizers that have a number for each of a parameter's; fused ones do not look at their sizes
OPTIMIZER_STATE_NAMES = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "sum",
    "acc_delta",
)


class TensorHeader(NamedTuple):
    """A tensor of a file: its shape, and its type in the file's words, such as `F32`."""

    shape: tuple[int, ...]
    dtype: str


def read_tensor_headers(folder: Path, adapter: bool = False) -> dict[str, TensorHeader]:
    """Return the tensors of a checkpoint's safetensors files by name, from their headers; none where it has no such files.

    Args:
        folder (`Path`): the checkpoint, whose files can be read.
        adapter (`bool`, *optional*, defaults to `False`): of its adapter.
    """
    whole, index = folder / (ADAPTER_FILE if adapter else SAFE_WEIGHTS_NAME), folder / SAFE_WEIGHTS_INDEX_NAME
    files = [whole] if whole.is_file() else []
    if not files and index.is_file() and not adapter:
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                tensor = file.get_slice(name)
                found[name] = TensorHeader(tuple(tensor.get_shape()), tensor.get_dtype())
    return found


def find_weight_mismatch(model: nn.Module, folder: Path) -> str | None:
    """Return why a checkpoint's weights are not those of a model, in a few words; None where they are or cannot be compared.

    Args:
        model (`PreTrainedModel` or `PeftModel`): not sharded.
        folder (`Path`): the checkpoint.
    """
    adapter = isinstance(model, PeftModel)
    try:
        stored = read_tensor_headers(folder, adapter)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its weights cannot be read ({error})"
    if not stored:
        return None
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False) if adapter else model.state_dict()
    for name, values in wanted.items():
        if name not in stored:
            continue
        if stored[name].shape != tuple(values.shape):
            return f"{name} has the shape {stored[name].shape} in its files and {tuple(values.shape)} in the model"
        if values.is_floating_point() and not stored[name].dtype.startswith(("F", "BF")):
            return f"{name} is stored as {stored[name].dtype}, and the model's is {str(values.dtype).removeprefix('torch.')}"
    lacking = [name for name in wanted if name not in stored] if adapter else _find_missing_parameters(model, stored)
    if lacking and (adapter or not stored.keys() - wanted.keys()):  # else they may have other names
        return f"its files lack {len(lacking)} of the {len(wanted)} tensors, such as {lacking[0]}"
    return None


def _find_missing_parameters(model: nn.Module, stored: dict[str, TensorHeader]) -> list[str]:
    """Return parameters whose names are absent from the files: a tied one has several names."""
    names: dict[int, list[str]] = {}
    for name, values in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(values), []).append(name)
    return [same[0] for same in names.values() if not stored.keys() & set(same)]


def has_renamed_parameters(model: nn.Module, folder: Path) -> bool:
    """Return whether a whole model's checkpoint lacks parameters by name: the Trainer would keep their present values."""
    if not isinstance(model, PreTrainedModel):
        return False
    stored = read_tensor_headers(folder)
    return bool(stored) and bool(_find_missing_parameters(model, stored))


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load a checkpoint's weights into a model, by the names under which `from_pretrained` looks for them.

    Raises:
        UserError: if they are not all of the model's.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32  # which hold 16 bits exactly
    with wrap_library_errors(f"{folder} cannot be gone on with"), suppress_load_report():
        loaded, report = type(model).from_pretrained(
            str(folder), config=copy.deepcopy(model.config), dtype=dtype, **LOADING_REPORT_KWARGS
        )
    try:
        check_loading_report(str(folder), loaded, report)
    except UserError as error:
        raise UserError(f"resume_from_checkpoint: {error}") from error
    model.load_state_dict(loaded.state_dict())


def check_optimizer_state(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Refuse an optimizer that has lost options, or whose loaded states are of other parameters: a fused one would read beyond
    them.

    Raises:
        UserError: with the first such option or state.
    """
    # torch adds `differentiable` to the defaults, not to the groups, when it loads a state (Optimizer.__setstate__)
    options = optimizer.defaults.keys() - {"differentiable"}
    for group in optimizer.param_groups:
        if missing := sorted(options - group.keys()):
            raise UserError(f"{folder} is damaged: its optimizer.pt lacks {missing[0]}: go on from another checkpoint")
        for values in group["params"]:
            state = optimizer.state.get(values, {})
            for name in OPTIMIZER_STATE_NAMES:
                moment = state.get(name) if isinstance(state, dict) else None
                fits = moment is None or (isinstance(moment, torch.Tensor) and moment.shape == values.shape)
                if not isinstance(state, dict) or not fits:
                    shown = tuple(moment.shape) if isinstance(moment, torch.Tensor) else type(moment).__name__
                    raise UserError(
                        f"{folder} is damaged: its optimizer.pt holds {name} {shown} of a parameter {tuple(values.shape)}: go "
                        "on from another checkpoint"
                    )

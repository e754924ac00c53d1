"""Loading of a checkpoint's weights into an existing model, for a resumed run and `load_best_model_at_end`.

transformers' Trainer loads weights by parameter name and skips other names with a warning. Some models are saved under other
names (the experts of Qwen3-MoE, the head of GPT-NeoX): their weights are loaded by `from_pretrained` here.
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
# states of torch's optimizers that have the shape of their parameter; fused optimizers do not check it
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
    """Shape and dtype of a tensor in a safetensors file. The dtype has safetensors' name, such as `F32`."""

    shape: tuple[int, ...]
    dtype: str


def read_tensor_headers(folder: Path, adapter: bool = False) -> dict[str, TensorHeader]:
    """Return the headers of the tensors in a checkpoint's safetensors files by name, empty without such files.

    Args:
        folder (`Path`): the checkpoint.
        adapter (`bool`, *optional*, defaults to `False`): read the adapter's file instead of the model's.
    """
    single_file, index = folder / (ADAPTER_FILE if adapter else SAFE_WEIGHTS_NAME), folder / SAFE_WEIGHTS_INDEX_NAME
    files = [single_file] if single_file.is_file() else []
    if not files and index.is_file() and not adapter:
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    headers = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                tensor = file.get_slice(name)
                headers[name] = TensorHeader(tuple(tensor.get_shape()), tensor.get_dtype())
    return headers


def find_weight_mismatch(model: nn.Module, folder: Path) -> str | None:
    """Return why a checkpoint's weights do not fit a model, in a few words, or None if they fit or cannot be compared.

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
    weights = get_peft_model_state_dict(model, save_embedding_layers=False) if adapter else model.state_dict()
    for name, values in weights.items():
        if name not in stored:
            continue
        if stored[name].shape != tuple(values.shape):
            return f"{name} has the shape {stored[name].shape} in its files and {tuple(values.shape)} in the model"
        if values.is_floating_point() and not stored[name].dtype.startswith(("F", "BF")):
            return f"{name} is stored as {stored[name].dtype}, and the model's is {str(values.dtype).removeprefix('torch.')}"
    missing = [name for name in weights if name not in stored] if adapter else _find_missing_parameters(model, stored)
    if missing and (adapter or not stored.keys() - weights.keys()):  # else they may be stored under other names
        return f"its files lack {len(missing)} of the {len(weights)} tensors, such as {missing[0]}"
    return None


def _find_missing_parameters(model: nn.Module, stored: dict[str, TensorHeader]) -> list[str]:
    """Return the parameters that are stored under none of their names. A tied parameter has several names."""
    names_by_id: dict[int, list[str]] = {}
    for name, values in model.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(values), []).append(name)
    return [names[0] for names in names_by_id.values() if not stored.keys() & set(names)]


def has_renamed_parameters(model: nn.Module, folder: Path) -> bool:
    """Return whether a full model's checkpoint lacks parameters by name. The Trainer would keep their current values."""
    if not isinstance(model, PreTrainedModel):
        return False
    stored = read_tensor_headers(folder)
    return bool(stored) and bool(_find_missing_parameters(model, stored))


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load a checkpoint's weights into a model by the names that `from_pretrained` knows.

    Raises:
        UserError: if weights are missing.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32  # hold 16-bit values exactly
    with wrap_library_errors(f"{folder} cannot be resumed"), suppress_load_report():
        loaded, report = type(model).from_pretrained(
            str(folder), config=copy.deepcopy(model.config), dtype=dtype, **LOADING_REPORT_KWARGS
        )
    try:
        check_loading_report(str(folder), loaded, report)
    except UserError as error:
        raise UserError(f"resume_from_checkpoint: {error}") from error
    model.load_state_dict(loaded.state_dict())


def check_optimizer_state(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Refuse a loaded optimizer that lacks options, or whose states do not have the shapes of their parameters.

    A fused optimizer would read beyond states that are too small.

    Args:
        optimizer (`torch.optim.Optimizer`): with the loaded state.
        folder (`Path`): the checkpoint, for messages.

    Raises:
        UserError: with the first missing option or wrong state.
    """
    # torch adds `differentiable` to the defaults, not to the groups, when it loads a state (Optimizer.__setstate__)
    options = optimizer.defaults.keys() - {"differentiable"}
    for group in optimizer.param_groups:
        if missing := sorted(options - group.keys()):
            raise UserError(f"{folder} is damaged: its optimizer.pt lacks {missing[0]}: resume from another checkpoint")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name in OPTIMIZER_STATE_NAMES:
                value = state.get(name) if isinstance(state, dict) else None
                fits = value is None or (isinstance(value, torch.Tensor) and value.shape == parameter.shape)
                if not isinstance(state, dict) or not fits:
                    kind = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                    raise UserError(
                        f"{folder} is damaged: its optimizer.pt holds {name} {kind} of a parameter {tuple(parameter.shape)}: "
                        "resume from another checkpoint"
                    )

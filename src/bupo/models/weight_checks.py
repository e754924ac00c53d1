"""Checks of loaded weights: no tensor is missing from the files, and no value is NaN, infinite or huge.

transformers initialises missing tensors of a model with random numbers, PEFT those of an adapter, and both only log it. These
checks refuse such a model.
"""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from bupo.utils.errors import UserError

MAX_WEIGHT = 1e18  # norms square the weights, which must not overflow fp32
# arguments of `from_pretrained`. Wrong shapes are reported instead of raised, so that the error can name the tensor.
LOADING_REPORT_KWARGS = {"output_loading_info": True, "ignore_mismatched_sizes": True}
MAX_LISTED_TENSORS = 3  # in a message

logger = logging.getLogger(__name__)


def check_weights(
    name: str, path: str, model: PreTrainedModel, report: Mapping[str, Collection], revision: str | None = None
) -> None:
    """Refuse a model with weights that are missing from its files, stored as integers, NaN, infinite or huge.

    Args:
        name (`str`): the user's name of the model.
        path (`str`), revision (`str`, *optional*): its folder, or a hub id whose files are in the cache.
        model (`PreTrainedModel`): the loaded model.
        report (`dict`): the loading info of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        UserError: naming the first such tensor.
    """
    check_loading_report(name, model, report)
    check_weight_dtypes(name, path, model, revision)
    check_weight_values(
        f"model {name!r}", model.named_parameters(), getattr(model.get_output_embeddings(), "bias", None)
    )


def check_loading_report(name: str, model: PreTrainedModel, report: Mapping[str, Collection]) -> None:
    """Refuse a model whose files lack some of its tensors, or hold more tensors of its layers.

    Args:
        name (`str`): the user's name of the model.
        model (`PreTrainedModel`): the loaded model.
        report (`dict`): the loading info of `from_pretrained(..., output_loading_info=True)`. It leaves out tensors that a
            file may lack, such as a tied unembedding and buffers.

    Raises:
        UserError: naming the tensors.
    """
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored_shape, shape = mismatched[0]
        more = f", and {len(mismatched) - 1} more tensors" if len(mismatched) > 1 else ""
        raise UserError(
            f"model {name!r} cannot be loaded: {tensor} has the shape {tuple(stored_shape)} in its files and {tuple(shape)} by "
            f"its config.json{more}: the two belong to different models, get both again"
        )
    if missing:
        instead = f"; they hold {_format_tensor_names(unexpected)} instead" if unexpected else ""
        raise UserError(
            f"model {name!r} cannot be loaded: its files lack {len(missing)} of the {len(model.state_dict())} tensors of "
            f"{type(model).__name__}, which would be random: {_format_tensor_names(missing)}{instead}; get all its files "
            "again, with the config.json that belongs to them"
        )
    if has_quantizer(model):  # its files also hold scales
        return
    if dropped := _find_dropped_tensors(model, unexpected):
        raise UserError(
            f"model {name!r} cannot be loaded: its files hold {len(dropped)} tensors that {type(model).__name__} with this "
            f"config.json leaves out: {_format_tensor_names(dropped)}; get the config.json that belongs to them, or save the "
            "smaller model with save_pretrained"
        )
    if unexpected:
        logger.warning("model %r: its files also hold %s, which are not used", name, _format_tensor_names(unexpected))


def has_quantizer(model: PreTrainedModel) -> bool:
    """Return whether transformers loaded the weights with a quantizer. It ignores quantizers that it does not know."""
    return getattr(model, "hf_quantizer", None) is not None


def _format_tensor_names(tensors: Collection[str]) -> str:
    shown = sorted(tensors, key=_natural_sort_key)[:MAX_LISTED_TENSORS]
    more = f" and {len(tensors) - len(shown)} more" if len(tensors) > len(shown) else ""
    return ", ".join(shown) + more


def _natural_sort_key(tensor: str) -> list:
    """Return a sort key with layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in tensor.split(".")]


def _find_dropped_tensors(model: nn.Module, unexpected: Collection[str]) -> list[str]:
    """Return the unexpected tensors that belong to a layer or module of the model, which would run without them.

    Tensors of another head, of an image tower or of a layer with other parts (multi-token prediction) do not count.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    blocks: dict[str, set[str]] = {}
    for name in names:
        if match := re.match(r"(.*?\.\d+)\.(.*)", name):
            blocks.setdefault(match[1], set()).add(match[2])
    block_parts = set().union(*blocks.values()) if blocks else set()
    block_lists = {block.rpartition(".")[0] for block in blocks}
    extra_blocks: dict[str, set[str]] = {}
    dropped = []
    for tensor in unexpected:
        match = re.match(r"(.*?\.\d+)\.(.*)", tensor)
        is_in_block = match is not None and match[1] in blocks and tensor.endswith(".weight")
        if f"{tensor.rpartition('.')[0]}.weight" in names or is_in_block:
            dropped.append(tensor)
        elif match and match[1] not in blocks and match[1].rpartition(".")[0] in block_lists:
            extra_blocks.setdefault(match[1], set()).add(match[2])
    for block, parts in extra_blocks.items():
        if parts <= block_parts:
            dropped += [f"{block}.{part}" for part in parts]
    return dropped


def check_weight_values(
    name: str, tensors: Iterable[tuple[str, torch.Tensor]], masking: torch.Tensor | None = None
) -> None:
    """Refuse weights that are NaN, infinite or huge.

    Args:
        name (`str`): name of the model in messages, such as `model 'x'`.
        tensors: names and parameters. Offloaded and quantised parameters are skipped.
        masking (`torch.Tensor`, *optional*): the bias of the unembedding, which may be -inf or the lowest float to mask entries
            of the vocabulary.

    Raises:
        UserError: naming the first such tensor.
    """
    for tensor, values in tensors:
        if values.is_meta or values.numel() == 0 or not values.is_floating_point() or values.dtype.itemsize < 2:
            continue
        low, high = (bound.item() for bound in torch.aminmax(values.detach()))
        if values is masking and low == low:
            low = 0.0
        if low >= -MAX_WEIGHT and high <= MAX_WEIGHT:  # false for NaN
            continue
        worst = low if not low >= -MAX_WEIGHT else high
        dtype = str(values.dtype).removeprefix("torch.")
        remedy = "its files are damaged, get them again"
        if values.dtype == torch.float16 and abs(worst) == torch.inf:
            remedy = f"float16 holds at most {torch.finfo(values.dtype).max:.0f}: give dtype bfloat16 or float32"
        raise UserError(f"{name} cannot be used: its tensor {tensor} holds {worst:.3g} (in {dtype}): {remedy}")


def check_weight_dtypes(name: str, path: str, model: PreTrainedModel, revision: str | None = None) -> None:
    """Refuse weights that are stored as integers, which would need a scale to become the model's floats.

    Args:
        name (`str`): the user's name of the model.
        path (`str`), revision (`str`, *optional*): its folder, or a hub id whose files are in the cache.
        model (`PreTrainedModel`): the loaded model.

    Raises:
        UserError: naming the first such tensor.
    """
    if has_quantizer(model):
        return
    prefix = f"{model.base_model_prefix}."
    names = {tensor.removeprefix(prefix) for tensor, _ in model.named_parameters(remove_duplicate=False)}
    for file in _find_weight_files(path, revision):
        for tensor, dtype in _read_integer_tensors(file):
            if tensor.removeprefix(prefix) in names:
                raise UserError(
                    f"model {name!r} cannot be loaded: {tensor} is stored as {dtype}, and config.json names no "
                    "quantization: save the weights as floats, or get the config.json that belongs to them"
                )


def _read_integer_tensors(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the integer tensors of a file and their dtypes. A file that cannot be read is skipped: transformers has read it."""
    try:
        if file.suffix == ".bin":
            for name, values in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
                if not values.is_floating_point():
                    yield name, str(values.dtype).removeprefix("torch.")
            return
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # not a mapping
                dtype = stored.get_slice(name).get_dtype()
                if not dtype.startswith(("F", "BF")):
                    yield name, dtype
    except (SafetensorError, OSError, RuntimeError):  # such as torch's old format, which cannot be memory-mapped
        return


def _find_weight_files(path: str, revision: str | None) -> list[Path]:
    """Return the local weight files of a model, found in the same order as by transformers."""

    def find(file: str) -> Path | None:
        if Path(path).is_dir():
            return Path(path, file) if Path(path, file).is_file() else None
        try:
            cached = try_to_load_from_cache(path, file, revision=revision)
        except ValueError:  # not a valid hub id
            return None
        return Path(cached) if isinstance(cached, str) else None

    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if file := find(name):
            return [file]
        if index := find(index_name):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [shard_file for shard in sorted(set(shards)) if (shard_file := find(shard))]
    return []


def check_adapter_weights(name: str, model: Any) -> None:
    """Refuse an adapter whose files lack some of its tensors, or hold others.

    Args:
        name (`str`): its folder or hub id.
        model (`PeftModel`): the model with the adapter. The adapter is loaded again, since only `load_adapter` returns the
            missing tensors.

    Raises:
        UserError: naming the tensors.
    """
    adapter = model.active_adapter
    if not model.peft_config[adapter].is_prompt_learning:  # PEFT itself checks the single tensor of such an adapter
        report = model.load_adapter(name, adapter)
        kinds = (("lack", report.missing_keys), ("also hold", report.unexpected_keys))
        if problems := " and ".join(f"{verb} {_format_tensor_names(keys)}" for verb, keys in kinds if keys):
            raise UserError(
                f"adapter {name!r} cannot be put on the model: its files {problems}; give the model that it was trained on, or "
                "get its files again"
            )
    tensors = ((tensor, values) for tensor, values in model.named_parameters() if adapter in tensor.split("."))
    check_weight_values(f"adapter {name!r}", tensors)


@contextmanager
def suppress_load_report() -> Iterator[None]:
    """Suppress transformers' log of missing tensors, which [`check_weights`] reports in one line."""
    transformers_logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in ("LOAD REPORT", "This checkpoint seem corrupted"))

    transformers_logger.addFilter(is_other)
    try:
        yield
    finally:
        transformers_logger.removeFilter(is_other)

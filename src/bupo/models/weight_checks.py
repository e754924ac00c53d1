"""Weights as they were loaded: all of the model's, from the files, and numbers that can be computed with.

transformers fills in what the files of a model lack with random numbers, and PEFT does so with an adapter; both only log it.
Here such a model is refused.
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

MAX_WEIGHT = 1e18  # of a weight: its square, which norms compute, must stay in fp32
# arguments of `from_pretrained`: shapes that differ are reported too, so that they can be refused with their tensor
LOADING_REPORT_KWARGS = {"output_loading_info": True, "ignore_mismatched_sizes": True}
MAX_LISTED_TENSORS = 3  # tensors that a message names

logger = logging.getLogger(__name__)


def check_weights(
    name: str, path: str, model: PreTrainedModel, report: Mapping[str, Collection], revision: str | None = None
) -> None:
    """Refuse a model whose weights are not all from its files, or are no numbers that can be computed with.

    Args:
        name (`str`): what the user calls the model.
        path (`str`), revision (`str`, *optional*): its folder, or a hub id whose files are in the cache.
        model (`PreTrainedModel`): as it was loaded.
        report (`dict`): of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        UserError: with the first such tensor.
    """
    check_loading_report(name, model, report)
    check_weight_dtypes(name, path, model, revision)
    check_weight_values(
        f"model {name!r}", model.named_parameters(), getattr(model.get_output_embeddings(), "bias", None)
    )


def check_loading_report(name: str, model: PreTrainedModel, report: Mapping[str, Collection]) -> None:
    """Refuse a model of which not all tensors came from its files, or whose files hold more of its layers.

    Args:
        name (`str`): what the user calls the model.
        model (`PreTrainedModel`): as it was loaded.
        report (`dict`): of `from_pretrained(..., output_loading_info=True)`. Tensors that a model may lack (a tied
            unembedding, buffers, what its class names) are left out of it.

    Raises:
        UserError: with the tensors.
    """
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored, wanted = mismatched[0]
        more = f", and {len(mismatched) - 1} more tensors" if len(mismatched) > 1 else ""
        raise UserError(
            f"model {name!r} cannot be loaded: {tensor} has the shape {tuple(stored)} in its files and {tuple(wanted)} by its "
            f"config.json{more}: the two belong to different models, get both again"
        )
    if missing:
        held = f"; they hold {_format_tensor_names(unexpected)} instead" if unexpected else ""
        raise UserError(
            f"model {name!r} cannot be loaded: its files lack {len(missing)} of the {len(model.state_dict())} tensors of "
            f"{type(model).__name__}, which would be random: {_format_tensor_names(missing)}{held}; get all its files again, with the "
            "config.json that belongs to them"
        )
    if has_quantizer(model):  # its files hold scales, too
        return
    if dropped := _find_dropped_tensors(model, unexpected):
        raise UserError(
            f"model {name!r} cannot be loaded: its files hold {len(dropped)} tensors that {type(model).__name__} with this "
            f"config.json leaves out: {_format_tensor_names(dropped)}; get the config.json that belongs to them, or save the smaller model "
            "with save_pretrained"
        )
    if unexpected:
        logger.warning("model %r: its files also hold %s, which are not used", name, _format_tensor_names(unexpected))


def has_quantizer(model: PreTrainedModel) -> bool:
    """Whether transformers has read the weights through a quantizer. A configuration may name one that it does not know."""
    return getattr(model, "hf_quantizer", None) is not None


def _format_tensor_names(tensors: Collection[str]) -> str:
    shown = sorted(tensors, key=_natural_sort_key)[:MAX_LISTED_TENSORS]
    return ", ".join(shown) + (
        f" and {len(tensors) - MAX_LISTED_TENSORS} more" if len(tensors) > MAX_LISTED_TENSORS else ""
    )


def _natural_sort_key(tensor: str) -> list:
    """Sorts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in tensor.split(".")]


def _find_dropped_tensors(model: nn.Module, unexpected: Collection[str]) -> list[str]:
    """Tensors of the files that belong to a layer or to a module of the model, which computes without them.

    A head of another kind, a tower for images or a layer of other parts (multi-token prediction) belongs to none.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    blocks = {found[0]: set[str]() for name in names if (found := re.match(r".*?\.\d+(?=\.)", name))}
    for name in names:
        if found := re.match(r"(.*?\.\d+)\.(.*)", name):
            blocks[found[1]].add(found[2])
    parts = set().union(*blocks.values()) if blocks else set()
    lists = {block.rpartition(".")[0] for block in blocks}
    further: dict[str, set[str]] = {}
    dropped = []
    for tensor in unexpected:
        found = re.match(r"(.*?\.\d+)\.(.*)", tensor)
        if f"{tensor.rpartition('.')[0]}.weight" in names or (
            found and found[1] in blocks and tensor.endswith(".weight")
        ):
            dropped.append(tensor)
        elif found and found[1] not in blocks and found[1].rpartition(".")[0] in lists:
            further.setdefault(found[1], set()).add(found[2])
    for block, theirs in further.items():
        if theirs <= parts:
            dropped += [f"{block}.{part}" for part in theirs]
    return dropped


def check_weight_values(
    name: str, tensors: Iterable[tuple[str, torch.Tensor]], masking: torch.Tensor | None = None
) -> None:
    """Refuse weights that are NaN, infinite, or too large to compute with.

    Args:
        name (`str`): what messages call the model, such as `model 'x'`.
        tensors: names and parameters, which are read once each; not those on a disk, and not quantised ones.
        masking (`torch.Tensor`, *optional*): the bias of the unembedding, which may be -inf or the lowest float: it masks
            entries of the vocabulary.

    Raises:
        UserError: with the first such tensor.
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
    """Refuse weights that are stored as integers: converted to floats without a scale they are not the model's.

    Args:
        name (`str`): what the user calls the model.
        path (`str`), revision (`str`, *optional*): its folder, or a hub id whose files are in the cache.
        model (`PreTrainedModel`): as it was loaded.

    Raises:
        UserError: with the first such tensor.
    """
    if has_quantizer(model):
        return
    prefix = f"{model.base_model_prefix}."
    names = {tensor.removeprefix(prefix) for tensor, _ in model.named_parameters(remove_duplicate=False)}
    for file in _find_weight_files(path, revision):
        for tensor, kind in _read_integer_tensors(file):
            if tensor.removeprefix(prefix) in names:
                raise UserError(
                    f"model {name!r} cannot be loaded: {tensor} is stored as {kind}, and config.json names no "
                    "quantization: save the weights as floats, or get the config.json that belongs to them"
                )


def _read_integer_tensors(file: Path) -> Iterator[tuple[str, str]]:
    """The tensors of a file that are no floats, with their types; none of a file that cannot be read, as transformers has."""
    try:
        if file.suffix == ".bin":
            for name, values in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
                if not values.is_floating_point():
                    yield name, str(values.dtype).removeprefix("torch.")
            return
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # no mapping
                kind = stored.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")):
                    yield name, kind
    except (SafetensorError, OSError, RuntimeError):  # a file of the format before zip files cannot be mapped
        return


def _find_weight_files(path: str, revision: str | None) -> list[Path]:
    """The weight files of a model that is on this machine, in the order in which transformers looks for them."""

    def there(file: str) -> Path | None:
        if Path(path).is_dir():
            return Path(path, file) if Path(path, file).is_file() else None
        try:
            found = try_to_load_from_cache(path, file, revision=revision)
        except ValueError:  # no name that a hub model could have
            return None
        return Path(found) if isinstance(found, str) else None

    for name, index_name in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if whole := there(name):
            return [whole]
        if index := there(index_name):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [file for shard in sorted(set(shards)) if (file := there(shard))]
    return []


def check_adapter_weights(name: str, model: Any) -> None:
    """Refuse an adapter of which not all tensors came from its files, or whose files hold others.

    Args:
        name (`str`): its folder or hub id.
        model (`PeftModel`): with the adapter. Its tensors are loaded once more, since only that returns what was missing.

    Raises:
        UserError: with the tensors.
    """
    adapter = model.active_adapter
    if not model.peft_config[adapter].is_prompt_learning:  # PEFT itself looks for the one tensor of such an adapter
        found = model.load_adapter(name, adapter)
        kinds = (("lack", found.missing_keys), ("also hold", found.unexpected_keys))
        if said := " and ".join(f"{verb} {_format_tensor_names(keys)}" for verb, keys in kinds if keys):
            raise UserError(
                f"adapter {name!r} cannot be put on the model: its files {said}; give the model that it was trained on, or get "
                "its files again"
            )
    tensors = ((tensor, values) for tensor, values in model.named_parameters() if adapter in tensor.split("."))
    check_weight_values(f"adapter {name!r}", tensors)


@contextmanager
def suppress_load_report() -> Iterator[None]:
    """Inside, transformers does not log its table of missing tensors, which are refused in one line."""
    theirs = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in ("LOAD REPORT", "This checkpoint seem corrupted"))

    theirs.addFilter(other)
    try:
        yield
    finally:
        theirs.removeFilter(other)

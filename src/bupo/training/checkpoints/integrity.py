"""Manifests of checkpoints and the checks that find a damaged one.

Each checkpoint holds `manifest.json`, written last, with the names, sizes and checksums of its files.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bupo.run_files.names import STATE_FILE
from bupo.run_files.reading import (
    NONE_TYPE,
    PARSE_ERRORS,
    DamagedFileError,
    ExpectedType,
    KeyTypes,
    check_keys,
    read_json,
    read_torch_file,
)
from bupo.utils.errors import summarize_error
from bupo.utils.files import write_json
from bupo.utils.safe_read import describe_index_error, has_regular_file

MANIFEST_FILE = "manifest.json"
MAX_HASHED_BYTES = 64 << 20  # only the size of a larger file is checked
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# keys that the state files of a checkpoint must hold, by file name pattern
_STATE_SCHEMAS: dict[str, KeyTypes] = {
    STATE_FILE: {"passes": int, "layout": dict, "planned": list, "metrics": dict, "counters": dict, "parts": dict},
    "rollouts_*.pt": {"micro_batches": object, "counters": dict},
    "optimizer.pt": {"state": dict, "param_groups": list},
    "optimizer.bin": {"state": dict},
    "scheduler.pt": {"last_epoch": (int, NONE_TYPE)},
    "rng_state*.pth": {"python": tuple, "numpy": (tuple, dict), "cpu": torch.Tensor},
}
# files that a resumed run needs, and the names that DeepSpeed (its own folder) and FSDP give them
_REQUIRED_FILES = {
    "the model's weights": (
        "model*.safetensors",
        "pytorch_model*",
        "*adapter_model*",
        "*/adapter_model*",
        "global_step*",
    ),
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


def write_manifest(folder: Path) -> None:
    """List the files of a folder in `manifest.json`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash_file(path)}
        for path in paths
    }
    write_json(folder / MANIFEST_FILE, {"schema_version": 1, "files": files})


def _hash_file(path: Path) -> str | None:
    if path.stat().st_size > MAX_HASHED_BYTES:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path, checksums: bool = True) -> str | None:
    """Return why a run cannot be resumed from a checkpoint, in a few words, or None for an intact one.

    A checkpoint without a manifest, such as another trainer's, is only checked for the files that are needed.

    Args:
        folder (`Path`): the checkpoint.
        checksums (`bool`, *optional*, defaults to `True`): compare checksums too, not only sizes.
    """
    try:
        exists = folder.is_dir()
    except (OSError, ValueError):  # the name is too long, or holds a null byte
        exists = False
    if not exists:
        return "there is no such folder"
    manifest = folder / MANIFEST_FILE
    if os.path.lexists(manifest):
        try:
            files = read_json(manifest, {"files": dict})["files"]
            changes = (_find_change(folder, name, files[name], checksums) for name in files)
            damage = next(filter(None, changes), None)
        except (OSError, *PARSE_ERRORS):
            damage = f"{MANIFEST_FILE} cannot be read"
        if damage:
            return damage
    if not os.path.lexists(folder / TRAINER_STATE_NAME):
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        read_trainer_state(folder)
    except DamagedFileError as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({error.reason})"
    for kind, patterns in _REQUIRED_FILES.items():
        if not any(next(folder.glob(pattern), None) for pattern in patterns):
            return f"{kind} is missing" + (" (save_only_model)" if manifest.exists() else "")
    return find_unreadable_file(folder)


def _find_change(folder: Path, name: str, entry: dict, checksums: bool) -> str | None:
    """Return how a file differs from its entry in the manifest, or None."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing" if not os.path.lexists(path) else f"{name} is no regular file"
    if not has_regular_file(folder, name):
        return f"{name} is no file of the checkpoint"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size:,} bytes, not {entry['bytes']:,}"
    if checksums and entry["sha256"] and _hash_file(path) != entry["sha256"]:
        return f"{name} has changed since it was written"
    return None


def find_unreadable_file(folder: Path) -> str | None:
    """Return which state or weight file of a checkpoint cannot be read, and why, or None. Only headers are read."""
    for pattern, keys in _STATE_SCHEMAS.items():
        for path in sorted(folder.glob(pattern)):
            try:
                read_torch_file(path, keys, mmap=True)
            except DamagedFileError as error:
                return f"{path.name} is damaged: {error.reason}"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            if not has_regular_file(folder, path.name):
                return f"{path.name} is no regular file of its folder"
            with safe_open(path, "pt") as file:
                file.keys()
        except (SafetensorError, OSError, *PARSE_ERRORS) as error:
            return f"{path.name} is damaged: {summarize_error(error)}"
    for path in sorted(folder.glob("*.index.json")):
        if problem := describe_index_error(folder, path.name):
            return problem
    return None


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read `trainer_state.json` with the types that transformers' `TrainerState` expects.

    Raises:
        DamagedFileError: if it is missing or not such a state.
    """
    path = checkpoint / TRAINER_STATE_NAME
    floats = ("epoch", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
    keys: dict[str, ExpectedType] = dict.fromkeys(floats, (float, NONE_TYPE))
    keys |= dict[str, ExpectedType].fromkeys(("max_steps", "train_batch_size", "best_global_step"), (int, NONE_TYPE))
    state = read_json(path, {"global_step": int, "log_history": (list, NONE_TYPE), **keys})
    try:
        if state["global_step"] < 0:
            raise ValueError(f"global_step is {state['global_step']}")
        for row in state.get("log_history") or []:
            check_keys(row, {"step": int})
        TrainerState(**state)
    except PARSE_ERRORS as error:
        raise DamagedFileError(path, f"log_history or another entry: {error}") from error
    return state


def get_global_step(checkpoint: str | Path | None) -> int:
    """Return the number of updates before a checkpoint, 0 without one."""
    return 0 if checkpoint is None else read_trainer_state(Path(checkpoint))["global_step"]


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, intact or not, in the order of their updates."""
    numbered = [(int(match[1]), path) for path in folder.glob("*") if (match := _CHECKPOINT_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if path.is_dir()]

"""Which checkpoints are whole: each holds a manifest, written last, of the names, sizes and checksums of its files."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
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
from bupo.utils.errors import UserError, summarize_error
from bupo.utils.files import write_json
from bupo.utils.safe_read import describe_index_error, has_regular_file

MANIFEST_FILE = "manifest.json"
MAX_HASHED_BYTES = 64 << 20  # bytes; of larger files, the size is looked at only
# by name, what the states of a checkpoint must hold to be loaded
_STATE_SCHEMAS: dict[str, KeyTypes] = {
    STATE_FILE: {"passes": int, "layout": dict, "planned": list, "metrics": dict, "numbers": dict, "parts": dict},
    "rollouts_*.pt": {"pieces": object, "numbers": dict},
    "optimizer.pt": {"state": dict, "param_groups": list},
    "optimizer.bin": {"state": dict},
    "scheduler.pt": {"last_epoch": (int, NONE_TYPE)},
    "rng_state*.pth": {"python": tuple, "numpy": (tuple, dict), "cpu": torch.Tensor},
}
ResultT = TypeVar("ResultT")
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# what a run cannot go on without, and where DeepSpeed (its own folder) and FSDP keep it
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
    """List a folder's files in `manifest.json`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    files = {path.relative_to(folder).as_posix(): _make_manifest_entry(path) for path in paths}
    write_json(folder / MANIFEST_FILE, {"schema_version": 1, "files": files})


def _make_manifest_entry(path: Path) -> dict[str, int | str | None]:
    return {"bytes": path.stat().st_size, "sha256": _hash_file(path)}


def _hash_file(path: Path) -> str | None:
    if path.stat().st_size > MAX_HASHED_BYTES:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path, sums: bool = True) -> str | None:
    """What keeps a run from going on with a checkpoint, in a few words; None for a whole one.

    One without a manifest, by an earlier version or another trainer, is judged by the files that are needed. Without `sums`,
    only sizes are looked at.
    """
    try:
        there = folder.is_dir()
    except (OSError, ValueError):  # too long a name, or none
        there = False
    if not there:
        return "there is no such folder"
    listed = folder / MANIFEST_FILE
    if os.path.lexists(listed):
        try:
            files = read_json(listed, {"files": dict})["files"]
            found = next((what for name in files if (what := _find_alteration(folder, name, files[name], sums))), None)
        except (OSError, *PARSE_ERRORS):
            found = f"{MANIFEST_FILE} cannot be read"
        if found:
            return found
    if not os.path.lexists(folder / TRAINER_STATE_NAME):
        return f"{TRAINER_STATE_NAME} is missing"
    try:
        read_trainer_state(folder)
    except DamagedFileError as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({error.reason})"
    for what, names in _REQUIRED_FILES.items():
        if not any(next(folder.glob(name), None) for name in names):
            return f"{what} is missing" + (" (save_only_model)" if listed.exists() else "")
    return find_unreadable_file(folder)


def find_unreadable_file(folder: Path) -> str | None:
    """Return what a checkpoint's states and weights cannot be read for, by their headers only; None where they can."""
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
        if wrong := describe_index_error(folder, path.name):
            return wrong
    return None


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return a trainer's state, as the resumed trainer will read it.

    Raises:
        Damaged: if it is missing or no such state.
    """
    path = checkpoint / TRAINER_STATE_NAME
    places = ("epoch", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
    numbers: dict[str, ExpectedType] = dict.fromkeys(places, (float, NONE_TYPE))
    numbers |= dict[str, ExpectedType].fromkeys(("max_steps", "train_batch_size", "best_global_step"), (int, NONE_TYPE))
    found = read_json(path, {"global_step": int, "log_history": (list, NONE_TYPE), **numbers})
    try:
        if found["global_step"] < 0:
            raise ValueError(f"global_step is {found['global_step']}")
        for row in found.get("log_history") or []:
            check_keys(row, {"step": int})
        TrainerState(**found)
    except PARSE_ERRORS as error:
        raise DamagedFileError(path, f"log_history or another entry: {error}") from error
    return found


def _find_alteration(folder: Path, name: str, entry: dict, sums: bool) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing" if not os.path.lexists(path) else f"{name} is no regular file"
    if not has_regular_file(folder, name):
        return f"{name} is no file of the checkpoint"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{name} has {size:,} bytes, not {entry['bytes']:,}"
    if sums and entry["sha256"] and _hash_file(path) != entry["sha256"]:
        return f"{name} is not what was written"
    return None


def get_global_step(checkpoint: str | Path | None) -> int:
    """Updates that a checkpoint was made after; 0 without one."""
    return 0 if checkpoint is None else read_trainer_state(Path(checkpoint))["global_step"]


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, whole or not, the last last. `checkpoint-abc` is none."""
    numbered = [(int(found[1]), path) for path in folder.glob("*") if (found := _CHECKPOINT_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if path.is_dir()]


def find_newest_intact_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The last checkpoint of a run that is whole by its manifest; `say` is told of the later ones, and what is wrong."""
    for path in reversed(list_checkpoints(folder)):
        wrong = find_damage(path)
        if wrong is None and not (path / MANIFEST_FILE).exists():
            wrong = f"it has no {MANIFEST_FILE}, so it may not be whole"
        if wrong is None:
            return path
        say(f"{path} is passed over: {wrong}")
    return None


def resolve_newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Where `true` goes on: the newest whole checkpoint of a run, or None where it has none yet. `say` is told which.

    Raises:
        UserError: if there are checkpoints and none is whole: to begin anew would delete them.
    """
    found = find_newest_intact_checkpoint(folder, say)
    if found is None and list_checkpoints(folder):
        raise UserError(
            f"resume_from_checkpoint: no checkpoint in {folder} is whole: name one of them to go on from it all the same, "
            "or start anew by --overwrite true and without resume_from_checkpoint"
        )
    say(f"going on from {found}" if found else f"{folder} holds no checkpoint yet: the run starts from the beginning")
    return found


def require_intact(checkpoint: Path) -> Path:
    """A checkpoint that was named.

    Raises:
        UserError: if it is damaged.
    """
    if wrong := find_damage(checkpoint):
        raise UserError(f"resume_from_checkpoint: {checkpoint} cannot be gone on with: {wrong}")
    return checkpoint


def run_on_main_process(find: Callable[[], ResultT]) -> ResultT:
    """What the main process finds, for all processes; what it refuses, all refuse."""
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = find()
        except UserError as error:
            answer[1] = str(error)
    found, refused = broadcast_object_list(answer)
    if refused is not None:
        raise UserError(refused)
    return found


def check_visible_to_all(checkpoint: Path | None) -> None:
    """Refuse a checkpoint that another process than the main one does not see, by its sizes: sums take long."""
    if checkpoint is None:
        return
    wrong = None if PartialState().is_main_process else find_damage(checkpoint, sums=False)
    for found in gather_object([wrong]):
        if found:
            raise UserError(
                f"resume_from_checkpoint: a process finds {checkpoint} otherwise ({found}): share output_dir"
            )

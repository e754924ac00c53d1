"""Rank, world size and first failed process of a distributed launch (`torchrun`, `accelerate launch`).

The failures are counted under one key of the launcher's key-value store, which outlives a failed process.
"""

import os
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

# a launcher sets all of these; a missing one shows that the others are left over from an earlier launch
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# accelerate and torch read each of these without the others
_LEFTOVER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# accelerate starts a distributed run from any one of these
_MPI_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
STORE_TIMEOUT = timedelta(seconds=5)  # for a reply of the store, and for a lost process to report its failure


class ProcessInfo(NamedTuple):
    """Rank of this process, from 0, and number of processes of its launch."""

    rank: int
    world_size: int


def get_process_info() -> ProcessInfo:
    """Return the rank and world size of the process group, else of the launch that the environment describes completely.

    A `RANK` or `WORLD_SIZE` alone describes no launch. All code that depends on a rank reads it from this function.
    """
    return _read_process_group() or _read_environment() or ProcessInfo(0, 1)


def _read_process_group() -> ProcessInfo | None:
    """Return the rank and world size of the process group, or None without a group."""
    # importing torch takes seconds, and there is no group before the import
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return ProcessInfo(distributed.get_rank(), distributed.get_world_size())


def _read_environment() -> ProcessInfo | None:
    """Return the rank and world size that the environment describes, or None if it is incomplete or contradictory."""
    if not all(os.environ.get(name) for name in LAUNCH_VARIABLES):
        return None
    try:
        process = ProcessInfo(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        port, local_rank = int(os.environ["MASTER_PORT"]), int(os.environ.get("LOCAL_RANK", 0))
    except ValueError:
        return None
    valid = 0 <= process.rank < process.world_size and 0 <= port < 1 << 16 and local_rank < process.world_size
    return process if valid else None


def drop_leftover_variables() -> str | None:
    """Remove the variables of an earlier launch from the environment, since accelerate reads them one by one.

    With `LOCAL_RANK=0` alone, accelerate would wait for other processes, or fail. Launches by MPI have other variables.

    Returns:
        `str`, *optional*: a line that names the removed variables.
    """
    present = {name: os.environ[name] for name in _LEFTOVER_VARIABLES if name in os.environ}
    if (
        not present
        or _read_process_group()
        or _read_environment()
        or any(_parse_size(os.environ.get(name)) > 1 for name in _MPI_SIZE_VARIABLES)
    ):
        return None
    for name in present:
        del os.environ[name]
    variables = ", ".join(f"{name}={value}" for name, value in present.items())
    missing = [name for name in LAUNCH_VARIABLES if not os.environ.get(name) and name not in present]
    problem = f"without {', '.join(missing)}" if missing else "with contradictory values"
    return f"{variables} in the environment {problem}: not a complete launch, so they are ignored; this is a single process"


def _parse_size(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 1


def is_distributed() -> bool:
    """Return whether this process is one of several."""
    return get_process_info().world_size > 1


def get_rank() -> int:
    """Return the rank of this process, from 0."""
    return get_process_info().rank


def has_process_group() -> bool:
    """Return whether this process still belongs to a process group, where other processes may wait for it."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def is_first_to_fail(lost_peer: bool) -> bool:
    """Record the failure of this process, and return whether it is the first one. Return True without a store.

    Args:
        lost_peer (`bool`): this process fails because another one has ended. Wait for the other one to record its failure.
    """
    deadline = time.monotonic() + STORE_TIMEOUT.total_seconds()
    try:
        store, key = _connect_store()
        while lost_peer and not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def has_failed_process() -> bool:
    """Return whether a process of this launch has failed. Return False without a store, and for a single process."""
    try:
        store, key = _connect_store()
        return is_distributed() and store.check([key])
    except (KeyError, ValueError, RuntimeError):
        return False


def _connect_store() -> tuple[Any, str]:
    """Return the launch's store and the key of the failures. Errors of torch are `RuntimeError`s."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
    return store, f"bupo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def is_lost_peer_error(error: BaseException | None) -> bool:
    """Return whether an error, or a cause of it, is that of a collective or a store that has lost its other end."""
    from torch.distributed import DistError

    while error is not None:
        if isinstance(error, DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

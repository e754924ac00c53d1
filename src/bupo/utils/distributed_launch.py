"""The processes of a launch (`torchrun`, `accelerate launch`): which of them is the first to fail.

They meet in the launch's own store, which outlives a process that fails; a key of ours is counted there.
"""

import os
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

# a launcher sets all of these; one that is missing shows that the others are left from an earlier launch
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEFTOVER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # by accelerate and torch, one by one
_MPI_SIZE_VARIABLES = (
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)  # accelerate makes a launch of these alone
STORE_TIMEOUT = timedelta(seconds=5)  # for the store to answer, and for the word of a process that has gone


class ProcessInfo(NamedTuple):
    """This process among those of its launch: its rank, from 0, and how many there are."""

    rank: int
    world_size: int


def get_process_info() -> ProcessInfo:
    """Return this process' place: in the process group, else in the launch that the environment describes completely.

    A single `RANK` or `WORLD_SIZE` describes none. Everything that depends on a rank takes it from here.
    """
    return _read_process_group() or _read_environment() or ProcessInfo(0, 1)


def _read_process_group() -> ProcessInfo | None:
    """Return the place in the process group; None where there is none."""
    distributed = sys.modules.get(
        "torch.distributed"
    )  # nobody is in a group before it is imported, which takes seconds
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return ProcessInfo(distributed.get_rank(), distributed.get_world_size())


def _read_environment() -> ProcessInfo | None:
    """Return the place that the environment describes; None where it is incomplete or contradicts itself."""
    if not all(os.environ.get(name) for name in LAUNCH_VARIABLES):
        return None
    try:
        described = ProcessInfo(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        port, local = int(os.environ["MASTER_PORT"]), int(os.environ.get("LOCAL_RANK", 0))
    except ValueError:
        return None
    whole = 0 <= described.rank < described.world_size and 0 <= port < 1 << 16 and local < described.world_size
    return described if whole else None


def drop_leftover_variables() -> str | None:
    """Remove the variables of a launch that there is not from the environment, since accelerate reads them one by one.

    With `LOCAL_RANK=0` alone it would wait for other processes, or fail. MPI's launches are described by its own variables.

    Returns:
        `str`, *optional*: a line that names what was removed.
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
    why = f"without {', '.join(missing)}" if missing else "and contradict each other"
    return f"{variables} in the environment {why}: no launch sets them so, they are ignored; this is a single process"


def _parse_size(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 1


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return get_process_info().world_size > 1


def get_rank() -> int:
    """This process' number, from 0."""
    return get_process_info().rank


def has_process_group() -> bool:
    """Whether this process still is in a group, whose other processes may wait for it."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def is_first_to_fail(lost: bool) -> bool:
    """Whether no other process has failed before this one, which is noted to have. True where the store cannot be asked.

    Args:
        lost (`bool`): whether this one fails because another has gone, whose word is then waited for.
    """
    end = time.monotonic() + STORE_TIMEOUT.total_seconds()
    try:
        store, key = _connect_store()
        while lost and not store.check([key]) and time.monotonic() < end:
            time.sleep(0.1)
        return store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def has_failed_process() -> bool:
    """Whether a process of this launch has failed. False where the store cannot be asked, and of one process."""
    try:
        store, key = _connect_store()
        return is_distributed() and store.check([key])
    except (KeyError, ValueError, RuntimeError):
        return False


def _connect_store() -> tuple[Any, str]:
    """The launch's store, and our key in it; torch's errors are `RuntimeError`s."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False)
    return store, f"bupo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def is_lost_peer_error(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that of a collective or store whose other side has gone."""
    from torch.distributed import DistError

    while error is not None:
        if isinstance(error, DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

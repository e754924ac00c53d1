"""The processes of a launch (`torchrun`, `accelerate launch`): which of them is the first to fail.

They meet in the launch's own store, which outlives a process that fails; a key of ours is counted there.
"""

import os
import time
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(seconds=5)  # for the store to answer, and for the word of a process that has gone


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def number() -> int:
    """This process' number, from 0."""
    return int(os.environ.get("RANK", "0"))


def in_group() -> bool:
    """Whether this process still is in a group, whose other processes may wait for it."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def first_to_fail(lost: bool) -> bool:
    """Whether no other process has failed before this one, which is noted to have. True where the store cannot be asked.

    Args:
        lost (`bool`): whether this one fails because another has gone, whose word is then waited for.
    """
    end = time.monotonic() + PATIENCE.total_seconds()
    try:
        store, key = _store()
        while lost and not store.check([key]) and time.monotonic() < end:
            time.sleep(0.1)
        return store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def has_failed() -> bool:
    """Whether a process of this launch has failed. False where the store cannot be asked, and of one process."""
    try:
        store, key = _store()
        return several() and store.check([key])
    except (KeyError, ValueError, RuntimeError):
        return False


def _store() -> tuple[Any, str]:
    """The launch's store, and our key in it; torch's errors are `RuntimeError`s."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
    return store, f"bupo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def peer_gone(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that of a collective or store whose other side has gone."""
    from torch.distributed import DistError

    while error is not None:
        if isinstance(error, DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

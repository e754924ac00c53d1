"""The processes of a launch (`torchrun`, `accelerate launch`): which of them is the first to fail.

They meet in the launch's own store, which outlives a process that fails; a key of ours is counted there.
"""

import os
import time
from datetime import timedelta

# in the words of gloo
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
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
    """Whether no other process has failed before this one. True where the store cannot be asked.

    Args:
        lost (`bool`): whether this one fails because another has gone, whose word is then waited for.
    """
    from torch.distributed import DistError, TCPStore

    key = f"bupo/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    end = time.monotonic() + PATIENCE.total_seconds()
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        while lost and not store.check([key]) and time.monotonic() < end:
            time.sleep(0.1)
        return store.add(key, 1) == 1
    except (KeyError, ValueError, DistError, RuntimeError):
        return True


def peer_gone(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that another process no longer answers."""
    while error is not None:
        if any(words in str(error) for words in PEER_GONE):
            return True
        error = error.__cause__ or error.__context__
    return False

"""Rewards that misbehave in the second rollout batch, named as `tests.faults.misbehaving.NAME`; the others are those of `digits`."""

import asyncio
import atexit
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from tests.faults.rewards import digits


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def forever():
    while True:
        time.sleep(1)


def _raises(error):
    raise error


def _kills_workers():
    for child in psutil.Process().children():
        child.kill()
    time.sleep(1)


def _forks():
    if Path("child").exists():  # of the run before
        return
    if (child := os.fork()) == 0:
        forever()
    Path("child").write_text(str(child))


def _pool():
    if Path("child").exists():
        return
    process = multiprocessing.get_context("fork").Process(target=forever)
    process.start()
    Path("child").write_text(str(process.pid))


DOES = {
    "exits": lambda: sys.exit(),
    "exits_with_text": lambda: sys.exit("enough\nof this"),
    "leaves_a_generator": lambda: _raises(GeneratorExit()),
    "interrupts": lambda: _raises(KeyboardInterrupt()),
    "unreadable": lambda: _raises(Unreadable()),
    "closes_stdout": lambda: sys.stdout.close(),
    "closes_stderr": lambda: os.close(2),
    "redirects": lambda: setattr(sys, "stdout", io.StringIO()),
    "moves": lambda: os.chdir("/"),
    "handles": lambda: signal.signal(signal.SIGUSR1, lambda number, frame: None),
    "kills_workers": _kills_workers,
    "forks": _forks,
    "pool": _pool,
    "comes_back": os.fork,
    "leaves_a_thread": lambda: threading.Thread(target=forever, name="mine").start(),
    "leaves_a_child": lambda: multiprocessing.get_context("fork").Process(target=forever).start(),
    "leaves_a_handler": lambda: atexit.register(forever),
}


def _misbehaving(name):
    calls = []

    def reward(completion_ids, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            DOES[name]()
        return digits(completion_ids)

    reward.__name__ = reward.__qualname__ = name
    return reward


globals().update({name: _misbehaving(name) for name in DOES})


async def exits_in_the_loop(completion_ids, **kwargs):
    await asyncio.sleep(0)
    sys.exit(0)


def short_grace():
    """Called before a run: its process has seconds to end."""
    from bupo.cli import process_exit

    process_exit.GRACE_SECONDS, process_exit.MEASURED_SECONDS = 6.0, 1.0

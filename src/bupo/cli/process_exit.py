"""Exit of the process: threads and exit handlers get a minute, then the process reports the ones still running and exits.

The interpreter's teardown of modules is always skipped. With torch and transformers loaded it takes seconds, or minutes on a
busy machine, and destructors of libraries may deadlock there with threads that need the interpreter's lock.
"""

import atexit
import faulthandler
import gc
import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import psutil

from bupo.utils.sanitize import sanitize_message

GRACE_SECONDS = 60.0  # from the end of the command's work to the report
FORCED_EXIT_SECONDS = 15.0  # from the report to an exit with status 1, if a C library blocks all Python code
MEASURED_SECONDS = 5.0  # interval before the report in which CPU time and I/O are measured
MAX_FRAMES, MAX_LINES = 4, 12  # frames of a thread's stack, lines of the report


def exit_process(status: int) -> NoReturn:
    """End this process: join its threads, run its exit handlers, flush its files, and exit.

    A tracker's upload is part of the command's work and is waited for. Threads and handlers that then take longer than
    `GRACE_SECONDS` are reported on standard error and abandoned.

    Args:
        status (`int`): the exit status.
    """
    with suppress(Exception):
        _finish_uploads(status)
    _flush((sys.stdout, sys.stderr))  # a reader such as `less` may take its time
    threading.Thread(target=_exit_after_grace, args=(status,), name="bupo-end", daemon=True).start()
    faulthandler.dump_traceback_later(GRACE_SECONDS + FORCED_EXIT_SECONDS, exit=True, file=2)
    if not (hasattr(threading, "_shutdown") and hasattr(atexit, "_run_exitfuncs")):
        sys.exit(status)  # a Python version that has renamed these functions: a slower exit, with the same report
    with suppress(KeyboardInterrupt):  # Ctrl-C ends the wait
        threading._shutdown()  # type: ignore[attr-defined]  # the interpreter does the same first
        atexit._run_exitfuncs()
    _exit_now(status)


def _finish_uploads(status: int) -> None:
    """Wait for Weights & Biases, the one tracker that transformers' callbacks leave open at the end of a run."""
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        wandb.finish(exit_code=status)  # type: ignore[union-attr]


def _exit_now(status: int) -> NoReturn:
    """Exit now, after flushing the files that Python code has left open, as the teardown would."""
    objects = gc.get_objects()
    for kind in (
        io.TextIOWrapper,
        io.BufferedWriter,
        io.BufferedRandom,
    ):  # text before the bytes that it is buffered in
        _flush(tuple(item for item in objects if issubclass(type(item), kind)))
    _flush((sys.stdout, sys.stderr))
    os._exit(status)


def _flush(streams: tuple) -> None:
    for stream in streams:
        with suppress(Exception):
            if not stream.closed and stream.writable():
                stream.flush()


def _exit_after_grace(status: int) -> None:
    """Report and exit after `GRACE_SECONDS`, unless the process has ended before."""
    time.sleep(max(0.0, GRACE_SECONDS - MEASURED_SECONDS))
    before, seconds = _measure_work(), min(GRACE_SECONDS, MEASURED_SECONDS)
    time.sleep(seconds)
    _call_with_timeout(
        2.0, lambda: os.write(2, describe_hanging_threads(status, before, seconds).encode(errors="replace"))
    )
    for child in multiprocessing.active_children():  # the exit handler of multiprocessing would join them
        with suppress(Exception):
            child.kill()
    _call_with_timeout(5.0, lambda: _exit_now(status))
    os._exit(status)


def _call_with_timeout(seconds: float, call: Callable[[], object]) -> None:
    """Call a function in a thread and wait at most `seconds`: a pipe may be full, or a file locked by a hanging thread."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def _measure_work() -> tuple[float, int]:
    """Return the known CPU seconds and bytes read and written of this process and its children."""
    cpu, moved = 0.0, 0
    with suppress(Exception):
        current = psutil.Process()
        for process in (current, *current.children(recursive=True)):
            with suppress(Exception):
                times = process.cpu_times()
                cpu += times.user + times.system
                counters = process.io_counters()
                moved += getattr(counters, "read_chars", 0) + getattr(counters, "write_chars", 0)
    return cpu, moved


def describe_hanging_threads(status: int, before: tuple[float, int], seconds: float) -> str:
    """Return lines that name the threads, exit handlers and child processes that this process waits for.

    Args:
        status (`int`): the exit status.
        before (`tuple`): the value of `_measure_work` `seconds` ago.
        seconds (`float`): length of the measured interval.
    """
    frames, excluded = sys._current_frames(), (threading.current_thread(), threading.main_thread())
    threads = [thread for thread in threading.enumerate() if thread not in excluded]
    threads = sorted((thread for thread in threads if thread.name != "bupo-end"), key=lambda thread: thread.daemon)
    lines = [
        f"bupo: warning: the work is done, but the process has not ended in {GRACE_SECONDS:.0f} s; it exits now with status "
        f"{status}. Still running:"
    ]
    lines += [_describe_main_thread(frames.get(threading.main_thread().ident or 0))]
    for thread in threads:
        kind = "daemon thread" if thread.daemon else "thread"
        lines.append(f"{kind} {thread.name!r}: {_format_stack(frames.get(thread.ident or 0))}")
    with suppress(Exception):
        for child in psutil.Process().children():
            with suppress(Exception):
                lines.append(f"child process {child.pid}: {' '.join(child.cmdline())[:160]} ({child.status()})")
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES} more"]
    cpu, moved = (after - former for after, former in zip(_measure_work(), before, strict=True))
    if cpu > 0.1 * seconds or moved > 1 << 16:
        lines.append(
            f"in the last {seconds:.0f} s they used {cpu:.1f} s of CPU and moved {moved / 1e6:.1f} MB: work such as an upload "
            "may be incomplete"
        )
    return "\n  ".join(sanitize_message(line) for line in lines) + "\n"


def _describe_main_thread(frame: FrameType | None) -> str:
    """Describe what the main thread waits for: other threads or an exit handler."""
    frames, stack = [], frame
    while stack is not None and stack.f_code is not exit_process.__code__:
        frames.append(stack)
        stack = stack.f_back
    if not frames:
        return f"the main thread: {_format_stack(frame)}"
    if frames[-1].f_code is _exit_now.__code__:
        return f"the main thread writes files that were left open: {_format_stack(frame)}"
    if frames[-1].f_code is threading._shutdown.__code__:  # type: ignore[attr-defined]
        return f"the main thread waits for threads: {_format_stack(frame)}"
    return f"the exit handler {frames[-1].f_code.co_qualname}: {_format_stack(frame)}"


def _format_stack(frame: FrameType | None) -> str:
    """Return the innermost frames of a stack."""
    lines: list[str] = []
    while frame is not None and len(lines) < MAX_FRAMES and frame.f_code is not exit_process.__code__:
        code = frame.f_code
        lines.append(f"{code.co_name} ({'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno})")
        frame = frame.f_back
    return " in ".join(lines) or "no Python code"

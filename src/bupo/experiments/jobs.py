"""Runs as child processes of their public commands: finished ones are kept, several go side by side, each has a log."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bupo.experiments.experiment import CommandRun
from bupo.run_files.reading import DamagedFileError, read_json, read_text
from bupo.utils.errors import UserError
from bupo.utils.files import append_text, make_folder, refuse_links, remove_path, write_json

TERMINATION_TIMEOUT = 60.0  # seconds that a child has to end after SIGTERM: it may write a checkpoint
POLL_INTERVAL = 0.1
RECORD_INTERVAL = 30.0  # seconds between two notes of how long a run has taken, which a kill would lose
_PR_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class RunPaths:
    """Where the runs of a scale are kept.

    Attributes:
        root (`Path`): `<output>/<scale>`.
    """

    root: Path

    def get_run_folder(self, name: str) -> Path:
        """Of a run."""
        return self.root / "runs" / name

    def get_log_path(self, name: str) -> Path:
        """What a run has printed."""
        return self.root / "runs" / f"{name}.log"

    def get_record_path(self, name: str) -> Path:
        """What is known of a run: its command line, its digest, its seconds, whether it is finished."""
        return self.root / "runs" / f"{name}.json"

    def get_done_path(self, name: str) -> Path:
        """The digest of a run that has ended elsewhere: printed commands write it last."""
        return self.root / "runs" / f"{name}.done"

    def read_record(self, name: str) -> dict[str, Any]:
        """What `note` holds, or else `mark` says; nothing where both are missing or broken."""
        with suppress(DamagedFileError):
            noted = read_json(self.get_record_path(name), {"digest": str, "finished": bool, "seconds": float})
            return {name: noted[name] for name in ("digest", "finished", "seconds")}
        with suppress(DamagedFileError):
            return {"digest": read_text(self.get_done_path(name)).strip(), "finished": True}
        return {}

    def read_seconds(self, name: str) -> float | None:
        """How long a finished run took here."""
        noted = self.read_record(name)
        return noted.get("seconds") if noted.get("finished") else None


def get_run_state(run: CommandRun, places: RunPaths) -> str:
    """`finished`, `begun` or `to do`.

    Raises:
        UserError: if the folder holds a run of this name by other options: a recipe has changed since.
    """
    noted = places.read_record(run.name)
    if noted and noted.get("digest") != run.compute_digest():
        raise UserError(
            f"{places.get_run_folder(run.name)} was made with other options than today's: choose another output, or --overwrite true"
        )
    if noted.get("finished") and places.get_run_folder(run.name).is_dir():
        return "finished"
    return "begun" if noted else "to do"


def remove_stale_run(run: CommandRun, places: RunPaths) -> None:
    """Delete a run that was made with other options."""
    noted = places.read_record(run.name)
    if noted and noted.get("digest") != run.compute_digest():
        for path in (places.get_run_folder, places.get_record_path, places.get_log_path, places.get_done_path):
            remove_path(path(run.name))


@dataclass
class _RunningProcess:
    run: CommandRun
    process: subprocess.Popen
    started: float
    earlier_seconds: float  # seconds of earlier attempts
    last_recorded: float = 0.0  # when its seconds were last written


class JobScheduler:
    """Runs children, several at once.

    Args:
        places ([`RunPaths`]): of the runs.
        jobs (`int`): children at once.
        say (`Callable`): is told what begins, ends and fails.
        on_finished (`Callable`): is given each finished run.
    """

    def __init__(
        self, places: RunPaths, jobs: int, say: Callable[[str], None], on_finished: Callable[[CommandRun], None]
    ):
        self.paths, self.max_processes, self.print_line, self.on_finished = places, jobs, say, on_finished
        self.failed: dict[str, str] = {}
        self.result_errors: list[UserError] = []
        self._children: list[_RunningProcess] = []

    def execute(self, runs: Sequence[CommandRun]) -> None:
        """Run all that are not finished; what one needs comes first. A run that fails stops only those that need it.

        Raises:
            UserError: at the end, if a run has failed, or `on_finished` has raised one.
        """
        waiting, done = list(runs), set()
        try:
            while waiting or self._children:
                self._skip_dependents(waiting)
                for run in [run for run in waiting if not run.needs or run.needs.name in done]:
                    if len(self._children) >= self.max_processes:
                        break
                    waiting.remove(run)
                    if get_run_state(run, self.paths) == "finished":
                        done.add(run.name)
                        self._report_finished(run)
                    else:
                        self._children.append(self._start(run))
                for child in [child for child in self._children if child.process.poll() is not None]:
                    self._children.remove(child)
                    if self._handle_exit(child):
                        done.add(child.run.name)
                        self._report_finished(child.run)
                self._wait()
        finally:
            self._stop()
        if self.failed:
            name, why = next(iter(self.failed.items()))
            more = f" ({len(self.failed)} runs in all)" if len(self.failed) > 1 else ""
            raise UserError(f"run {name} failed{more}: {why}; its log is {self.paths.get_log_path(name)}")
        if self.result_errors:
            raise self.result_errors[0]

    def _report_finished(self, run: CommandRun) -> None:
        """Tell of a finished run. What cannot be made of it stops no other run."""
        try:
            self.on_finished(run)
        except UserError as error:
            self.print_line(f"not made: {error}")
            self.result_errors.append(error)

    def _wait(self) -> None:
        for child in self._children:
            if time.monotonic() - child.last_recorded > RECORD_INTERVAL:
                self._record(child, finished=False)
        if self._children:
            time.sleep(POLL_INTERVAL)

    def _skip_dependents(self, waiting: list[CommandRun]) -> None:
        """Leave out what needs a run that has failed."""
        for run in [run for run in waiting if run.needs and run.needs.name in self.failed]:
            waiting.remove(run)
            self.failed[run.name] = "it needs a run that has failed"

    def _start(self, run: CommandRun) -> _RunningProcess:
        before = float(self.paths.read_record(run.name).get("seconds", 0.0))
        self.print_line(f"{'goes on' if before else 'begins'}: {run.name}")
        make_folder(self.paths.get_log_path(run.name).parent, self.paths.root)
        refuse_links(self.paths.get_run_folder(run.name), self.paths.root)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.max_processes))}
        append_text(self.paths.get_log_path(run.name), "")  # refused where it is a link or a pipe
        with self.paths.get_log_path(run.name).open("a") as log:
            process = subprocess.Popen(
                run.get_arguments(self.paths.get_run_folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=threads | os.environ,
                start_new_session=True, preexec_fn=_terminate_with_parent,
            )  # fmt: skip
        child = _RunningProcess(run, process, time.monotonic(), before)
        self._record(child, finished=False)
        return child

    def _handle_exit(self, child: _RunningProcess) -> bool:
        """Whether it has ended well; else why is kept."""
        name, status = child.run.name, child.process.returncode
        self._record(child, finished=status == 0)
        if status == 0:
            self.print_line(f"done in {time.monotonic() - child.started:.0f} s: {name}")
            return True
        lines = self.paths.get_log_path(name).read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it has printed nothing")
        self.failed[name] = f"exit status {status}, {last.removeprefix('bupo: error: ')}"
        self.print_line(f"failed: {name}: {self.failed[name]}")
        return False

    def _record(self, child: _RunningProcess, finished: bool) -> None:
        child.last_recorded = time.monotonic()
        noted = {
            "digest": child.run.compute_digest(),
            "finished": finished,
            "seconds": child.earlier_seconds + time.monotonic() - child.started,
            "command": child.run.format_command(self.paths.get_run_folder),
        }
        write_json(self.paths.get_record_path(child.run.name), noted)

    def _stop(self) -> None:
        """End the children that are left, each with the time to write a checkpoint."""
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(TERMINATION_TIMEOUT)
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)  # and what it has started: it leads a session of its own
            child.process.wait()
            self._record(child, finished=False)
        self._children = []


def _terminate_with_parent() -> None:
    """In a child on Linux: it is told to end when its parent is killed, so that the next attempt finds its folder free."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

"""Scheduler of runs as child processes of the public commands, with logs, resumption and several runs in parallel.

It replaces make and Snakemake because make decides by file times, not by a run's options, and Snakemake deletes the output of
an interrupted job, from which a training resumes here.
"""

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

TERMINATION_TIMEOUT = 60.0  # seconds from SIGTERM to SIGKILL: a child may write a checkpoint
POLL_INTERVAL = 0.1
RECORD_INTERVAL = 30.0  # seconds between two writes of a run's duration: a kill loses no more
_PR_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class RunPaths:
    """Paths of the runs of a scale.

    Attributes:
        root (`Path`): `<output>/<scale>`.
    """

    root: Path

    def get_run_folder(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.root / "runs" / name

    def get_log_path(self, name: str) -> Path:
        """Return the file of a run's output."""
        return self.root / "runs" / f"{name}.log"

    def get_record_path(self, name: str) -> Path:
        """Return the file of a run's record: command line, digest, seconds and completion."""
        return self.root / "runs" / f"{name}.json"

    def get_done_path(self, name: str) -> Path:
        """Return the file with the digest of a run that was finished elsewhere. Printed commands write it last."""
        return self.root / "runs" / f"{name}.done"

    def read_record(self, name: str) -> dict[str, Any]:
        """Return the record of a run, or one from its done file, or an empty mapping if both are missing or damaged."""
        with suppress(DamagedFileError):
            record = read_json(self.get_record_path(name), {"digest": str, "finished": bool, "seconds": float})
            return {key: record[key] for key in ("digest", "finished", "seconds")}
        with suppress(DamagedFileError):
            return {"digest": read_text(self.get_done_path(name)).strip(), "finished": True}
        return {}

    def read_seconds(self, name: str) -> float | None:
        """Return the seconds of a finished run, or None if they are unknown."""
        record = self.read_record(name)
        return record.get("seconds") if record.get("finished") else None


def get_run_state(run: CommandRun, paths: RunPaths) -> str:
    """Return `finished`, `begun` or `to do`.

    Raises:
        UserError: if the folder holds a run with other options, for example because a recipe has changed.
    """
    record, folder = paths.read_record(run.name), paths.get_run_folder(run.name)
    if record and record.get("digest") != run.compute_digest():
        raise UserError(f"{folder} was made with other options: choose another output, or --overwrite true")
    if record.get("finished") and folder.is_dir():
        return "finished"
    return "begun" if record else "to do"


def remove_stale_run(run: CommandRun, paths: RunPaths) -> None:
    """Delete a run that was made with other options."""
    record = paths.read_record(run.name)
    if record and record.get("digest") != run.compute_digest():
        for get_path in (paths.get_run_folder, paths.get_record_path, paths.get_log_path, paths.get_done_path):
            remove_path(get_path(run.name))


@dataclass
class _RunningProcess:
    run: CommandRun
    process: subprocess.Popen
    started: float  # by the monotonic clock
    earlier_seconds: float  # of earlier attempts
    last_recorded: float = 0.0  # time of the last write of its seconds


class JobScheduler:
    """Scheduler of runs as child processes, several in parallel.

    Args:
        paths ([`RunPaths`]): of the runs.
        jobs (`int`): maximum number of child processes.
        print_line (`Callable`): called with a line when a run starts, ends or fails.
        on_finished (`Callable`): called with each finished run.
    """

    def __init__(
        self,
        paths: RunPaths,
        jobs: int,
        print_line: Callable[[str], None],
        on_finished: Callable[[CommandRun], None],
    ):
        self.paths, self.max_processes, self.print_line, self.on_finished = paths, jobs, print_line, on_finished
        self.failed: dict[str, str] = {}
        self.result_errors: list[UserError] = []
        self._children: list[_RunningProcess] = []

    def execute(self, runs: Sequence[CommandRun]) -> None:
        """Run all unfinished runs, each after the run that it needs. A failed run stops only the runs that need it.

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
            name, reason = next(iter(self.failed.items()))
            count = f" ({len(self.failed)} runs in all)" if len(self.failed) > 1 else ""
            raise UserError(f"run {name} failed{count}: {reason}; its log is {self.paths.get_log_path(name)}")
        if self.result_errors:
            raise self.result_errors[0]

    def _report_finished(self, run: CommandRun) -> None:
        """Call `on_finished`. An error in it is raised at the end and stops no other run."""
        try:
            self.on_finished(run)
        except UserError as error:
            self.print_line(f"result not written: {error}")
            self.result_errors.append(error)

    def _wait(self) -> None:
        for child in self._children:
            if time.monotonic() - child.last_recorded > RECORD_INTERVAL:
                self._record(child, finished=False)
        if self._children:
            time.sleep(POLL_INTERVAL)

    def _skip_dependents(self, waiting: list[CommandRun]) -> None:
        """Skip the runs that need a failed run."""
        for run in [run for run in waiting if run.needs and run.needs.name in self.failed]:
            waiting.remove(run)
            self.failed[run.name] = "it needs a run that has failed"

    def _start(self, run: CommandRun) -> _RunningProcess:
        earlier_seconds = float(self.paths.read_record(run.name).get("seconds", 0.0))
        self.print_line(f"{'resumed' if earlier_seconds else 'started'}: {run.name}")
        log_path = self.paths.get_log_path(run.name)
        make_folder(log_path.parent, self.paths.root)
        refuse_links(self.paths.get_run_folder(run.name), self.paths.root)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.max_processes))}
        append_text(log_path, "")  # raises for a link or a pipe
        with log_path.open("a") as log:
            process = subprocess.Popen(
                run.get_arguments(self.paths.get_run_folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=threads | os.environ,
                start_new_session=True,
                preexec_fn=_terminate_with_parent,
            )
        child = _RunningProcess(run, process, time.monotonic(), earlier_seconds)
        self._record(child, finished=False)
        return child

    def _handle_exit(self, child: _RunningProcess) -> bool:
        """Record a child's end and return True if it succeeded. Store the reason of a failure."""
        name, status = child.run.name, child.process.returncode
        self._record(child, finished=status == 0)
        if status == 0:
            self.print_line(f"done in {time.monotonic() - child.started:.0f} s: {name}")
            return True
        lines = self.paths.get_log_path(name).read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "its log is empty")
        self.failed[name] = f"exit status {status}, {last.removeprefix('bupo: error: ')}"
        self.print_line(f"failed: {name}: {self.failed[name]}")
        return False

    def _record(self, child: _RunningProcess, finished: bool) -> None:
        child.last_recorded = time.monotonic()
        record = {
            "digest": child.run.compute_digest(),
            "finished": finished,
            "seconds": child.earlier_seconds + time.monotonic() - child.started,
            "command": child.run.format_command(self.paths.get_run_folder),
        }
        write_json(self.paths.get_record_path(child.run.name), record)

    def _stop(self) -> None:
        """Terminate the running children, with time to write a checkpoint."""
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(TERMINATION_TIMEOUT)
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)  # with its own children: it leads a session
            child.process.wait()
            self._record(child, finished=False)
        self._children = []


def _terminate_with_parent() -> None:
    """Have Linux send SIGTERM to this child when its parent is killed, so that the next attempt finds its folder unlocked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

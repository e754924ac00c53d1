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

    def folder(self, name: str) -> Path:
        """Of a run."""
        return self.root / "runs" / name

    def log(self, name: str) -> Path:
        """What a run has printed."""
        return self.root / "runs" / f"{name}.log"

    def note(self, name: str) -> Path:
        """What is known of a run: its command line, its digest, its seconds, whether it is finished."""
        return self.root / "runs" / f"{name}.json"

    def mark(self, name: str) -> Path:
        """The digest of a run that has ended elsewhere: printed commands write it last."""
        return self.root / "runs" / f"{name}.done"

    def noted(self, name: str) -> dict[str, Any]:
        """What `note` holds, or else `mark` says; nothing where both are missing or broken."""
        with suppress(DamagedFileError):
            noted = read_json(self.note(name), {"digest": str, "finished": bool, "seconds": float})
            return {name: noted[name] for name in ("digest", "finished", "seconds")}
        with suppress(DamagedFileError):
            return {"digest": read_text(self.mark(name)).strip(), "finished": True}
        return {}

    def seconds(self, name: str) -> float | None:
        """How long a finished run took here."""
        noted = self.noted(name)
        return noted.get("seconds") if noted.get("finished") else None


def get_run_state(run: CommandRun, places: RunPaths) -> str:
    """`finished`, `begun` or `to do`.

    Raises:
        UserError: if the folder holds a run of this name by other options: a recipe has changed since.
    """
    noted = places.noted(run.name)
    if noted and noted.get("digest") != run.digest():
        raise UserError(
            f"{places.folder(run.name)} was made with other options than today's: choose another output, or --overwrite true"
        )
    if noted.get("finished") and places.folder(run.name).is_dir():
        return "finished"
    return "begun" if noted else "to do"


def remove_stale_run(run: CommandRun, places: RunPaths) -> None:
    """Delete a run that was made with other options."""
    noted = places.noted(run.name)
    if noted and noted.get("digest") != run.digest():
        for path in (places.folder, places.note, places.log, places.mark):
            remove_path(path(run.name))


@dataclass
class _RunningProcess:
    run: CommandRun
    process: subprocess.Popen
    started: float
    before: float  # seconds of earlier attempts
    noted: float = 0.0  # when its seconds were last written


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
        self.places, self.jobs, self.say, self.on_finished = places, jobs, say, on_finished
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
                    if len(self._children) >= self.jobs:
                        break
                    waiting.remove(run)
                    if get_run_state(run, self.places) == "finished":
                        done.add(run.name)
                        self._report_finished(run)
                    else:
                        self._children.append(self._start(run))
                for child in [child for child in self._children if child.process.poll() is not None]:
                    self._children.remove(child)
                    if self._ended(child):
                        done.add(child.run.name)
                        self._report_finished(child.run)
                self._wait()
        finally:
            self._stop()
        if self.failed:
            name, why = next(iter(self.failed.items()))
            more = f" ({len(self.failed)} runs in all)" if len(self.failed) > 1 else ""
            raise UserError(f"run {name} failed{more}: {why}; its log is {self.places.log(name)}")
        if self.result_errors:
            raise self.result_errors[0]

    def _report_finished(self, run: CommandRun) -> None:
        """Tell of a finished run. What cannot be made of it stops no other run."""
        try:
            self.on_finished(run)
        except UserError as error:
            self.say(f"not made: {error}")
            self.result_errors.append(error)

    def _wait(self) -> None:
        for child in self._children:
            if time.monotonic() - child.noted > RECORD_INTERVAL:
                self._note(child, finished=False)
        if self._children:
            time.sleep(POLL_INTERVAL)

    def _skip_dependents(self, waiting: list[CommandRun]) -> None:
        """Leave out what needs a run that has failed."""
        for run in [run for run in waiting if run.needs and run.needs.name in self.failed]:
            waiting.remove(run)
            self.failed[run.name] = "it needs a run that has failed"

    def _start(self, run: CommandRun) -> _RunningProcess:
        before = float(self.places.noted(run.name).get("seconds", 0.0))
        self.say(f"{'goes on' if before else 'begins'}: {run.name}")
        make_folder(self.places.log(run.name).parent, self.places.root)
        refuse_links(self.places.folder(run.name), self.places.root)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        append_text(self.places.log(run.name), "")  # refused where it is a link or a pipe
        with self.places.log(run.name).open("a") as log:
            process = subprocess.Popen(
                run.words(self.places.folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=threads | os.environ,
                start_new_session=True, preexec_fn=_terminate_with_parent,
            )  # fmt: skip
        child = _RunningProcess(run, process, time.monotonic(), before)
        self._note(child, finished=False)
        return child

    def _ended(self, child: _RunningProcess) -> bool:
        """Whether it has ended well; else why is kept."""
        name, status = child.run.name, child.process.returncode
        self._note(child, finished=status == 0)
        if status == 0:
            self.say(f"done in {time.monotonic() - child.started:.0f} s: {name}")
            return True
        lines = self.places.log(name).read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it has printed nothing")
        self.failed[name] = f"exit status {status}, {last.removeprefix('bupo: error: ')}"
        self.say(f"failed: {name}: {self.failed[name]}")
        return False

    def _note(self, child: _RunningProcess, finished: bool) -> None:
        child.noted = time.monotonic()
        noted = {
            "digest": child.run.digest(),
            "finished": finished,
            "seconds": child.before + time.monotonic() - child.started,
            "command": child.run.line(self.places.folder),
        }
        write_json(self.places.note(child.run.name), noted)

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
            self._note(child, finished=False)
        self._children = []


def _terminate_with_parent() -> None:
    """In a child on Linux: it is told to end when its parent is killed, so that the next attempt finds its folder free."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

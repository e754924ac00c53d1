"""Grading with math-verify in worker processes that can be killed.

math-verify sets its own time limit with signals. These work in the main thread only, and some expressions hang where Python
does not handle signals. Therefore each answer is graded in a worker process, which is killed and replaced when it misses the
deadline.
"""

import importlib.machinery
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, NamedTuple

from bupo.rewards import grader_worker
from bupo.rewards.answers.equality import is_empty_gold
from bupo.rewards.answers.extraction import extract_final_answer, find_later_answer
from bupo.utils.errors import UserError
from bupo.utils.signals import blocked_signals


class Verdict(StrEnum):
    """The verdict on an answer. Only `correct` earns a reward; the others are counted separately.

    - `unevaluated` (strict verdicts only): equal to the gold answer, but not worked out, such as the sum of the question.
    - `unparsable`: there is no final answer, or it cannot be parsed in the gold answer's class.
    - `no_gold`: the gold answer is empty. For math-verify's own verdict: it holds no expression that math-verify can parse.
    - `timeout`: the worker missed the deadline or died.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNEVALUATED = "unevaluated"
    UNPARSABLE = "unparsable"
    NO_GOLD = "no_gold"
    TIMEOUT = "timeout"


class Grade(NamedTuple):
    """The two verdicts on an answer.

    Attributes:
        verdict ([`Verdict`]): math-verify's own verdict, `verify(parse(gold), parse(answer))`; never `unevaluated`.
        value (`str`, *optional*): the text of the final answer, cut at 200 characters, or None.
        strict ([`Verdict`]): the verdict for the reward: the final answer is compared within the gold answer's class.
        reason (`str`, *optional*): the reason for the strict verdict `unparsable`: empty, no box or final answer, unclosed box,
            empty box, unfinished thinking, the answer is taken back, several answers, not readable.
    """

    verdict: Verdict
    value: str | None
    strict: Verdict
    reason: str | None = None


_INTEGER = re.compile(r"-?[0-9]{1,300}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*|[0-9]{1,3})")  # longer numbers with a leading zero are codes
_BOXED_INTEGER = re.compile(r"\\boxed\{(-?[0-9]{1,300})\}")
_MAX_INLINE_LENGTH = 50_000  # characters; a longer answer is searched in a worker, which can be killed
_END_OF_SENTENCE = re.compile(r"[\s$*.!)\]\\]*")
_MATH_VERIFY_CUES = re.compile(r"(?i)final answer|fbox|%|percent|pct")
_POLL_SECONDS = 0.5  # of one wait for a worker
_STARTUP_TIMEOUT = 120  # seconds; importing sympy is slow on a busy machine
_WORKER_LIBRARIES = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4", "reasoning_gym")


def _grade_integers(answer: str, gold: str) -> Grade | None:
    """Grade an answer without a worker if it and the gold answer are plain integers, else return None.

    The function also returns None if math-verify may extract something other than the box: text behind "final answer", which it
    prefers to an earlier box, and percentages.
    """
    if (
        len(answer) > _MAX_INLINE_LENGTH
        or answer.count("\\boxed") != 1
        or not _INTEGER.fullmatch(gold.strip())
        or not _NUMBER.fullmatch(gold.strip())
    ):
        return None
    boxed = _BOXED_INTEGER.search(answer)
    if boxed is None or (_MATH_VERIFY_CUES.search(answer) and not _is_box_final(answer, boxed)):
        return None
    verdict = Verdict.CORRECT if int(boxed[1]) == int(gold) else Verdict.WRONG
    if find_later_answer(answer) is not None:
        return None
    text, reason = extract_final_answer(answer)
    if text is None:
        return Grade(verdict, None, Verdict.UNPARSABLE, reason)
    return Grade(verdict, text[:200], verdict) if text == boxed[1] else None


def _is_box_final(answer: str, boxed: re.Match) -> bool:
    """Return whether only the end of a formula or sentence follows the box."""
    if "fbox" in answer or "hope" in answer.lower():
        return False
    return _END_OF_SENTENCE.fullmatch(answer, boxed.end()) is not None


def _get_worker_command() -> list[str]:
    """Return the command of a worker: this Python without the working directory, `PYTHON*` variables and user start-up files.

    Folders of absolute import paths that hold the worker's libraries (for example from `PYTHONPATH`) are passed as arguments,
    but never the working directory.
    """
    try:
        working_dir = os.path.realpath(os.getcwd())
    except OSError:  # it has been deleted
        working_dir = ""
    paths = [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) != working_dir]
    specs = [importlib.machinery.PathFinder.find_spec(name, paths) for name in _WORKER_LIBRARIES]
    packages = [path for spec in specs if spec for path in spec.submodule_search_locations or ()]
    library_dirs = dict.fromkeys(str(Path(path).parent) for path in packages)
    return [sys.executable, "-I", str(Path(grader_worker.__file__).resolve()), *library_dirs]


def _get_worker_environment() -> dict[str, str]:
    """Return the environment variables that Python needs to start, without tokens and settings."""
    names = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
    return {name: os.environ[name] for name in names if name in os.environ} | {"OMP_NUM_THREADS": "1"}


class _Deadline:
    """A time limit that does not count the time in which this process is stopped or the machine sleeps.

    Args:
        seconds (`float`): the time limit.
    """

    def __init__(self, seconds: float):
        self.remaining, self._last = seconds, time.monotonic()

    def wait(self, pipe: IO[bytes], event: int) -> bool:
        """Wait until a pipe can be read or written, at most until the deadline; return whether it can."""
        poll = select.poll()
        poll.register(pipe, event)
        while True:
            if poll.poll(1000 * max(0.0, min(self.remaining, _POLL_SECONDS))):
                return True
            if self.remaining <= 0:
                return False
            current = time.monotonic()
            # a longer wait means that the process was stopped
            self.remaining -= min(current - self._last, 2 * _POLL_SECONDS)
            self._last = current


class _WorkerProcess:
    """One worker process and its pipes. It does not receive Ctrl-C, so that a run can finish and save its current update."""

    @blocked_signals()
    def __init__(self):
        self.num_requests = 0
        self.warmed_up_tasks: set[str] = set()
        options: dict[str, Any] = {
            "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL,
            "env": _get_worker_environment(), "cwd": "/", "start_new_session": True,
        }  # fmt: skip
        try:
            self.process = subprocess.Popen(_get_worker_command(), **options)
        except OSError as error:  # no memory, or too many processes
            raise UserError(f"the grading process cannot start: {error}") from error
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)  # a request may be longer than the pipe holds
        ready = self._read_reply(_Deadline(_STARTUP_TIMEOUT))
        if ready is None or "error" in ready:
            try:
                cause = f"it ended with status {self.process.wait(0.5)}"
            except subprocess.TimeoutExpired:
                cause = f"no reply within {_STARTUP_TIMEOUT} s"
            self.kill()
            raise UserError(f"the grading process cannot start: {(ready or {}).get('error', cause)}")

    def grade(self, answer: str, gold: str, deadline: float, problem: str | None = None) -> Grade | None:
        """Return the worker's grade, or None if it missed the deadline, died or sent an invalid reply."""
        task = json.loads(problem)["task"] if problem else None
        if task and task not in self.warmed_up_tasks:
            self._send_request({"problem": problem, "deadline": _STARTUP_TIMEOUT})
            self.warmed_up_tasks.add(task)
        reply = self._send_request({"answer": answer, "gold": gold, "problem": problem, "deadline": deadline})
        try:
            return Grade(Verdict(reply["verdict"]), reply["value"], Verdict(reply["strict"]), reply.get("reason"))
        except (KeyError, ValueError):
            return None

    def _send_request(self, request_fields: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the reply, which is empty after a missed deadline or an invalid reply."""
        self.num_requests += 1
        request = memoryview(json.dumps({"number": self.num_requests, **request_fields}).encode() + b"\n")
        deadline = _Deadline(request_fields["deadline"])
        try:
            while request:
                if not deadline.wait(self.requests, select.POLLOUT):
                    return {}
                request = request[os.write(self.requests.fileno(), request) :]
        except BrokenPipeError:
            return {}
        reply = self._read_reply(deadline) or {}
        return reply if reply.get("number") == self.num_requests else {}

    def _read_reply(self, deadline: _Deadline) -> dict | None:
        line = b""
        while not line.endswith(b"\n"):
            chunk = os.read(self.replies.fileno(), 65536) if deadline.wait(self.replies, select.POLLIN) else b""
            if not chunk:
                return None
            line += chunk
        try:
            reply = json.loads(line)
        except ValueError:  # an answer made the worker write something else
            return None
        return reply if isinstance(reply, dict) else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close_pipes()

    def close_pipes(self) -> None:
        """Close the pipes. The worker ends once no process holds them."""
        self.replies.close()
        self.requests.close()


class MathGrader:
    """A pool of worker processes that grade answers against gold answers, with a deadline for each answer.

    The workers start with the first answers that need them, and end with [`close`] or with this process.

    Args:
        deadline (`float`, *optional*, defaults to `5.0`): seconds for an answer.
        processes (`int`, *optional*): number of workers, by default the number of cores, at most 8.
    """

    def __init__(self, deadline: float = 5.0, processes: int | None = None):
        self.deadline = deadline
        self._free: queue.SimpleQueue[_WorkerProcess | None] = queue.SimpleQueue()  # None: not started
        self.processes = processes or min(8, os.cpu_count() or 1)
        for _ in range(self.processes):
            self._free.put(None)
        self._workers: set[_WorkerProcess] = set()
        _graders.add(self)

    def grade(
        self, answers: Sequence[str], golds: Sequence[str], problems: Sequence[str | None] | None = None
    ) -> list[Verdict]:
        """Return the strict verdict on each answer; see [`get_grades`]."""
        return [grade.strict for grade in self.get_grades(answers, golds, problems)]

    def get_grades(
        self, answers: Sequence[str], golds: Sequence[str], problems: Sequence[str | None] | None = None
    ) -> list[Grade]:
        """Return the grade of each answer.

        Args:
            answers, golds (`list[str]`): completions and gold answers.
            problems (`list[str | None]`, *optional*): references of problems whose task has a scorer, which then decides both
                verdicts ([`bupo.rewards.task_scorers`]).

        Raises:
            UserError: if the lengths differ.
        """
        problems = [None] * len(answers) if problems is None else problems
        if len(answers) != len(golds):
            raise UserError(
                f"there are {len(answers)} answers and {len(golds)} gold answers: pass one gold answer for each"
            )
        grades: list[Grade | None] = [
            None if problem else _grade_integers(answer, gold)
            for answer, gold, problem in zip(answers, golds, problems, strict=True)
        ]
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index, grade in enumerate(grades):
            if grade is None:
                waiting.put(index)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not errors:
                    index = waiting.get_nowait()
                    grades[index] = self._grade_one(answers[index], golds[index], problems[index])
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(min(self.processes, waiting.qsize()))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # each wait in `work` has a deadline
        if errors:
            raise errors[0]
        return grades  # type: ignore[return-value]

    def _grade_one(self, answer: str, gold: str, problem: str | None) -> Grade:
        worker, grade = self._free.get(), None
        try:
            if worker is None:
                self._workers.add(worker := _WorkerProcess())
            grade = worker.grade(answer, gold, self.deadline, problem)
        finally:
            if grade is None and worker is not None:
                self._workers.discard(worker)
                worker.kill()
                worker = None
            self._free.put(worker)
        return grade or Grade(Verdict.TIMEOUT, None, Verdict.TIMEOUT)

    def group_equal_answers(self, answers: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """Group equal answers to each problem by the strict comparison. Answers with the same text are always equal.

        Args:
            answers (`list[list[str | None]]`): final answers of each problem, such as `Grade.value`.

        Returns:
            `list[list[int | None]]`: the number of each answer's group, from 0 for each problem. None for None.
        """
        groups: list[dict[str, int]] = [{} for _ in answers]  # group of each text, by problem
        ungrouped = [list(dict.fromkeys(text for text in texts if text is not None)) for texts in answers]
        while any(ungrouped):
            pairs = []
            for problem, texts in enumerate(ungrouped):
                if texts:
                    first = texts.pop(0)
                    groups[problem][first] = len(set(groups[problem].values()))
                    pairs += [(problem, first, text) for text in texts]
            verdicts = self.grade([f"\\boxed{{{text}}}" for _, _, text in pairs], [first for _, first, _ in pairs])
            for (problem, first, text), verdict in zip(pairs, verdicts, strict=True):
                if verdict == Verdict.CORRECT:
                    groups[problem][text] = groups[problem][first]
                    ungrouped[problem].remove(text)
        return [
            [None if text is None else group_by_text[text] for text in texts]
            for group_by_text, texts in zip(groups, answers, strict=True)
        ]

    def close(self) -> None:
        """End the workers."""
        for _ in range(self.processes):
            worker = self._free.get()
            if worker is not None:
                self._workers.discard(worker)
                worker.kill()
            self._free.put(None)

    def reset_after_fork(self) -> None:
        """Use new workers in a forked process. Workers of the parent would outlive it if this process held their pipes."""
        for worker in self._workers:
            worker.close_pipes()
        self._workers = set()
        self._free = queue.SimpleQueue()
        for _ in range(self.processes):
            self._free.put(None)


_graders: weakref.WeakSet[MathGrader] = weakref.WeakSet()


def _reset_graders_after_fork() -> None:
    for grader in _graders:
        grader.reset_after_fork()


os.register_at_fork(after_in_child=_reset_graders_after_fork)


def check_gold_answers(golds: Sequence[str], where: str) -> None:
    """Refuse empty gold answers, with which no answer earns a reward.

    Raises:
        UserError: naming the first such row.
    """
    for row, gold in enumerate(golds):
        if len(gold) < 1000 and is_empty_gold(gold):
            raise UserError(
                f"{where}, row {row}: the gold answer {gold!r} is no answer: give the problem one, or leave it out"
            )

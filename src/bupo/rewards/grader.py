"""math-verify in child processes that can be killed.

math-verify stops itself with signals, which work in a main thread only, and an expression can hang where no signal is
looked at. So each answer is graded in a child process, and a child that misses the deadline is killed and replaced.
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

from bupo.errors import UserError
from bupo.rewards import worker
from bupo.signals import unheard


class Verdict(StrEnum):
    """What became of an answer. Only `correct` earns a reward; the others are counted apart.

    `unevaluated`, of strict verdicts: equal to the gold answer, but the question again, such as the sum that was to be done.
    `no_gold`: the gold answer holds no expression that math-verify can read.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNEVALUATED = "unevaluated"
    UNPARSABLE = "unparsable"
    NO_GOLD = "no_gold"
    TIMEOUT = "timeout"


class Grade(NamedTuple):
    """What math-verify and we make of an answer.

    Attributes:
        verdict ([`Verdict`]): of `verify(parse(gold), parse(answer))`, math-verify's own; never `unevaluated`.
        value (`str`, *optional*): what math-verify takes the answer for, as text, for majority votes.
        strict ([`Verdict`]): the reward's, after spellings that math-verify misreads have been rewritten.
    """

    verdict: Verdict
    value: str | None
    strict: Verdict


_INTEGER = re.compile(r"-?[0-9]{1,300}")
_BOXED_INTEGER = re.compile(r"\\boxed\{(-?[0-9]{1,300})\}")
_CLOSING = re.compile(r"[\s$*.!)\]\\]*")
_NEAR_BOX = re.compile(r"(?i)final answer|fbox|%|percent|pct")
_SLICE = 0.5  # seconds of one wait for a child
_START_SECONDS = 120  # importing sympy on a busy machine
_LIBRARIES = ("math_verify", "latex2sympy2_extended", "sympy", "mpmath", "antlr4")  # what the worker imports


def _integer_grade(answer: str, gold: str) -> Grade | None:
    """The grade where both are plain integers, which needs no algebra; None otherwise, and where math-verify may look
    elsewhere: at what follows "final answer", which goes before a box that ends earlier, and at percentages.
    """
    if answer.count("\\boxed") != 1 or not _INTEGER.fullmatch(gold.strip()):
        return None
    boxed = _BOXED_INTEGER.search(answer)
    if boxed is None or (_NEAR_BOX.search(answer) and not _is_final(answer, boxed)):
        return None
    verdict = Verdict.CORRECT if int(boxed[1]) == int(gold) else Verdict.WRONG
    return Grade(verdict, str(int(boxed[1])), verdict)


def _is_final(answer: str, boxed: re.Match) -> bool:
    """Whether nothing but the end of a formula or sentence follows the box."""
    return "fbox" not in answer and "hope" not in answer.lower() and bool(_CLOSING.fullmatch(answer, boxed.end()))


def _command() -> list[str]:
    """The worker: this Python without the working folder, `PYTHON*` variables and the user's own start-up files.

    A library that is found on this process' absolute path only (a folder of `PYTHONPATH`, say) is looked for there, too, but
    never in the working folder.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was deleted meanwhile
        here = ""
    safe = [place for place in sys.path if os.path.isabs(place) and os.path.realpath(place) != here]
    found = [importlib.machinery.PathFinder.find_spec(name, safe) for name in _LIBRARIES]
    packages = [place for spec in found if spec for place in spec.submodule_search_locations or ()]
    places = dict.fromkeys(str(Path(place).parent) for place in packages)
    return [sys.executable, "-I", str(Path(worker.__file__).resolve()), *places]


def _environment() -> dict[str, str]:
    """What Python needs to start, and no more: no token, no setting."""
    kept = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"OMP_NUM_THREADS": "1"}


class _Deadline:
    """A number of seconds in which this process ran: one that is stopped, or its machine asleep, uses none of them.

    Args:
        seconds (`float`): until it has passed.
    """

    def __init__(self, seconds: float):
        self.left, self._last = seconds, time.monotonic()

    def wait(self, pipe: IO[bytes], event: int) -> bool:
        """Wait until a pipe can be read or written, at most until the deadline; return whether it can."""
        poll = select.poll()
        poll.register(pipe, event)
        while True:
            if poll.poll(1000 * max(0.0, min(self.left, _SLICE))):
                return True
            if self.left <= 0:
                return False
            now = time.monotonic()
            self.left -= min(now - self._last, 2 * _SLICE)  # a longer wait than that has not been ours
            self._last = now


class _Child:
    """One worker process and its pipe. Ctrl-C is not for it: the update that it grades for is finished and saved."""

    @unheard()  # the run that it grades for decides what is finished
    def __init__(self):
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self.asked = 0
        alone: dict[str, Any] = {"env": _environment(), "cwd": "/", "start_new_session": True}
        try:
            self.process = subprocess.Popen(_command(), stdin=pipe, stdout=pipe, stderr=nowhere, **alone)
        except OSError as error:  # no memory, or too many processes
            raise UserError(f"the grading process cannot start: {error}") from error
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)  # a request may be longer than the pipe holds
        ready = self._reply(_Deadline(_START_SECONDS))
        if ready is None or "error" in ready:
            try:
                silent = f"it ended with status {self.process.wait(0.5)}"
            except subprocess.TimeoutExpired:
                silent = f"no word in {_START_SECONDS} s"
            self.kill()
            raise UserError(f"the grading process cannot start: {(ready or {}).get('error', silent)}")

    def grade(self, answer: str, gold: str, deadline: float) -> Grade | None:
        """The child's grade, or None if it missed the deadline, died, or says what is no answer to this request."""
        self.asked += 1
        asked = {"number": self.asked, "answer": answer, "gold": gold, "deadline": deadline}
        request = memoryview(json.dumps(asked).encode() + b"\n")
        end = _Deadline(deadline)
        try:
            while request:
                if not end.wait(self.requests, select.POLLOUT):
                    return None
                request = request[os.write(self.requests.fileno(), request) :]
        except BrokenPipeError:
            return None
        reply = self._reply(end) or {}
        try:
            grade = Grade(Verdict(reply["verdict"]), reply["value"], Verdict(reply["strict"]))
        except (KeyError, ValueError):
            return None
        return grade if reply.get("number") == self.asked else None

    def _reply(self, end: _Deadline) -> dict | None:
        line = b""
        while not line.endswith(b"\n"):
            chunk = os.read(self.replies.fileno(), 65536) if end.wait(self.replies, select.POLLIN) else b""
            if not chunk:
                return None
            line += chunk
        try:
            reply = json.loads(line)
        except ValueError:  # it was made to write something else
            return None
        return reply if isinstance(reply, dict) else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.let_go()

    def let_go(self) -> None:
        """Close the pipes. The child ends once nobody holds them."""
        self.replies.close()
        self.requests.close()


class MathGrader:
    """Grades answers against gold answers by math-verify, in child processes with a deadline for each answer.

    Args:
        deadline (`float`, *optional*, defaults to `5.0`): seconds an answer may take.
        processes (`int`, *optional*): number of children, by default the number of cores, at most 8.

    The children start with the first answer that needs one and end with [`close`], or with this process.
    """

    def __init__(self, deadline: float = 5.0, processes: int | None = None):
        self.deadline = deadline
        self._free: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()  # None: not started yet
        self.processes = processes or min(8, os.cpu_count() or 1)
        for _ in range(self.processes):
            self._free.put(None)
        self._children: set[_Child] = set()
        _graders.add(self)

    def grade(self, answers: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """The strict verdict of each answer."""
        return [grade.strict for grade in self.examine(answers, golds)]

    def examine(self, answers: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """The grade of each answer.

        Raises:
            UserError: if the lengths differ.
        """
        if len(answers) != len(golds):
            raise UserError(f"{len(answers)} answers were given with {len(golds)} gold answers: one each is needed")
        grades: list[Grade | None] = [_integer_grade(answer, gold) for answer, gold in zip(answers, golds, strict=True)]
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index, grade in enumerate(grades):
            if grade is None:
                waiting.put(index)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not errors:
                    index = waiting.get_nowait()
                    grades[index] = self._grade_one(answers[index], golds[index])
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(min(self.processes, waiting.qsize()))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # ends: every wait inside has a deadline
        if errors:
            raise errors[0]
        return grades  # type: ignore[return-value]

    def _grade_one(self, answer: str, gold: str) -> Grade:
        child, grade = self._free.get(), None
        try:
            if child is None:
                self._children.add(child := _Child())
            grade = child.grade(answer, gold, self.deadline)
        finally:
            if grade is None and child is not None:
                self._children.discard(child)
                child.kill()
                child = None
            self._free.put(child)
        return grade or Grade(Verdict.TIMEOUT, None, Verdict.TIMEOUT)

    def close(self) -> None:
        """End the children."""
        for _ in range(self.processes):
            child = self._free.get()
            if child is not None:
                self._children.discard(child)
                child.kill()
            self._free.put(None)

    def after_fork(self) -> None:
        """In a forked process: leave the children to the parent, whose end they would else outlive, and start others."""
        for child in self._children:
            child.let_go()
        self._children = set()
        self._free = queue.SimpleQueue()
        for _ in range(self.processes):
            self._free.put(None)


_graders: weakref.WeakSet[MathGrader] = weakref.WeakSet()


def _in_child() -> None:
    for grader in _graders:
        grader.after_fork()


os.register_at_fork(after_in_child=_in_child)


def check_golds(golds: Sequence[str], where: str) -> None:
    """Refuse gold answers that cannot be graded against, before a run gives no reward for hours.

    Raises:
        UserError: with the first such row.
    """
    grader = MathGrader()
    try:
        grades = grader.examine([f"\\boxed{{{gold}}}" for gold in golds], golds)
    finally:
        grader.close()
    for row, (gold, grade) in enumerate(zip(golds, grades, strict=True)):
        if grade.strict == Verdict.NO_GOLD:
            raise UserError(
                f"{where}, row {row}: the gold answer {gold[:80]!r} holds no mathematical expression that math-verify can read"
            )
